"""The calls that a model has accepted and not ended: what an unload waits for. Floor 4, on one event loop."""

import asyncio


class OpenCalls:
    """Counts calls, and tells when the last one has ended."""

    __slots__ = ("_is_idle", "is_draining", "num_calls")

    def __init__(self) -> None:
        self.num_calls = 0
        self.is_draining = False
        """No more calls are taken; whoever accepts them must look."""
        self._is_idle: asyncio.Event | None = None

    def begin(self) -> None:
        """A call was accepted; `end` follows exactly once."""
        self.num_calls += 1

    def end(self) -> None:
        """It has ended."""
        self.num_calls -= 1
        if not self.num_calls and self._is_idle is not None:
            self._is_idle.set()

    async def drain(self, timeout_s: float) -> None:
        """Have no more calls taken, and wait until those there are have ended, so long at most."""
        self.is_draining = True
        if not self.num_calls:
            return
        self._is_idle = self._is_idle or asyncio.Event()
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            return
