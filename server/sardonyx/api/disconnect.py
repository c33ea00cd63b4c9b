"""Work that ends when its client leaves.

Floor 5. Litestar runs a handler to its end whether or not anybody waits for the answer; a model server cannot afford
that.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from litestar.types import Receive

from sardonyx.errors import RequestAborted

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; cancel it when the client leaves. The request's body must have been read.

    `work` has ended when this returns, however it returns. It cleans up synchronously: while it is being cancelled it
    must not wait for anything slow.

    Raises:
        RequestAborted: the client left first. What else `work` raises comes through.
    """
    task, watcher = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise RequestAborted("the client left before its answer")
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    # uvicorn may repeat an empty last piece of the body before it has nothing but the disconnect to tell.
    while (await receive())["type"] != "http.disconnect":
        pass
