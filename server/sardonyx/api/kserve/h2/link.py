"""The transport below an HTTP/2 connection: writing, signs of life, and the end.

Floor 5. A client that takes nothing is read from no more, and after a while cut off; so is one that says nothing and
does not answer when asked. Knows no frame but PING and GOAWAY.

Source: RFC 9113, sections 6.7, 6.8 and 9.2.1; `asyncio` flow control (docs.python.org, "Transports and Protocols").
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping
from typing import cast

from sardonyx.api.kserve.h2.answers import EMPTY_TABLE
from sardonyx.api.kserve.h2.frames import (
    DEFAULT_FRAME_BYTES,
    DEFAULT_TABLE_BYTES,
    DEFAULT_WINDOW_BYTES,
    HEADER_TABLE_SIZE,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    MAX_WINDOW_BYTES,
    PING,
    ConnectionFault,
    ErrorCode,
    frame,
    goaway,
)
from sardonyx.api.kserve.h2.messages import Buffer

PREFACE_TIMEOUT_S = 10.0
"""For the first bytes."""
KEEPALIVE_INTERVAL_S = 60.0
"""A connection that says nothing for so long is asked for a sign of life."""
KEEPALIVE_TIMEOUT_S = 20.0
CHOKED_TIMEOUT_S = 30.0
"""For a client that takes nothing while something waits to be sent."""
FLUSH_TIMEOUT_S = 5.0
"""For the last bytes of a connection that we close."""
MAX_BUFFERED_BYTES = 1 << 20
"""Of what the system does not take; above that nothing is made or read for this client."""
_ALIVE = b"sardonyx"


class Link(asyncio.Protocol):
    """One accepted connection. What it means is for a subclass to say."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._choked_timer: asyncio.TimerHandle | None = None
        self._queue: deque[asyncio.Future[None]] = deque()
        """Of those with something to send."""
        self._heard_at_s = loop.time()
        self._asked_at_s = 0.0
        self.is_choked = False
        """Too much waits to be sent."""
        self.is_closed = False
        """Nothing is sent or read any more."""
        self.send_window = self.initial_send_window = DEFAULT_WINDOW_BYTES
        """Bytes of DATA that the client takes, in all and on a new stream."""
        self.max_frame_bytes = DEFAULT_FRAME_BYTES
        self.block_prefix = b""
        """What the next header block must begin with."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        encryption = transport.get_extra_info("ssl_object")
        if encryption is not None and encryption.selected_alpn_protocol() != "h2":
            self.close(ErrorCode.INADEQUATE_SECURITY, 0, "negotiate h2 by ALPN")
            return
        self._transport.set_write_buffer_limits(high=MAX_BUFFERED_BYTES)
        self._timer = self._loop.call_later(PREFACE_TIMEOUT_S, self._look)
        self.begin()

    @property
    def has_greeted(self) -> bool:
        """Whether the client has begun to speak HTTP/2."""
        raise NotImplementedError

    def begin(self) -> None:
        """Say the first thing."""
        raise NotImplementedError

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        for timer in (self._timer, self._choked_timer):
            if timer is not None:
                timer.cancel()

    def write(self, data: bytes) -> None:
        transport = self._transport
        if transport is not None and not self.is_closed and not transport.is_closing():
            transport.write(data)

    def write_pieces(self, pieces: Iterable[Buffer]) -> None:
        """Write without joining; large ones are not copied."""
        transport = self._transport
        if transport is not None and not self.is_closed and not transport.is_closing():
            transport.writelines(pieces)
        self.wake()

    def takes_at_once(self, size: int) -> bool:
        """Whether so much DATA can go out as one frame behind a plain header block, now."""
        return (
            size <= self.send_window and size <= self.max_frame_bytes and not self.is_choked and not self.block_prefix
        )

    def take_block_prefix(self) -> bytes:
        prefix, self.block_prefix = self.block_prefix, b""
        return prefix

    def adopt(self, settings: Mapping[int, int]) -> int:
        """Keep to what the client asked for. Returns how much more may be sent on each stream."""
        window = settings.get(INITIAL_WINDOW_SIZE, self.initial_send_window)
        more, self.initial_send_window = window - self.initial_send_window, window
        self.max_frame_bytes = settings.get(MAX_FRAME_SIZE, self.max_frame_bytes)
        if settings.get(HEADER_TABLE_SIZE, DEFAULT_TABLE_BYTES) < DEFAULT_TABLE_BYTES:
            self.block_prefix = EMPTY_TABLE
        return more

    def widen(self, more: int) -> None:
        """Send more on all streams together.

        Raises:
            ConnectionFault: that is no number that a window may grow by.
        """
        if not more:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a window must grow")
        if self.send_window + more > MAX_WINDOW_BYTES:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "the window is too large")
        self.send_window += more
        self.wake()

    async def room(self) -> None:
        """Wait until something can be sent, behind those who wait already."""
        turn = self._loop.create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.wake()
            raise

    def wake(self) -> None:
        """Give the turn to who waits longest, if there is room. Who had it calls this again."""
        while self._queue and self.send_window > 0 and not self.is_choked:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def pause_writing(self) -> None:
        self.is_choked = True
        self._choked_timer = self._loop.call_later(CHOKED_TIMEOUT_S, self.abort)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self.is_choked = False
        if self._choked_timer is not None:
            self._choked_timer.cancel()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
        self.wake()

    def close(self, code: ErrorCode, last_stream_id: int, reason: str = "") -> None:
        """Say why, flush and close."""
        if self.is_closed or self._transport is None:
            return
        self.write(goaway(last_stream_id, code, reason))
        self.is_closed = True
        self._transport.close()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(FLUSH_TIMEOUT_S, self.abort)

    def abort(self) -> None:
        """Cut it off."""
        self.is_closed = True
        if self._transport is not None:
            self._transport.abort()

    def _look(self) -> None:
        """At whether the client is there."""
        now_s = self._loop.time()
        wait_s = self._heard_at_s + KEEPALIVE_INTERVAL_S - now_s
        if not self.has_greeted or self._asked_at_s > self._heard_at_s:
            self.abort()
            return
        if wait_s <= 0:
            self._asked_at_s = now_s
            self.write(frame(PING, 0, 0, _ALIVE))
            wait_s = KEEPALIVE_TIMEOUT_S
        self._timer = self._loop.call_later(wait_s, self._look)
