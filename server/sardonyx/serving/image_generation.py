"""One call for pictures on its way. Floor 4, on the event loop."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from sardonyx.core import FinishReason, SequenceEvent
from sardonyx.diffusion import ImageEvent, ImageRequest, Picture, Pixels
from sardonyx.errors import EngineDead, EngineError, RequestAborted, ServeError
from sardonyx.serving.admission import Reservation
from sardonyx.serving.dispatch import EventDispatch
from sardonyx.serving.engine_errors import deadline_exceeded, error_of
from sardonyx.serving.tasks import ImageUsage, PictureUpdate


@dataclass(slots=True, frozen=True)
class ImageCall:
    """What is asked for."""

    id: str
    pictures: Sequence[Picture]
    size: tuple[int, int]
    """Height and width of each."""
    usage: ImageUsage
    deadline_s: float
    """Monotonic."""
    start_by_s: float
    """Monotonic; a picture that has not begun by then is refused."""
    check: Callable[[Pixels], Awaitable[None]] | None = None
    """Raises ServeError for pictures that are not to be given out."""


class ImageGeneration:
    """See `tasks.Pictures`. Made by `ImageModel.start`.

    Args:
        call: to serve.
        dispatch: connected to the engine.
        reservation: released at the end.
        retry_after_s: when a request that waited too long should come back.
        on_end: called once, synchronously, at the end; with an error unless all went well.
    """

    def __init__(
        self,
        call: ImageCall,
        *,
        dispatch: EventDispatch,
        reservation: Reservation,
        retry_after_s: Callable[[], float],
        on_end: "Callable[[ImageGeneration, ServeError | None], None]",
    ) -> None:
        self.id = call.id
        self.size = call.size
        self.usage = call.usage
        self.finish_reason = FinishReason.STOP
        self._check = call.check
        self._dispatch = dispatch
        self._reservation = reservation
        self._retry_after_s = retry_after_s
        self._on_end = on_end
        self._error: ServeError | None = None
        self._has_ended = False
        self._updates: asyncio.Queue[PictureUpdate | None] = asyncio.Queue()
        self._requests = [
            ImageRequest(
                id=f"{call.id}-{index}",
                prompt_ids=[0],
                picture=picture,
                deadline_s=call.deadline_s,
                start_by_s=call.start_by_s,
            )
            for index, picture in enumerate(call.pictures)
        ]
        self._places = {request.id: index for index, request in enumerate(self._requests)}
        self._unfinished = set(self._places)
        # The engine ends requests at their deadline; this ends them where a step hangs.
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, call.deadline_s - dispatch.clock()), self._expire)

    def submit(self) -> None:
        """Give the pictures to the engine. Once.

        Raises:
            ServeError: the engine is dead; what was submitted is aborted.
        """
        try:
            for request in self._requests:
                self._dispatch.submit(request, self._take)
        except ServeError as error:
            self.abort(error)
            raise

    async def __aiter__(self) -> AsyncIterator[PictureUpdate]:
        """See `tasks.Pictures`."""
        try:
            while (update := await self._updates.get()) is not None:
                if self._check is not None:
                    await self._check(update.pixels)
                yield update
            if self._error is not None:
                raise self._error
        except ServeError as error:
            self.abort(error)
            raise
        finally:
            self.abort()

    async def collect(self) -> list[PictureUpdate]:
        """See `tasks.Pictures`."""
        finished = [update async for update in self if update.is_final]
        return sorted(finished, key=lambda update: update.index)

    def abort(self, error: ServeError | None = None) -> None:
        """See `tasks.Pictures`."""
        if self._has_ended:
            return
        for request_id in self._unfinished:
            self._dispatch.abort(request_id)
        self._end(error or RequestAborted("the pictures were stopped"))

    def _expire(self) -> None:
        self.abort(deadline_exceeded())

    def _take(self, request_id: str, event: SequenceEvent) -> None:
        """One event of one of our pictures, called by the dispatch on the event loop."""
        assert isinstance(event, ImageEvent) or event.finish_reason is not None
        if event.finish_reason in {FinishReason.ERROR, FinishReason.CANCELLED}:
            is_alive = self._dispatch.is_alive
            self.abort(error_of(event, is_alive=is_alive, retry_after_s=self._retry_after_s))
            return
        assert isinstance(event, ImageEvent)
        is_final = event.finish_reason is not None
        pixels = event.image if is_final else event.preview
        assert pixels is not None
        self._updates.put_nowait(PictureUpdate(index=self._places[request_id], pixels=pixels, is_final=is_final))
        if is_final:
            self._dispatch.forget(request_id)
            self._unfinished.discard(request_id)
            if not self._unfinished:
                self._end(None)

    def _end(self, error: ServeError | None) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        self._error = error
        if error is not None:
            is_engine = isinstance(error, EngineError | EngineDead)
            self.finish_reason = FinishReason.ERROR if is_engine else FinishReason.CANCELLED
        self._timer.cancel()
        self._reservation.release(was_served=error is None)
        self._updates.put_nowait(None)
        self._on_end(self, error)
