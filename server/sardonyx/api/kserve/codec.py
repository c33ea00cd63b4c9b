"""Tensors on the wire: raw little-endian bytes, and lists of JSON or protobuf values.

Floor 5. Both fronts use it. All arrays are C-contiguous and have the shape that the request states; whether a model
wants that shape is checked later. Raw bytes are never copied on the way in: the array looks into them, so it may lie
at an odd address, and nobody can write to it.

Source: KServe V2 protocol, "Tensor Data Representation"; Triton, docs/protocol/extension_binary_data.md.
"""

import math
import struct
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from sardonyx.errors import InvalidRequest
from sardonyx.runtime.dtypes import DATATYPES, Datatype
from sardonyx.tensors import Tensor

MAX_ELEMENTS = (1 << 63) - 1
"""Triton's limit, int64, on elements and on bytes."""
MAX_DIMENSIONS = 64
"""numpy's."""
MAX_DEPTH = 100
"""Of nested lists."""
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Floats that JSON has no numbers for, as strings."""

_LENGTH_BYTES = 4
_PLURAL_KINDS = frozenset((list, tuple))
# What Triton says of a JSON value that is not of the tensor's datatype; clients know these texts.
_WANTED = {"BOOL": "boolean", "BYTES": "string", "FP32": "double", "FP64": "double"}


def from_raw(
    data: bytes | bytearray | memoryview, *, name: str, datatype: str, shape: Sequence[int], model_name: str = ""
) -> Tensor:
    """A tensor of raw bytes.

    Args:
        data: the elements, row-major, little-endian, without padding; BYTES each behind its length in 4 bytes.
        name: of the input.
        datatype: KServe's.
        shape: as the request states it.
        model_name: for messages, where it is known.

    Raises:
        InvalidRequest: unknown datatype, a dimension below 0, a size that is not the shape's, BYTES elements whose
            lengths do not add up.
    """
    known = _datatype(datatype, name)
    count = element_count(shape, name)
    if datatype == "BYTES":
        return Tensor(name, datatype, _object_array(_split_elements(bytes(data), count, name), shape))
    num_bytes = count * known.array.itemsize
    if num_bytes != len(data):
        if num_bytes > MAX_ELEMENTS:
            raise InvalidRequest(f"byte size overflow for input '{name}'", param=name)
        of_model = f" for model '{model_name}'" if model_name else ""
        raise InvalidRequest(
            f"input byte size mismatch for input '{name}'{of_model}. Expected {num_bytes}, got {len(data)}", param=name
        )
    array: npt.NDArray[Any] = np.ndarray(shape, known.array, data)
    if known.name == "BOOL":
        array = _clean_bools(array)
    return Tensor(name, datatype, array)


def from_values(values: Any, *, name: str, datatype: str, shape: Sequence[int]) -> Tensor:
    """A tensor of a flat or nested list, row-major, as JSON or protobuf's typed contents carry it.

    Lists may be nested in any way: only their elements count, in their order. Integers pass for floats, nothing else
    passes for anything; "NaN", "Infinity" and "-Infinity" are floats. BYTES elements are strings or bytes.

    Raises:
        InvalidRequest: a value of the wrong type or out of range, more or fewer than the shape says, FP16 and BF16
            (``receiving FP16 data via JSON is not supported. ...``).
    """
    known = jsonable(datatype, name, "receiving", "input")
    count = element_count(shape, name)
    if count * known.array.itemsize > MAX_ELEMENTS:
        raise InvalidRequest(f"byte size overflow for input '{name}'", param=name)
    flat, kinds = _flatten(values, name)
    if len(flat) != count:
        raise InvalidRequest("Unable to parse 'data': Shape does not match true shape of 'data' field", param=name)
    return Tensor(name, datatype, _array(flat, kinds, known, name, shape))


def to_raw(tensor: Tensor) -> bytes | memoryview:
    """Its raw bytes; a view of the array where the datatype allows."""
    array = tensor.array
    if tensor.datatype == "BYTES":
        return _join_elements(array.reshape(-1).tolist())
    if not array.size:
        return b""
    return np.ascontiguousarray(array).data.cast("B")


def to_values(tensor: Tensor) -> list[Any]:
    """Its elements as flat JSON values. BYTES must be UTF-8. Floats may be NaN or infinite.

    Raises:
        InvalidRequest: FP16, BF16 (``sending FP16 data via JSON is not supported. ...``), or BYTES that are no UTF-8.
    """
    jsonable(tensor.datatype, tensor.name, "sending", "output")
    values: list[Any] = tensor.array.reshape(-1).tolist()
    if tensor.datatype != "BYTES":
        return values
    try:
        return [element.decode() for element in values]
    except UnicodeDecodeError:
        raise InvalidRequest(
            f"output '{tensor.name}' holds bytes that are no UTF-8; ask for it as binary data", param=tensor.name
        ) from None


def element_count(shape: Sequence[int], name: str) -> int:
    """How many elements a tensor of that shape has.

    Raises:
        InvalidRequest: a dimension below 0, too many of them, or more elements than int64 counts.
    """
    if shape and min(shape) < 0:
        raise InvalidRequest(f"shape for input '{name}' contains one or more invalid dimensions", param=name)
    # Before they are multiplied: 80,000 of them take 15 s, in which no thread runs Python.
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidRequest(f"input '{name}' has {len(shape)} dimensions; {MAX_DIMENSIONS} are possible", param=name)
    count = math.prod(shape)
    # Dimensions beside a 0 are bounded as well: numpy cannot hold them.
    if count > MAX_ELEMENTS or (not count and math.prod(filter(None, shape)) > MAX_ELEMENTS >> 4):
        raise InvalidRequest(
            f"shape of input '{name}' causes total element count to exceed maximum size of {MAX_ELEMENTS}", param=name
        )
    return count


def jsonable(datatype: str, name: str, doing: str, side: str) -> Datatype:
    """The datatype, if its values can be written as JSON.

    Raises:
        InvalidRequest: it is unknown, or FP16 or BF16.
    """
    if datatype in ("FP16", "BF16"):
        raise InvalidRequest(
            f"{doing} {datatype} data via JSON is not supported. Please use the binary data format for {side} {name}",
            param=name,
        )
    return _datatype(datatype, name)


def mistyped(datatype: str) -> InvalidRequest:
    """The error for a JSON value that is not of the datatype."""
    wanted = _WANTED.get(datatype) or ("unsigned-integer" if datatype.startswith("U") else "signed-integer")
    return InvalidRequest(f"Unable to parse 'data': attempt to access JSON non-{wanted} as {wanted}")


def number_array(values: list[Any], known: Datatype, name: str, shape: Sequence[int]) -> npt.NDArray[Any]:
    """The array of flat numbers of the right Python type, as many as the shape says.

    Raises:
        InvalidRequest: one of them is out of the datatype's range.
    """
    try:
        # Overflow to infinity is found by whoever looks: only 1e39 and the like as FP32 do.
        with np.errstate(over="raise"):
            return np.array(values, known.array).reshape(shape)
    except (OverflowError, FloatingPointError):
        raise InvalidRequest(f"input '{name}' has a value that is out of range for {known.name}", param=name) from None


def _datatype(datatype: str, name: str) -> Datatype:
    try:
        return DATATYPES[datatype]
    except KeyError:
        raise InvalidRequest(f"'{datatype[:32]}' of tensor '{name}' is no datatype", param=name) from None


def _clean_bools(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Any byte but 0 is true; as a numpy bool it must be 1, since compiled code may count with it."""
    bits = np.frombuffer(array.data, np.uint8) if array.size else array
    return bits.astype(np.bool_).reshape(array.shape) if bits.size and bits.max() > 1 else array


