"""HTTP/2 frames: their numbers, and the bytes of those that a server sends by itself.

Floor 5. Knows the layout of frames; not what a connection does about them.

Source: RFC 9113, sections 4.1 (layout), 6 (frame types), 6.5.2 (settings) and 7 (error codes).
"""

import struct
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What every client begins with (section 3.4)."""
HEADER = struct.Struct(">HBBBI")
"""Of a frame: upper 16 and lower 8 bits of the payload's length, type, flags, stream."""

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 5, 6, 7, 8, 9

END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
HAS_PRIORITY = 0x20

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS = 1, 2, 3
INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = 4, 5, 6

DEFAULT_WINDOW_BYTES = 65_535
DEFAULT_FRAME_BYTES = 16_384
DEFAULT_TABLE_BYTES = 4_096
"""Of HPACK's dynamic table."""
MAX_WINDOW_BYTES = MAX_STREAM_ID = (1 << 31) - 1


class ErrorCode(IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12


class ConnectionFault(Exception):
    """The peer broke a rule after which nothing that it sends can be trusted (section 5.4.1)."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class StreamFault(Exception):
    """The peer broke a rule of one stream; the others go on (section 5.4.2)."""

    def __init__(self, code: ErrorCode) -> None:
        super().__init__(code.name)
        self.code = code


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    size = len(payload)
    return HEADER.pack(size >> 8, size & 0xFF, kind, flags, stream_id) + payload


def settings(values: dict[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *each) for each in values.items()))


def window_update(stream_id: int, num_bytes: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream_id, num_bytes.to_bytes(4, "big"))


def rst_stream(stream_id: int, code: ErrorCode) -> bytes:
    return frame(RST_STREAM, 0, stream_id, code.to_bytes(4, "big"))


def goaway(last_stream_id: int, code: ErrorCode, reason: str = "") -> bytes:
    return frame(GOAWAY, 0, 0, struct.pack(">II", last_stream_id, code) + reason.encode())


def require(has_right_stream: bool, has_right_size: bool) -> None:
    """Check what every type of frame prescribes.

    Raises:
        ConnectionFault: one is false.
    """
    if not has_right_stream:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the frame has the wrong stream")
    if not has_right_size:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "the frame has the wrong size")


def without_padding(payload: bytes, flags: int) -> bytes:
    """The payload of a HEADERS frame without its padding and priority (section 6.2).

    Raises:
        ConnectionFault: they are longer than the payload.
    """
    begin, end = 0, len(payload)
    if flags & PADDED:
        end -= payload[0] if payload else 1
        begin = 1
    if flags & HAS_PRIORITY:
        begin += 5
    if begin > end:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "padding is longer than its frame")
    return payload[begin:end]
