"""Several models asked at once for one answer.

Floor 4.
"""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def together(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The jobs' results in their order, all of them under way at once.

    Every job has ended when this returns, however it returns. Cancelling cancels all of them.

    Raises:
        Exception: what the first job raised that failed; the others were cancelled.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
