"""What a client's SETTINGS ask of us.

Floor 5.

Source: RFC 9113, section 6.5.
"""

import struct

from sardonyx.api.kserve.h2.frames import (
    DEFAULT_FRAME_BYTES,
    ENABLE_PUSH,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    MAX_WINDOW_BYTES,
    ConnectionFault,
    ErrorCode,
)

_SETTING = struct.Struct(">HI")
_MAX_FRAME_BYTES = (1 << 24) - 1


def read_settings(payload: bytes) -> dict[int, int]:
    """The values by their numbers, the last of each; unknown ones too, which mean nothing.

    Raises:
        ConnectionFault: a value is out of its range.
    """
    if len(payload) % _SETTING.size:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS have 6 bytes each")
    values: dict[int, int] = {}
    for number, value in _SETTING.iter_unpack(payload):
        if number == ENABLE_PUSH and value > 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "ENABLE_PUSH is 0 or 1")
        if number == INITIAL_WINDOW_SIZE and value > MAX_WINDOW_BYTES:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "the window is too large")
        if number == MAX_FRAME_SIZE and not DEFAULT_FRAME_BYTES <= value <= _MAX_FRAME_BYTES:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the frame size is out of its range")
        values[number] = value
    return values
