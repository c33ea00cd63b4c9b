"""A heap of flows whose places change while they are in it.

Floor 3.
"""

import heapq
from collections.abc import Callable
from typing import Any, Generic, TypeVar

_MIN_SIZE = 64

T = TypeVar("T")


class TurnHeap(Generic[T]):
    """Hands out the member with the lowest turn.

    Turns only grow, so a member that has moved is put in its new place when it comes up. One that has left stays until
    then, too, or until it is one of many.

    Args:
        turn: of a member; no two members share one.
        holds: whether it still is a member.
    """

    __slots__ = ("_entries", "_holds", "_max_size", "_members", "_turn")

    def __init__(self, turn: Callable[[T], Any], holds: Callable[[T], bool]) -> None:  # any sortable turn
        self._turn = turn
        self._holds = holds
        self._entries: list[tuple[Any, T]] = []
        self._members: set[T] = set()
        self._max_size = _MIN_SIZE

    def add(self, member: T) -> None:
        """Take a member; nothing happens if it is one."""
        if member in self._members:
            return
        if len(self._entries) >= self._max_size:
            self._sweep()
        self._members.add(member)
        heapq.heappush(self._entries, (self._turn(member), member))

    def _sweep(self) -> None:
        """Forget those that have left."""
        self._entries = [entry for entry in self._entries if self._holds(entry[1])]
        heapq.heapify(self._entries)
        self._members = {member for _, member in self._entries}
        self._max_size = max(_MIN_SIZE, 2 * len(self._entries))

    def peek(self) -> T | None:
        """The member whose turn it is; ``None`` where there is none."""
        while self._entries:
            turn, member = self._entries[0]
            if not self._holds(member):
                heapq.heappop(self._entries)
                self._members.remove(member)
                continue
            current = self._turn(member)
            if current == turn:
                return member
            heapq.heapreplace(self._entries, (current, member))
        return None
