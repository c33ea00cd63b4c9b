"""The bridge between a step loop's thread and the event loop: one call a step, then one call for each event.

Floor 4. Which generation an event belongs to is known here and nowhere else.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from sardonyx.core import FinishReason, Request, SequenceEvent

logger = logging.getLogger(__name__)

Sink = Callable[[str, SequenceEvent], None]
"""Takes the events of one request, on the event loop; the first argument is the request's id."""


class Engine(Protocol):
    """What serving asks of a step loop. `engine.loop.StepLoop` is one."""

    @property
    def is_alive(self) -> bool: ...

    def submit(self, request: Request) -> None:
        """Raises EngineDead after death or close."""
        ...

    def abort(self, request_id: str) -> None:
        """Synchronous, idempotent, returns at once; unknown ids are ignored."""
        ...


class EventDispatch:
    """Submits requests and brings their events to the event loop that submitted them.

    Made before the engine, whose `deliver` it is; `connect` closes the circle.

    Args:
        clock: monotonic seconds, the engine's clock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._engine: Engine | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._sinks: dict[str, Sink] = {}

    def connect(self, engine: Engine) -> None:
        """Once, before the first request."""
        self._engine = engine

    @property
    def is_alive(self) -> bool:
        """The engine takes requests."""
        return self._engine is not None and self._engine.is_alive

    def submit(self, request: Request, sink: Sink) -> None:
        """Submit a request whose events go to `sink`, until `forget`, `abort` or an event with a finish reason.

        Raises:
            EngineDead: the engine stopped; the sink gets nothing.
        """
        assert self._engine is not None
        if not self._sinks:
            self._event_loop = asyncio.get_running_loop()
        self._sinks[request.id] = sink
        try:
            self._engine.submit(request)
        except BaseException:
            self.forget(request.id)
            raise

    def abort(self, request_id: str) -> None:
        """End a request at the next step. What still comes for it is dropped."""
        assert self._engine is not None
        self.forget(request_id)
        self._engine.abort(request_id)

    def forget(self, request_id: str) -> None:
        """Drop what still comes for a request."""
        self._sinks.pop(request_id, None)

    def deliver(self, events: list[SequenceEvent]) -> None:
        """All events of a step. Called in the step loop's thread; costs it one wake-up of the event loop."""
        loop = self._event_loop
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(self._dispatch, events)
        except RuntimeError:
            # The event loop is closed: nobody is left to read. The step loop must not die of it.
            logger.debug("%d events came after the event loop was closed", len(events))

    def _dispatch(self, events: list[SequenceEvent]) -> None:
        for event in events:
            sink = self._sinks.get(event.request_id)
            if sink is None:
                continue
            try:
                sink(event.request_id, event)
            except Exception:
                # A bug of ours in one request must not take the other requests' events with it.
                logger.exception("the events of request %s could not be handled", event.request_id)
                self._fail(event.request_id, sink)

    def _fail(self, request_id: str, sink: Sink) -> None:
        self.abort(request_id)
        sink(request_id, SequenceEvent(request_id=request_id, finish_reason=FinishReason.ERROR, error="internal error"))
