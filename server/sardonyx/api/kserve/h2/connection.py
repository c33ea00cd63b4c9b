"""One HTTP/2 connection of a client: what it may send, in which order, how much of it, and who gets it.

Floor 5. Every breach of the protocol ends the connection, or the one stream, with the code that RFC 9113 names for it.
What a client can do as often as it likes costs it a budget.

Source: RFC 9113; CVE-2023-44487 (rapid reset), CVE-2019-9512 to 9518 (floods).
"""

import asyncio
import logging
from collections.abc import Callable
from typing import cast

import grpc

from sardonyx.api.kserve.grpc_routes import Routes
from sardonyx.api.kserve.h2 import frames
from sardonyx.api.kserve.h2.answers import trailers
from sardonyx.api.kserve.h2.budget import CHATTER, RESETS, Budget
from sardonyx.api.kserve.h2.call import Call
from sardonyx.api.kserve.h2.client_settings import read_settings
from sardonyx.api.kserve.h2.frames import MAX_STREAM_ID, MAX_WINDOW_BYTES, ConnectionFault, ErrorCode, StreamFault
from sardonyx.api.kserve.h2.heads import MAX_LIST_BYTES, HeadReader
from sardonyx.api.kserve.h2.intake import WINDOW_BYTES, Intake
from sardonyx.api.kserve.h2.link import Link
from sardonyx.api.kserve.h2.reader import MAX_DATA_BYTES, Body, FrameReader
from sardonyx.api.kserve.h2.stream import Stream
from sardonyx.api.kserve.h2.streams import Streams
from sardonyx.errors import ModelNotReady

logger = logging.getLogger(__name__)

MAX_CALLS = 1024
"""Of one connection at once. Clients keep further ones to themselves until earlier ones have ended."""
DRAIN_TIMEOUT_S = 1.0
"""For a client to hear that it should begin nothing more."""
_DRAINING = b"draining"

_UNKNOWN_METHOD = trailers(grpc.StatusCode.UNIMPLEMENTED.value[0], "Method not found!")
_FIRST_FRAMES = frames.settings(
    {
        frames.MAX_CONCURRENT_STREAMS: MAX_CALLS,
        frames.INITIAL_WINDOW_SIZE: WINDOW_BYTES,
        frames.MAX_FRAME_SIZE: MAX_DATA_BYTES,
        frames.MAX_HEADER_LIST_SIZE: MAX_LIST_BYTES,
    }
) + frames.window_update(0, WINDOW_BYTES - frames.DEFAULT_WINDOW_BYTES)


