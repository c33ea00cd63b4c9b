"""Calls that end when their caller likes: streams that wait for a message, watches, reflection.

Floor 5. A server that stops waits for its calls, and these would keep it waiting for its whole grace.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any


class Lingering:
    """The waiting parts of such calls. Belongs to one event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopped = False

    async def run(self, part: Coroutine[Any, Any, None]) -> bool:
        """Await a part; false where `stop` has cut it short. Cancelling this cancels the part."""
        if self._is_stopped:
            part.close()
            return False
        task = asyncio.ensure_future(part)
        self._tasks.add(task)
        try:
            await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if not self._is_stopped or (caller is not None and caller.cancelling()):
                raise
            return False
        finally:
            self._tasks.discard(task)
        return True

    def stop(self) -> None:
        """Cut every part short, those to come as well."""
        self._is_stopped = True
        for task in self._tasks:
            task.cancel()
