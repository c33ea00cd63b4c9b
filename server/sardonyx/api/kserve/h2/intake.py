"""What a connection has received and nobody has taken, and how much more its client may send.

Floor 5. One for all streams of a connection. The client is given more room sparsely, and none while enough messages
wait for their methods. Unfinished messages are no reason to wait, for without room they would stay so; they have a
limit instead, above which their calls are refused.

Source: RFC 9113, section 5.2 and 6.9.
"""

from collections.abc import Callable

from sardonyx.api.kserve.h2.frames import ConnectionFault, ErrorCode, window_update

WINDOW_BYTES = 16 << 20
"""What a client may send ahead, on a stream and on a connection: a usual request in one go."""
MAX_WAITING_BYTES = 64 << 20
"""Above that a client whose messages wait is given no more room."""


class Intake:
    """The receiving side of a connection's flow control.

    Args:
        max_message_bytes: of a request.
        write: sends a frame.
    """

    __slots__ = ("_window", "_write", "held_bytes", "max_message_bytes", "num_readable")

    def __init__(self, max_message_bytes: int, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._window = WINDOW_BYTES
        self.max_message_bytes = max_message_bytes
        self.held_bytes = 0
        """Received and not yet taken."""
        self.num_readable = 0
        """Streams with a message that nobody has taken."""

    def charge(self, size: int) -> None:
        """Count the payload of a DATA frame.

        Raises:
            ConnectionFault: there was no room for it.
        """
        self._window -= size
        if self._window < WINDOW_BYTES // 2:
            if self._window < 0:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "the connection's window is exceeded")
            self.credit()

    def credit(self) -> None:
        """Give the client more room where that is due."""
        if self._window < WINDOW_BYTES // 2 and (self.held_bytes < MAX_WAITING_BYTES or not self.num_readable):
            self._write(window_update(0, WINDOW_BYTES - self._window))
            self._window = WINDOW_BYTES

    @property
    def holds_too_much(self) -> bool:
        """Whether unfinished messages take more than one message of any allowed size could."""
        return self.held_bytes > MAX_WAITING_BYTES + self.max_message_bytes
