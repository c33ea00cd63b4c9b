"""Header blocks of answers, encoded without HPACK's dynamic table, so that they are made once and joined.

Floor 5.

Source: RFC 7541, sections 5 and 6.2.2 (literals without indexing); gRPC over HTTP/2 (grpc/grpc,
doc/PROTOCOL-HTTP2.md), "Responses"; doc/compression.md.
"""

import base64
from collections.abc import Iterable
from urllib.parse import quote_from_bytes

from sardonyx.api.kserve.h2.frames import END_HEADERS, END_STREAM, HEADER, HEADERS

ENCODINGS = ("identity", "deflate", "gzip")
"""Of messages that we read. We write them as they are."""
EMPTY_TABLE = b"\x20"
"""Sets the dynamic table to nothing, which a client must hear at the next block once it allows less than we could use
(RFC 7541, section 4.2)."""

_STATUS_200 = b"\x88"
_SAFE = " !\"#$&'()*+,/:;<=>?@[\\]^`{|}"
"""Printable characters that ``grpc-message`` has as they are, besides letters, digits and ``_.-~``."""

Metadata = Iterable[tuple[str, str | bytes]]


def literal(name: bytes, value: bytes) -> bytes:
    """One field."""
    return b"".join((b"\0", _length(name), name, _length(value), value))


def _length(text: bytes) -> bytes:
    size = len(text)
    if size < 127:
        return bytes((size,))
    size -= 127
    out = bytearray((127,))
    while size >= 128:
        out.append(size & 127 | 128)
        size >>= 7
    out.append(size)
    return bytes(out)


def _trailers(code: int, details: str, metadata: Metadata) -> bytes:
    fields = [literal(b"grpc-status", b"%d" % code)]
    if details:
        # Not `quote`: it takes no bytes that are no text.
        text = quote_from_bytes(details.encode(errors="replace"), safe=_SAFE)
        fields.append(literal(b"grpc-message", text.encode()))
    for name, value in metadata:
        data = base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode("ascii", "replace")
        fields.append(literal(name.encode(), data))
    return b"".join(fields)


INITIAL = b"".join(
    (
        _STATUS_200,
        literal(b"content-type", b"application/grpc"),
        literal(b"grpc-accept-encoding", ",".join(ENCODINGS).encode()),
    )
)
"""What an answer begins with."""
OK_TRAILERS = _trailers(0, "", ())


def trailers(code: int, details: str = "", metadata: Metadata = ()) -> bytes:
    """What an answer ends with: the status."""
    return OK_TRAILERS if code == 0 and not details and not metadata else _trailers(code, details, metadata)


def http_refusal(status: int) -> bytes:
    """The whole answer to what is no gRPC call."""
    return literal(b":status", b"%d" % status)


def _start(flags: int, block: bytes) -> bytes:
    """A HEADERS frame up to its stream."""
    return HEADER.pack(len(block) >> 8, len(block) & 0xFF, HEADERS, flags, 0)[:5]


_INITIAL_START = _start(END_HEADERS, INITIAL)
_OK_START = _start(END_HEADERS | END_STREAM, OK_TRAILERS)


def whole(stream_id: int, message: bytes) -> bytes:
    """The three frames of a unary answer: HEADERS, DATA with one message, trailers."""
    id_bytes, size = stream_id.to_bytes(4, "big"), len(message)
    # DATA has type 0 and no flags here; then comes a message that is not compressed.
    data = b"%b\0\0%b\0%b" % ((size + 5).to_bytes(3, "big"), id_bytes, size.to_bytes(4, "big"))
    return b"".join((_INITIAL_START, id_bytes, INITIAL, data, message, _OK_START, id_bytes, OK_TRAILERS))
