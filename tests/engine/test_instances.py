import contextlib
import itertools
import os
import random
import sys
import threading
import time

import pytest
from tests.engine.fake_tensor_runner import TIMES, FakeTensorRunner, ids, make_request, make_step

from sardonyx.engine.dynamic import DynamicOptions, DynamicPolicy, QueuePolicy
from sardonyx.engine.instances import InstanceLoop
from sardonyx.engine.sequences import SequenceOptions, SequencePolicy
from sardonyx.errors import EngineDead, EngineError, InvalidRequest, ModelNotReady, Overloaded, RequestAborted
from sardonyx.runtime.priority import MODEST_NICENESS

TIMEOUT_S = 20.0
STOPPING = "Server is stopping, scheduler for model has stopped accepting new inference requests"


class Inbox:
    """Where a loop delivers; the test waits on it instead of sleeping."""

    def __init__(self):
        self.lists = []
        self.on_event = lambda event: None
        self._num_inside = 0
        self._changed = threading.Condition()

    def __call__(self, events):
        self._num_inside += 1
        assert self._num_inside == 1, "never two at once"
        with self._changed:
            self.lists.append(events)
            self._changed.notify_all()
        for event in events:
            self.on_event(event)
        self._num_inside -= 1

    @property
    def events(self):
        return [event for events in list(self.lists) for event in events]

    @property
    def ids(self):
        return [event.request_id for event in self.events]

    def of(self, request_id):
        [event] = [event for event in self.events if event.request_id == request_id]
        return event

    def wait_for(self, *request_ids):
        with self._changed:
            assert self._changed.wait_for(lambda: set(request_ids) <= set(self.ids), TIMEOUT_S)


class Gate:
    """Holds each step of a runner until the test lets its instance go."""

    def __init__(self, num_instances=1):
        self.entered = [threading.Semaphore(0) for _ in range(num_instances)]
        self.leave = [threading.Semaphore(0) for _ in range(num_instances)]

    def __call__(self, batch, instance):
        self.entered[instance].release()
        assert self.leave[instance].acquire(timeout=TIMEOUT_S)

    def wait(self, instance=0):
        assert self.entered[instance].acquire(timeout=TIMEOUT_S)

    def open(self, instance=0, num_steps=1000):
        self.leave[instance].release(num_steps)


class Bench:
    """A started loop and what it is made of."""

    def __init__(
        self,
        on_step=None,
        policy=None,
        num_instances=1,
        is_quick=False,
        clock=time.monotonic,
        max_failed_steps=5,
        **options,
    ):
        self.inbox = Inbox()
        self.gate = on_step if isinstance(on_step, Gate) else None
        self.runner = FakeTensorRunner(on_step)
        self.policy = policy or DynamicPolicy(
            "m", DynamicOptions(**({"max_batch_size": 4, "is_batching": True} | options))
        )
        self.loop = InstanceLoop(
            "m",
            self.policy,
            self.runner,
            self.inbox,
            num_instances=num_instances,
            is_quick=is_quick,
            clock=clock,
            max_failed_steps=max_failed_steps,
        )
        self.loop.start()

    def submit(self, *request_ids, **fields):
        for request_id in request_ids:
            self.loop.submit(make_request(request_id, **fields))

    def run(self, *request_ids, **fields):
        self.submit(*request_ids, **fields)
        self.inbox.wait_for(*request_ids)


@pytest.fixture
def make_bench():
    benches = []

    def make(*args, **options):
        benches.append(Bench(*args, **options))
        return benches[-1]

    yield make
    for bench in benches:
        for instance in range(len(bench.gate.leave) if bench.gate else 0):
            bench.gate.open(instance)
        bench.loop.close(TIMEOUT_S)


def fail(batch, instance):
    raise EngineError("the session failed")


def break_down(batch, instance):
    raise RuntimeError("a bug")


def test_request_gets_its_outputs(make_bench):
    bench = make_bench()
    bench.run(1)
    event = bench.inbox.of(1)
    assert event.error is None
    assert event.outputs["id"].tolist() == [1]
    assert event.times == TIMES


