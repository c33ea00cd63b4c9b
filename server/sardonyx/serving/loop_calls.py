"""The calls of a model whose work a step loop does: what it accepts, counts, stops and ends.

Floor 4, on one event loop. What a call asks of the step loop is its own matter.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from sardonyx.engine.stats import LoopStats
from sardonyx.errors import InvalidRequest, ModelNotReady, ServeError
from sardonyx.metrics import ModelMetrics
from sardonyx.serving.admission import Admission, Reservation
from sardonyx.serving.open_calls import OpenCalls
from sardonyx.statistics import InferenceStatistics, failure_reason
from sardonyx.tensors import InferenceTimes


class Loop(Protocol):
    """What is asked of a step loop here; `engine.loop.StepLoop` is one."""

    @property
    def is_alive(self) -> bool: ...

    def stats(self) -> LoopStats: ...

    def close(self) -> None:
        """Blocks until the loop's thread has ended."""
        ...


class LoopCall(Protocol):
    """A call that has begun."""

    id: str

    def abort(self, error: ServeError | None = None) -> None:
        """End it. Synchronous, idempotent."""
        ...


@dataclass(slots=True, frozen=True)
class Acceptance:
    """Of a call that is being prepared."""

    reservation: Reservation
    """The call's own once it has begun: it releases it."""
    started_ns: int


C = TypeVar("C", bound=LoopCall)


class LoopCalls(Generic[C]):
    """Admits calls, keeps those that have begun, and owns the loop.

    Args:
        name: of the model, for messages.
        loop: started; closed with the model.
        admission: shared by models.
        metrics: of the model.
        statistics: of this version; they outlive it.
        on_close: called once, when the model is closed or discarded.
    """

    def __init__(
        self,
        name: str,
        loop: Loop,
        *,
        admission: Admission,
        metrics: ModelMetrics,
        statistics: InferenceStatistics,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.admission = admission
        self.metrics = metrics
        self.statistics = statistics
        self._loop = loop
        self._on_close = on_close
        self._open = OpenCalls()
        self._started_ns: dict[C, int] = {}
        """Of the calls that have begun."""
        self._is_closed = False
        self._stats = loop.stats  # one bound method, so that detach finds what attach got
        metrics.attach(self._stats)

    @property
    def is_alive(self) -> bool:
        """The loop takes requests."""
        return self._loop.is_alive

    @property
    def stalled_s(self) -> float:
        """For how long the loop has had work and finished no step."""
        return self.stats().stalled_s

    @property
    def num_active(self) -> int:
        """Calls that were accepted and have not ended."""
        return self._open.num_calls

    def stats(self) -> LoopStats:
        """Of the loop."""
        return self._stats()

    @contextmanager
    def accept(self, num_sequences: int, num_tokens: int) -> Iterator[Acceptance]:
        """Accept a call, which the block prepares; what the block raises ends it. Right after the block, `begin` it.

        Args:
            num_sequences: that the admission counts, and the next as well.
            num_tokens: an estimate; the block may correct it.

        Raises:
            ModelNotReady: the model is being unloaded, or was closed while the block ran.
            Overloaded: the server is at a limit.
        """
        if self._open.is_draining:
            raise self._unloaded()
        started_ns = time.perf_counter_ns()
        self._open.begin()
        self.statistics.num_pending += 1
        reservation: Reservation | None = None
        try:
            reservation = self.admission.reserve(num_sequences, num_tokens)
            yield Acceptance(reservation, started_ns)
            if self._is_closed:
                raise self._unloaded()
        except BaseException as error:
            if reservation is not None:
                reservation.release()
            self._count_end(error, started_ns)
            raise

    def begin(self, call: C, acceptance: Acceptance) -> None:
        """Keep a call that was prepared; `end` follows exactly once."""
        self._started_ns[call] = acceptance.started_ns

    def end(self, call: C, error: ServeError | None) -> None:
        """It has ended, well unless there is an error."""
        self._count_end(error, self._started_ns.pop(call))

    def stop(self, request_id: str | None = None) -> int:
        """End one call, or all of them. How many were ended."""
        chosen = [call for call in self._started_ns if request_id in {None, call.id}]
        for call in chosen:
            call.abort()
        return len(chosen)

    async def drain(self, timeout_s: float) -> None:
        """Take no more calls, and wait until the accepted ones have ended, so long at most."""
        await self._open.drain(timeout_s)

    async def close(self) -> None:
        """End what is left with ModelNotReady, and free the engine. Idempotent."""
        self._open.is_draining = True
        if self._is_closed:
            return
        self._is_closed = True
        for call in list(self._started_ns):
            call.abort(self._unloaded())
        try:
            await asyncio.to_thread(self._loop.close)
        finally:
            self._let_go()

    def discard(self) -> None:
        """Free what was never put in place. Blocks."""
        self._loop.close()
        self._let_go()

    def _let_go(self) -> None:
        self.metrics.detach(self._stats)
        self._on_close()

    def _count_end(self, error: BaseException | None, started_ns: int) -> None:
        """A call that was accepted is over."""
        self.statistics.num_pending -= 1
        self._open.end()
        total_ns = time.perf_counter_ns() - started_ns
        if error is None:
            times = InferenceTimes(compute_infer_ns=total_ns)
            self.statistics.observe_success(total_ns=total_ns, queue_ns=0, times=times, batch_size=1)
            self.statistics.observe_execution(1, times)
        elif isinstance(error, asyncio.CancelledError):
            self.statistics.observe_failure("CANCELED", total_ns)
        # Triton counts no request that it refused for what it says.
        elif isinstance(error, ServeError) and not isinstance(error, InvalidRequest):
            self.statistics.observe_failure(failure_reason(error), total_ns)

    def _unloaded(self) -> ModelNotReady:
        return ModelNotReady(f"model {self.name} is being unloaded")
