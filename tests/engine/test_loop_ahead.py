"""The loop over a runner whose steps overlap: what it launches when, and that every promise of the loop still holds."""

import threading
from collections.abc import Callable

import pytest
from tests.engine.fake_device import FakeDevice
from tests.engine.fake_runner import complete
from tests.engine.paged_driver import make_paged_limits
from tests.engine.test_loop import TIMEOUT_S, Gate, Inbox, break_down, fail, request

from sardonyx.core import Batch, FinishReason
from sardonyx.engine.continuous import ContinuousPolicy
from sardonyx.engine.loop import StepLoop
from sardonyx.errors import EngineDead

LIMITS = make_paged_limits()


class Bench:
    """A started loop and what it is made of."""

    def __init__(self, on_step: Callable[[Batch], dict[int, str] | None] | None = None, **options: int) -> None:
        self.inbox = Inbox()
        self.device = FakeDevice(LIMITS)
        self.device.on_step = on_step
        self.now_s = 0.0
        self.num_out: list[int] = []
        self.loop = StepLoop(
            "tiny", ContinuousPolicy(LIMITS), self.device, self.deliver, clock=lambda: self.now_s, **options
        )
        self.loop.start()

    def deliver(self, events) -> None:
        self.num_out.append(len(self.device.out))
        self.inbox(events)

    def tokens(self, request_id: str) -> list[int]:
        return [token for event in self.inbox.of(request_id) for token in event.token_ids]


@pytest.fixture
def make_bench():
    benches = []

    def make(on_step=None, **options):
        benches.append(Bench(on_step, **options))
        return benches[-1]

    yield make
    for bench in benches:
        bench.loop.close(TIMEOUT_S)


class Nth:
    """Does something to one step and lets the others be."""

    def __init__(self, number: int, act: Callable[[Batch], None]) -> None:
        self.num_steps = 0
        self.number, self.act = number, act

    def __call__(self, batch: Batch) -> None:
        self.num_steps += 1
        if self.num_steps == self.number:
            self.act(batch)


def test_requests_get_their_tokens_and_one_end(make_bench):
    bench = make_bench()
    for i, request_id in enumerate("abcdefgh"):
        bench.loop.submit(request(request_id, 3 + 9 * i, max_tokens=20))
    bench.inbox.wait_for_end(*"abcdefgh")
    for i, request_id in enumerate("abcdefgh"):
        wanted, reason = complete(request(request_id, 3 + 9 * i, max_tokens=20), LIMITS)
        assert (bench.tokens(request_id), bench.inbox.ends(request_id)) == (wanted, [reason])


def test_step_is_launched_before_the_one_before_it_is_collected_and_delivered(make_bench):
    bench = make_bench()
    bench.loop.submit(request("a", max_tokens=5))
    bench.inbox.wait_for_end("a")
    bench.loop.close()
    assert bench.device.log == ["launch", *["launch", "collect"] * 4, "collect"]
    assert bench.num_out == [1, 1, 1, 1, 0]
    assert bench.loop.num_steps == 5


def test_nothing_is_launched_behind_a_step_that_cannot_be_followed(make_bench):
    bench = make_bench()
    bench.device.is_followed = lambda batch: False
    bench.loop.submit(request("a", max_tokens=5))
    bench.inbox.wait_for_end("a")
    assert bench.device.log == ["launch", "collect"] * 5
    assert bench.tokens("a") == complete(request("a", max_tokens=5), LIMITS)[0]


def test_blocks_are_served_by_a_runner_whose_steps_do_not_overlap():
    inbox, device = Inbox(), FakeDevice(LIMITS)

    class Plain:
        limits, execute, close = LIMITS, device.execute, device.close

    loop = StepLoop("tiny", ContinuousPolicy(LIMITS), Plain(), inbox)
    loop.start()
    loop.submit(request("a"))
    inbox.wait_for_end("a")
    loop.close()
    assert [token for event in inbox.of("a") for token in event.token_ids] == complete(request("a"), LIMITS)[0]
    assert device.log == ["launch", "collect"] * 4


def test_request_that_comes_while_steps_are_out_joins_the_next_one(make_bench):
    gate = Gate()
    bench = make_bench(Nth(1, gate))
    bench.loop.submit(request("a", max_tokens=20))
    gate.wait()
    bench.loop.submit(request("b", max_tokens=3))
    gate.may_leave.set()
    bench.inbox.wait_for_end("a", "b")
    first = [sorted(event.request_id for event in events) for events in bench.inbox.lists].index(["a", "b"])
    assert first == 2, "two steps were out when it came"


def test_abort_ends_a_request_with_a_row_that_is_out(make_bench):
    gate = Gate()
    bench = make_bench(Nth(1, gate))
    bench.loop.submit(request("a", max_tokens=100))
    bench.loop.submit(request("b", max_tokens=6))
    gate.wait()
    bench.loop.abort("a")
    gate.may_leave.set()
    bench.inbox.wait_for_end("a", "b")
    assert bench.inbox.ends("a") == [FinishReason.CANCELLED]
    assert bench.tokens("b") == complete(request("b", max_tokens=6), LIMITS)[0]


