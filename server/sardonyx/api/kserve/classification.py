"""The classification extension: an output's likeliest classes in place of its values.

Floor 5.

Source: Triton, docs/protocol/extension_classification.md.
"""

import asyncio
from collections.abc import Callable, Mapping

import numpy as np

from sardonyx.errors import InvalidRequest
from sardonyx.tensors import Tensor

MAX_INLINE_VALUES = 8192
"""More are ranked in a thread."""


async def with_classes(
    outputs: list[Tensor], num_classes: Mapping[str, int], labels: Callable[[str], list[str]], *, is_batching: bool
) -> list[Tensor]:
    """The outputs, those that `num_classes` names as `classify` makes them. Raises what it raises.

    Args:
        labels: class names of an output.
    """
    answered = []
    for tensor in outputs:
        if wanted := num_classes.get(tensor.name):
            given = (tensor, wanted, labels(tensor.name))
            if tensor.array.size > MAX_INLINE_VALUES:
                tensor = await asyncio.to_thread(classify, *given, is_batching=is_batching)
            else:
                tensor = classify(*given, is_batching=is_batching)
        answered.append(tensor)
    return answered


def classify(tensor: Tensor, num_classes: int, labels: list[str], *, is_batching: bool) -> Tensor:
    """The highest values of each batch element, highest first, as ``value:index`` or ``value:index:label``.

    Args:
        tensor: of numbers; with batch axis where `is_batching`.
        num_classes: how many; fewer where there are fewer.
        labels: by index; may be shorter.
        is_batching: axis 0 is the batch's.

    Returns:
        BYTES, ``(B, n)`` or ``(n,)``.

    Raises:
        InvalidRequest: strings, BF16 and the like cannot be ranked.
    """
    array = tensor.array
    if tensor.datatype in {"BYTES", "BF16", "BOOL"}:
        raise InvalidRequest(
            f"class result not available for output '{tensor.name}' due to unsupported type '{tensor.datatype}'",
            param="outputs",
        )
    rows = array.reshape(array.shape[0] if is_batching else 1, -1)
    num_kept = min(num_classes, rows.shape[1])
    # Stable on the negated order, so that equal values come lowest index first. Unsigned types cannot be negated.
    order = np.argsort(rows[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :num_kept]
    order = rows.shape[1] - 1 - order
    result = np.empty((rows.shape[0], num_kept), object)
    for row, indexes in enumerate(order):
        for position, index in enumerate(indexes):
            value = rows[row, index]
            number = f"{value:.6f}" if np.issubdtype(rows.dtype, np.floating) else str(value)
            label = f":{labels[index]}" if index < len(labels) else ""
            result[row, position] = f"{number}:{index}{label}".encode()
    return Tensor(tensor.name, "BYTES", result if is_batching else result[0])