def _flatten(values: Any, name: str) -> tuple[list[Any], set[type]]:
    """All elements in order, and the types among them."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise InvalidRequest("Unable to parse 'data': attempt to access JSON non-array as array", param=name)
    flat = values if isinstance(values, list) else list(values)
    for _ in range(MAX_DEPTH):
        kinds = set(map(type, flat))
        if not kinds & _PLURAL_KINDS:
            return flat, kinds
        flat = list(chain.from_iterable(value if type(value) in _PLURAL_KINDS else (value,) for value in flat))
    raise InvalidRequest(f"JSON nesting depth exceeds maximum allowed limit ({MAX_DEPTH})", param=name)


def _array(values: list[Any], kinds: set[type], known: Datatype, name: str, shape: Sequence[int]) -> npt.NDArray[Any]:
    """The array of flat values, strictly typed."""
    if known.name == "BYTES":
        if not kinds <= {str, bytes}:
            raise mistyped("BYTES")
        try:
            elements = [value.encode() if type(value) is str else value for value in values]
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
            raise InvalidRequest(f"input '{name}' has a string that is not Unicode", param=name) from None
        return _object_array(elements, shape)
    is_float = known.array.kind == "f"
    if is_float and str in kinds:
        values = [NON_FINITE.get(value, value) if type(value) is str else value for value in values]
        kinds = set(map(type, values))
    allowed = {bool} if known.name == "BOOL" else {int, float} if is_float else {int}
    if not kinds <= allowed:
        raise mistyped(known.name)
    return number_array(values, known, name, shape)


def _object_array(elements: list[bytes], shape: Sequence[int]) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


def _split_elements(data: bytes, count: int, name: str) -> list[bytes]:
    """BYTES elements, each behind its length: 4 bytes, little-endian."""
    if count * _LENGTH_BYTES > len(data):
        raise _wrong_count(count, len(data) // _LENGTH_BYTES, name)
    if count > 1 and (elements := _split_equal(data, count)) is not None:
        return elements
    elements = []
    position, end, read_length = 0, len(data), struct.Struct("<I").unpack_from
    while position < end:
        if end - position < _LENGTH_BYTES:
            raise InvalidRequest(
                f"incomplete string length indicator for inference input '{name}', expecting {_LENGTH_BYTES} bytes "
                f"but only {end - position} bytes available",
                param=name,
            )
        start = position + _LENGTH_BYTES
        position = start + read_length(data, position)[0]
        if position > end:
            raise InvalidRequest(
                f"incomplete string data for inference input '{name}', expecting string of length {position - start} "
                f"bytes but only {end - start} bytes available",
                param=name,
            )
        elements.append(data[start:position])
        if len(elements) > count:
            raise InvalidRequest(
                f"unexpected number of string elements {len(elements)} for inference input '{name}', expecting {count}",
                param=name,
            )
    if len(elements) != count:
        raise _wrong_count(count, len(elements), name)
    return elements


def _wrong_count(count: int, found: int, name: str) -> InvalidRequest:
    return InvalidRequest(
        f"expected {count} string elements for inference input '{name}', got {found}",
        param=name,
    )


def _split_equal(data: bytes, count: int) -> list[bytes] | None:
    """BYTES elements that are all equally long, in numpy; ``None`` where they are not."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if not length or count * (_LENGTH_BYTES + length) != len(data):
        return None
    rows = np.frombuffer(data, np.uint8).reshape(count, _LENGTH_BYTES + length)
    if (rows[:, :_LENGTH_BYTES] != rows[0, :_LENGTH_BYTES]).any():
        return None
    elements: list[bytes] = np.ascontiguousarray(rows[:, _LENGTH_BYTES:]).view(f"V{length}").reshape(-1).tolist()
    return elements


def _join_elements(elements: list[bytes]) -> bytes:
    """As `_split_elements` takes them apart."""
    lengths = np.fromiter(map(len, elements), "<u4", len(elements)).tobytes()
    parts = [b""] * (2 * len(elements))
    parts[::2] = [lengths[at : at + _LENGTH_BYTES] for at in range(0, len(lengths), _LENGTH_BYTES)]
    parts[1::2] = elements
    return b"".join(parts)
