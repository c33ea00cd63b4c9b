"""One gRPC call: runs its method and is the context that the method talks to.

Floor 5. Offers of ``grpc.aio.ServicerContext`` what the servicers of `api.kserve` use, and ends a call exactly once: by
its method, its deadline, its client, or the server's stop.

Source: gRPC over HTTP/2 (grpc/grpc, doc/PROTOCOL-HTTP2.md); doc/statuscodes.md.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from sardonyx.api.kserve.grpc_status import log_unforeseen, status_of
from sardonyx.api.kserve.h2 import answers
from sardonyx.api.kserve.h2.messages import decompress
from sardonyx.api.kserve.h2.stream import Stream
from sardonyx.errors import DeadlineExceeded, InvalidRequest, ServeError, UnsupportedFeature

Code = Any
"""``grpc.StatusCode``, which is untyped."""


class Call:
    """A call of one method.

    Args:
        stream: carries it.
        handler: of the method, from `grpc_routes`: ``grpc.RpcMethodHandler``.
        tasks: of the connection; the call's is in it as long as it runs.
        max_message_bytes: of a request, decompressed.
    """

    __slots__ = ("_handler", "_max_message_bytes", "_reader", "_stream", "_task", "_tasks", "_timer", "is_streaming")

    def __init__(self, stream: Stream, handler: Any, tasks: "set[asyncio.Task[None]]", max_message_bytes: int) -> None:
        self._stream = stream
        self._handler = handler
        self._tasks = tasks
        self._max_message_bytes = max_message_bytes
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reader: asyncio.Future[None] | None = None
        self.is_streaming: bool = handler.request_streaming
        """Whether it takes any number of messages, and so begins before the first."""

    def open(self) -> None:
        """Start the clock, and a method of many messages."""
        timeout_s = self._stream.head.timeout_s
        if timeout_s is not None:
            self._timer = asyncio.get_running_loop().call_later(timeout_s, self._expire)
        if self.is_streaming:
            self._run(self._answer_many)

    def begin(self, message: bytes) -> None:
        """Answer the one message of a call that has no more."""
        self._run(self._answer_one, message)

    def notice(self) -> None:
        """Something was received."""
        if self.is_streaming:
            if self._reader is not None and not self._reader.done():
                self._reader.set_result(None)
        elif self._stream.is_half_closed:
            self._run(self._answer_received)

    def fail(self, error: ServeError) -> None:
        """End the call from outside of its method, which is cancelled."""
        self._finish(*status_of(error))
        if self._task is not None:
            self._task.cancel()

    def cancel(self) -> None:
        """The client is gone: nothing is to be sent."""
        self._stop_clock()
        if self._task is not None:
            self._task.cancel()

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self.fail(DeadlineExceeded("Deadline Exceeded"))

    # What methods call.

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._stream.head.invocation_metadata

    async def abort(self, code: Code, details: str = "", trailing_metadata: answers.Metadata = ()) -> None:
        """End the call with a status. Always raises ``AbortError``."""
        self._finish(code, details, trailing_metadata)
        raise grpc.aio.AbortError

    async def read(self) -> Any:
        """The next message, or ``grpc.aio.EOF`` when the client has no more.

        Raises:
            InvalidRequest: it is cut off, or cannot be decompressed or parsed.
            PayloadTooLarge: it is too large.
            UnsupportedFeature: it was compressed in a way that we do not know.
        """
        while (taken := self._stream.take()) is None:
            if self._stream.is_ended:
                raise grpc.aio.UsageError("the call has ended")
            if self._stream.is_half_closed:
                if self._stream.has_rest:
                    raise InvalidRequest("the last message is cut off")
                return grpc.aio.EOF
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._parse(await self._decompress(*taken))

    async def write(self, message: Any) -> None:
        """Send a message; back when it is out of our hands, or has no one to take it."""
        if self._stream.is_ended:
            raise grpc.aio.UsageError("the call has ended")
        serialize = self._handler.response_serializer
        await self._stream.send(message if serialize is None else serialize(message))

    # How methods are run.

    def _run(self, work: Callable[..., Awaitable[None]], *arguments: bytes) -> None:
        self._task = task = asyncio.get_running_loop().create_task(self._guard(work, arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(self, work: Callable[..., Awaitable[None]], arguments: tuple[bytes, ...]) -> None:
        # It makes the coroutine itself: a task may be cancelled before it begins.
        try:
            await work(*arguments)
        except grpc.aio.BaseError:
            # It has ended: `abort` did it, or it was in vain.
            self._finish(grpc.StatusCode.UNKNOWN)
        except asyncio.CancelledError:
            # Nobody awaits this task, so that nobody needs to be told.
            self._finish(grpc.StatusCode.CANCELLED, "the call was cancelled")
        except Exception as error:
            log_unforeseen(error)
            self._finish(*status_of(error))
        else:
            self._finish(grpc.StatusCode.OK)

    def _finish(self, code: Code, details: str = "", metadata: answers.Metadata = ()) -> None:
        self._stream.end(answers.trailers(code.value[0], details, metadata))
        self._stop_clock()

    async def _answer_one(self, message: bytes) -> None:
        handler = self._handler
        if handler.response_streaming:
            await handler.unary_stream(self._parse(message), self)
            return
        answer: bytes = await handler.unary_unary(message, self)
        if not self._stream.answer(answer) and not self._stream.is_ended:
            await self._stream.send(answer)

    async def _answer_received(self) -> None:
        """The one message is in the stream, whole or not."""
        taken = self._stream.take()
        if taken is None and self._stream.has_rest:
            raise InvalidRequest("the message is cut off")
        if taken is None or self._stream.has_rest:
            raise UnsupportedFeature("the method takes exactly one message")
        await self._answer_one(await self._decompress(*taken))

    async def _decompress(self, is_compressed: bool, message: bytes) -> bytes:
        if not is_compressed:
            return message
        return await decompress(message, self._stream.head.encoding, self._max_message_bytes)

    def _parse(self, message: bytes) -> Any:
        parse = self._handler.request_deserializer
        try:
            return message if parse is None else parse(message)
        except DecodeError:
            raise InvalidRequest("the message cannot be parsed") from None

    async def _answer_many(self) -> None:
        # No service of ours answers many messages with one.
        await self._handler.stream_stream(self, self)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._messages()

    async def _messages(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message
