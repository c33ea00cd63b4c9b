"""Calls of many items over an engine whose steps the test runs by hand."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serving.fakes import until

from sardonyx.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    ModelNotReady,
    Overloaded,
    RequestAborted,
    ServeError,
)
from sardonyx.serving import item_calls
from sardonyx.serving.admission import Admission
from sardonyx.serving.event_inbox import EventInbox
from sardonyx.serving.item_calls import OUTPUT, Item, ItemCalls
from sardonyx.statistics import InferenceStatistics
from sardonyx.tensors import InferenceTimes, TensorEvent, TensorRequest


class HandEngine:
    """An `InstanceEngine` that queues and answers when told: an item's result is ten times its input."""

    is_alive = True
    is_quick = False
    stalled_s = 0.0

    def __init__(self, inbox: EventInbox, max_waiting: int) -> None:
        self.waiting: dict[int, TensorRequest] = {}
        self.running: dict[int, TensorRequest] = {}
        self.flows: list[int] = []
        self.num_aborted = 0
        self.is_closed = False
        self._inbox = inbox
        self._max_waiting = max_waiting

    def submit(self, request: TensorRequest) -> None:
        if len(self.waiting) >= self._max_waiting:
            raise Overloaded("the queue is full", retry_after_s=1.0)
        assert request.id not in self.waiting
        self.flows.append(request.flow)
        self.waiting[request.id] = request

    def abort(self, request_id: int) -> None:
        if self.waiting.pop(request_id, None) is not None:
            self.num_aborted += 1
            error = RequestAborted("the request was cancelled")
            self._inbox.deliver([TensorEvent(request_id=request_id, error=error)])

    def begin(self, ids: list[int]) -> None:
        for request_id in ids:
            self.running[request_id] = self.waiting.pop(request_id)

    def step(self, ids: list[int], failing: set[int] = frozenset()) -> None:
        """Run these, in one step."""
        self.begin([each for each in ids if each in self.waiting])
        times = InferenceTimes(1, 10, 100)
        events = []
        for place, request_id in enumerate(ids):
            request = self.running.pop(request_id)
            event = TensorEvent(
                request_id=request_id,
                times=times,
                executed_batch_size=len(ids),
                counts_execution=place == 0,
                queue_ns=5,
            )
            if request_id in failing:
                event.error = EngineError(f"item {request.inputs['n'].item()} failed")
            else:
                event.outputs = {OUTPUT: request.inputs["n"] * 10}
            events.append(event)
        self._inbox.deliver(events)

    def run_ready(self) -> None:
        raise AssertionError("it is not quick")

    def close(self) -> None:
        self.is_closed = True


class Bench:
    """What a test works on."""

    def __init__(self, *, max_waiting: int = 10_000, **options: Any) -> None:
        inbox = EventInbox()
        self.engine = HandEngine(inbox, max_waiting)
        self.admission = Admission(8, 1000)
        self.statistics = InferenceStatistics("m", 1)
        self.calls = ItemCalls("m", self.engine, inbox, self.statistics, admission=self.admission, **options)

    def start(self, *numbers: int, estimate: int = 1, **options: Any) -> "asyncio.Task[list[int]]":
        return asyncio.ensure_future(self._run([item(n) for n in numbers], estimate, options))

    async def _run(self, items: list[Item], estimate: int, options: dict[str, Any]) -> list[int]:
        async with self.calls.open(estimate, **options) as call:
            return [int(value) for value in await call.run(items)]

    async def queued(self, count: int) -> list[int]:
        await until(lambda: len(self.engine.waiting) == count)
        return list(self.engine.waiting)


def item(number: int, num_tokens: int = 1) -> Item:
    return Item(inputs={"n": np.array(number)}, num_tokens=num_tokens)


