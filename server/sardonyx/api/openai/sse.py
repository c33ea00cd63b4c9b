"""A generation or a transcription as server-sent events.

Floor 5. Every token of every stream passes here, so a frame is put together from bytes that were encoded once for the
stream and the little that is new; Litestar's own classes would split, join and re-encode each one.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from litestar import Response
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send

from sardonyx.api.disconnect import while_connected
from sardonyx.api.openai.errors import encode_error
from sardonyx.api.openai.replies import usage_reply
from sardonyx.errors import RequestAborted, ServeError
from sardonyx.serving.options import Usage

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
PING_INTERVAL_S = 15.0
"""Proxies cut a silent connection after 30 to 60 s; a long prompt in a full queue may take longer than that."""

encode = msgspec.json.Encoder().encode

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Streamable(Protocol[T_co]):
    """What comes piece by piece: a `serving.generation.Generation`, a `serving.tasks.Transcript`."""

    id: str

    def __aiter__(self) -> AsyncIterator[T_co]:
        """Raises ServeErrors."""
        ...

    def abort(self) -> None:
        """End it; synchronous, idempotent."""
        ...


class Frames:
    """What the frames of one stream have in common.

    Args:
        head: the chunk object's fields before ``choices``.
        include_usage: every chunk but the last has ``"usage": null``, as OpenAI's.
        usage: growing counts, to go into every chunk instead (vLLM's ``continuous_usage_stats``).
    """

    def __init__(self, head: dict[str, Any], *, include_usage: bool, usage: Usage | None) -> None:
        self._head = b"data: " + encode(head)[:-1] + b',"choices":['
        self._end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._usage = usage
        self._text_heads: dict[int, bytes] = {}

    def choice(self, choice: bytes) -> bytes:
        """A frame with one choice, given as JSON."""
        return b"".join((self._head, choice, self._end if self._usage is None else self._usage_end(self._usage)))

    def text(self, index: int, before: bytes, text: str, after: bytes) -> bytes:
        """`choice` for a choice that has only text, between JSON that is the same for all choices of the stream."""
        head = self._text_heads.get(index)
        if head is None:
            head = self._text_heads[index] = self._head + b'{"index":%d' % index + before
        end = self._end if self._usage is None else self._usage_end(self._usage)
        return b"".join((head, encode(text), after, end))

    def usage(self, usage: Usage) -> bytes:
        """The frame without choices that closes a stream with ``include_usage``."""
        return self._head + self._usage_end(usage)

    def _usage_end(self, usage: Usage) -> bytes:
        return b'],"usage":' + encode(usage_reply(usage)) + b"}\n\n"


class OpenStream(Generic[T]):
    """A source whose first chunk is there, or whose client has waited long enough to be told that it is coming."""

    def __init__(self, source: Streamable[T]) -> None:
        self.source = source
        self._chunks = aiter(source)
        self._first: asyncio.Future[T] | None = None

    async def wait(self) -> None:
        """Wait for the first chunk, but not too long: until the answer has begun, an error can still have its status.

        Raises:
            ServeError: the source ended before it gave anything.
        """
        first = asyncio.ensure_future(anext(self._chunks))
        try:
            await asyncio.wait({first}, timeout=PING_INTERVAL_S)
            if first.done():
                first.result()
        except StopAsyncIteration:
            return  # it gave nothing, and that is no error: nobody spoke
        except BaseException:
            first.cancel()
            self.source.abort()
            raise
        self._first = first

    async def chunks(self) -> AsyncIterator[T]:
        """The first chunk and all others."""
        if self._first is not None:
            try:
                first = await self._first
            except StopAsyncIteration:
                return
            yield first
        async for chunk in self._chunks:
            yield chunk

    def close(self) -> None:
        """End the source if it has not ended; synchronous."""
        if self._first is not None and not self._first.done():
            self._first.cancel()
        self.source.abort()


class EventStream(Response[bytes], Generic[T]):
    """The answer to a request with ``stream: true``. However it is left, its source ends.

    Args:
        frame: bytes for a chunk, none where there is nothing to tell yet.
        last: frames after the last chunk, before ``[DONE]``.
    """

    def __init__(
        self, stream: OpenStream[T], *, frame: Callable[[T], bytes], last: Callable[[], bytes] = lambda: b""
    ) -> None:
        super().__init__(
            b"",
            status_code=200,
            media_type="text/event-stream",
            # X-Accel-Buffering: nginx would hold tokens back to fill its buffer.
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._parts = (stream, frame, last)

    def to_asgi_response(self, *args: Any, **kwargs: Any) -> ASGIResponse:
        """Litestar's conversion; what other layers would add (cookies, background tasks) we do not use."""
        return _EventStreamResponse(*self._parts, headers=self.headers, media_type=self.media_type)


class _EventStreamResponse(ASGIResponse, Generic[T]):
    _should_set_content_length = False

    def __init__(
        self, stream: OpenStream[T], frame: Callable[[T], bytes], last: Callable[[], bytes], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._stream = stream
        self._frame = frame
        self._last = last
        self._sent_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keeper = asyncio.create_task(self._keep_alive(send))
        try:
            await self.start_response(send)
            await while_connected(receive, self._send_frames(send))
        except RequestAborted:
            logger.debug("%s: the client left its stream", self._stream.source.id)
        finally:
            keeper.cancel()
            self._stream.close()

    async def _send_frames(self, send: Send) -> None:
        frame = self._frame
        try:
            async for chunk in self._stream.chunks():
                if data := frame(chunk):
                    await self._send(send, data)
            data = self._last()
        except Exception as error:
            # The status is long sent; a client that reads only text would take a cut stream for a complete answer.
            if not isinstance(error, ServeError):
                logger.exception("%s failed in its stream", self._stream.source.id)
            data = b"data: " + encode_error(error) + b"\n\n"
        await self._send(send, data + DONE, more_body=False)

    async def _send(self, send: Send, data: bytes, *, more_body: bool = True) -> None:
        self._sent_s = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": more_body})

    async def _keep_alive(self, send: Send) -> None:
        """Send a comment wherever nothing else was sent for a while."""
        while True:
            left_s = self._sent_s + PING_INTERVAL_S - time.monotonic()
            if left_s > 0:
                await asyncio.sleep(left_s)
            else:
                await self._send(send, PING)
