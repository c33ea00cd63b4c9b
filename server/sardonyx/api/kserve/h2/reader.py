"""Frames in received bytes, however these were cut.

Floor 5. Small frames wait until they are whole; the payload of DATA goes on as it comes, so that large messages are
not gathered twice. Knows where frames begin and end; not what they mean.

Source: RFC 9113, sections 3.4, 4.1, 4.2, 6.1 and 6.10.
"""

from typing import Protocol

from sardonyx.api.kserve.h2.frames import (
    CONTINUATION,
    DATA,
    DEFAULT_FRAME_BYTES,
    END_HEADERS,
    END_STREAM,
    HEADER,
    HEADERS,
    MAX_STREAM_ID,
    PADDED,
    PREFACE,
    SETTINGS,
    ConnectionFault,
    ErrorCode,
    without_padding,
)
from sardonyx.api.kserve.h2.heads import MAX_LIST_BYTES

MAX_DATA_BYTES = 1 << 20
"""Of a DATA frame; we ask for larger ones than usual, because each costs the same."""
MAX_CONTINUATIONS = 16
"""Frames that one header block may be cut into; usual clients cut after 16 KiB, which is our limit for all of it."""


class Body(Protocol):
    """Takes what a stream receives."""

    def receive(self, data: bytes, begin: int, end: int, is_last: bool) -> None:
        """A part of `data`; `is_last` ends the stream's side."""


class FrameTaker(Protocol):
    """What a connection does with frames. Everything may raise `ConnectionFault`."""

    def take_data(self, stream_id: int, size: int, ends_stream: bool) -> Body | None:
        """DATA of so many bytes begins. Returns who takes what is no padding, if anyone does."""

    def take_part(self, body: Body, data: bytes, begin: int, end: int, is_last: bool) -> None:
        """A part of it."""

    def take_headers(self, stream_id: int, block: bytes, ends_stream: bool) -> None:
        """A whole header block."""

    def take_frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """Another whole frame, known or not."""


class FrameReader:
    """Reads what one client sends, beginning with the preface."""

    def __init__(self, taker: FrameTaker) -> None:
        self._taker = taker
        self._rest = b""
        """An unfinished small frame."""
        self._left = 0
        """Bytes of the DATA frame that is being read."""
        self._padding = 0
        """Bytes to pass over after that."""
        self._body: Body | None = None
        self._ends_stream = False
        self._block: bytearray | None = None
        """Of headers, until it is whole."""
        self._block_stream, self._block_ends_stream, self._num_continuations = 0, False, 0
        self.has_preface = False
        """Also whether its SETTINGS came."""

    def feed(self, data: bytes) -> None:
        """Read on.

        Raises:
            ConnectionFault: this is not HTTP/2, or `taker` raised it.
        """
        at = 0
        if self._rest:
            data, self._rest = self._rest + data, b""
        if not self.has_preface:
            at = self._greet(data)
        size = len(data)
        while True:
            if self._left or self._padding:
                at = self._read_on(data, at, size)
            if size - at < HEADER.size:
                break
            high, low, kind, flags, stream_id = HEADER.unpack_from(data, at)
            length, begin = high << 8 | low, at + HEADER.size
            stream_id &= MAX_STREAM_ID
            if self._block is not None and (kind != CONTINUATION or stream_id != self._block_stream):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a header block was interrupted")
            if kind == DATA:
                if (end := self._begin_data(data, begin, length, flags, stream_id)) < 0:
                    break
                at = end
                continue
            if length > DEFAULT_FRAME_BYTES:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "the frame is too large")
            end = begin + length
            if end > size:
                break
            if kind in (HEADERS, CONTINUATION):
                self._read_headers(kind, flags, stream_id, data[begin:end])
            else:
                self._taker.take_frame(kind, flags, stream_id, data[begin:end])
            at = end
        if at < size:
            self._rest = data[at:]

    def _greet(self, data: bytes) -> int:
        """Find the preface, and SETTINGS as the first frame. 0 until they are there."""
        size = len(PREFACE)
        if data[:size] != PREFACE[: len(data)]:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the connection does not begin as HTTP/2")
        if len(data) < size + HEADER.size:
            self._rest = data
            return len(data)
        _, _, kind, flags, _ = HEADER.unpack_from(data, size)
        if kind != SETTINGS or flags:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the first frame must be SETTINGS")
        self.has_preface = True
        return size

    def _begin_data(self, data: bytes, begin: int, length: int, flags: int, stream_id: int) -> int:
        """Begin a DATA frame. Returns what follows as much as was read of it; negative where its start is missing."""
        left = length
        padding = 0
        if flags & PADDED:
            if begin == len(data) and length:
                return -1
            padding = data[begin] if length else 0
            left, begin = length - 1 - padding, begin + 1
            if left < 0:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "padding is longer than its frame")
        if length > MAX_DATA_BYTES:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "the frame is too large")
        ends_stream = bool(flags & END_STREAM)
        body = self._taker.take_data(stream_id, length, ends_stream)
        end = begin + left
        if end <= len(data):
            if body is not None:
                self._taker.take_part(body, data, begin, end, ends_stream)
            self._padding = padding
            return end
        self._left, self._padding, self._body, self._ends_stream = left, padding, body, ends_stream
        return begin

    def _read_on(self, data: bytes, at: int, size: int) -> int:
        if self._left:
            end = min(at + self._left, size)
            self._left -= end - at
            if self._body is not None and end > at:
                self._taker.take_part(self._body, data, at, end, self._ends_stream and not self._left)
            at = end
            if self._left:
                return at
            self._body = None
        skipped = min(self._padding, size - at)
        self._padding -= skipped
        return at + skipped

    def _read_headers(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == HEADERS:
            if not stream_id:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "HEADERS belong to a stream")
            block = without_padding(payload, flags) if flags & ~(END_HEADERS | END_STREAM) else payload
            if flags & END_HEADERS:
                self._taker.take_headers(stream_id, block, bool(flags & END_STREAM))
                return
            self._block, self._num_continuations = bytearray(block), 0
            self._block_stream, self._block_ends_stream = stream_id, bool(flags & END_STREAM)
            return
        if self._block is None:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION continues nothing")
        self._block += payload
        self._num_continuations += 1
        if len(self._block) > MAX_LIST_BYTES or self._num_continuations > MAX_CONTINUATIONS:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "the header block is too large")
        if flags & END_HEADERS:
            block, self._block = bytes(self._block), None
            self._taker.take_headers(stream_id, block, self._block_ends_stream)
