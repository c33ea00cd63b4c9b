"""Who has been promised an answer and has none yet: one event for each request, and in order where that is asked.

Floor 3. A part of `sardonyx.engine.instances`, under its lock.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Container

from sardonyx.errors import ServeError
from sardonyx.tensors import TensorEvent

logger = logging.getLogger(__name__)


class Ledger:
    """Open requests in the order of submission, and the events that are on their way out.

    All but `flush` is called with the lock held. Events that belong to no open request are dropped, so whoever comes
    first ends a request.

    Args:
        lock: guards the ledger.
        deliver: gets the events, without the lock, in one thread at a time.
        is_ordered: events of requests that ran leave in the order of submission. What never ran has no place in that
            order and leaves at once.
    """

    def __init__(self, lock: threading.Lock, deliver: Callable[[list[TensorEvent]], None], *, is_ordered: bool) -> None:
        self._lock = lock
        self._deliver = deliver
        self._is_ordered = is_ordered
        self._live: dict[int, None] = {}
        # Of ordered ones: ids in order, ended ones among them until they come to the front, and who waits for others.
        self._order: deque[int] = deque()
        self._held: dict[int, TensorEvent] = {}
        self._outbox: list[TensorEvent] = []
        self._is_delivering = False

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._live

    @property
    def has_deliveries(self) -> bool:
        """`flush` has something to do."""
        return bool(self._outbox) and not self._is_delivering

    def open(self, request_id: int) -> None:
        """An event is owed."""
        self._live[request_id] = None
        if self._is_ordered:
            self._order.append(request_id)

    def end(self, event: TensorEvent, *, has_run: bool = False) -> None:
        """The event of a request; it leaves with the next `flush`, or when those before it have left."""
        if event.request_id not in self._live:
            return
        if has_run and self._is_ordered:
            self._held[event.request_id] = event
        else:
            self._send(event)
        if self._is_ordered:
            self._send_held()

    def _send(self, event: TensorEvent) -> None:
        del self._live[event.request_id]
        self._outbox.append(event)

    def _send_held(self) -> None:
        while self._order:
            first = self._order[0]
            if first in self._held:
                self._send(self._held.pop(first))
            elif first in self._live:
                return
            self._order.popleft()

    def end_all(self, make_error: Callable[[], ServeError], *, but: Container[int] = ()) -> None:
        """End open requests with an error, but for some; those that ran and only wait for others keep their events."""
        for request_id in list(self._live):
            if request_id not in but and request_id not in self._held:
                self.end(TensorEvent(request_id=request_id, error=make_error()))

    def flush(self) -> None:
        """Deliver what is there, or leave it to the thread that is delivering. Without the lock."""
        # Read without the lock: whoever puts events in flushes afterwards, so none is overlooked.
        while self._outbox:
            with self._lock:
                if not self.has_deliveries:
                    return
                events, self._outbox = self._outbox, []
                self._is_delivering = True
            try:
                self._deliver(events)
            except Exception:
                logger.exception("%d events were not delivered", len(events))
            finally:
                with self._lock:
                    self._is_delivering = False
