import re

import pytest
from tests.engine.fake_tensor_runner import ids, make_request, make_step

from sardonyx.engine.sequences import SequenceOptions, SequencePolicy
from sardonyx.errors import InvalidRequest, Overloaded, RequestAborted

START_TEXT = (
    "inference request for sequence {} to model 'm' must specify the START flag on the first request of the sequence"
)


class Bench:
    """A policy, and the batches that are out by instance."""

    def __init__(self, **options):
        self.policy = SequencePolicy("m", SequenceOptions(**({"max_batch_size": 4} | options)))
        self.batches = {}

    def add(self, request_id, sequence_id, flags="", now_s=0.0, **fields):
        request = make_step(request_id, sequence_id, flags, **fields)
        self.policy.check(request)
        self.policy.add(request, now_s)

    def schedule(self, instance=0, now_s=0.0):
        batch = self.policy.schedule(instance, now_s)
        if batch is not None:
            self.batches[instance] = batch
        return ids(batch)

    def finish(self, instance=0, now_s=0.0):
        self.policy.update(self.batches.pop(instance), now_s)

    def run(self, instance=0, now_s=0.0):
        rows = self.schedule(instance, now_s)
        if rows:
            self.finish(instance, now_s)
        return rows

    def is_refused(self, request_id, sequence_id, flags="", now_s=0.0):
        with pytest.raises(InvalidRequest, match=f"^{re.escape(START_TEXT.format(sequence_id))}$"):
            self.add(request_id, sequence_id, flags, now_s)
        return True


def strategies(test):
    return pytest.mark.parametrize("strategy", ["direct", "oldest"])(test)


@strategies
def test_request_without_sequence_is_refused(strategy):
    text = "^inference request to model 'm' must specify a non-zero or non-empty correlation ID$"
    with pytest.raises(InvalidRequest, match=text):
        Bench(strategy=strategy).policy.check(make_request(1))


@strategies
def test_request_with_several_rows_is_refused(strategy):
    text = "^inference request to model 'm' must specify batch-size 1 due to requirements of sequence batcher$"
    with pytest.raises(InvalidRequest, match=text):
        Bench(strategy=strategy).add(1, 7, "S", batch_size=2)


@strategies
def test_first_request_without_start_is_refused(strategy):
    bench = Bench(strategy=strategy)
    assert bench.is_refused(1, 7)
    assert bench.is_refused(2, "seven", "E")
    assert bench.policy.num_sequences == 0


@strategies
def test_requests_of_a_sequence_run_one_after_the_other(strategy):
    bench = Bench(strategy=strategy)
    bench.add(1, 7, "S")
    bench.add(2, 7)
    bench.add(3, 7, "E")
    assert bench.schedule() == [1]
    assert not bench.policy.is_ready(0, 0.0)
    bench.finish()
    assert [bench.run(), bench.run(), bench.run()] == [[2], [3], []]


@strategies
def test_rows_of_a_sequence_share_its_object(strategy):
    bench = Bench(strategy=strategy)
    bench.add(1, 7, "S")
    bench.add(2, 7)
    objects = []
    for _ in range(2):
        bench.schedule()
        objects.append(bench.batches[0].rows[0].sequence)
        bench.finish()
    assert objects[0] is objects[1]
    assert objects[0].id == 7


@strategies
def test_start_on_a_live_sequence_begins_a_new_one_behind_it(strategy):
    bench = Bench(strategy=strategy)
    bench.add(1, 7, "S")
    bench.add(2, 7)
    bench.add(3, 7, "S")
    bench.add(4, 7)
    objects = {}
    while bench.schedule():
        row = bench.batches[0].rows[0]
        objects[row.request.id] = row.sequence
        bench.finish()
    assert list(objects) == [1, 2, 3, 4]
    assert objects[1] is objects[2] is not objects[3]
    assert objects[3] is objects[4]


@strategies
def test_sequence_is_over_once_its_end_is_queued(strategy):
    bench = Bench(strategy=strategy)
    bench.add(1, 7, "S")
    bench.add(2, 7, "E")
    assert bench.is_refused(3, 7)
    assert [bench.run(), bench.run()] == [[1], [2]]
    assert bench.policy.num_sequences == 0


@strategies
def test_sequence_may_be_one_request(strategy):
    bench = Bench(strategy=strategy)
    bench.add(1, 7, "SE")
    assert bench.run() == [1]
    assert bench.policy.num_sequences == 0


