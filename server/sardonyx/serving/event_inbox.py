"""The way of events from the threads of a tensor model to the event loop. Floor 4."""

import asyncio
import logging
import threading
from collections.abc import Callable

from sardonyx.tensors import TensorEvent

logger = logging.getLogger(__name__)


class EventInbox:
    """Brings the events of the instances' threads to the event loop: one call a batch."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread_id = 0
        self._sink: Callable[[list[TensorEvent]], None] | None = None

    def connect(self, sink: Callable[[list[TensorEvent]], None]) -> None:
        """Once, before the first request."""
        self._sink = sink

    def open(self) -> asyncio.AbstractEventLoop:
        """The running event loop; it gets the events."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread_id = threading.get_ident()
        return self._loop

    def deliver(self, events: list[TensorEvent]) -> None:
        """Called in an instance's thread, or on the event loop for what ends there."""
        if self._loop is None or self._sink is None:
            return
        if threading.get_ident() == self._thread_id:
            self._sink(events)
            return
        try:
            self._loop.call_soon_threadsafe(self._sink, events)
        except RuntimeError:
            logger.debug("%d events came after the event loop was closed", len(events))
