import itertools
import threading

import pytest
from tests.engine.fake_tensor_runner import FakeTensorRunner, make_request
from tests.engine.token_history import TokenHistory

from sardonyx.engine.instances import InstanceLoop
from sardonyx.engine.token_budget import TokenBudgetOptions, TokenBudgetPolicy
from sardonyx.errors import EngineError, RequestAborted

TIMEOUT_S = 20.0


def history(**options):
    return TokenHistory(**({"max_batch_tokens": 100} | options))


# Sizes of steps -------------------------------------------------------------------------------------------------------


def test_step_is_filled_up_to_the_tokens_of_the_budget():
    held = history()
    ids = held.submit(1, *[20] * 7)
    assert held.step() == ids[:5]
    assert held.step() == ids[5:]


def test_step_has_no_more_rows_than_it_may():
    held = history(max_batch_size=3)
    ids = held.submit(1, *[2] * 4)
    assert held.step() == ids[:3]


def test_item_longer_than_the_budget_runs_alone():
    held = history()
    (short, long) = held.submit(1, 100, 101)
    assert [held.step(), held.step()] == [[short], [long]]


def test_item_of_exactly_the_budget_runs():
    held = history()
    ids = held.submit(1, 100)
    assert held.step() == ids


def test_items_of_unlike_lengths_do_not_share_a_step():
    held = history()
    short, long, other = held.submit(1, 8, 60, 9)
    assert held.step() == [short, other]
    assert held.step() == [long]


def test_short_items_fill_what_long_ones_leave_while_little_is_padded():
    held = history(max_batch_tokens=130)
    ids = held.submit(1, 40, 40, 40, 5)
    # 4 rows of 40 are 160 places for 125 tokens.
    assert held.step() == ids


def test_without_padding_only_rows_of_the_same_length_share_a_step():
    held = history(max_padding=1.0)
    ids = held.submit(1, 20, 21, 20, 21)
    assert held.step() == [ids[0], ids[2]]


def test_long_call_of_mixed_lengths_wastes_little():
    held = history(max_batch_tokens=1024)
    held.submit(1, *[8 + 37 * number % 121 for number in range(600)])
    num_tokens = sum(request.num_tokens for request in held.waiting.values())
    num_steps = len(list(itertools.takewhile(bool, (held.step() for _ in itertools.count()))))
    assert num_steps <= num_tokens / 1024 * 1.1 + 1


def test_nothing_waits_nothing_runs():
    held = history()
    assert held.step() == []
    assert held.policy.wake_at_s(0.0) is None


def test_item_without_tokens_is_our_bug():
    policy = TokenBudgetPolicy("m", TokenBudgetOptions(max_batch_tokens=8))
    with pytest.raises(AssertionError, match="m: an item has tokens"):
        policy.check(make_request(1, num_tokens=0))
    with pytest.raises(AssertionError, match="m: an item is one row"):
        policy.check(make_request(1, batch_size=2, num_tokens=3))


# Sharing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 20, 50])
def test_short_call_is_first_in_the_next_step_while_a_huge_one_is_worked_off(length):
    held = history(max_batch_tokens=50)
    held.submit(1, *[20] * 200)
    for number in range(20):
        held.step()
        (short,) = held.submit(2 + number, length)
        assert short in held.schedule()
        held.finish()


def test_calls_of_the_same_lengths_share_each_step():
    held = history()
    one, two = held.submit(1, *[10] * 20), held.submit(2, *[10] * 20)
    ids = held.step()
    assert (len(set(ids) & set(one)), len(set(ids) & set(two))) == (5, 5)


def test_call_is_owed_nothing_for_the_time_before_it_came():
    held = history()
    held.submit(1, *[10] * 300)
    for number in range(20):
        held.submit(2 + number, 10)
        held.step()
    held.step()
    before = held.given[1]
    held.submit(99, *[10] * 100)
    held.step()
    assert (held.given[1] - before, held.given[99]) == (50, 50)


def test_call_that_took_room_which_nobody_else_could_use_pays_for_no_more_than_a_step():
    held = history()
    held.submit(1, *[10] * 450, 90)
    # The history sees to it that the long item has its turn in time, although its call had most of 50 steps.
    for number in range(300):
        held.submit(2 + number, 10)
        held.step()
    assert 1 not in held.flows()


def test_call_that_could_use_little_of_its_turns_is_owed_no_more_than_a_step():
    held = history()
    held.submit(1, *[10] * 500, *[1] * 5000)
    held.submit(2, 10)
    for number in range(80):
        # The second call has one item for each step, and always another one waits that is unlike.
        held.submit(2, 10 if number % 2 else 1)
        if number == 40:
            # This one does not wait for all that the second could not use of its share until now.
            (item,) = held.submit(3, 50)
        held.step()
    assert item in held.ended


# Leaving --------------------------------------------------------------------------------------------------------------


def test_abort_in_the_middle_of_a_call_drops_what_waits_only():
    held = history()
    ids = held.submit(1, *[50] * 6)
    first = held.step()
    second = held.schedule()
    for request_id in ids:
        held.abort(request_id)
    held.finish()
    assert held.ended == first + second == ids[:4]
    assert held.policy.num_waiting == 0
    assert not held.policy.is_ready(0, held.now_s)


def test_call_that_was_aborted_may_submit_again():
    held = history()
    (gone,) = held.submit(1, 30)
    held.abort(gone)
    assert held.step() == []
    ids = held.submit(1, 30, 30)
    assert held.step() == ids