def test_event_tells_the_time_in_the_queue_and_the_size_of_the_batch(make_bench):
    gate = Gate()
    now_s = [10.0]
    bench = make_bench(gate, clock=lambda: now_s[0])
    bench.submit(1)
    gate.wait()
    bench.submit(2, 3, batch_size=2, arrival_s=9.5)
    now_s[0] = 12.0
    gate.open()
    bench.inbox.wait_for(1, 2, 3)
    assert [bench.inbox.of(i).executed_batch_size for i in (1, 2, 3)] == [1, 4, 4]
    assert [bench.inbox.of(i).queue_ns for i in (2, 3)] == [2_500_000_000] * 2
    assert [bench.inbox.of(i).counts_execution for i in (1, 2, 3)] == [True, True, False]


def test_requests_that_come_during_a_step_share_the_next(make_bench):
    gate = Gate()
    bench = make_bench(gate)
    bench.submit(1)
    gate.wait()
    bench.submit(2, 3, 4)
    gate.open()
    bench.inbox.wait_for(1, 2, 3, 4)
    assert [ids(batch) for batch in bench.runner.batches] == [[1], [2, 3, 4]]
    assert [len(events) for events in bench.inbox.lists] == [1, 3]


def test_instances_run_at_once(make_bench):
    gate = Gate(2)
    bench = make_bench(gate, num_instances=2, is_batching=False)
    bench.submit(1, 2)
    gate.wait(0)
    gate.wait(1)
    assert bench.loop.stats().num_busy_instances == 2


def test_idle_loop_takes_no_turns(make_bench):
    bench = make_bench(num_instances=4)
    bench.run(1)
    calls = []
    schedule = bench.policy.schedule
    bench.policy.schedule = lambda *args: calls.append(args) or schedule(*args)
    bench.run(2)
    bench.run(3)
    assert len(calls) <= 6, "one thread a request, which looks again when it is done"


def test_delayed_batch_runs_when_its_time_is_over(make_bench):
    bench = make_bench(max_queue_delay_s=0.01, num_instances=2)
    bench.run(1, 2)
    assert [ids(batch) for batch in bench.runner.batches] == [[1, 2]]


def test_late_request_is_refused_while_all_instances_are_busy(make_bench):
    gate = Gate()
    bench = make_bench(gate, default_queue_policy=QueuePolicy(default_timeout_s=0.01))
    bench.submit(1)
    gate.wait()
    bench.submit(2, arrival_s=time.monotonic())
    bench.inbox.wait_for(2)
    event = bench.inbox.of(2)
    assert isinstance(event.error, Overloaded)
    assert event.error.message == "Request timeout expired"
    assert event.queue_ns >= 10_000_000
    assert event.executed_batch_size == 0
    assert bench.inbox.ids == [2]


def test_earlier_time_limit_is_kept_when_a_later_one_is_watched(make_bench):
    gate = Gate()
    bench = make_bench(gate, default_queue_policy=QueuePolicy(default_timeout_s=999, allows_timeout_override=True))
    bench.submit(1)
    gate.wait()
    bench.submit(2)
    bench.submit(3, timeout_s=0.01)
    bench.inbox.wait_for(3)
    assert bench.inbox.ids == [3]


def test_request_is_refused_when_the_queue_is_full(make_bench):
    gate = Gate()
    bench = make_bench(gate, default_queue_policy=QueuePolicy(max_queue_size=1))
    bench.submit(1)
    gate.wait()
    bench.submit(2)
    with pytest.raises(Overloaded, match=r"^Exceeds maximum queue size$"):
        bench.submit(3)
    gate.open()
    bench.inbox.wait_for(1, 2)
    bench.run(3)


def test_id_in_use_is_refused(make_bench):
    gate = Gate()
    bench = make_bench(gate)
    bench.submit(1)
    with pytest.raises(InvalidRequest):
        bench.submit(1)
    gate.open()
    bench.inbox.wait_for(1)
    assert bench.inbox.ids == [1]


def test_waiting_request_ends_at_once_when_it_is_aborted(make_bench):
    gate = Gate()
    bench = make_bench(gate)
    bench.submit(1)
    gate.wait()
    bench.submit(2)
    bench.loop.abort(2)
    assert isinstance(bench.inbox.of(2).error, RequestAborted)
    gate.open()
    bench.run(3)
    assert [ids(batch) for batch in bench.runner.batches] == [[1], [3]]


