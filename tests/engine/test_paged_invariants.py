"""Over blocks, with and without steps ahead, whatever arrives, is aborted, late, preempted or fails: every request gets
its own tokens and one end, and no block is lost or read by the wrong sequence."""

import random
from collections import Counter
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.engine.fake_runner import complete, prompt_logprob
from tests.engine.paged_driver import PagedDriver, make_paged_limits

from sardonyx.core import FinishReason, Request, SequenceState
from sardonyx.engine.kv_blocks import pack_ids
from sardonyx.errors import EngineError

MAX_MODEL_LEN = 60
BLOCK_SIZE = 4
VOCAB_SIZE = 5
COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)

# Prompts are the start of one of two texts and a tail, so that they share prefixes of every length.
TEXTS = [[random.Random(seed).randrange(VOCAB_SIZE) for _ in range(MAX_MODEL_LEN)] for seed in range(2)]
PROMPTS = st.builds(
    lambda text, num_shared, tail: (text[:num_shared] + tail)[:MAX_MODEL_LEN],
    st.sampled_from(TEXTS),
    st.sampled_from([0, 3, 4, 5, 12, 30, 59, 60]),
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=6),
)


class PagedBatching(RuleBasedStateMachine):
    """The driver checks one end a request; the device chunks, T, and what each row reads and writes."""

    @initialize(
        num_slots=st.sampled_from([1, 2, 4, 6]),
        num_blocks=st.sampled_from([16, 17, 20, 30, 100]),
        max_chunk_tokens=st.sampled_from([1, 5, 16, 64]),
        room=st.sampled_from([0, 3, 40]),
        step_s=st.sampled_from([1e-6, 0.004, 0.1]),
        is_late=st.booleans(),
        is_scored_followed=st.booleans(),
        growth_tokens=st.sampled_from([0, 4, 32]),
    )
    def start(self, num_slots, num_blocks, max_chunk_tokens, room, step_s, is_late, is_scored_followed, growth_tokens):
        # Less room to grow than in production, so that there is more to preempt.
        self.patch = mock.patch("sardonyx.engine.paged_roster.GROWTH_TOKENS", growth_tokens)
        self.patch.start()
        limits = make_paged_limits(
            num_slots=num_slots,
            max_model_len=MAX_MODEL_LEN,
            max_chunk_tokens=max_chunk_tokens,
            vocab_size=VOCAB_SIZE,
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
        )
        self.driver = PagedDriver(
            limits,
            is_late=is_late,
            step_s=lambda batch: step_s * batch.num_tokens,
            max_num_seqs=num_slots,
            max_batch_tokens=num_slots + room,
            min_prefill_tokens=4,
            prefill_guard_s=2.0,
            max_step_ms=20.0,
        )
        self.requests: dict[str, Request] = {}
        self.fault: tuple[str | None, int] = (None, 0)
        self.num_preemptions: dict[str, int] = {}
        self.driver.runner.on_step = self.on_step
        self.driver.runner.on_launch = self.on_launch
        if not is_scored_followed:
            self.driver.runner.is_followed = lambda batch: all(
                row.sequence.request.num_prompt_logprobs is None for row in batch.rows
            )

    @rule(
        prompts=st.lists(PROMPTS, min_size=1, max_size=5),
        max_tokens=st.sampled_from([0, 1, 5, 20, 60]),
        min_tokens=st.integers(0, 4),
        stop=st.sampled_from([frozenset(), frozenset({0}), frozenset({0, 1})]),
        is_scored=st.sampled_from([False, False, True]),
        timeout_s=st.sampled_from([None, None, None, 1.0, 9.0]),
    )
    def submit(self, prompts, max_tokens, min_tokens, stop, is_scored, timeout_s):
        for prompt in prompts:
            request_id = f"r{len(self.requests)}"
            self.requests[request_id] = self.driver.submit(
                request_id,
                prompt,
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                stop_token_ids=stop,
                num_prompt_logprobs=0 if is_scored else None,
                deadline_s=None if timeout_s is None else self.driver.now_s + timeout_s,
                start_by_s=None if timeout_s is None else self.driver.now_s + timeout_s / 2,
            )

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        self.driver.policy.abort(data.draw(st.sampled_from(sorted(self.requests))))

    @rule(
        num_steps=st.sampled_from([1, 2, 5, 20]),
        fault=st.sampled_from([None, None, None, None, "step", "row", "launch", "late"]),
        row=st.integers(0, 4),
        is_overlapped=st.sampled_from([True, True, False]),
    )
    def step(self, num_steps, fault, row, is_overlapped):
        self.driver.is_overlapped = is_overlapped
        if fault == "late":
            self.driver.now_s += 3.0
        for i in range(num_steps):
            self.fault = (fault, row) if i == num_steps - 1 else (None, 0)
            if not self.driver.step():
                assert not self.those_in(SequenceState.WAITING, SequenceState.PREEMPTED, SequenceState.RUNNING)
            self.num_preemptions = self.count_preemptions()
            self.blocks_are_in_order()
        self.fault = (None, 0)

    def on_launch(self, batch):
        running = self.those_in(SequenceState.RUNNING)
        assert len({each.slot for each in running}) == len(running), "no place is taken twice"
        if not self.driver.runner.out:
            scheduled = {row.sequence.request.id for row in batch.rows}
            sitting_out = [each for each in running if each.request.id not in scheduled]
            prompts = [each for each in running if each.num_pending_tokens > 1]
            assert all(each in prompts for each in sitting_out), "every decode is in the step"
            assert not prompts or prompts[0] not in sitting_out, "the oldest prompt advances"
        self.check_order(running)
        self.num_preemptions = self.count_preemptions()
        if self.fault[0] == "launch":
            raise EngineError("the step was not started")

    def on_step(self, batch):
        fault, index = self.fault
        if fault == "step":
            raise EngineError("the step failed")
        return {index: "the row failed"} if fault == "row" and index < len(batch.rows) else None

    def check_order(self, running):
        """The youngest is preempted, and never while a step is out; nobody starts before an older one that does not
        wait for a common prefix."""
        num_preemptions = self.count_preemptions()
        for each in self.those_in(SequenceState.PREEMPTED):
            if num_preemptions[each.request.id] > self.num_preemptions.get(each.request.id, 0):
                assert not self.driver.runner.out
                assert all(self.age(other) < self.age(each) for other in running)
        for waiting in self.those_in(SequenceState.WAITING):
            has_been_passed = any(
                each.started_s == self.driver.now_s and self.age(each) > self.age(waiting) for each in running
            )
            if has_been_passed:
                shared = [self.num_shared(waiting, each) for each in running]
                assert max(shared) >= BLOCK_SIZE

    def those_in(self, *states):
        """Oldest first."""
        return [each for each in self.driver.sequences.values() if each.state in states]

    def count_preemptions(self):
        return {request_id: each.num_preemptions for request_id, each in self.driver.sequences.items()}

    def age(self, sequence):
        return int(sequence.request.id[1:])

    def num_shared(self, waiting, other):
        if other is waiting:
            return 0
        pairs = zip(waiting.token_ids, other.token_ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(waiting.token_ids), len(other.token_ids)))

    @invariant()
    def blocks_are_in_order(self):
        if not hasattr(self, "driver"):
            return
        blocks, memory = self.driver.roster._blocks, self.driver.runner.memory
        running = self.those_in(SequenceState.RUNNING)
        holders = Counter(block for each in running for block in each.blocks)
        assert all(
            not each.blocks and each.slot == -1 for each in self.driver.sequences.values() if each not in running
        )
        assert {i: n for i, n in enumerate(blocks._num_holders) if n} == dict(holders)
        assert 0 not in holders
        assert set(blocks._free) == set(range(1, len(memory))) - set(holders), "no block is lost"
        for each in running:
            assert len(set(each.blocks)) == len(each.blocks), "no block twice"
            shared = [index for index, block in enumerate(each.blocks) if holders[block] > 1]
            assert all((index + 1) * BLOCK_SIZE <= each.num_computed_tokens for index in shared), "full ones are shared"
        for content, block in blocks._found.items():
            assert content.packed_ids == pack_ids([-1 if each is None else each for each in memory[block]])

    def teardown(self):
        if not hasattr(self, "driver"):
            return
        try:
            self.check_ends()
        finally:
            self.patch.stop()

    def check_ends(self):
        driver = self.driver
        driver.is_overlapped = True
        num_tokens = sum(len(each.prompt_ids) + each.max_tokens for each in self.requests.values())
        driver.run(max_steps=20 * num_tokens + 10)
        assert not driver.runner.out
        for request_id, request in self.requests.items():
            tokens, reason = complete(request, driver.limits)
            events = driver.events[request_id]
            assert sum(event.finish_reason is not None for event in events) == 1
            if driver.finish_reason(request_id) in COMPLETE:
                assert (driver.tokens(request_id), driver.finish_reason(request_id)) == (tokens, reason)
            else:
                assert driver.tokens(request_id) == tokens[: len(driver.tokens(request_id))]
            scores = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
            if request.num_prompt_logprobs is None:
                assert not scores
            elif driver.finish_reason(request_id) in COMPLETE:
                prompt = request.prompt_ids
                assert scores == [[prompt_logprob(prompt, i) for i in range(1, len(prompt))]]
        stats = driver.policy.stats()
        assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)


def run(max_examples):
    examples = settings(
        max_examples=max_examples, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(PagedBatching, settings=examples)


def test_any_history_over_blocks_gives_every_request_its_own_tokens_and_one_end():
    run(40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_more_histories_over_blocks_give_every_request_its_own_tokens_and_one_end():
    run(3000)
