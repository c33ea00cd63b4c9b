"""gRPC messages in the bytes of a stream: where they begin and end, and how they are compressed.

Floor 5.

Source: gRPC over HTTP/2 (grpc/grpc, doc/PROTOCOL-HTTP2.md), "Length-Prefixed-Message"; doc/compression.md.
"""

import asyncio
import zlib
from collections import deque

from sardonyx.errors import InvalidRequest, PayloadTooLarge, ServeError, UnsupportedFeature

Buffer = bytes | bytearray | memoryview

PREFIX_BYTES = 5
"""Before each message: whether it is compressed, and its length."""
MIN_VIEW_BYTES = 8 << 10
"""Smaller pieces are copied. A view keeps all of what was read at once alive, some 256 KiB."""
MAX_TAIL_BYTES = 64 << 10
MAX_INLINE_BYTES = 64 << 10
"""Messages of more bytes are decompressed in a thread; so many take about 0.2 ms."""
_WINDOW_BITS = {"gzip": 31, "deflate": 15}


class Inbox:
    """Bytes of a stream that nobody has taken yet. Messages are cut out of them when they are asked for."""

    __slots__ = ("_at", "_fault", "_max_bytes", "_needed", "_pieces", "size")

    def __init__(self, max_message_bytes: int) -> None:
        self._max_bytes = max_message_bytes
        self._pieces: deque[Buffer] = deque()
        self._at = 0
        """What of the first piece is gone."""
        self._needed = 0
        """The first message with its prefix; 0 where that has not come."""
        self._fault: ServeError | None = None
        """Of the first message, when the one before it was taken."""
        self.size = 0
        """Bytes that are here."""

    def push(self, data: bytes, begin: int, end: int) -> None:
        """Add a part of what was received.

        Raises:
            PayloadTooLarge: the first message is too large.
            InvalidRequest: it is none.
        """
        size = end - begin
        if size >= MIN_VIEW_BYTES:
            self._pieces.append(memoryview(data)[begin:end])
        elif size:
            # One object for many small pieces: each on its own would take far more memory than its bytes.
            tail = self._pieces[-1] if self._pieces else None
            if type(tail) is bytearray and len(tail) < MAX_TAIL_BYTES:
                tail += data[begin:end]
            else:
                self._pieces.append(bytearray(data[begin:end]))
        self.size += size
        if not self._needed and self._fault is None:
            self._measure()

    @property
    def has_message(self) -> bool:
        return 0 < self._needed <= self.size

    def pop(self) -> tuple[bool, bytes] | None:
        """The first message and whether it is compressed; ``None`` where it is not whole.

        Raises:
            PayloadTooLarge: it is too large.
            InvalidRequest: it is none.
        """
        if self._fault is not None:
            raise self._fault
        if not self.has_message:
            return None
        prefix, message = self._take(PREFIX_BYTES), self._take(self._needed - PREFIX_BYTES)
        self._needed = 0
        try:
            self._measure()
        except ServeError as fault:
            self._fault = fault
        return bool(prefix[0]), message

    def clear(self) -> None:
        self._pieces.clear()
        self._at = self._needed = self.size = 0

    def _measure(self) -> None:
        if self.size < PREFIX_BYTES:
            return
        first = self._pieces[0]
        prefix = bytes(first[self._at : self._at + PREFIX_BYTES])
        for piece in self._pieces:
            if len(prefix) >= PREFIX_BYTES:
                break
            if piece is not first:
                prefix += bytes(piece[: PREFIX_BYTES - len(prefix)])
        length = int.from_bytes(prefix[1:], "big")
        if length > self._max_bytes:
            raise _too_large(self._max_bytes, f"{length:,}")
        if prefix[0] > 1:
            raise InvalidRequest("the message has unknown flags")
        self._needed = PREFIX_BYTES + length

    def _take(self, size: int) -> bytes:
        taken: list[Buffer] = []
        self.size -= size
        while size:
            first = self._pieces[0]
            left = len(first) - self._at
            if left > size:
                part = memoryview(first)[self._at : self._at + size] if size >= MIN_VIEW_BYTES else None
                taken.append(first[self._at : self._at + size] if part is None else bytes(part))
                self._at += size
                break
            taken.append(first[self._at :] if self._at else first)
            self._pieces.popleft()
            self._at = 0
            size -= left
        return bytes(taken[0]) if len(taken) == 1 else b"".join(taken)


async def decompress(data: bytes, encoding: str, max_bytes: int) -> bytes:
    """A compressed message as it was.

    Raises:
        PayloadTooLarge: it is larger than `max_bytes`.
        InvalidRequest: it was compressed in another way.
        UnsupportedFeature: we do not know that way.
    """
    if encoding not in _WINDOW_BITS:
        if encoding == "identity":
            raise InvalidRequest("the message is compressed, and grpc-encoding is missing")
        raise UnsupportedFeature("grpc-encoding must be identity, deflate or gzip")
    inflater = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        message = inflater.decompress(data, min(MAX_INLINE_BYTES, max_bytes + 1))
        if not inflater.eof and len(message) <= max_bytes:
            rest = inflater.unconsumed_tail
            message += await asyncio.to_thread(inflater.decompress, rest, max_bytes + 1 - len(message))
    except zlib.error:
        raise InvalidRequest(f"the message cannot be decompressed as {encoding}") from None
    if len(message) > max_bytes:
        raise _too_large(max_bytes, "more")
    if not inflater.eof:
        raise InvalidRequest(f"the message cannot be decompressed as {encoding}")
    return message


def _too_large(max_bytes: int, size: str) -> PayloadTooLarge:
    return PayloadTooLarge(f"the message is larger than {max_bytes:,} bytes: it has {size}")
