import threading
from collections.abc import Callable

import pytest
from tests.engine.driver import make_limits
from tests.engine.fake_runner import FakeRunner, complete

from sardonyx.core import Batch, FinishReason, Request, SequenceEvent
from sardonyx.engine.continuous import ContinuousPolicy
from sardonyx.engine.loop import StepLoop
from sardonyx.errors import EngineDead, EngineError, InvalidRequest

TIMEOUT_S = 20.0
LIMITS = make_limits()


class Inbox:
    """Where a loop delivers; the test waits on it instead of sleeping."""

    def __init__(self) -> None:
        self.lists: list[list[SequenceEvent]] = []
        self._changed = threading.Condition()

    def __call__(self, events: list[SequenceEvent]) -> None:
        with self._changed:
            self.lists.append(events)
            self._changed.notify_all()

    def of(self, request_id: str) -> list[SequenceEvent]:
        return [event for events in list(self.lists) for event in events if event.request_id == request_id]

    def ends(self, request_id: str) -> list[FinishReason]:
        return [event.finish_reason for event in self.of(request_id) if event.finish_reason is not None]

    def wait(self, is_there: Callable[[], object]) -> None:
        with self._changed:
            assert self._changed.wait_for(is_there, TIMEOUT_S)

    def wait_for_end(self, *request_ids: str) -> None:
        self.wait(lambda: all(self.ends(request_id) for request_id in request_ids))


class Gate:
    """Holds the runner inside a step until the test lets it go."""

    def __init__(self) -> None:
        self.is_entered = threading.Event()
        self.may_leave = threading.Event()

    def __call__(self, batch: Batch) -> None:
        self.is_entered.set()
        assert self.may_leave.wait(TIMEOUT_S)

    def wait(self) -> None:
        assert self.is_entered.wait(TIMEOUT_S)


def request(request_id: str, num_tokens: int = 3, **fields: int) -> Request:
    return Request(id=request_id, prompt_ids=[ord(request_id[0])] * num_tokens, **({"max_tokens": 4} | fields))


class Bench:
    """A started loop and what it is made of."""

    def __init__(self, on_step: Callable[[Batch], dict[int, str] | None] | None = None, **options: int) -> None:
        self.inbox = Inbox()
        self.runner = FakeRunner(LIMITS, on_step=on_step)
        self.policy = ContinuousPolicy(LIMITS)
        self.now_s = 0.0
        self.loop = StepLoop("tiny", self.policy, self.runner, self.inbox, clock=lambda: self.now_s, **options)
        self.loop.start()


@pytest.fixture
def make_bench():
    benches = []

    def make(on_step=None, **options):
        benches.append(Bench(on_step, **options))
        return benches[-1]

    yield make
    for bench in benches:
        bench.loop.close(TIMEOUT_S)


def fail(batch: Batch) -> None:
    raise EngineError("the session failed")


def break_down(batch: Batch) -> None:
    raise RuntimeError("a bug")


def test_request_gets_its_tokens_and_one_end(make_bench):
    bench = make_bench()
    bench.loop.submit(request("a"))
    bench.inbox.wait_for_end("a")
    tokens = [token for event in bench.inbox.of("a") for token in event.token_ids]
    assert (tokens, bench.inbox.ends("a")[0]) == complete(request("a"), LIMITS)


def test_events_of_a_step_come_in_one_list(make_bench):
    gate = Gate()
    bench = make_bench(gate)
    bench.loop.submit(request("first"))
    gate.wait()
    for request_id in "abc":
        bench.loop.submit(request(request_id))
    gate.may_leave.set()
    bench.inbox.wait_for_end("a", "b", "c")
    assert [sorted(event.request_id for event in events) for events in bench.inbox.lists][-1] == ["a", "b", "c"]


def test_idle_loop_takes_no_turns(make_bench):
    bench = make_bench()
    num_calls = 0
    schedule = bench.policy.schedule

    def counted(now_s: float) -> Batch | None:
        nonlocal num_calls
        num_calls += 1
        return schedule(now_s)

    bench.policy.schedule = counted
    for request_id in "abc":
        bench.loop.submit(request(request_id, max_tokens=4))
        bench.inbox.wait_for_end(request_id)
    bench.loop.close()
    assert bench.loop.num_steps == 12
    assert num_calls <= 12 + 3, "one that finds nothing to do after each request, at most"


def test_abort_ends_a_running_request_at_the_next_step(make_bench):
    gate = Gate()
    bench = make_bench(gate)
    bench.loop.submit(request("a", max_tokens=100))
    gate.wait()
    bench.loop.abort("a")
    bench.loop.abort("a")
    gate.may_leave.set()
    bench.inbox.wait_for_end("a")
    assert bench.inbox.ends("a") == [FinishReason.CANCELLED]
    assert bench.loop.num_steps == 1


