"""A request's body: read within its limit, decompressed within the same.

Floor 5. The limit holds for the bytes that come, whatever Content-Length says, and for those that they decompress to.
"""

import asyncio
import zlib
from collections.abc import Mapping

from litestar.types import Receive

from sardonyx.errors import InvalidRequest, PayloadTooLarge, RequestAborted, UnsupportedFeature

MAX_SMALL_PIECES = 65_536
"""Triton's limit on chunks. A chunk's bounds do not reach an application, so pieces count that are small as well."""
SMALL_PIECE_BYTES = 1024
"""Below what any network makes of a large body."""
MAX_INLINE_BYTES = 256 * 1024
"""What is decompressed, decoded or encoded on the event loop; it takes about a millisecond. More goes to a thread."""

_WINDOW_BITS = {"gzip": 31, "deflate": 15}
"""zlib's words for the two formats; HTTP's deflate is zlib's format."""


async def read_body(receive: Receive, headers: Mapping[str, str], max_bytes: int) -> bytes:
    """The whole body as it was sent.

    Raises:
        PayloadTooLarge: it is over the limit.
        InvalidRequest: it came in too many tiny pieces.
        RequestAborted: the client left first.
    """
    stated = headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > max_bytes:
        raise over_limit(int(stated), max_bytes)
    message = await receive()
    pieces: list[bytes] = []
    num_bytes = num_small = 0
    while True:
        if message["type"] != "http.request":
            raise RequestAborted("the client left before its request was complete")
        piece = message["body"]
        pieces.append(piece)
        num_bytes += len(piece)
        num_small += 0 < len(piece) < SMALL_PIECE_BYTES
        if num_bytes > max_bytes:
            raise over_limit(num_bytes, max_bytes)
        if num_small > MAX_SMALL_PIECES:
            raise InvalidRequest(
                f"Chunked request body exceeds maximum of {MAX_SMALL_PIECES} non-empty chunks. Send larger ones."
            )
        if not message.get("more_body"):
            return piece if len(pieces) == 1 else b"".join(pieces)
        message = await receive()


async def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """The body without its Content-Encoding. What is large is done in a thread.

    Raises:
        UnsupportedFeature: the encoding is neither gzip nor deflate.
        PayloadTooLarge: it decompresses to more than the limit.
        InvalidRequest: it is not of that encoding.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOW_BITS:
        raise UnsupportedFeature("Unsupported compression type")
    stream = zlib.decompressobj(_WINDOW_BITS[encoding])
    head = _inflate(stream, body, min(max_bytes, MAX_INLINE_BYTES) + 1, encoding)
    if stream.eof or len(head) <= min(max_bytes, MAX_INLINE_BYTES):
        return _whole(stream, head, max_bytes, encoding)
    if len(head) > max_bytes:
        raise over_limit(len(head), max_bytes)
    tail = await asyncio.to_thread(_inflate, stream, stream.unconsumed_tail, max_bytes + 1 - len(head), encoding)
    return _whole(stream, head + tail, max_bytes, encoding)


def over_limit(num_bytes: int, max_bytes: int) -> PayloadTooLarge:
    """The error for a body over the limit."""
    return PayloadTooLarge(
        f"request JSON size or input size of {num_bytes} bytes or more exceeds the maximum allowed input size. "
        f"It exceeds the maximum allowed value of {max_bytes} bytes. Use --http-max-input-size to increase the limit."
    )


def _inflate(stream: "zlib._Decompress", data: bytes, max_bytes: int, encoding: str) -> bytes:
    try:
        return stream.decompress(data, max_bytes)
    except zlib.error:
        raise InvalidRequest(f"the request body is not {encoding} data") from None


def _whole(stream: "zlib._Decompress", body: bytes, max_bytes: int, encoding: str) -> bytes:
    if len(body) > max_bytes:
        raise over_limit(len(body), max_bytes)
    if not stream.eof:
        raise InvalidRequest(f"the request body ends in the middle of its {encoding} data")
    if stream.unused_data:
        raise InvalidRequest(f"the request body has bytes behind its {encoding} data")
    return body


def choose_encoding(accepted: str) -> str | None:
    """The encoding for an answer: gzip, deflate, or ``None`` for none.

    Args:
        accepted: ``Accept-Encoding``; the highest q-value wins, gzip before deflate, and none where it is ranked
            higher than either.

    Source: RFC 9110, section 12.5.3.
    """
    if not accepted:
        return None
    qualities: dict[str, float] = {}
    for item in accepted.lower().split(","):
        name, *parameters = [part.strip() for part in item.split(";")]
        qualities[name] = next((_quality(each[2:]) for each in parameters if each.startswith("q=")), 1.0)
    others = qualities.get("*", 0.0)
    best = max(_WINDOW_BITS, key=lambda name: qualities.get(name, others))
    quality = qualities.get(best, others)
    return best if quality > 0 and quality >= qualities.get("identity", 0.0) else None


def compress(body: bytes, encoding: str) -> bytes:
    """The body in that encoding, at zlib's fastest level."""
    stream = zlib.compressobj(1, zlib.DEFLATED, _WINDOW_BITS[encoding])
    return stream.compress(body) + stream.flush()


def _quality(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0.0 <= value <= 1.0 else 0.0
