"""BYTES of the protocol as text of ONNX Runtime, and back.

Floor 4. Its Python binding takes and gives text only, so every element is converted: 8192 of them take a millisecond.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from sardonyx.errors import InvalidRequest
from sardonyx.tensors import Tensor

MAX_INLINE = 8192
"""More strings than this are converted in a thread."""


def has_many(tensors: Iterable[Tensor]) -> bool:
    """The strings among them are more than the event loop should convert."""
    return sum(tensor.array.size for tensor in tensors if tensor.datatype == "BYTES") > MAX_INLINE


def to_text(tensor: Tensor) -> tuple[npt.NDArray[Any], int]:
    """BYTES as objects of `str`, and how many bytes they are.

    Raises:
        InvalidRequest: one of them is no UTF-8, so that it cannot reach a model.
    """
    array = np.empty(tensor.array.shape, object)
    flat = array.reshape(-1)
    num_bytes = 0
    try:
        for index, value in enumerate(tensor.array.reshape(-1)):
            num_bytes += len(value)
            flat[index] = value.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(
            f"element {index} of input '{tensor.name}' is not UTF-8; string tensors of ONNX models must be",
            param="inputs",
        ) from None
    return array, num_bytes


def with_bytes(tensor: Tensor) -> Tensor:
    """The same, with objects of `str` encoded where it is BYTES."""
    if tensor.datatype != "BYTES":
        return tensor
    array = np.empty(tensor.array.shape, object)
    flat = array.reshape(-1)
    for index, value in enumerate(tensor.array.reshape(-1)):
        flat[index] = value.encode()
    return Tensor(tensor.name, tensor.datatype, array)
