"""Which runs are alone: they may have all the threads that instances otherwise divide.

Floor 3.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class LoneRuns:
    """Watches runs of one model begin and end, in any threads."""

    __slots__ = ("_lock", "_num_begun", "_num_running", "_was_alone")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_running = 0
        self._num_begun = 0
        self._was_alone = True

    @contextmanager
    def run(self) -> Iterator[bool]:
        """A run, for as long as the block; true where no other is under way and the one before had no company either.

        Under load an instance often begins in the gap between two of another's steps, and has company at once.
        """
        with self._lock:
            is_alone = not self._num_running
            self._num_running += 1
            self._num_begun += 1
            number = self._num_begun
        try:
            yield is_alone and self._was_alone
        finally:
            with self._lock:
                self._num_running -= 1
                self._was_alone = is_alone and number == self._num_begun
