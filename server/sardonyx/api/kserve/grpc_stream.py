"""ModelStreamInfer: many requests and their answers over one call.

Floor 5. Requests of a stream run at once. The one answer of each non-decoupled request leaves in the order of the
requests; answers of decoupled ones leave as they come. A refusal is an answer too; it ends the stream only where the
caller asked for that.

Nothing piles up: a stream has at most `MAX_IN_FLIGHT` requests, each holds one answer at most, and no message is read
or answer asked for while the caller does not take what is there.

Source: Triton, server/src/grpc/stream_infer_handler.cc.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
from tritonclient.grpc import service_pb2 as pb

from sardonyx.api.kserve.calls import WireReply, WireRequest
from sardonyx.api.kserve.grpc_lingering import Lingering
from sardonyx.api.kserve.grpc_messages import (
    FINAL,
    MAX_INLINE_BYTES,
    read_request,
    reads_slowly,
    write_reply,
    writes_slowly,
)
from sardonyx.api.kserve.grpc_status import abort, details_of, log_unforeseen
from sardonyx.api.kserve.grpc_wire import RequestParts, join_stream_reply, split_request
from sardonyx.api.kserve.service import InferenceService
from sardonyx.errors import ModelNotReady, PayloadTooLarge, RequestAborted, ServeError

MAX_IN_FLIGHT = 128
"""Requests of one stream that have no answer yet: enough to fill the largest usual batches."""
STATUS_ERRORS = ("triton_grpc_error", "true")
"""Metadata of callers who want a refusal to end their stream, with its status."""


class _StreamEnded(Exception):
    """No more is to be written. `error` is the status; ``None`` where nobody is there to read one."""

    def __init__(self, error: BaseException | None, request_id: str = "") -> None:
        super().__init__()
        self.error = error
        self.request_id = request_id


class InferStream:
    """One call of ModelStreamInfer.

    Args:
        service: computes.
        context: grpc's, of the call.
        lingering: where the call waits for requests; when it is cut short, those that came are still answered.
        max_message_bytes: of an answer.
    """

    def __init__(self, service: InferenceService, context: Any, lingering: Lingering, max_message_bytes: int) -> None:
        self._service = service
        self._context = context
        self._lingering = lingering
        self._max_message_bytes = max_message_bytes
        self._errors_are_statuses = STATUS_ERRORS in (context.invocation_metadata() or ())
        self._slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._writing = asyncio.Lock()
        self._is_ended = False
        self._last_sent: asyncio.Event | None = None
        """Set when the newest ordered request has its answer."""

    async def run(self) -> None:
        """Serve the call to its end. Cancelling it cancels every request of it."""
        ended = _StreamEnded(None)
        try:
            async with asyncio.TaskGroup() as group:
                if not await self._lingering.run(self._read(group)):
                    ended.error = ModelNotReady("the server is shutting down")
        except* _StreamEnded as endings:
            ended = _first(endings)
        except* Exception as unforeseen:
            ended = _StreamEnded(unforeseen)
        if ended.error is not None:
            await abort(self._context, ended.error, ended.request_id)

    async def _read(self, group: asyncio.TaskGroup) -> None:
        while True:
            await self._slots.acquire()
            try:
                data = await self._context.read()
                if data is grpc.aio.EOF:
                    return
                parts = split_request(data)
            except ServeError as error:
                # Whose request it was nobody can tell.
                await self._end(error)
            await self._begin(group, parts, len(data))
            del data, parts  # the next one may be long in coming

    async def _begin(self, group: asyncio.TaskGroup, parts: RequestParts, num_bytes: int) -> None:
        """Start the work on a request. Requests reach the service in the order of their messages."""
        message = parts.message
        refusal = pb.ModelInferResponse(
            id=message.id, model_name=message.model_name, model_version=message.model_version
        )
        try:
            if num_bytes > MAX_INLINE_BYTES and reads_slowly(parts):
                request, wants_empty_final = await asyncio.to_thread(read_request, parts)
            else:
                request, wants_empty_final = read_request(parts)
            is_decoupled = self._service.model(request.model_name, request.model_version).is_decoupled
        except Exception as error:
            work = self._refuse_in_turn(error, refusal, *self._take_turn())
        else:
            if is_decoupled:
                work = self._answer_many(request, refusal, wants_empty_final)
            else:
                work = self._answer_one(request, refusal, *self._take_turn())
        group.create_task(self._release(work))

    def _take_turn(self) -> tuple[asyncio.Event | None, asyncio.Event]:
        """What an ordered answer waits for, and what it sets."""
        turn, self._last_sent = self._last_sent, asyncio.Event()
        return turn, self._last_sent

    async def _release(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        finally:
            self._slots.release()

    async def _answer_one(
        self, request: WireRequest, refusal: pb.ModelInferResponse, turn: asyncio.Event | None, sent: asyncio.Event
    ) -> None:
        try:
            data = await self._encode(await self._service.infer(request))
        except asyncio.CancelledError:
            await self._refuse_in_turn(_cancelled(), refusal, turn, sent)
        except Exception as error:
            await self._refuse_in_turn(error, refusal, turn, sent)
        else:
            await self._send_in_turn(data, turn, sent)

    async def _answer_many(self, request: WireRequest, refusal: pb.ModelInferResponse, wants_empty_final: bool) -> None:
        try:
            async with _closing(self._service.stream(request)) as replies:
                async for reply in replies:
                    if reply.outputs or not reply.is_final or wants_empty_final:
                        await self._send(await self._encode(reply))
        except _StreamEnded:
            raise
        except asyncio.CancelledError:
            await self._refuse(_cancelled(), refusal)
        except Exception as error:
            await self._refuse(error, refusal)

    async def _encode(self, reply: WireReply) -> bytes:
        if writes_slowly(reply):
            head, raw_contents = await asyncio.to_thread(write_reply, reply, is_final=reply.is_final)
        else:
            head, raw_contents = write_reply(reply, is_final=reply.is_final)
        data = join_stream_reply(head, raw_contents)
        if len(data) > self._max_message_bytes:
            raise PayloadTooLarge(f"the answer is larger than {self._max_message_bytes:,} bytes")
        return data

    async def _refuse_in_turn(
        self, error: BaseException, refusal: pb.ModelInferResponse, turn: asyncio.Event | None, sent: asyncio.Event
    ) -> None:
        if turn is not None:
            await turn.wait()
        await self._refuse(error, refusal)
        sent.set()

    async def _refuse(self, error: BaseException, refusal: pb.ModelInferResponse) -> None:
        if self._errors_are_statuses:
            await self._end(error, refusal.id)
        log_unforeseen(error)
        refusal.parameters[FINAL].bool_param = True
        message = pb.ModelStreamInferResponse(error_message=details_of(error, refusal.id), infer_response=refusal)
        await self._send(message.SerializeToString())

    async def _end(self, error: BaseException, request_id: str = "") -> NoReturn:
        # With the lock, for grpc cannot send a status while it sends a message.
        async with self._writing:
            self._is_ended = True
            raise _StreamEnded(error, request_id)

    async def _send_in_turn(self, data: bytes, turn: asyncio.Event | None, sent: asyncio.Event) -> None:
        if turn is not None:
            await turn.wait()
        await self._send(data)
        sent.set()

    async def _send(self, data: bytes) -> None:
        async with self._writing:
            if self._is_ended:
                return
            try:
                await self._context.write(data)
            except grpc.aio.BaseError as error:
                self._is_ended = True
                raise _StreamEnded(None) from error


def _cancelled() -> BaseException:
    """What to tell of a request that was cancelled. Raises it again where all of the stream was."""
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise asyncio.CancelledError
    return RequestAborted("the request was cancelled")


def _first(endings: BaseExceptionGroup[_StreamEnded]) -> _StreamEnded:
    """The ending with a status, if there is one."""
    leaves = [each for each in endings.exceptions if isinstance(each, _StreamEnded)]
    return next((each for each in leaves if each.error is not None), leaves[0])


@asynccontextmanager
async def _closing(replies: AsyncIterator[WireReply]) -> AsyncIterator[AsyncIterator[WireReply]]:
    """Close an iterator at the end, if it is one that can be: then the service aborts what is left of the request."""
    try:
        yield replies
    finally:
        if (close := getattr(replies, "aclose", None)) is not None:
            await close()