def test_abort_of_a_request_that_no_step_has_seen_ends_it(make_bench):
    gate = Gate()
    bench = make_bench(gate)
    bench.loop.submit(request("a"))
    gate.wait()
    bench.loop.submit(request("b"))
    bench.loop.abort("b")
    gate.may_leave.set()
    bench.inbox.wait_for_end("a", "b")
    assert bench.inbox.ends("b") == [FinishReason.CANCELLED]


def test_abort_of_an_unknown_request_is_ignored(make_bench):
    bench = make_bench()
    bench.loop.abort("nobody")
    bench.loop.submit(request("a"))
    bench.inbox.wait_for_end("a")
    bench.loop.abort("a")
    bench.loop.submit(request("b"))
    bench.inbox.wait_for_end("b")
    assert len(bench.inbox.ends("a")) == 1


def test_request_that_can_never_run_is_refused_to_its_caller(make_bench):
    bench = make_bench()
    with pytest.raises(InvalidRequest):
        bench.loop.submit(request("a", num_tokens=LIMITS.max_model_len + 1))


def test_id_in_use_is_refused(make_bench):
    gate = Gate()
    bench = make_bench(gate)
    bench.loop.submit(request("a"))
    with pytest.raises(InvalidRequest, match="id"):
        bench.loop.submit(request("a"))
    gate.may_leave.set()
    bench.inbox.wait_for_end("a")
    bench.loop.submit(request("a"))


def test_failed_step_ends_its_requests_and_the_loop_goes_on(make_bench, caplog):
    bench = make_bench(fail)
    bench.loop.submit(request("a"))
    bench.inbox.wait_for_end("a")
    bench.runner.on_step = None
    bench.loop.submit(request("b"))
    bench.inbox.wait_for_end("b")
    assert bench.inbox.of("a")[-1].error == "the session failed"
    assert bench.inbox.ends("a") + bench.inbox.ends("b") == [FinishReason.ERROR, FinishReason.LENGTH]
    assert bench.loop.is_alive
    assert bench.loop.stats().num_failed_steps == 1
    assert "a step of 1 rows failed" in caplog.text


def test_loop_dies_when_steps_keep_failing(make_bench):
    bench = make_bench(fail, max_failed_steps=2)
    for request_id in "ab":
        bench.loop.submit(request(request_id))
        bench.inbox.wait_for_end(request_id)
    bench.loop._thread.join(TIMEOUT_S)
    assert not bench.loop.is_alive
    with pytest.raises(EngineDead):
        bench.loop.submit(request("c"))


def test_loop_survives_failures_that_do_not_follow_one_another(make_bench):
    bench = make_bench(max_failed_steps=2)
    for request_id, on_step in (("a", fail), ("b", None), ("c", fail), ("d", None)):
        bench.runner.on_step = on_step
        bench.loop.submit(request(request_id))
        bench.inbox.wait_for_end(request_id)
    assert bench.loop.is_alive


def test_every_request_ends_with_error_when_the_loop_dies(make_bench, caplog):
    gate = Gate()
    bench = make_bench(gate)
    for request_id in "abcdefgh":
        bench.loop.submit(request(request_id))
    gate.wait()
    bench.loop.submit(request("late"))
    bench.runner.on_step = break_down
    gate.may_leave.set()
    bench.inbox.wait_for_end(*"abcdefgh", "late")
    bench.loop._thread.join(TIMEOUT_S)
    assert all(bench.inbox.ends(each) == [FinishReason.ERROR] for each in (*"abcdefgh", "late"))
    assert "a bug" not in (bench.inbox.of("a")[-1].error or "")
    assert "a bug" in caplog.text
    assert not bench.loop.is_alive
    stats = bench.loop.stats()
    assert (stats.has_work, stats.num_running, stats.num_waiting, stats.stalled_s) == (False, 0, 0, 0.0)


def test_answer_of_the_wrong_shape_kills_the_loop_and_no_request_waits(make_bench):
    bench = make_bench()
    execute = bench.runner.execute

    def short(batch: Batch):
        output = execute(batch)
        output.token_ids.pop()
        return output

    bench.runner.execute = short
    bench.loop.submit(request("a"))
    bench.inbox.wait_for_end("a")
    assert bench.inbox.ends("a") == [FinishReason.ERROR]


def test_close_finishes_the_step_and_cancels_the_rest(make_bench):
    gate = Gate()
    bench = make_bench(gate)
    bench.loop.submit(request("a", max_tokens=1))
    gate.wait()
    bench.loop.submit(request("b"))
    thread = bench.loop._thread
    join, is_joining = thread.join, threading.Event()
    thread.join = lambda timeout: (is_joining.set(), join(timeout))
    closing = threading.Thread(target=bench.loop.close)
    closing.start()
    assert is_joining.wait(TIMEOUT_S)
    gate.may_leave.set()
    closing.join(TIMEOUT_S)
    assert bench.inbox.ends("a") == [FinishReason.LENGTH]
    assert bench.inbox.ends("b") == [FinishReason.CANCELLED]
    with pytest.raises(EngineDead):
        bench.loop.submit(request("c"))


