"""The few threads that do what would block the event loop: tokenising, templates, decoding, large conversions.

Floor 4. Bounded twice: in threads that run and in calls that wait. All models of a process share one pool.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from sardonyx.errors import Overloaded

P = ParamSpec("P")
R = TypeVar("R")


class WorkerPool:
    """Runs short jobs off the event loop.

    Args:
        num_threads: jobs that run at once.
        max_waiting: jobs of `run_bounded` that may wait for a thread.
    """

    def __init__(self, num_threads: int = 2, max_waiting: int = 64) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="sardonyx-worker")
        self._max_jobs = num_threads + max_waiting
        self._num_jobs = 0

    async def run(self, job: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The job's result. For work that admission has let in, so it is bounded already.

        Cancelling drops a job that has not started; one that runs goes on, and its result is dropped.
        """
        self._num_jobs += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, partial(job, *args, **kwargs))
        finally:
            self._num_jobs -= 1

    async def run_bounded(self, job: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """As `run`, for work that no admission counted.

        Raises:
            Overloaded: too many jobs wait.
        """
        if self._num_jobs >= self._max_jobs:
            raise Overloaded("too many requests wait for the tokenizer; try again later", retry_after_s=1.0)
        return await self.run(job, *args, **kwargs)

    def close(self) -> None:
        """Drop what waits, let what runs finish. Idempotent."""
        self._executor.shutdown(wait=False, cancel_futures=True)
