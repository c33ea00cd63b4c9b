"""Tensors as JSON text: the ``data`` of an input or an output.

Floor 5. Numbers never become nested Python lists: a checked document's brackets say nothing that its shape does not,
so they are cut out of the text and one flat typed list is read.
"""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from sardonyx.api.kserve.codec import MAX_ELEMENTS, element_count, from_values, jsonable, number_array, to_values
from sardonyx.api.kserve.json_text import check_containers, has_more
from sardonyx.errors import InvalidRequest
from sardonyx.runtime.dtypes import Datatype
from sardonyx.tensors import Tensor

_INTEGERS = msgspec.json.Decoder(list[int])
_FLOATS = msgspec.json.Decoder(list[float])
_BOOLEANS = msgspec.json.Decoder(list[bool])
_STRINGS = msgspec.json.Decoder(list[str])
_ANYTHING = msgspec.json.Decoder(Any)
_WRONG_COUNT = "Unable to parse 'data': Shape does not match true shape of 'data' field"
_BRACKETS = b"[] \t\r\n"


def from_json(text: bytes | memoryview | msgspec.Raw, *, name: str, datatype: str, shape: Sequence[int]) -> Tensor:
    """A tensor of a flat or nested JSON list.

    Args:
        text: the list, a part of a document that was decoded before: it is known to be JSON, and how deep.
        name: of the input.
        datatype: KServe's.
        shape: as the request states it.

    Raises:
        InvalidRequest: as `codec.from_values`.
        PayloadTooLarge: too many lists of strings.
    """
    raw = bytes(text)
    known = jsonable(datatype, name, "receiving", "input")
    count = element_count(shape, name)
    # Each list may have a comma more than elements; so many are never those of the shape, and need not be read.
    if has_more(raw, b",", count + raw.count(b"[")):
        raise InvalidRequest(_WRONG_COUNT, param=name)
    values = _read_flat(raw, known)
    if values is None:
        check_containers(raw)
        try:
            generic = _ANYTHING.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):  # a number over every range, text that is no UTF-8
            raise InvalidRequest(f"Unable to parse 'data' of input '{name}': invalid value", param=name) from None
        return from_values(generic, name=name, datatype=datatype, shape=shape)
    if known.name == "BYTES":
        return from_values(values, name=name, datatype=datatype, shape=shape)
    if count * known.array.itemsize > MAX_ELEMENTS:
        raise InvalidRequest(f"byte size overflow for input '{name}'", param=name)
    if count != len(values):
        raise InvalidRequest(_WRONG_COUNT, param=name)
    return Tensor(name, datatype, number_array(values, known, name, shape))


def to_json(tensor: Tensor) -> bytes:
    """Its elements as a flat JSON list; floats that are not finite as ``NaN`` and ``Infinity``, as Triton writes them.

    Raises:
        InvalidRequest: as `codec.to_values`.
    """
    return encode_values(to_values(tensor), tensor)


def encode_values(values: Any, tensor: Tensor) -> bytes:
    """JSON of values that were taken from `tensor`."""
    if tensor.array.dtype.kind == "f" and not np.isfinite(tensor.array).all():
        return json.dumps(values, separators=(",", ":")).encode()
    return msgspec.json.encode(values)


def _read_flat(raw: bytes, known: Datatype) -> list[Any] | None:
    """The elements, if the text is a list that holds nothing but elements of the datatype's kind."""
    if raw[:1] != b"[":
        return None
    try:
        if known.name == "BYTES":
            return _STRINGS.decode(raw)
        decoder = _BOOLEANS if known.name == "BOOL" else _FLOATS if known.array.kind == "f" else _INTEGERS
        return decoder.decode(b"[" + raw.translate(None, _BRACKETS) + b"]")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