def test_runner_is_closed_once(make_bench):
    bench = make_bench()
    closing = [threading.Thread(target=bench.loop.close) for _ in range(4)]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(TIMEOUT_S)
    assert bench.runner.num_closed == 1


def test_runner_of_a_dead_loop_is_closed_by_close(make_bench):
    bench = make_bench(break_down)
    bench.loop.submit(request("a"))
    bench.inbox.wait_for_end("a")
    assert bench.runner.num_closed == 0
    bench.loop.close()
    assert bench.runner.num_closed == 1


def test_close_leaves_a_stuck_step_behind_and_ends_its_requests_once(make_bench):
    gate = Gate()
    bench = make_bench(gate)
    bench.loop.submit(request("a", max_tokens=1))
    gate.wait()
    bench.loop.close(timeout_s=0.0)
    assert bench.inbox.ends("a") == [FinishReason.CANCELLED]
    assert bench.runner.num_closed == 0
    gate.may_leave.set()
    bench.loop._thread.join(TIMEOUT_S)
    assert bench.inbox.ends("a") == [FinishReason.CANCELLED]


def test_loop_that_never_started_takes_nothing_and_closes_its_runner():
    runner = FakeRunner(LIMITS)
    loop = StepLoop("tiny", ContinuousPolicy(LIMITS), runner, Inbox())
    with pytest.raises(EngineDead):
        loop.submit(request("a"))
    loop.close()
    assert runner.num_closed == 1


@pytest.mark.parametrize("is_death", [False, True])
def test_requests_that_race_with_the_end_get_an_end_or_a_refusal(make_bench, is_death):
    bench = make_bench()
    taken: list[str] = []
    has_begun = threading.Barrier(4)

    def submit_many(letter: str) -> None:
        has_begun.wait(TIMEOUT_S)
        for i in range(10_000):
            try:
                bench.loop.submit(request(f"{letter}{i}", max_tokens=1))
            except EngineDead:
                return
            taken.append(f"{letter}{i}")

    threads = [threading.Thread(target=submit_many, args=(letter,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    has_begun.wait(TIMEOUT_S)
    bench.inbox.wait(lambda: bench.inbox.lists)
    if is_death:
        bench.runner.on_step = break_down
    else:
        bench.loop.close()
    for thread in threads:
        thread.join(TIMEOUT_S)
    bench.loop._thread.join(TIMEOUT_S)
    ends = [event.request_id for events in bench.inbox.lists for event in events if event.finish_reason]
    assert sorted(ends) == sorted(taken)


def test_seed_is_drawn_where_none_is_given(make_bench):
    seeds = {}
    bench = make_bench(lambda batch: seeds.update((row.sequence.request.id, row.sequence.seed) for row in batch.rows))
    bench.loop.submit(Request(id="a", prompt_ids=[1]))
    bench.loop.submit(Request(id="b", prompt_ids=[1]))
    bench.inbox.wait_for_end("a", "b")
    assert seeds["a"] != seeds["b"]


def test_stats_are_of_one_moment_and_tell_how_long_work_has_stood_still(make_bench):
    gate = Gate()
    bench = make_bench(gate)
    bench.now_s = 50.0
    assert bench.loop.stats().stalled_s == 0.0
    bench.loop.submit(request("a", num_tokens=5, max_tokens=2))
    gate.wait()
    bench.loop.submit(request("b"))
    bench.now_s = 53.0
    stats = bench.loop.stats()
    assert (stats.num_running, stats.num_waiting, stats.has_work, stats.is_alive) == (1, 1, True, True)
    assert stats.stalled_s == 3.0
    gate.may_leave.set()
    bench.inbox.wait_for_end("a", "b")
    bench.loop.close()
    stats = bench.loop.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.num_failed_steps) == (8, 6, 0)
    assert stats.num_steps == sum(stats.step_s_counts) == bench.loop.num_steps
    assert stats.step_tokens == 8 + 6 - 2
    assert stats.step_s_sum == 3.0
    assert (stats.last_step_rows, stats.last_step_tokens, stats.last_step_s) == (1, 1, 0.0)


def test_a_loop_prepares_in_its_own_thread_before_it_has_started(make_bench):
    threads = []
    bench = make_bench(prepare=lambda: threads.append(threading.current_thread().name))
    assert threads == ["step-loop-tiny"]
    bench.loop.submit(request("a"))
    bench.inbox.wait_for_end("a")


def test_a_loop_that_cannot_prepare_does_not_start():
    runner = FakeRunner(LIMITS)
    loop = StepLoop("tiny", ContinuousPolicy(LIMITS), runner, Inbox(), prepare=lambda: fail(None))
    with pytest.raises(EngineError, match="the session failed"):
        loop.start()
    assert not loop.is_alive
    with pytest.raises(EngineDead):
        loop.submit(request("a"))
    loop.close(TIMEOUT_S)