@strategies
def test_idle_sequence_is_dropped(strategy):
    bench = Bench(strategy=strategy, max_idle_s=5.0)
    bench.add(1, 7, "S", now_s=0.0)
    assert bench.policy.wake_at_s(0.0) is None
    bench.run(now_s=1.0)
    assert bench.policy.wake_at_s(1.0) == 6.0
    assert bench.is_refused(2, 7, now_s=6.0)
    assert bench.policy.num_sequences == 0


@strategies
def test_sequence_is_not_idle_while_a_request_of_it_waits_or_runs(strategy):
    bench = Bench(strategy=strategy, max_idle_s=5.0)
    bench.add(1, 7, "S", now_s=0.0)
    bench.schedule(now_s=10.0)
    bench.policy.expire(20.0)
    bench.finish(now_s=20.0)
    bench.add(2, 7, now_s=24.0)
    assert bench.run(now_s=40.0) == [2]


@strategies
def test_sequences_beyond_capacity_wait_in_order_of_arrival(strategy):
    bench = Bench(strategy=strategy, max_batch_size=2, max_candidate_sequences=2)
    for sequence_id in range(1, 5):
        bench.add(sequence_id * 10, sequence_id, "S")
    assert bench.run() == [10, 20]
    assert bench.run() == []
    bench.add(21, 2, "E")
    assert [row for row in bench.run() if row] == [21]
    assert [row for row in bench.run() if row] == [30]
    bench.add(11, 1, "E")
    bench.run()
    assert [row for row in bench.run() if row] == [40]


@strategies
def test_place_of_an_idle_sequence_goes_to_one_that_waits(strategy):
    bench = Bench(strategy=strategy, max_batch_size=1, max_candidate_sequences=1, max_idle_s=5.0)
    bench.add(1, 7, "S")
    bench.add(2, 8, "S")
    bench.run(now_s=1.0)
    bench.policy.expire(5.5)
    assert not bench.policy.is_ready(0, 5.5)
    bench.policy.expire(6.0)
    assert bench.policy.is_ready(0, 6.0)
    assert bench.run(now_s=6.0) == [2]


@strategies
def test_next_sequence_of_an_id_waits_its_turn_for_a_place(strategy):
    bench = Bench(strategy=strategy, max_batch_size=1, max_candidate_sequences=1)
    bench.add(1, 7, "SE")
    bench.add(2, 8, "SE")
    bench.add(3, 7, "SE")
    assert [bench.run(), bench.run(), bench.run()] == [[1], [2], [3]]


@strategies
def test_sequence_is_refused_when_too_many_wait_for_a_place(strategy):
    bench = Bench(strategy=strategy, max_batch_size=1, max_candidate_sequences=1, max_waiting_sequences=1)
    bench.add(1, 7, "S")
    bench.add(2, 8, "S")
    with pytest.raises(Overloaded, match=r"^Exceeds maximum queue size$"):
        bench.add(3, 9, "S")
    bench.add(4, 8)
    assert bench.is_refused(5, 9)


@strategies
def test_request_is_refused_when_too_many_wait(strategy):
    bench = Bench(strategy=strategy, max_queue_size=2)
    bench.add(1, 7, "S")
    bench.add(2, 7)
    with pytest.raises(Overloaded, match=r"^Exceeds maximum queue size$"):
        bench.add(3, 7, "E")
    bench.run()
    bench.add(4, 7)
    assert [bench.run(), bench.run()] == [[2], [4]]


@strategies
def test_aborted_request_ends_its_sequence_for_those_behind_it(strategy):
    bench = Bench(strategy=strategy)
    bench.add(1, 7, "S")
    bench.add(2, 7)
    bench.add(3, 7)
    bench.add(4, 7, "S")
    assert bench.policy.abort(2, 0.0).id == 2
    refused = bench.policy.take_refused()
    assert [(request.id, type(error)) for request, error in refused] == [(3, RequestAborted)]
    assert [bench.run(), bench.run()] == [[1], [4]]
    bench.add(5, 7)
    assert bench.run() == [5]


@strategies
def test_sequence_of_an_aborted_request_needs_start_again(strategy):
    bench = Bench(strategy=strategy)
    bench.add(1, 7, "S")
    bench.policy.abort(1, 0.0)
    assert bench.is_refused(2, 7)
    assert bench.run() == []
    bench.add(3, 7, "S")
    assert bench.run() == [3]


@strategies
def test_aborted_sequence_frees_its_place(strategy):
    bench = Bench(strategy=strategy, max_batch_size=1, max_candidate_sequences=1)
    for request_id, sequence_id in [(1, 7), (2, 8), (3, 9)]:
        bench.add(request_id, sequence_id, "S")
    bench.policy.abort(2, 0.0)
    bench.policy.abort(1, 0.0)
    assert bench.run() == [3]


