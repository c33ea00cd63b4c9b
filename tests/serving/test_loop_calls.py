"""Calls on a step loop: what is admitted and counted, and how they and the model end."""

import asyncio

import pytest
from tests.serving.speech_serving import ScriptedEngine

from sardonyx.errors import (
    DeadlineExceeded,
    EngineDead,
    EngineError,
    InvalidRequest,
    ModelNotReady,
    Overloaded,
    RequestAborted,
    ServeError,
    UnsupportedFeature,
)
from sardonyx.metrics import ModelMetrics
from sardonyx.serving.admission import Admission
from sardonyx.serving.dispatch import EventDispatch
from sardonyx.serving.loop_calls import Acceptance, LoopCalls
from sardonyx.statistics import InferenceStatistics


class Call:
    """Ends when a test says so."""

    def __init__(self, id: str, acceptance: Acceptance, bench: "Bench") -> None:
        self.id = id
        self.error: ServeError | None = None
        self._acceptance = acceptance
        self._bench = bench

    def end(self, error: ServeError | None = None) -> None:
        self.error = error
        self._acceptance.reservation.release(was_served=error is None)
        self._bench.calls.end(self, error)

    def abort(self, error: ServeError | None = None) -> None:
        self.end(error or RequestAborted("stopped"))


class Bench:
    """Calls, with all parts in reach."""

    def __init__(self, max_sequences: int = 8) -> None:
        self.loop = ScriptedEngine(EventDispatch(), lambda _: None)
        self.admission = Admission(max_sequences, 100)
        self.statistics = InferenceStatistics("tiny", 1)
        self.metrics = ModelMetrics("tiny")
        self.num_closed = 0
        self.calls = LoopCalls[Call](
            "tiny",
            self.loop,
            admission=self.admission,
            metrics=self.metrics,
            statistics=self.statistics,
            on_close=self._count_close,
        )

    def _count_close(self) -> None:
        self.num_closed += 1

    def start(self, id: str = "call", num_sequences: int = 1, num_tokens: int = 10) -> Call:
        with self.calls.accept(num_sequences, num_tokens) as accepted:
            pass
        call = Call(id, accepted, self)
        self.calls.begin(call, accepted)
        return call

    @property
    def num_loops(self) -> int:
        """That the metrics read."""
        return len(self.metrics._engine.sources)

    def assert_idle(self) -> None:
        assert (self.admission.num_sequences, self.admission.num_tokens) == (0, 0)
        assert (self.calls.num_active, self.statistics.num_pending) == (0, 0)


@pytest.fixture
def bench():
    return Bench()


def test_call_is_counted_from_its_acceptance_to_its_end(bench):
    with bench.calls.accept(2, 10) as accepted:
        assert (bench.calls.num_active, bench.statistics.num_pending) == (1, 1)
        accepted.reservation.correct(30)
        assert (bench.admission.num_sequences, bench.admission.num_tokens) == (2, 30)
    call = Call("call", accepted, bench)
    bench.calls.begin(call, accepted)
    assert (bench.calls.num_active, bench.statistics.num_pending) == (1, 1)
    assert bench.statistics.success.count == 0
    call.end()
    bench.assert_idle()
    statistics = bench.statistics
    assert (statistics.success.count, statistics.fail.count) == (1, 0)
    assert (statistics.inference_count, statistics.execution_count) == (1, 1)
    assert statistics.success.ns > 0


@pytest.mark.parametrize(
    ("error", "failures"),
    [
        (EngineError("it broke"), {"BACKEND": 1}),
        (EngineDead("it stopped"), {"BACKEND": 1}),
        (DeadlineExceeded("too late"), {"CANCELED": 1}),
        (RequestAborted("the client left"), {"CANCELED": 1}),
        (Overloaded("no slot", retry_after_s=1), {"REJECTED": 1}),
        (InvalidRequest("no sound"), {}),
    ],
)
def test_failures_are_counted_by_reason_and_refusals_for_what_is_said_are_not(bench, error, failures):
    bench.start().end(error)
    assert bench.statistics.failures == failures
    with pytest.raises(type(error)), bench.calls.accept(1, 10):
        raise error
    assert bench.statistics.failures == dict.fromkeys(failures, 2)
    bench.assert_idle()


@pytest.mark.parametrize(
    ("error", "failures"),
    [
        (UnsupportedFeature("no words"), {}),
        (asyncio.CancelledError(), {"CANCELED": 1}),
        (ZeroDivisionError(), {}),
    ],
)
def test_what_the_preparation_raises_ends_the_call(bench, error, failures):
    with pytest.raises(type(error)), bench.calls.accept(1, 10):
        raise error
    assert bench.statistics.failures == failures
    bench.assert_idle()


def test_so_many_calls_and_no_more():
    bench = Bench(max_sequences=1)
    first = bench.start()
    with pytest.raises(Overloaded, match="limit of 1 requests"):
        bench.start()
    assert bench.statistics.failures == {"REJECTED": 1}
    first.end()
    bench.start().end()
    bench.assert_idle()


def test_correction_that_does_not_fit_ends_the_call(bench):
    first = bench.start()
    with pytest.raises(Overloaded), bench.calls.accept(1, 10) as accepted:
        accepted.reservation.correct(91)
    assert bench.statistics.failures == {"REJECTED": 1}
    assert bench.admission.num_tokens == 10
    first.end()


@pytest.mark.parametrize(
    ("request_id", "ended"), [("first", ["first"]), ("third", []), (None, ["first", "second"])], ids=str
)
def test_calls_are_stopped_by_name_or_all(bench, request_id, ended):
    calls = [bench.start(name) for name in ("first", "second")]
    assert bench.calls.stop(request_id) == len(ended)
    assert [call.id for call in calls if isinstance(call.error, RequestAborted)] == ended
    assert bench.calls.num_active == 2 - len(ended)


def test_drain_takes_no_more_calls_and_waits_for_those_there_are(bench):
    async def main():
        with bench.calls.accept(1, 10) as accepted:
            draining = asyncio.ensure_future(bench.calls.drain(60))
            await asyncio.sleep(0)
            with pytest.raises(ModelNotReady, match="tiny is being unloaded"):
                bench.start()
        assert bench.statistics.failures == {}
        call = Call("call", accepted, bench)
        bench.calls.begin(call, accepted)
        await asyncio.sleep(0)
        assert not draining.done()
        call.end()
        await draining
        await bench.calls.drain(60)  # nothing is left

    asyncio.run(main())
    bench.assert_idle()


def test_close_ends_what_is_left(bench):
    call = bench.start()
    assert bench.num_loops == 1
    asyncio.run(bench.calls.close())
    assert isinstance(call.error, ModelNotReady)
    assert bench.statistics.failures == {"REJECTED": 1}
    assert bench.loop.is_closed
    assert not bench.calls.is_alive
    asyncio.run(bench.calls.close())
    assert (bench.num_closed, bench.num_loops) == (1, 0)
    with pytest.raises(ModelNotReady):
        bench.start()
    bench.assert_idle()


def test_call_that_was_prepared_while_the_model_was_closed_does_not_begin(bench):
    async def main():
        with bench.calls.accept(1, 10):
            await bench.calls.close()

    with pytest.raises(ModelNotReady):
        asyncio.run(main())
    assert bench.statistics.failures == {"REJECTED": 1}
    bench.assert_idle()


def test_model_that_was_never_put_in_place_is_discarded(bench):
    bench.calls.discard()
    assert bench.loop.is_closed
    assert (bench.num_closed, bench.num_loops) == (1, 0)