def test_running_request_ends_normally_when_it_is_aborted(make_bench):
    gate = Gate()
    bench = make_bench(gate)
    bench.submit(1)
    gate.wait()
    bench.loop.abort(1)
    gate.open()
    bench.inbox.wait_for(1)
    bench.loop.abort(1)
    bench.loop.abort(99)
    assert bench.inbox.of(1).error is None


def test_sequence_goes_on_from_its_state(make_bench):
    bench = make_bench(policy=SequencePolicy("m", SequenceOptions(max_batch_size=2, num_instances=2)), num_instances=2)
    for request_id, flags in enumerate(["S", "", "E"]):
        bench.loop.submit(make_step(request_id, 7, flags))
    bench.inbox.wait_for(0, 1, 2)
    assert bench.inbox.of(2).outputs["id"].tolist() == [0, 1, 2]


def test_sequence_that_waits_for_a_place_gets_that_of_an_idle_one(make_bench):
    bench = make_bench(policy=SequencePolicy("m", SequenceOptions(max_idle_s=0.01)))
    bench.loop.submit(make_step(1, 7, "S"))
    bench.loop.submit(make_step(2, 8, "S"))
    bench.inbox.wait_for(1, 2)


def test_requests_behind_an_aborted_one_of_their_sequence_end_too(make_bench):
    gate = Gate()
    bench = make_bench(gate, policy=SequencePolicy("m", SequenceOptions()))
    bench.loop.submit(make_step(1, 7, "S"))
    gate.wait()
    bench.loop.submit(make_step(2, 7))
    bench.loop.submit(make_step(3, 7))
    bench.loop.abort(2)
    assert [type(bench.inbox.of(i).error) for i in (2, 3)] == [RequestAborted] * 2


def test_failed_step_ends_its_requests_and_no_others(make_bench):
    steps = iter([fail, lambda batch, instance: None])
    bench = make_bench(lambda batch, instance: next(steps)(batch, instance))
    bench.run(1)
    bench.run(2)
    error = bench.inbox.of(1).error
    assert isinstance(error, EngineError)
    assert error.message == "the session failed"
    assert bench.inbox.of(2).error is None
    assert bench.loop.stats().num_failed_steps == 1


def test_failed_row_ends_alone(make_bench):
    gate = Gate()

    def on_step(batch, instance):
        gate(batch, instance)
        return {2: InvalidRequest("bad row")}

    bench = make_bench(on_step)
    bench.submit(1)
    gate.wait()
    bench.submit(2, 3)
    gate.open()
    bench.inbox.wait_for(2, 3)
    assert bench.inbox.of(2).error.message == "bad row"
    assert bench.inbox.of(3).error is None
    assert bench.loop.stats().num_failed_steps == 0


def test_text_of_an_unforeseen_error_is_kept_from_callers(make_bench, caplog):
    bench = make_bench(break_down)
    bench.run(1)
    assert bench.inbox.of(1).error.message == "internal error"
    assert "a bug" in caplog.text
    assert bench.loop.is_alive


def test_wrong_number_of_results_fails_the_step(make_bench, monkeypatch):
    bench = make_bench()
    execute = bench.runner.execute

    def lose_results(batch, instance):
        output = execute(batch, instance)
        output.results.clear()
        return output

    monkeypatch.setattr(bench.runner, "execute", lose_results)
    bench.run(1)
    assert bench.inbox.of(1).error.message == "internal error"


def test_loop_dies_when_steps_fail_one_after_the_other(make_bench):
    gate = Gate()

    def on_step(batch, instance):
        gate(batch, instance)
        raise EngineError("the session failed")

    bench = make_bench(on_step, is_batching=False)
    bench.submit(*range(7))
    gate.open(num_steps=5)
    bench.inbox.wait_for(*range(7))
    errors = [bench.inbox.of(i).error for i in range(7)]
    assert [type(error) for error in errors] == [EngineError] * 5 + [EngineDead] * 2
    assert not bench.loop.is_alive
    with pytest.raises(EngineDead):
        bench.submit(9)
    bench.loop.close(TIMEOUT_S)
    assert bench.runner.num_closed == 1


