"""Tensors on the wire: raw little-endian bytes, and lists of JSON or protobuf values.

Floor 5. Both fronts use it. All arrays are C-contiguous and have the shape that the request states; whether a model
wants that shape is checked later. Raw bytes are never copied on the way in: the array looks into them.

Source: KServe V2 protocol, "Tensor Data Representation"; Triton, docs/protocol/extension_binary_data.md.
"""

from collections.abc import Sequence
from typing import Any

from sardonyx.tensors import Tensor


def from_raw(data: bytes | bytearray | memoryview, *, name: str, datatype: str, shape: Sequence[int]) -> Tensor:
    """A tensor of raw bytes.

    Raises:
        InvalidRequest: unknown datatype, a dimension below 0, a size that is not the shape's, BYTES elements whose
            lengths do not add up.
    """
    raise NotImplementedError


def from_values(values: Any, *, name: str, datatype: str, shape: Sequence[int]) -> Tensor:
    """A tensor of a flat or nested list, row-major, as JSON or protobuf's typed contents carry it.

    Raises:
        InvalidRequest: a value of the wrong type or out of range, more or fewer than the shape says, FP16 and BF16
            (``receiving FP16 data via JSON is not supported. ...``).
    """
    raise NotImplementedError


def to_raw(tensor: Tensor) -> bytes | memoryview:
    """Its raw bytes; a view of the array where the datatype allows."""
    raise NotImplementedError


def to_values(tensor: Tensor) -> list[Any]:
    """Its elements as flat JSON values. BYTES must be UTF-8.

    Raises:
        InvalidRequest: FP16, BF16 (``sending FP16 data via JSON is not supported. ...``), or BYTES that are no UTF-8.
    """
    raise NotImplementedError
