"""The streams of a connection: which are open, which ended a moment ago, which never were.

Floor 5.

Source: RFC 9113, section 5.1 and 5.1.1 (states and numbers of streams), 6.8 (GOAWAY).
"""

from sardonyx.api.kserve.h2.frames import ConnectionFault, ErrorCode
from sardonyx.api.kserve.h2.stream import Stream

MAX_REMEMBERED = 1024


class Streams(dict[int, Stream]):
    """The open ones by number."""

    def __init__(self) -> None:
        super().__init__()
        self.last_id = 0
        """The newest."""
        self.is_closed = False
        """No more are taken: what comes for later ones is for nobody."""
        self._unfinished: dict[int, None] = {}
        """Ended before their client had sent all of them, which it may not know yet; oldest first."""

    def takes(self, stream_id: int) -> bool:
        """Whether a header block may open a stream of this number. Then it is the newest.

        Raises:
            ConnectionFault: it could neither do that nor be on its way to a stream that ended.
        """
        if not stream_id & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "clients have odd streams")
        if stream_id > self.last_id:
            if not self.is_closed:
                self.last_id = stream_id
            return not self.is_closed
        if stream_id not in self._unfinished:
            raise ConnectionFault(ErrorCode.STREAM_CLOSED, "the stream has ended")
        return False

    def end(self, stream_id: int, *, is_sending: bool) -> None:
        """Forget a stream; `is_sending`: its client still sends."""
        self.pop(stream_id, None)
        if is_sending:
            self._unfinished[stream_id] = None
            if len(self._unfinished) > MAX_REMEMBERED:
                del self._unfinished[next(iter(self._unfinished))]

    def expects(self, stream_id: int, *, is_last: bool) -> bool:
        """Whether something may still come for a stream that is not open.

        Raises:
            ConnectionFault: there never was such a stream.
        """
        if stream_id in self._unfinished:
            if is_last:
                del self._unfinished[stream_id]
            return True
        if stream_id & 1 and stream_id > self.last_id and self.is_closed:
            return True
        if not stream_id & 1 or stream_id > self.last_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "there is no such stream")
        return False
