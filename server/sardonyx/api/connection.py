"""uvicorn's HTTP/1.1 connection with the limits that it lacks: a head's size and time, and how long a client may stall.

Floor 5. httptools keeps collecting a header that never ends, and uvicorn waits for ever for a head's end and for a
client that does not read. Each lets anybody, without a key, hold memory, sockets and slots (compare CVE-2025-48956).
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from sardonyx.api.openai.errors import encode_envelope

MAX_HEAD_BYTES = 32 * 1024
"""Request line and headers together."""
MAX_HEADERS = 100
HEAD_TIMEOUT_S = 10.0
"""From the first byte of a head, or the connection's beginning, to the head's end."""
STALL_TIMEOUT_S = 30.0
"""A client that takes so little for so long that its buffers stay full is treated as gone."""


class _HeadTooLarge(Exception):
    """Stops the parser; httptools turns it into an error of its own."""


class HeadWithBody:
    """An answer's transport that sends its head together with what follows in the same turn of the event loop.

    uvicorn writes both by themselves, and the event loop sends each at once: two system calls and two packets for an
    answer of a few hundred bytes. A head that nothing follows leaves with the next turn.
    """

    __slots__ = ("_held", "_is_first", "_loop", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held = b""
        self._is_first = True

    def write(self, data: bytes) -> None:
        """Send, behind a head that is held; or hold the head."""
        if self._is_first:
            self._is_first, self._held = False, data
            self._loop.call_soon(self._flush)
        elif self._held:
            held, self._held = self._held, b""
            self._transport.writelines((held, data))
        else:
            self._transport.write(data)

    def is_closing(self) -> bool:
        """As the transport's."""
        return self._transport.is_closing()

    def close(self) -> None:
        """As the transport's, after the head."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held)


class LimitedHttpProtocol(HttpToolsProtocol):
    """One client connection. For ``uvicorn.Config(http=...)``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_head = True
        self._num_head_bytes = 0
        """Received of a head that is not whole yet."""
        self._num_header_bytes = 0
        self._is_too_large = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._active: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Start waiting for the first head."""
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request that is being answered, too: uvicorn tells only the last of several pipelined ones."""
        self._stop_head_timer()
        self._stop_stall_timer()
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True
            self._active.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More is waiting for the client than it takes."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """It takes it after all."""
        self._stop_stall_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Feed the parser while the head is within its limits."""
        if self._is_in_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        # A whole head may come with megabytes of body behind it; only what is no complete head yet counts.
        if self._is_in_head and self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse_head()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when the parser gives up. Answers with the envelope and closes."""
        if self._is_too_large:
            self._refuse_head()
        else:
            self._refuse(400, "this is not HTTP/1.1")

    def on_message_begin(self) -> None:
        """A head begins, perhaps in the middle of received data."""
        super().on_message_begin()
        self._is_in_head = True
        if self._head_timer is None:
            self._start_head_timer()

    def on_url(self, url: bytes) -> None:
        """Part of the request line."""
        super().on_url(url)
        self._check_head(len(self.url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One whole header."""
        super().on_header(name, value)
        self._num_header_bytes += len(name) + len(value)
        self._check_head(len(self.url) + self._num_header_bytes)

    def on_headers_complete(self) -> None:
        """The head is whole: what follows is bounded by the application."""
        self._is_in_head = False
        self._num_head_bytes = 0
        self._num_header_bytes = 0
        self._stop_head_timer()
        super().on_headers_complete()
        if self.cycle is not None:
            self.cycle.transport = HeadWithBody(self.transport, self.loop)  # type: ignore[assignment]  # all that it uses

    def on_message_complete(self) -> None:
        """The next head may follow."""
        super().on_message_complete()
        self._is_in_head = True

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        super()._start_asgi_task(cycle, app)

    def _check_head(self, num_bytes: int) -> None:
        if num_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._is_too_large = True
            raise _HeadTooLarge

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._on_head_timeout)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _on_head_timeout(self) -> None:
        if self._num_head_bytes:
            self._refuse(408, f"the request's head did not come within {HEAD_TIMEOUT_S:g} s")
        else:
            self.transport.close()

    def _refuse_head(self) -> None:
        self._refuse(431, f"the request's head is over {MAX_HEAD_BYTES:,} bytes or {MAX_HEADERS} headers")

    def _refuse(self, status: int, message: str) -> None:
        """Answer outside of the application, and close."""
        self._stop_head_timer()
        # Behind an answer that is on its way, another one would be taken for a part of it.
        if self._active is None or self._active.response_complete:
            body = encode_envelope(message, type="invalid_request_error")
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