def test_failed_step_ends_its_requests_and_those_of_the_step_behind_it(make_bench, caplog):
    gate = Gate()
    bench = make_bench(Nth(1, gate))
    bench.loop.submit(request("a", max_tokens=50))
    gate.wait()
    bench.loop.submit(request("b", max_tokens=50))
    bench.device.on_step = Nth(1, fail)
    gate.may_leave.set()
    bench.inbox.wait_for_end("a", "b")
    bench.loop.submit(request("c"))
    bench.inbox.wait_for_end("c")
    assert [bench.inbox.of(each)[-1].error for each in "ab"] == ["the session failed"] * 2
    assert bench.tokens("c") == complete(request("c"), LIMITS)[0]
    stats = bench.loop.stats()
    assert stats.num_failed_steps == 2
    assert bench.loop.is_alive
    assert "a step of 1 rows failed" in caplog.text
    assert "a step of 2 rows failed" in caplog.text


def test_step_that_is_not_started_fails_after_the_one_before_it_is_delivered(make_bench):
    bench = make_bench()
    bench.device.on_launch = Nth(3, fail)
    bench.loop.submit(request("a", max_tokens=50))
    bench.inbox.wait_for_end("a")
    assert bench.tokens("a") == complete(request("a", max_tokens=2), LIMITS)[0]
    assert bench.inbox.of("a")[-1].error == "the session failed"
    bench.loop.submit(request("b"))
    bench.inbox.wait_for_end("b")
    assert bench.tokens("b") == complete(request("b"), LIMITS)[0]
    assert bench.loop.stats().num_failed_steps == 1


def test_first_step_that_is_not_started_fails(make_bench):
    bench = make_bench()
    bench.device.on_launch = Nth(1, fail)
    bench.loop.submit(request("a"))
    bench.inbox.wait_for_end("a")
    assert bench.inbox.ends("a") == [FinishReason.ERROR]
    assert bench.device.log == []


def test_loop_dies_when_steps_keep_failing_and_counts_two_that_fall_together_once(make_bench):
    bench = make_bench(fail, max_failed_steps=2)
    bench.loop.submit(request("a"))
    bench.inbox.wait_for_end("a")
    bench.loop.submit(request("b"))
    bench.inbox.wait_for_end("b")
    bench.loop._thread.join(TIMEOUT_S)
    assert bench.inbox.of("b")[-1].error == "the session failed", "and not: the engine has stopped"
    assert bench.loop.stats().num_failed_steps == 4
    assert not bench.loop.is_alive
    with pytest.raises(EngineDead):
        bench.loop.submit(request("c"))


def test_every_request_ends_with_error_when_the_loop_dies_with_steps_out(make_bench):
    gate = Gate()
    bench = make_bench(Nth(1, gate))
    bench.device.close = lambda: None
    bench.loop.submit(request("a", max_tokens=50))
    gate.wait()
    bench.loop.submit(request("b"))
    bench.device.on_step = break_down
    gate.may_leave.set()
    bench.inbox.wait_for_end("a", "b")
    assert [bench.inbox.ends(each) for each in "ab"] == [[FinishReason.ERROR]] * 2


def test_close_collects_what_is_out_and_cancels_the_rest(make_bench):
    gate = Gate()
    bench = make_bench(Nth(1, gate))
    bench.loop.submit(request("a", max_tokens=2))
    bench.loop.submit(request("long", max_tokens=90))
    gate.wait()
    thread = bench.loop._thread
    join, is_joining = thread.join, threading.Event()
    thread.join = lambda timeout: (is_joining.set(), join(timeout))
    closing = threading.Thread(target=bench.loop.close)
    closing.start()
    assert is_joining.wait(TIMEOUT_S)
    gate.may_leave.set()
    closing.join(TIMEOUT_S)
    assert not bench.device.out
    assert bench.device.log == ["launch", "launch", "collect", "collect"]
    assert bench.tokens("a") == complete(request("a", max_tokens=2), LIMITS)[0]
    assert bench.inbox.ends("a") == [FinishReason.LENGTH]
    assert bench.inbox.ends("long") == [FinishReason.CANCELLED]
    assert bench.device.num_closed == 1


def test_steps_that_come_to_nothing_are_collected_before_the_loop_rests(make_bench):
    gate = Gate()
    bench = make_bench(Nth(2, gate))
    token_id = complete(request("a"), LIMITS)[0][0]
    bench.loop.submit(request("a", stop_token_ids=frozenset({token_id})))
    bench.inbox.wait_for_end("a")
    gate.wait()
    gate.may_leave.set()
    bench.loop.submit(request("b"))
    bench.inbox.wait_for_end("b")
    bench.loop.close()
    assert bench.tokens("a") == [token_id]
    assert bench.device.log.count("launch") == bench.device.log.count("collect") == bench.loop.num_steps


def test_time_of_a_step_is_counted_once(make_bench):
    def wait(batch: Batch) -> None:
        bench.now_s += 2.0

    bench = make_bench(wait)
    bench.loop.submit(request("a", max_tokens=5))
    bench.inbox.wait_for_end("a")
    bench.loop.close()
    stats = bench.loop.stats()
    assert (stats.num_steps, stats.step_s_sum, stats.last_step_s) == (5, 10.0, 2.0)
    assert (stats.generated_tokens, stats.step_tokens) == (5, 3 + 4)