@strategies
def test_running_request_cannot_be_aborted(strategy):
    bench = Bench(strategy=strategy)
    bench.add(1, 7, "S")
    bench.schedule()
    assert bench.policy.abort(1, 0.0) is None
    bench.finish()
    bench.add(2, 7)
    assert bench.run() == [2]


def test_direct_sequences_keep_their_row():
    bench = Bench()
    for sequence_id in (1, 2, 3):
        bench.add(sequence_id * 10, sequence_id, "S")
    assert bench.run() == [10, 20, 30]
    bench.add(31, 3)
    assert bench.run() == [None, None, 31]
    bench.add(21, 2)
    bench.add(11, 1)
    assert bench.run() == [11, 21]


def test_direct_sequences_spread_over_instances_and_stay_there():
    bench = Bench(num_instances=2)
    for sequence_id in (1, 2, 3):
        bench.add(sequence_id * 10, sequence_id, "S")
    assert (bench.run(0), bench.run(1)) == ([10, 30], [20])
    bench.add(21, 2)
    assert not bench.policy.is_ready(0, 0.0)
    assert bench.policy.is_ready(1, 0.0)
    assert (bench.run(0), bench.run(1)) == ([], [21])


def test_direct_step_takes_the_shape_of_its_oldest_request():
    bench = Bench()
    bench.add(10, 1, "S", batch_key="a", now_s=1.0)
    bench.add(20, 2, "S", batch_key="b", now_s=0.0)
    bench.add(30, 3, "S", batch_key="a", now_s=1.0)
    assert bench.run(now_s=1.0) == [None, 20]
    assert bench.run(now_s=1.0) == [10, None, 30]


def test_direct_step_waits_until_enough_slots_are_used():
    bench = Bench(minimum_slot_utilization=0.5, max_queue_delay_s=2.0)
    bench.add(10, 1, "S", now_s=1.0)
    assert bench.run(now_s=1.0) == []
    assert bench.policy.wake_at_s(1.0) == 3.0
    bench.add(20, 2, "S", now_s=1.5)
    assert bench.run(now_s=1.5) == [10, 20]


def test_direct_step_waits_no_longer_than_the_delay():
    bench = Bench(minimum_slot_utilization=1.0, max_queue_delay_s=2.0)
    bench.add(10, 1, "S", now_s=1.0)
    assert not bench.policy.is_ready(0, 2.9)
    assert bench.run(now_s=3.0) == [10]


def test_oldest_takes_one_request_of_each_sequence():
    bench = Bench(strategy="oldest")
    for request_id in (1, 2):
        bench.add(request_id, 1, "S" if request_id == 1 else "")
    bench.add(3, 2, "S")
    assert bench.run() == [1, 3]
    assert bench.run() == [2]


def test_oldest_runs_a_sequence_on_one_instance_at_a_time():
    bench = Bench(strategy="oldest", num_instances=2)
    bench.add(1, 1, "S")
    bench.add(2, 1)
    assert bench.schedule(0) == [1]
    assert bench.schedule(1) == []
    bench.add(3, 2, "S")
    assert bench.schedule(1) == [3]
    bench.finish(0)
    bench.finish(1)
    assert bench.schedule(1) == [2]


def test_oldest_prefers_who_waited_longest():
    bench = Bench(strategy="oldest", max_batch_size=1, max_candidate_sequences=3)
    bench.add(1, 1, "S")
    bench.add(2, 1)
    bench.add(3, 2, "S")
    assert [bench.run(), bench.run(), bench.run()] == [[1], [3], [2]]


def test_oldest_batch_waits_for_company():
    bench = Bench(strategy="oldest", max_queue_delay_s=2.0, preferred_batch_sizes=(2,))
    bench.add(1, 1, "S", now_s=1.0)
    assert bench.schedule(now_s=1.0) == []
    assert bench.policy.wake_at_s(1.0) == 3.0
    bench.add(2, 2, "S", now_s=1.5)
    assert bench.schedule(now_s=1.5) == [1, 2]


def test_oldest_has_candidates_for_each_instance():
    bench = Bench(strategy="oldest", max_candidate_sequences=1, num_instances=2)
    for sequence_id in (1, 2, 3):
        bench.add(sequence_id, sequence_id, "S")
    assert bench.run() == [1, 2]
    assert bench.run() == []