class Connection(Link):
    """One client.

    Args:
        loop: runs everything here.
        routes: pick the methods.
        max_message_bytes: of a request.
        made: told when it has begun.
        lost: told when it is gone.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        routes: Routes,
        max_message_bytes: int,
        made: "Callable[[Connection], None]",
        lost: "Callable[[Connection], None]",
    ) -> None:
        super().__init__(loop)
        self._routes = routes
        self._made = made
        self._lost = lost
        self._reader = FrameReader(self)
        self._heads = HeadReader()
        self._streams = Streams()
        self._intake = Intake(max_message_bytes, self.write)
        self._chatter, self._resets = Budget(*CHATTER, loop.time()), Budget(*RESETS, loop.time())
        self.tasks: set[asyncio.Task[None]] = set()
        """Running calls, including those whose clients left."""

    # The transport's side.

    @property
    def has_greeted(self) -> bool:
        return self._reader.has_preface

    def begin(self) -> None:
        self.write(_FIRST_FRAMES)
        self._made(self)

    def data_received(self, data: bytes) -> None:
        if self.is_closed:
            return
        self._heard_at_s = self._loop.time()
        try:
            self._reader.feed(data)
        except ConnectionFault as fault:
            self._fail(fault.code, fault.reason)
        except Exception:
            logger.exception("a gRPC connection failed")
            self._fail(ErrorCode.INTERNAL_ERROR, "internal error")

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._drop_all()
        self._lost(self)

    def _fail(self, code: ErrorCode, reason: str) -> None:
        self.close(code, self._streams.last_id, reason)
        self._drop_all()

    def _drop_all(self) -> None:
        for stream in list(self._streams.values()):
            stream.drop()
            stream.call.cancel()

    def drain(self) -> None:
        """Let running calls end and take no more; the client is told first, and has a moment to hear it."""
        if not self.is_closed:
            self.write(frames.goaway(MAX_STREAM_ID, ErrorCode.NO_ERROR))
            self.write(frames.frame(frames.PING, 0, 0, _DRAINING))
            self._loop.call_later(DRAIN_TIMEOUT_S, self._settle)

    def _settle(self) -> None:
        if not self._streams.is_closed:
            self._streams.is_closed = True
            if self._streams:
                self.write(frames.goaway(self._streams.last_id, ErrorCode.NO_ERROR))
            self._close_if_drained()

    def cut_short(self) -> None:
        """End every call now, and the connection."""
        for stream in list(self._streams.values()):
            stream.call.fail(ModelNotReady("the server is shutting down"))
        self.close(ErrorCode.NO_ERROR, self._streams.last_id)

    def _close_if_drained(self) -> None:
        if self._streams.is_closed and not self._streams:
            self.close(ErrorCode.NO_ERROR, self._streams.last_id)

    # The streams' side.

    def spend(self, size: int) -> None:
        """Count DATA that goes out. Clients that are sent some may ask how fast, with a PING each time."""
        self.send_window -= size
        self._chatter.left += 1

    def forget(self, stream_id: int, *, is_sending: bool) -> None:
        """A stream has ended; its client may still be sending."""
        self._streams.end(stream_id, is_sending=is_sending)
        self._close_if_drained()
        self._intake.credit()

    # The client's side: `reader.FrameTaker`.

    def take_headers(self, stream_id: int, block: bytes, ends_stream: bool) -> None:
        head = self._heads.read(block)
        if (stream := self._streams.get(stream_id)) is not None:
            self._take_trailers(stream_id, stream, ends_stream)
            return
        if not self._streams.takes(stream_id):
            return
        if head.is_malformed:
            self._reset(stream_id, ErrorCode.PROTOCOL_ERROR, is_sending=not ends_stream)
            return
        if len(self._streams) >= MAX_CALLS or len(self.tasks) >= MAX_CALLS:
            self._reset(stream_id, ErrorCode.REFUSED_STREAM, is_sending=not ends_stream)
            return
        stream = Stream(self, self._intake, stream_id, head)
        if head.http_status != 200:
            stream.is_half_closed = ends_stream
            stream.refuse(head.http_status)
            return
        handler = self._routes.service(head)
        if handler is None:
            stream.is_half_closed = ends_stream
            stream.end(_UNKNOWN_METHOD)
            return
        stream.call = Call(stream, handler, self.tasks, self._intake.max_message_bytes)
        self._streams[stream_id] = stream
        stream.call.open()
        if ends_stream:
            self._receive(stream_id, stream, b"", 0, 0, True)

    def _take_trailers(self, stream_id: int, stream: Stream, ends_stream: bool) -> None:
        """A second header block ends a request. gRPC has nothing to say in it."""
        if stream.is_half_closed or not ends_stream:
            self._break(stream_id, ErrorCode.STREAM_CLOSED if stream.is_half_closed else ErrorCode.PROTOCOL_ERROR)
        else:
            self._receive(stream_id, stream, b"", 0, 0, True)

    def take_data(self, stream_id: int, size: int, ends_stream: bool) -> Body | None:
        self._intake.charge(size)
        if not size and not ends_stream:
            self._chat()
        stream = self._streams.get(stream_id)
        if stream is None:
            self._take_stray_data(stream_id, ends_stream)
            return None
        if stream.is_half_closed:
            self._break(stream_id, ErrorCode.STREAM_CLOSED)
            return None
        try:
            stream.charge(size)
        except StreamFault as fault:
            self._break(stream_id, fault.code)
            return None
        return stream

    def _take_stray_data(self, stream_id: int, ends_stream: bool) -> None:
        if not self._streams.expects(stream_id, is_last=ends_stream):
            self._chat()
            self.write(frames.rst_stream(stream_id, ErrorCode.STREAM_CLOSED))

    def take_part(self, body: Body, data: bytes, begin: int, end: int, is_last: bool) -> None:
        stream = cast(Stream, body)
        self._receive(stream.id, stream, data, begin, end, is_last)

    def take_frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == frames.WINDOW_UPDATE:
            self._take_window(stream_id, payload)
        elif kind == frames.RST_STREAM:
            self._take_reset(stream_id, payload)
        elif kind == frames.PING:
            self._take_ping(flags, stream_id, payload)
        elif kind == frames.SETTINGS:
            self._take_settings(flags, stream_id, payload)
        elif kind == frames.GOAWAY:
            frames.require(not stream_id, len(payload) >= 8)
            self._settle()
        elif kind == frames.PUSH_PROMISE:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "clients do not push")
        else:
            frames.require(kind != frames.PRIORITY or stream_id > 0, kind != frames.PRIORITY or len(payload) == 5)
            self._chat()

    def _take_window(self, stream_id: int, payload: bytes) -> None:
        frames.require(True, len(payload) == 4)
        more = int.from_bytes(payload, "big") & MAX_WINDOW_BYTES
        if not stream_id:
            self.widen(more)
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            self._streams.expects(stream_id, is_last=False)
        elif not more:
            self._break(stream_id, ErrorCode.PROTOCOL_ERROR)
        elif stream.send_window + more > MAX_WINDOW_BYTES:
            self._break(stream_id, ErrorCode.FLOW_CONTROL_ERROR)
        else:
            stream.widen(more)

    def _take_reset(self, stream_id: int, payload: bytes) -> None:
        frames.require(True, len(payload) == 4)
        stream = self._streams.get(stream_id)
        if stream is None:
            self._streams.expects(stream_id, is_last=True)
            self._chat()
            return
        self._resets.spend(self._loop.time())
        stream.drop()
        stream.call.cancel()

    def _take_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        frames.require(not stream_id, len(payload) == 8)
        self._chat()
        if not flags & frames.ACK:
            self.write(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif payload == _DRAINING:
            self._settle()

    def _take_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        frames.require(not stream_id, not (flags & frames.ACK and payload))
        self._chat()
        if flags & frames.ACK:
            return
        more = self.adopt(read_settings(payload))
        for stream in self._streams.values():
            if stream.send_window + more > MAX_WINDOW_BYTES:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "the window is too large")
            stream.widen(more)
        self.write(frames.frame(frames.SETTINGS, frames.ACK, 0))

    def _chat(self) -> None:
        self._chatter.spend(self._loop.time())

    def _receive(self, stream_id: int, stream: Stream, data: bytes, begin: int, end: int, is_last: bool) -> None:
        try:
            stream.receive(data, begin, end, is_last)
        except StreamFault as fault:
            self._break(stream_id, fault.code)

    def _break(self, stream_id: int, code: ErrorCode) -> None:
        """End a stream whose client broke a rule."""
        stream = self._streams[stream_id]
        self._reset(stream_id, code, is_sending=not stream.is_half_closed)
        stream.drop()
        stream.call.cancel()

    def _reset(self, stream_id: int, code: ErrorCode, *, is_sending: bool) -> None:
        self._chat()
        self.write(frames.rst_stream(stream_id, code))
        self.forget(stream_id, is_sending=is_sending)