def test_loop_lives_however_many_steps_fail_where_that_proves_nothing(make_bench):
    bench = make_bench(fail, max_failed_steps=None)
    for request_id in range(20):
        bench.run(request_id)
    assert bench.loop.is_alive
    assert bench.loop.stats().num_failed_steps == 20


def test_loop_lives_when_steps_fail_now_and_then(make_bench):
    steps = iter([fail, lambda batch, instance: None] * 3)
    bench = make_bench(lambda batch, instance: next(steps)(batch, instance), max_failed_steps=2)
    for request_id in range(6):
        bench.run(request_id)
    assert bench.loop.is_alive
    assert bench.loop.stats().num_failed_steps == 3


@pytest.mark.parametrize("method", ["schedule", "update", "take_refused"])
def test_loop_dies_but_answers_when_its_policy_breaks(make_bench, monkeypatch, method):
    gate = Gate()
    bench = make_bench(gate, is_batching=False)
    bench.submit(1, 2, 3)
    gate.wait()

    def break_policy(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(bench.policy, method, break_policy)
    gate.open()
    bench.inbox.wait_for(1, 2, 3)
    assert sorted(bench.inbox.ids) == [1, 2, 3]
    assert isinstance(bench.inbox.of(3).error, EngineDead)
    assert not bench.loop.is_alive


def test_broken_receiver_does_not_stop_the_loop(make_bench, monkeypatch):
    bench = make_bench()
    broken = threading.Event()

    def deliver(events):
        if not broken.is_set():
            broken.set()
            raise RuntimeError("a bug")
        bench.inbox(events)

    monkeypatch.setattr(bench.loop._ledger, "_deliver", deliver)
    bench.submit(1)
    assert broken.wait(TIMEOUT_S)
    bench.run(2)


def test_close_ends_waiting_requests_and_lets_running_ones_finish(make_bench):
    gate = Gate()
    bench = make_bench(gate)
    bench.submit(1)
    gate.wait()
    bench.submit(2)
    closing = threading.Thread(target=bench.loop.close, args=(TIMEOUT_S,))
    closing.start()
    bench.inbox.wait_for(2)
    assert isinstance(bench.inbox.of(2).error, ModelNotReady)
    assert bench.inbox.of(2).error.message == STOPPING
    with pytest.raises(ModelNotReady, match=STOPPING):
        bench.submit(3)
    assert bench.runner.num_closed == 0
    gate.open()
    closing.join(TIMEOUT_S)
    assert bench.inbox.of(1).error is None
    assert bench.runner.num_closed == 1
    assert not [thread for thread in threading.enumerate() if thread in bench.loop._threads]


def test_close_lets_a_step_finish_that_run_ready_runs(make_bench):
    entered, leave = threading.Event(), threading.Event()

    def on_step(batch, instance):
        if threading.current_thread() is caller:
            entered.set()
            assert leave.wait(TIMEOUT_S)
            assert not bench.runner.num_closed

    def call():
        for request_id in itertools.count():
            bench.submit(request_id)
            bench.loop.run_ready()
            bench.inbox.wait_for(request_id)  # until its thread sleeps, an instance runs steps itself
            if entered.is_set():
                return

    bench = make_bench(on_step, is_quick=True)
    caller = threading.Thread(target=call)
    closer = threading.Thread(target=bench.loop.close)
    caller.start()
    assert entered.wait(TIMEOUT_S)
    closer.start()
    closer.join(0.1)
    leave.set()
    for thread in (closer, caller):
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    assert [event.error for event in bench.inbox.events if event.error] == []
    assert bench.runner.num_closed == 1


def test_run_ready_runs_what_waits_in_its_own_thread(make_bench):
    threads = []
    bench = make_bench(lambda batch, instance: threads.append(threading.current_thread()), is_quick=True)
    for request_id in itertools.count():
        bench.submit(request_id)
        bench.loop.run_ready()
        if threads and threads[-1] is threading.current_thread():
            break
        bench.inbox.wait_for(request_id)
    assert bench.inbox.of(request_id).error is None


def test_loop_dies_but_answers_when_steps_fail_in_the_thread_of_run_ready(make_bench):
    def fail(batch, instance):
        raise EngineError("the session failed")

    bench = make_bench(fail, is_quick=True, max_failed_steps=3)
    with contextlib.suppress(EngineDead):
        for request_id in range(100):
            bench.submit(request_id)
            bench.loop.run_ready()
            bench.inbox.wait_for(request_id)
    assert not bench.loop.is_alive
    assert 3 <= len(bench.inbox.ids) < 100, "each that was taken, until the loop died"


def test_close_twice_closes_the_runner_once(make_bench):
    bench = make_bench()
    bench.loop.close(TIMEOUT_S)
    bench.loop.close(TIMEOUT_S)
    assert bench.runner.num_closed == 1


def test_close_leaves_a_stuck_step_behind(make_bench):
    gate = Gate()
    bench = make_bench(gate)
    bench.submit(1)
    gate.wait()
    bench.loop.close(0.0)
    assert isinstance(bench.inbox.of(1).error, ModelNotReady)
    assert bench.runner.num_closed == 0
    gate.open()
    bench.loop._threads[0].join(TIMEOUT_S)
    assert bench.inbox.ids == [1]


def test_loop_that_was_never_started_takes_nothing():
    runner = FakeTensorRunner()
    loop = InstanceLoop("m", DynamicPolicy("m", DynamicOptions()), runner, Inbox())
    with pytest.raises(EngineDead):
        loop.submit(make_request(1))
    loop.close()
    assert runner.num_closed == 1


def test_stats_show_what_waits_and_runs_and_for_how_long_nothing_moved(make_bench):
    gate = Gate()
    now_s = [10.0]
    bench = make_bench(gate, clock=lambda: now_s[0])
    assert bench.loop.stalled_s == 0.0
    bench.submit(1)
    gate.wait()
    bench.submit(2, 3)
    now_s[0] = 13.0
    stats = bench.loop.stats()
    assert (stats.num_waiting, stats.num_running, stats.stalled_s, stats.has_work) == (2, 1, 3.0, True)
    assert bench.loop.stalled_s == 3.0
    gate.open()
    bench.inbox.wait_for(1, 2, 3)
    stats = bench.loop.stats()
    assert (stats.num_waiting, stats.num_running, stats.stalled_s, stats.has_work) == (0, 0, 0.0, False)
    assert stats.num_steps == 2


class Gates:
    """Holds each request until the test lets it go."""

    def __init__(self, *request_ids):
        self.entered = threading.Semaphore(0)
        self.leave = {request_id: threading.Event() for request_id in request_ids}

    def __call__(self, batch, instance):
        self.entered.release()
        for request in batch.requests:
            assert self.leave[request.id].wait(TIMEOUT_S)

    def wait_for_steps(self, num_steps):
        for _ in range(num_steps):
            assert self.entered.acquire(timeout=TIMEOUT_S)


def test_answers_come_in_the_order_of_requests_when_ordering_is_preserved(make_bench):
    gates = Gates(1, 2, 3)
    bench = make_bench(gates, num_instances=2, is_batching=False, preserve_ordering=True)
    bench.submit(1, 2, 3)
    gates.leave[2].set()
    gates.wait_for_steps(3)
    assert bench.inbox.ids == [], "2 is done, as 3 has begun, and waits for 1"
    gates.leave[1].set()
    bench.inbox.wait_for(1, 2)
    gates.leave[3].set()
    bench.inbox.wait_for(3)
    assert bench.inbox.ids == [1, 2, 3]


def test_aborted_request_waits_for_nobody_when_ordering_is_preserved(make_bench):
    gate = Gate()
    bench = make_bench(gate, preserve_ordering=True)
    bench.submit(1)
    gate.wait()
    bench.submit(2, 3)
    bench.loop.abort(2)
    assert bench.inbox.ids == [2]
    gate.open()
    bench.inbox.wait_for(1, 3)
    assert bench.inbox.ids == [2, 1, 3]


def test_close_delivers_what_is_done_when_it_waits_for_a_stuck_step(make_bench):
    gates = Gates(1, 2, 3)
    bench = make_bench(gates, num_instances=2, is_batching=False, preserve_ordering=True)
    bench.submit(1, 2, 3)
    gates.leave[2].set()
    gates.wait_for_steps(3)
    bench.loop.close(0.0)
    assert bench.inbox.ids == [1, 2, 3]
    assert [type(bench.inbox.of(i).error) for i in (1, 2, 3)] == [ModelNotReady, type(None), ModelNotReady]
    for leave in gates.leave.values():
        leave.set()


@pytest.mark.parametrize("is_ordered", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "delayed", "alone", "direct", "oldest", "quick"])
@pytest.mark.parametrize("seed", range(3))
def test_every_request_gets_one_event_with_aborts_failures_and_a_close_in_the_middle(kind, seed, is_ordered):
    if kind in ("direct", "oldest"):
        policy = SequencePolicy(
            "m",
            SequenceOptions(
                strategy=kind, max_batch_size=3, num_instances=3, max_idle_s=0.002, preserve_ordering=is_ordered
            ),
        )
    else:
        options = DynamicOptions(
            max_batch_size=5,
            is_batching=kind != "alone",
            max_queue_delay_s=0.001 if kind == "delayed" else 0.0,
            default_queue_policy=QueuePolicy(default_timeout_s=0.002 if seed == 1 else 0.0, max_queue_size=50),
            preserve_ordering=is_ordered,
        )
        policy = DynamicPolicy("m", options)
    chance = random.Random(seed)

    def on_step(batch, instance):
        if chance.random() < 0.1:
            raise EngineError("the session failed")
        return {request.id: InvalidRequest("bad row") for request in batch.requests if chance.random() < 0.1}

    bench = Bench(on_step, policy=policy, num_instances=3, is_quick=kind == "quick", max_failed_steps=10**9)
    one_at_a_time = threading.Lock()
    taken: list[list[int]] = [[] for _ in range(3)]
    may_submit = [threading.Semaphore(8) for _ in range(3)]
    halfway = threading.Barrier(4)

    def call(caller):
        mine = random.Random(100 * seed + caller)
        for i in range(600):
            if i == 400:
                halfway.wait(TIMEOUT_S)
            request_id = 1000 * caller + i
            if kind in ("direct", "oldest"):
                flags = mine.choice(["S", "", "", "E", "SE"])
                request = make_step(request_id, 10 * caller + mine.randrange(1, 5), flags)
            else:
                request = make_request(request_id, mine.randrange(1, 4), batch_key=mine.choice("aab"))
            try:
                assert may_submit[caller].acquire(timeout=TIMEOUT_S)
                bench.loop.submit(request)
                if kind == "quick":
                    with one_at_a_time:
                        bench.loop.run_ready()
            except (InvalidRequest, Overloaded, ModelNotReady):
                may_submit[caller].release()
                continue
            taken[caller].append(request_id)
            if mine.random() < 0.2:
                bench.loop.abort(mine.choice(taken[caller][-5:]))

    bench.inbox.on_event = lambda event: may_submit[event.request_id // 1000].release()
    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(3)]
    for thread in callers:
        thread.start()
    halfway.wait(TIMEOUT_S)
    bench.loop.close(TIMEOUT_S)
    for thread in callers:
        thread.join(TIMEOUT_S)
    assert sorted(bench.inbox.ids) == sorted(itertools.chain(*taken))
    assert sum(map(len, taken)) > 300
    assert bench.runner.num_closed == 1
    if is_ordered:
        for mine in taken:
            ran = [e.request_id for e in bench.inbox.events if e.executed_batch_size and e.request_id in set(mine)]
            assert ran == [each for each in mine if each in set(ran)]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own elsewhere")
def test_modest_instances_leave_the_processor_to_the_others():
    niceness = {}

    inbox, gate = Inbox(), Gate(num_instances=2)

    def on_step(batch, instance):
        niceness[instance] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        gate(batch, instance)

    policy = DynamicPolicy("m", DynamicOptions(max_batch_size=1))
    loop = InstanceLoop("m", policy, FakeTensorRunner(on_step), inbox, num_instances=2, num_modest=1)
    loop.start()
    loop.submit(make_request(1))
    loop.submit(make_request(2))
    for instance in range(2):
        gate.wait(instance)
        gate.open(instance)
    inbox.wait_for(1, 2)
    loop.close()
    normal = os.getpriority(os.PRIO_PROCESS, 0)
    assert niceness == {0: min(normal + MODEST_NICENESS, 19), 1: normal}
