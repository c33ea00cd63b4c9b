"""When requests must have ended, or at least begun. Floor 3; a part of every policy over token sequences."""

import heapq
from collections.abc import Callable, Iterator

from sardonyx.core import Request, Sequence


class Deadlines:
    """Knows which sequences are late. Used by one thread.

    Args:
        find: the sequence of a request's id, unless it has ended.
    """

    def __init__(self, find: Callable[[str], Sequence | None]) -> None:
        self._find = find
        self._times: list[tuple[float, str, str]] = []

    def add(self, request: Request) -> None:
        """Watch a request from now on."""
        if request.deadline_s is not None:
            heapq.heappush(self._times, (request.deadline_s, request.id, "deadline"))
        if request.start_by_s is not None:
            heapq.heappush(self._times, (request.start_by_s, request.id, "queue"))

    def late(self, now_s: float) -> Iterator[tuple[Sequence, str]]:
        """Sequences whose time is over, each once, and which one: ``deadline`` or ``queue``. The caller ends them."""
        while self._times and self._times[0][0] < now_s:
            time_s, request_id, what = heapq.heappop(self._times)
            sequence = self._find(request_id)
            if sequence is None:
                continue
            request = sequence.request
            # The times are compared because an ended request's id may have come again, with others.
            is_late = request.deadline_s == time_s if what == "deadline" else request.start_by_s == time_s
            if is_late and (what == "deadline" or sequence.started_s is None):
                yield sequence, what
