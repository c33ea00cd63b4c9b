"""One gRPC call: runs its method and is the context that the method talks to.

Floor 5. Offers of ``grpc.aio.ServicerContext`` what the servicers of `api.kserve` use, and ends a call exactly once: by
its method, its deadline, its client, or the server's stop.

Source: gRPC over HTTP/2 (grpc/grpc, doc/PROTOCOL-HTTP2.md); doc/statuscodes.md.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from sardonyx.api.kserve.grpc_status import log_unforeseen
from sardonyx.api.kserve.h2 import answers
from sardonyx.api.kserve.h2.messages import MessageFault, decompress
from sardonyx.api.kserve.h2.stream import Stream

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

    def finish(self, code: Code, details: str = "", metadata: answers.Metadata = ()) -> None:
        """End the call with a status, unless it has ended; what still runs of it is cancelled by who else calls it."""
        self._stream.end(answers.trailers(code.value[0], details, metadata))
        self._stop_clock()
        if self._task is not None and self._task is not asyncio.current_task():
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
        self.finish(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    # What methods call.

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._stream.head.invocation_metadata

    async def abort(self, code: Code, details: str = "", trailing_metadata: answers.Metadata = ()) -> None:
        """End the call with a status. Always raises ``AbortError``."""
        self._finish_from_within(code, details, trailing_metadata)
        raise grpc.aio.AbortError

    async def read(self) -> Any:
        """The next message, or ``grpc.aio.EOF`` when the client has no more."""
        while (taken := self._stream.take()) is None:
            if self._stream.is_ended:
                raise grpc.aio.UsageError("the call has ended")
            if self._stream.is_half_closed:
                if self._stream.has_rest:
                    raise MessageFault(grpc.StatusCode.INTERNAL, "the last message is cut off")
                return grpc.aio.EOF
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        is_compressed, message = taken
        if is_compressed:
            message = await decompress(message, self._stream.head.encoding, self._max_message_bytes)
        parse = self._handler.request_deserializer
        return message if parse is None else parse(message)

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
            self._finish_from_within(grpc.StatusCode.UNKNOWN)
        except MessageFault as fault:
            self._finish_from_within(fault.code, fault.details)
        except asyncio.CancelledError:
            # Nobody awaits this task, so that nobody needs to be told.
            self._finish_from_within(grpc.StatusCode.CANCELLED, "the call was cancelled")
        except Exception as error:
            log_unforeseen(error)
            self._finish_from_within(grpc.StatusCode.INTERNAL, "internal error")
        else:
            self._finish_from_within(grpc.StatusCode.OK)

    def _finish_from_within(self, code: Code, details: str = "", metadata: answers.Metadata = ()) -> None:
        self._stream.end(answers.trailers(code.value[0], details, metadata))
        self._stop_clock()

    async def _answer_one(self, message: bytes) -> None:
        handler = self._handler
        if handler.response_streaming:
            await handler.unary_stream(handler.request_deserializer(message), self)
            return
        answer: bytes = await handler.unary_unary(message, self)
        if not self._stream.answer(answer) and not self._stream.is_ended:
            await self._stream.send(answer)

    async def _answer_received(self) -> None:
        """The one message is in the stream, whole or not."""
        taken = self._stream.take()
        if taken is None or self._stream.has_rest:
            if taken is None and self._stream.has_rest:
                raise MessageFault(grpc.StatusCode.INTERNAL, "the message is cut off")
            raise MessageFault(grpc.StatusCode.UNIMPLEMENTED, "the method takes exactly one message")
        is_compressed, message = taken
        del taken
        if is_compressed:
            message = await decompress(message, self._stream.head.encoding, self._max_message_bytes)
        await self._answer_one(message)

    async def _answer_many(self) -> None:
        # No service of ours answers many messages with one.
        await self._handler.stream_stream(self, self)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._messages()

    async def _messages(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message