def check(test: Callable[[Bench], Awaitable[None]], **options: Any) -> Bench:
    """Run a test; afterwards nothing may be left of any call."""

    async def main() -> Bench:
        bench = Bench(**options)
        await test(bench)
        await asyncio.sleep(0)
        assert (bench.admission.num_sequences, bench.admission.num_tokens) == (0, 0)
        assert (bench.statistics.num_pending, bench.calls.num_active) == (0, 0)
        assert not bench.engine.waiting
        assert not bench.calls._calls
        return bench

    return asyncio.run(main())


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    seed=st.integers(0, 1 << 20),
    failing=st.sets(st.integers(0, 30), max_size=3),
    leaving=st.sets(st.integers(0, 4), max_size=2),
)
def test_every_call_ends_once_with_its_own_items_in_order(sizes, seed, failing, leaving) -> None:
    rng = random.Random(seed)

    async def test(bench: Bench) -> None:
        numbers = [list(range(100 * n, 100 * n + size)) for n, size in enumerate(sizes)]
        tasks = [bench.start(*each) for each in numbers]
        order = await bench.queued(sum(sizes))
        bad = {order[each] for each in failing if each < len(order)}
        bad_numbers = {bench.engine.waiting[each].inputs["n"].item() for each in bad}
        while bench.engine.waiting or bench.engine.running:
            waiting = list(bench.engine.waiting)
            rng.shuffle(waiting)
            bench.engine.begin(waiting[: rng.randint(0, 4)])
            if leaving and rng.random() < 0.3:
                index = leaving.pop()
                if index < len(tasks):
                    tasks[index].cancel()
                    await asyncio.gather(tasks[index], return_exceptions=True)
            running = list(bench.engine.running)
            rng.shuffle(running)
            if running:
                bench.engine.step(running[: rng.randint(1, len(running))], bad)
            await asyncio.sleep(0)
        for own, result in zip(numbers, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
            if isinstance(result, EngineError):
                assert bad_numbers.intersection(own)
            elif not isinstance(result, asyncio.CancelledError):
                assert result == [10 * number for number in own]
                assert not bad_numbers.intersection(own)

    check(test)


def test_items_of_a_call_share_a_flow_and_calls_do_not() -> None:
    async def test(bench: Bench) -> None:
        tasks = [bench.start(1, 2), bench.start(3)]
        ids = await bench.queued(3)
        assert bench.engine.flows == [1, 1, 2]
        bench.engine.step(ids)
        assert await asyncio.gather(*tasks) == [[10, 20], [30]]

    check(test)


def test_first_error_ends_the_call_and_aborts_what_waits() -> None:
    async def test(bench: Bench) -> None:
        task = bench.start(1, 2, 3, 4)
        ids = await bench.queued(4)
        bench.engine.begin(ids[:3])
        bench.engine.step([ids[1]], {ids[1]})
        with pytest.raises(EngineError, match="item 2 failed"):
            await task
        assert bench.engine.num_aborted == 1
        bench.engine.step([ids[0], ids[2]])  # ran on; nobody listens

    bench = check(test)
    assert bench.statistics.failures == {"BACKEND": 1}
    assert bench.statistics.execution_count == 2


def test_cancelled_call_aborts_what_waits() -> None:
    async def test(bench: Bench) -> None:
        task, other = bench.start(1, 2, 3), bench.start(9)
        ids = await bench.queued(4)
        bench.engine.step(ids[:1])
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bench.engine.num_aborted == 2
        bench.engine.step(ids[3:])
        assert await other == [90]

    assert check(test).statistics.failures == {"CANCELED": 1}


def test_queue_that_is_full_midway_refuses_the_whole_call() -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(Overloaded):
            await bench.start(*range(9))
        assert bench.engine.num_aborted == 5

    assert check(test, max_waiting=5).statistics.failures == {"REJECTED": 1}


@pytest.mark.parametrize("options", [{"timeout_s": 1e-3}, {}])
def test_call_ends_when_its_time_or_the_servers_is_over(options: dict[str, float]) -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(DeadlineExceeded):
            await bench.start(1, 2, **options)
        assert bench.engine.num_aborted == 2

    check(test, timeout_s=600 if options else 1e-3)


def test_time_counts_from_the_begin_of_preparing() -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(DeadlineExceeded):
            async with bench.calls.open(1, timeout_s=1e-3):
                await asyncio.Event().wait()

    check(test)


def test_tokens_of_the_items_replace_the_estimate() -> None:
    async def test(bench: Bench) -> None:
        task = bench.start(1, 2, estimate=700)
        ids = await bench.queued(2)
        assert (bench.admission.num_sequences, bench.admission.num_tokens) == (1, 2)
        bench.engine.step(ids)
        await task
        async with bench.calls.open(3), bench.calls.open(4) as call:
            with pytest.raises(Overloaded, match="1,000 queued prompt tokens"):
                await call.run([item(1, num_tokens=999)])

    check(test)


def test_admission_refuses_a_call_before_it_is_prepared() -> None:
    async def test(bench: Bench) -> None:
        async with bench.calls.open(990):
            with pytest.raises(Overloaded):
                await bench.start(1, estimate=20)

    assert check(test).statistics.failures == {"REJECTED": 1}


def test_error_of_preparing_is_not_counted_where_the_caller_is_at_fault() -> None:
    async def refused(bench: Bench, error: ServeError) -> None:
        with pytest.raises(type(error)):
            async with bench.calls.open(1):
                raise error

    async def test(bench: Bench) -> None:
        await refused(bench, ContextLengthExceeded("too long"))
        assert bench.statistics.failures == {}
        await refused(bench, EngineError("failed"))

    assert check(test).statistics.failures == {"BACKEND": 1}


def test_call_of_too_many_items_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_calls, "MAX_ITEMS", 2)

    async def test(bench: Bench) -> None:
        with pytest.raises(InvalidRequest, match="3 parts; at most 2"):
            await bench.start(1, 2, 3)

    check(test)


def test_call_of_no_items_has_no_results() -> None:
    async def test(bench: Bench) -> None:
        assert await bench.start() == []

    check(test)


def test_drained_model_takes_no_calls_and_waits_for_those_it_has() -> None:
    async def test(bench: Bench) -> None:
        task = bench.start(1)
        ids = await bench.queued(1)
        drain = asyncio.ensure_future(bench.calls.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(ModelNotReady):
            await bench.start(2)
        assert not drain.done()
        bench.engine.step(ids)
        await drain
        assert await task == [10]

    check(test)


def test_closing_ends_calls_as_not_ready_also_those_that_are_being_prepared() -> None:
    async def test(bench: Bench) -> None:
        prepared = asyncio.Event()

        async def prepare() -> None:
            async with bench.calls.open(1) as call:
                await prepared.wait()
                await call.run([item(1)])

        tasks = [bench.start(1, 2), asyncio.ensure_future(prepare())]
        await bench.queued(2)
        await bench.calls.close()
        prepared.set()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, ModelNotReady)
        assert bench.engine.is_closed
        await bench.calls.close()

    check(test)


def test_call_counts_as_one_request_and_its_steps_as_executions() -> None:
    async def test(bench: Bench) -> None:
        task = bench.start(1, 2, 3)
        ids = await bench.queued(3)
        bench.engine.step(ids[:2])
        bench.engine.step(ids[2:])
        await task

    statistics = check(test).statistics
    assert (statistics.success.count, statistics.inference_count, statistics.execution_count) == (1, 3, 2)
    assert (statistics.compute_input.ns, statistics.compute_infer.ns, statistics.compute_output.ns) == (2, 20, 200)
    assert statistics.queue.ns == 5
    assert sorted(statistics.batches) == [1, 2]
