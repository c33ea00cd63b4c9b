"""ModelInfer's messages at the level of their bytes, so that large tensors are not copied more often than needed.

Floor 5. Protobuf copies every ``raw_input_contents`` into memory of its own and hands out another copy; here it parses
what is left of a message without its tensors, and they stay where they came in. The other way, it writes a message
without tensors, behind which they are joined. Knows field numbers and varints; not what a message means.

Microseconds to parse a request of one FP32 tensor and to write a reply of one, on 2 shared cores: `split_request`
and `join_reply` against ``FromString`` and ``SerializeToString`` with the tensor in the message; best of 7 by `timeit`:

    ==========  ==============  ==============
    tensor      protobuf alone  this module
    ==========  ==============  ==============
    64 B        0.7 +   1.5     1.1 +   1.9
    64 KiB      3.3 +  10.1     2.7 +   3.2
    1 MiB        91 + 1,580     3.0 +  36
    4 MiB       606 + 7,040     3.2 + 303
    ==========  ==============  ==============

Behind a whole server, with 4 MiB each way: 72 and 106 calls/s, against 41 and 37 with protobuf alone (two runs of
``h2load -c 4 -m 1 -D 4 --data=FILE -H 'content-type: application/grpc' -H 'te: trailers' .../ModelInfer``).

Source: protobuf, "Encoding" (protobuf.dev/programming-guides/encoding); service.proto of KServe V2.
"""

from collections.abc import Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from sardonyx.errors import InvalidRequest

Buffer = bytes | memoryview

MIN_SPLIT_BYTES = 32 << 10
"""Smaller messages go through protobuf as they are: it is faster there (see the table above)."""
MAX_SPLIT_FIELDS = 256
"""Messages of more fields than that go through protobuf, which walks them faster than Python does."""

_RAW_INPUT = 7 << 3 | 2
"""Tag of ``ModelInferRequest.raw_input_contents``."""
_RAW_OUTPUT = bytes([6 << 3 | 2])
"""Tag of ``ModelInferResponse.raw_output_contents``."""
_INFER_RESPONSE = bytes([2 << 3 | 2])
"""Tag of ``ModelStreamInferResponse.infer_response``."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class RequestParts(NamedTuple):
    """A ``ModelInferRequest``, taken apart."""

    message: pb.ModelInferRequest
    """``raw_input_contents`` must not be read from it."""
    raw_contents: Sequence[Buffer]
    """``raw_input_contents`` in order. Views keep the whole received message alive."""


def split_request(data: bytes) -> RequestParts:
    """Parse a ``ModelInferRequest``; the tensors of a large one are views into `data`.

    Raises:
        InvalidRequest: these are not the bytes of such a message.
    """
    spans = _raw_spans(data) if len(data) >= MIN_SPLIT_BYTES else None
    try:
        if not spans:
            message = pb.ModelInferRequest.FromString(data)
            return RequestParts(message, message.raw_input_contents)
        view = memoryview(data)
        rest, end = [], 0
        for tag_at, _, stop in spans:
            rest.append(view[end:tag_at])
            end = stop
        rest.append(view[end:])
        return RequestParts(
            pb.ModelInferRequest.FromString(b"".join(rest)), [view[begin:stop] for _, begin, stop in spans]
        )
    except DecodeError:
        raise InvalidRequest("the message is not a ModelInferRequest") from None


def join_reply(head: bytes, raw_contents: Sequence[Buffer]) -> bytes:
    """The bytes of a ``ModelInferResponse``.

    Args:
        head: the serialized message without ``raw_output_contents``.
        raw_contents: these.
    """
    return b"".join(_reply_pieces(head, raw_contents))


def join_stream_reply(head: bytes, raw_contents: Sequence[Buffer]) -> bytes:
    """The bytes of a ``ModelStreamInferResponse`` whose ``infer_response`` is what `join_reply` makes."""
    pieces = _reply_pieces(head, raw_contents)
    return b"".join([_INFER_RESPONSE, _varint(sum(map(_size_bytes, pieces))), *pieces])


def _reply_pieces(head: bytes, raw_contents: Sequence[Buffer]) -> list[Buffer]:
    pieces: list[Buffer] = [head]
    for raw in raw_contents:
        pieces += (_RAW_OUTPUT, _varint(_size_bytes(raw)), raw)
    return pieces


def _size_bytes(buffer: Buffer) -> int:
    return buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    low = []
    while value >= 0x80:
        low.append(value & 0x7F | 0x80)
        value >>= 7
    low.append(value)
    return bytes(low)


def _raw_spans(data: bytes) -> list[tuple[int, int, int]] | None:
    """Where each ``raw_input_contents`` has its tag, its first byte and its end.

    ``None`` for anything out of the ordinary (many fields, groups, long tags, what is cut off or malformed): protobuf
    itself then judges the whole message, so that this function need not know its every rule.
    """
    spans: list[tuple[int, int, int]] = []
    position, size = 0, len(data)
    try:
        for _ in range(MAX_SPLIT_FIELDS):
            if position == size:
                return spans
            tag_at, tag = position, data[position]
            kind = tag & 7
            if tag < 8 or tag >= 0x80:
                return None
            position += 1
            if kind == _BYTES:
                length, position = _read_varint(data, position)
                begin = position
                position += length
                if tag == _RAW_INPUT:
                    spans.append((tag_at, begin, position))
            elif kind == _VARINT:
                _, position = _read_varint(data, position)
            elif kind == _FIXED64:
                position += 8
            elif kind == _FIXED32:
                position += 4
            else:
                return None
    except IndexError:
        # Also where a field runs over the end: then there is no next tag.
        return None
    return None


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Value and what follows it. Raises IndexError where it is cut off or longer than any length here can be."""
    value = data[position]
    if value < 0x80:
        return value, position + 1
    value &= 0x7F
    for shift in (7, 14, 21, 28):
        position += 1
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + 1
    raise IndexError
