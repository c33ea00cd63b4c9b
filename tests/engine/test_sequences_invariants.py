"""Whatever arrives and is aborted: sequences keep their order, their state and their slot, and every request ends."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.engine.fake_tensor_runner import make_step

from sardonyx.engine.sequences import SequenceOptions, SequencePolicy
from sardonyx.errors import InvalidRequest, Overloaded

MAX_IDLE_S = 10.0


class Generation:
    """What one START began: its requests that have not run, and what it was seen with."""

    def __init__(self, sequence_id):
        self.id = sequence_id
        self.waiting = []
        self.num_run = 0
        self.is_open = True
        self.is_running = False
        self.idle_since_s = None
        self.sequence = None
        self.place = None

    @property
    def is_over(self):
        return not self.is_open and not self.waiting and not self.is_running


class SequenceBatching(RuleBasedStateMachine):
    @initialize(
        strategy=st.sampled_from(["direct", "oldest"]),
        max_batch_size=st.integers(1, 3),
        num_instances=st.integers(1, 2),
        num_candidates=st.integers(1, 3),
        delay_s=st.sampled_from([0.0, 0.0, 3.0]),
        utilization=st.sampled_from([0.0, 0.7]),
        max_waiting_sequences=st.sampled_from([0, 0, 1]),
    )
    def start(
        self, strategy, max_batch_size, num_instances, num_candidates, delay_s, utilization, max_waiting_sequences
    ):
        self.options = SequenceOptions(
            strategy=strategy,
            max_batch_size=max_batch_size,
            num_instances=num_instances,
            max_candidate_sequences=num_candidates,
            max_queue_delay_s=delay_s,
            minimum_slot_utilization=utilization,
            max_waiting_sequences=max_waiting_sequences,
            max_idle_s=MAX_IDLE_S,
        )
        self.policy = SequencePolicy("m", self.options)
        self.now_s = 0.0
        self.num_requests = 0
        self.accepted: set[int] = set()
        self.ended: list[int] = []
        self.newest: dict[int, Generation] = {}
        self.by_request: dict[int, Generation] = {}
        self.by_id: dict[int, list[Generation]] = {}
        self.batches: dict[int, object] = {}
        self.slots: dict[tuple[int, int], Generation] = {}

    @rule(
        sequence_ids=st.lists(st.integers(1, 5), min_size=1, max_size=4),
        flags=st.sampled_from(["S", "", "", "E", "SE"]),
        key=st.sampled_from("aaab"),
    )
    def submit(self, sequence_ids, flags, key):
        for sequence_id in sequence_ids:
            self.num_requests += 1
            request = make_step(self.num_requests, sequence_id, flags, batch_key=key)
            self.drop_idle()
            newest = self.newest.get(sequence_id)
            is_live = newest is not None and newest.is_open
            try:
                self.policy.add(request, self.now_s)
            except InvalidRequest:
                assert "S" not in flags
                assert not is_live
                continue
            except Overloaded:
                assert "S" in flags
                assert self.options.max_waiting_sequences
                assert newest is None or newest.is_over
                continue
            assert "S" in flags or is_live
            if "S" in flags:
                if newest is not None:
                    newest.is_open = False
                newest = self.newest[sequence_id] = Generation(sequence_id)
                self.by_id.setdefault(sequence_id, []).append(newest)
            newest.waiting.append(request.id)
            newest.idle_since_s = None
            newest.is_open = "E" not in flags
            self.by_request[request.id] = newest
            self.accepted.add(request.id)

    def drop_idle(self):
        for each in self.newest.values():
            if each.is_open and each.idle_since_s is not None and each.idle_since_s + MAX_IDLE_S <= self.now_s:
                each.is_open = False

    @precondition(lambda self: self.num_requests)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.integers(1, self.num_requests))
        generation = self.by_request.get(request_id)
        removed = self.policy.abort(request_id, self.now_s)
        refused = [request.id for request, _ in self.policy.take_refused()]
        if generation is None or request_id not in generation.waiting:
            assert removed is None
            assert not refused
            return
        assert removed.id == request_id
        index = generation.waiting.index(request_id)
        assert refused == generation.waiting[index + 1 :]
        self.ended += generation.waiting[index:]
        del generation.waiting[index:]
        generation.is_open = False

    @rule(dt_s=st.sampled_from([1.0, 4.0, 11.0]))
    def pass_time(self, dt_s):
        at_s = self.policy.wake_at_s(self.now_s)
        ready = [self.policy.is_ready(i, self.now_s) for i in range(self.options.num_instances)]
        num_sequences = self.policy.num_sequences
        self.now_s += dt_s
        if at_s is None or at_s > self.now_s:
            assert [self.policy.is_ready(i, self.now_s) for i in range(self.options.num_instances)] == ready
            self.policy.expire(self.now_s)
            assert self.policy.num_sequences == num_sequences, "nothing happens before the announced time"
        self.policy.expire(self.now_s)
        self.drop_idle()

    @rule(instance=st.integers(0, 1))
    def schedule(self, instance):
        if instance >= self.options.num_instances or instance in self.batches:
            return
        self.policy.expire(self.now_s)
        self.drop_idle()
        is_ready = self.policy.is_ready(instance, self.now_s)
        batch = self.policy.schedule(instance, self.now_s)
        assert is_ready or batch is None, "who asks only when told misses nothing"
        assert batch or not self.policy.is_ready(instance, self.now_s), "who asks again when told does not spin"
        if batch is None:
            return
        self.batches[instance] = batch
        assert batch.rows[-1].request is not None
        assert len(batch.rows) <= self.options.max_batch_size
        assert len({request.batch_key for request in batch.requests}) == 1
        if self.options.strategy == "oldest":
            assert len(batch.requests) == len(batch.rows)
        for slot, row in enumerate(batch.rows):
            if row.request is None:
                assert row.sequence is None
            else:
                self.check_row(row, instance, slot)

    def check_row(self, row, instance, slot):
        generation = self.by_request[row.request.id]
        earlier = self.by_id[generation.id][: self.by_id[generation.id].index(generation)]
        assert all(each.is_over for each in earlier), "sequences of an id follow each other"
        assert not generation.is_running, "a sequence runs one request at a time"
        assert generation.waiting.pop(0) == row.request.id, "in its order"
        if generation.sequence is None:
            assert all(row.sequence is not each.sequence for each in self.by_request.values())
            generation.sequence = row.sequence
        assert row.sequence is generation.sequence
        assert row.sequence.id == generation.id
        generation.is_running = True
        if self.options.strategy == "direct":
            generation.place = generation.place or (instance, slot)
            assert generation.place == (instance, slot), "a sequence keeps its slot"
            owner = self.slots.get(generation.place, generation)
            assert owner is generation or owner.is_over, "a slot has one owner"
            self.slots[generation.place] = generation

    @rule(instance=st.integers(0, 1))
    def finish(self, instance):
        batch = self.batches.pop(instance, None)
        if batch is None:
            return
        self.policy.update(batch, self.now_s)
        for request in batch.requests:
            generation = self.by_request[request.id]
            generation.is_running = False
            self.ended.append(request.id)
            if not generation.waiting:
                generation.idle_since_s = self.now_s

    def teardown(self):
        if not hasattr(self, "policy"):
            return
        for _ in range(2 * self.num_requests + 2):
            for instance in range(self.options.num_instances):
                self.finish(instance)
                self.schedule(instance)
            self.now_s += MAX_IDLE_S
        assert sorted(self.ended) == sorted(self.accepted), "every request ends once"
        self.policy.expire(self.now_s)
        assert (self.policy.num_waiting, self.policy.num_sequences) == (0, 0), "nothing is kept"


@pytest.mark.parametrize("num_steps", [15, 60])
def test_sequence_policy_keeps_its_promises(num_steps):
    run_state_machine_as_test(
        SequenceBatching, settings=settings(max_examples=120, stateful_step_count=num_steps, deadline=None)
    )
