"""Calls of many items: each item is queued by itself, and the call ends when all have.

Floor 4. Encoder models and image classifiers work so: a step takes items of any calls, and a call of 2,048 texts is
many steps. Everything but the instances' threads runs on the event loop that made the first call.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy.typing as npt

from sardonyx.errors import DeadlineExceeded, InvalidRequest, ModelNotReady, ServeError
from sardonyx.serving.admission import Admission, Reservation
from sardonyx.serving.event_inbox import EventInbox
from sardonyx.serving.open_calls import OpenCalls
from sardonyx.serving.tensors import InstanceEngine
from sardonyx.statistics import InferenceStatistics, failure_reason
from sardonyx.tensors import InferenceTimes, TensorEvent, TensorRequest

OUTPUT = "values"
"""What runners of encoder models and image classifiers call an item's result."""
# A request's number is its flow's and, in so many bits, its place in it: no item needs a place in a table.
_INDEX_BITS = 20
_INDEX_MASK = (1 << _INDEX_BITS) - 1
MAX_ITEMS = 1 << _INDEX_BITS


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a call, ready to run."""

    inputs: dict[str, npt.NDArray[Any]]
    """As the runner takes them."""
    num_tokens: int = 0
    """0 where the model reads no tokens."""
    batch_key: Hashable = None
    """See `TensorRequest`."""


class ItemCall:
    """An admitted call. Made by `ItemCalls.open`, which ends it."""

    __slots__ = ("_calls", "_reservation", "flow", "future", "num_left", "num_steps_ns", "queue_ns", "results", "times")

    def __init__(self, calls: "ItemCalls", reservation: Reservation, flow: int) -> None:
        self._calls = calls
        self._reservation = reservation
        self.flow = flow
        self.future: asyncio.Future[ServeError | None] | None = None
        self.results: list[npt.NDArray[Any] | None] = []
        """By item; ``None`` until it has ended."""
        self.num_left = 0
        self.queue_ns: int | None = None
        """Until the first item ran."""
        self.times = InferenceTimes()
        """Of the last step seen."""
        self.num_steps_ns = [0, 0, 0]
        """`InferenceTimes` summed over the steps that had a part in it."""

    async def run(self, items: Sequence[Item]) -> list[npt.NDArray[Any]]:
        """The items' results, in their order. Once a call.

        Args:
            items: their tokens, where they have any, replace the estimate of the admission.

        Raises:
            InvalidRequest: there are more than `MAX_ITEMS`.
            ServeError: the first that an item got, or the queue's refusal; the other items were aborted.
        """
        return await self._calls.run(self, self._reservation, items)


class ItemCalls:
    """Admits calls, submits their items and gathers what comes back; owns the engine.

    Args:
        name: of the model, for messages.
        engine: started, not quick; its `deliver` is the inbox's.
        inbox: connected here.
        statistics: of this version; they outlive it.
        admission: shared by models. A call is one request there, whatever it holds; its tokens are `open`'s estimate.
        timeout_s: most time of a call.
    """

    def __init__(
        self,
        name: str,
        engine: InstanceEngine,
        inbox: EventInbox,
        statistics: InferenceStatistics,
        *,
        admission: Admission,
        timeout_s: float = 600.0,
    ) -> None:
        self.name = name
        self.statistics = statistics
        self._engine = engine
        self._inbox = inbox
        self._admission = admission
        self._timeout_s = timeout_s
        self._flows = itertools.count(1)
        self._calls: dict[int, ItemCall] = {}
        self._open = OpenCalls()
        self._is_closed = False
        inbox.connect(self._take)

    @property
    def num_active(self) -> int:
        """Calls that were accepted and have not ended."""
        return self._open.num_calls

    @property
    def is_alive(self) -> bool:
        """The instances take requests."""
        return self._engine.is_alive

    @property
    def stalled_s(self) -> float:
        """For how long the instances have had work and finished none."""
        return self._engine.stalled_s

    @asynccontextmanager
    async def open(self, estimate: int, *, timeout_s: float | None = None) -> AsyncIterator[ItemCall]:
        """Admit a call; the block prepares its items and runs them. Time counts from here.

        Args:
            estimate: tokens (or what else the admission counts) of all its items together.
            timeout_s: less than the server's limit, if the caller wants so.

        Raises:
            ModelNotReady: the model is being unloaded.
            Overloaded: the server is at a limit.
            DeadlineExceeded: the time was over.
        """
        if self._open.is_draining:
            raise self._unloaded()
        started_ns = time.perf_counter_ns()
        self._open.begin()
        self.statistics.num_pending += 1
        call: ItemCall | None = None
        was_served = False
        try:
            call = ItemCall(self, self._admission.reserve(1, estimate), next(self._flows))
            async with asyncio.timeout(self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)):
                yield call
            was_served = True
        except TimeoutError:
            error = DeadlineExceeded("the request's time was over before its answer")
            self._observe_failure(error, started_ns)
            raise error from None
        except ServeError as error:
            self._observe_failure(error, started_ns)
            raise
        except asyncio.CancelledError:
            self.statistics.observe_failure("CANCELED", time.perf_counter_ns() - started_ns)
            raise
        finally:
            if call is not None:
                call._reservation.release(was_served=was_served)
            self.statistics.num_pending -= 1
            self._open.end()
        self._observe_success(call, started_ns)

    async def run(self, call: ItemCall, reservation: Reservation, items: Sequence[Item]) -> list[npt.NDArray[Any]]:
        """See `ItemCall.run`."""
        assert call.future is None, "a call runs once"
        if len(items) > MAX_ITEMS:
            raise InvalidRequest(f"the request has {len(items):,} parts; at most {MAX_ITEMS:,} are taken at once")
        if self._is_closed:
            raise self._unloaded()
        if num_tokens := sum(item.num_tokens for item in items):
            reservation.correct(num_tokens)
        if not items:
            return []
        call.future = self._inbox.open().create_future()
        call.results = [None] * len(items)
        call.num_left = len(items)
        self._calls[call.flow] = call
        num_submitted = 0
        try:
            now_s = time.monotonic()
            for item in items:
                self._engine.submit(_request(call.flow, num_submitted, item, now_s))
                num_submitted += 1
            error = await call.future
        finally:
            # First, so that the events of what is aborted find no call.
            del self._calls[call.flow]
            if call.num_left:
                self._abort(call, num_submitted)
        if error is not None:
            raise error
        return [result for result in call.results if result is not None]

    def stop(self, request_id: str | None = None) -> int:
        """Nothing is generated: a call ends by itself."""
        return 0

    async def drain(self, timeout_s: float) -> None:
        """Take no more calls, and wait until the accepted ones have ended, so long at most."""
        await self._open.drain(timeout_s)

    async def close(self) -> None:
        """End what is left with ModelNotReady, and free the engine. Idempotent."""
        self._open.is_draining = True
        if self._is_closed:
            return
        self._is_closed = True
        for call in list(self._calls.values()):
            _fail(call, self._unloaded())
        await asyncio.to_thread(self._engine.close)

    def discard(self) -> None:
        """Free what was never put in place. Blocks."""
        self._engine.close()

    def _unloaded(self) -> ModelNotReady:
        return ModelNotReady(f"model '{self.name}' is being unloaded")

    def _abort(self, call: ItemCall, num_submitted: int) -> None:
        for index, result in enumerate(call.results[:num_submitted]):
            if result is None:
                self._engine.abort(call.flow << _INDEX_BITS | index)

    def _take(self, events: list[TensorEvent]) -> None:
        """Ends of items, on the event loop."""
        for event in events:
            if event.counts_execution:
                self.statistics.observe_execution(event.executed_batch_size, event.times)
            call = self._calls.get(event.request_id >> _INDEX_BITS)
            if call is None:
                continue
            if event.error is not None:
                _fail(call, event.error)
                continue
            call.results[event.request_id & _INDEX_MASK] = event.outputs[OUTPUT]
            call.num_left -= 1
            _add_times(call, event)
            if not call.num_left and call.future is not None and not call.future.done():
                call.future.set_result(None)

    def _observe_success(self, call: ItemCall, started_ns: int) -> None:
        self.statistics.observe_success(
            total_ns=time.perf_counter_ns() - started_ns,
            queue_ns=call.queue_ns or 0,
            times=InferenceTimes(*call.num_steps_ns),
            batch_size=len(call.results),
        )

    def _observe_failure(self, error: ServeError, started_ns: int) -> None:
        # Triton counts no request that it refused for what it says.
        if not isinstance(error, InvalidRequest):
            self.statistics.observe_failure(failure_reason(error), time.perf_counter_ns() - started_ns)


def _request(flow: int, index: int, item: Item, now_s: float) -> TensorRequest:
    return TensorRequest(
        id=flow << _INDEX_BITS | index,
        inputs=item.inputs,
        outputs=(OUTPUT,),
        batch_key=item.batch_key,
        arrival_s=now_s,
        num_tokens=item.num_tokens,
        flow=flow,
    )


def _fail(call: ItemCall, error: ServeError) -> None:
    if call.future is not None and not call.future.done():
        call.future.set_result(error)


def _add_times(call: ItemCall, event: TensorEvent) -> None:
    """Count each step once: the events of a step share the object, and mostly come one after the other."""
    if call.queue_ns is None:
        call.queue_ns = event.queue_ns
    if event.times is not call.times:
        call.times = event.times
        call.num_steps_ns[0] += event.times.compute_input_ns
        call.num_steps_ns[1] += event.times.compute_infer_ns
        call.num_steps_ns[2] += event.times.compute_output_ns