def test_queue_forgets_calls_that_are_gone():
    held = history()
    for number in range(1000):
        for request_id in held.submit(number, 5, 50):
            held.abort(request_id)
    queue = held.policy._queue
    heaps = [queue._turns, queue._short, *queue._classes.values()]
    assert max(len(heap._entries) for heap in heaps) <= 64


# Instances ------------------------------------------------------------------------------------------------------------


def test_express_instance_takes_a_short_call_while_all_others_are_busy_with_long_steps():
    held = history(num_instances=2, num_express=1, express_tokens=30)
    held.submit(1, *[100] * 4)
    held.schedule(0)
    short = held.submit(2, 10, 9)
    assert held.schedule(2) == [], "an ordinary instance is free"
    assert held.schedule(1) == short
    held.finish(1)
    held.schedule(1)
    short = held.submit(3, 12)
    assert held.schedule(2) == short
    assert held.policy.num_waiting == 2


def test_express_instance_takes_no_part_of_a_long_call():
    held = history(num_express=1, express_tokens=30)
    held.submit(1, *[10] * 40)
    held.schedule(0)
    assert not held.policy.is_ready(1, held.now_s)
    assert held.schedule(1) == []


def test_express_instance_sleeps_while_another_is_soon_free():
    held = history(num_express=1, express_tokens=30)
    held.submit(1, 10)
    held.schedule(0)
    held.submit(2, 10)
    assert not held.policy.is_ready(1, held.now_s)


def test_express_step_takes_short_calls_as_long_as_they_fit():
    held = history(num_express=1, express_tokens=30)
    held.submit(1, 100)
    held.schedule(0)
    one, two, three = held.submit(2, 10), held.submit(3, 10), held.submit(4, 11)
    assert held.schedule(1) == one + two
    held.finish(1)
    assert held.schedule(1) == three


def test_step_waits_for_company_no_longer_than_the_delay():
    held = history(max_queue_delay_s=2.0)
    held.submit(1, 10)
    held.now_s += 1.0
    held.submit(2, 10)
    assert held.step() == []
    assert held.policy.wake_at_s(held.now_s) == 2.0
    held.now_s += 1.0
    assert held.step() == [0, 1]


def test_full_step_does_not_wait():
    held = history(max_queue_delay_s=2.0)
    ids = held.submit(1, *[10] * 10)
    assert held.step() == ids


# In a loop ------------------------------------------------------------------------------------------------------------


class Inbox:
    """Counts the ends of requests; a test waits for a number of them."""

    def __init__(self):
        self.events = []
        self._changed = threading.Condition()

    def __call__(self, events):
        with self._changed:
            self.events += events
            self._changed.notify_all()

    def wait_for(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) >= count, TIMEOUT_S)


def test_every_request_of_many_threads_has_exactly_one_end():
    def step(batch, instance):
        lengths = [request.num_tokens for request in batch.requests]
        assert sum(lengths) <= 64 or len(lengths) == 1
        if 7 in lengths:
            raise EngineError("no sevens")

    inbox = Inbox()
    policy = TokenBudgetPolicy(
        "m", TokenBudgetOptions(max_batch_tokens=64, num_instances=2, num_express=1, express_tokens=16)
    )
    loop = InstanceLoop("m", policy, FakeTensorRunner(step), inbox, num_instances=3, max_failed_steps=None)
    loop.start()
    num_flows, num_items = 8, 60

    def call(flow):
        ids = range(flow * 1000, flow * 1000 + num_items)
        for request_id in ids:
            loop.submit(make_request(request_id, num_tokens=1 + (request_id * 37 + flow) % 90, flow=flow))
        if flow % 2:
            for request_id in ids[::3]:
                loop.abort(request_id)

    threads = [threading.Thread(target=call, args=(flow,)) for flow in range(num_flows)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    inbox.wait_for(num_flows * num_items)
    loop.close()
    ended = sorted(event.request_id for event in inbox.events)
    assert ended == sorted(flow * 1000 + index for flow in range(num_flows) for index in range(num_items))
    for event in inbox.events:
        if isinstance(event.error, RequestAborted):
            assert event.request_id // 1000 % 2
        elif event.error is None:
            assert event.outputs["id"].tolist() == [event.request_id]


def test_short_call_ends_on_the_express_instance_while_a_long_step_runs():
    inbox, entered, leave = Inbox(), threading.Semaphore(0), threading.Semaphore(0)
    instances = {}

    def step(batch, instance):
        instances.update({request.id: instance for request in batch.requests})
        if batch.requests[0].num_tokens == 100:
            entered.release()
            assert leave.acquire(timeout=TIMEOUT_S)

    policy = TokenBudgetPolicy("m", TokenBudgetOptions(max_batch_tokens=100, num_express=1, express_tokens=20))
    loop = InstanceLoop("m", policy, FakeTensorRunner(step), inbox, num_instances=2)
    loop.start()
    loop.submit(make_request(1, num_tokens=100, flow=1))
    assert entered.acquire(timeout=TIMEOUT_S)
    loop.submit(make_request(2, num_tokens=100, flow=1))
    loop.submit(make_request(3, num_tokens=5, flow=2))
    inbox.wait_for(1)
    assert [event.request_id for event in inbox.events] == [3]
    leave.release(2)
    inbox.wait_for(3)
    loop.close()
    assert instances == {1: 0, 2: 0, 3: 1}
