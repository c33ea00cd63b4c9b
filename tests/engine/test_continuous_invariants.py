"""Whatever arrives, is aborted, late, preempted or fails: every request gets its own tokens and one end."""

import random

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
from tests.engine.driver import Driver, make_limits
from tests.engine.fake_runner import complete, prompt_logprob

from sardonyx.core import FinishReason, Request, SequenceState
from sardonyx.engine.kv_slots import MIN_SHARED_TOKENS
from sardonyx.errors import EngineError

MAX_MODEL_LEN = 120
VOCAB_SIZE = 5
COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)

# Prompts are the start of one of two texts and a tail, so that they share prefixes of every length.
TEXTS = [[random.Random(seed).randrange(VOCAB_SIZE) for _ in range(MAX_MODEL_LEN)] for seed in range(2)]
PROMPTS = st.builds(
    lambda text, num_shared, tail: (text[:num_shared] + tail)[:MAX_MODEL_LEN],
    st.sampled_from(TEXTS),
    st.sampled_from([0, 15, 16, 25, 40, 60, 119, 120]),
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12),
)


class ContinuousBatching(RuleBasedStateMachine):
    """The driver checks one end a request, the runner slots, P + S, chunks, T and the cache of each row."""

    @initialize(
        num_slots=st.sampled_from([1, 2, 4, 6]),
        max_chunk_tokens=st.sampled_from([1, 5, 16, 64]),
        room=st.sampled_from([0, 3, 40]),
        budget=st.sampled_from([None, None, 120, 150, 200]),
        step_s=st.sampled_from([1e-6, 0.004, 0.1]),
    )
    def start(self, num_slots, max_chunk_tokens, room, budget, step_s):
        limits = make_limits(
            num_slots=num_slots, max_model_len=MAX_MODEL_LEN, max_chunk_tokens=max_chunk_tokens, vocab_size=VOCAB_SIZE
        )
        self.budget = budget
        self.driver = Driver(
            limits,
            step_s=lambda batch: step_s * batch.num_tokens,
            max_num_seqs=num_slots,
            max_batch_tokens=num_slots + room,
            min_prefill_tokens=4,
            prefill_guard_s=2.0,
            max_step_ms=20.0,
            kv_budget_tokens=budget,
        )
        self.requests: dict[str, Request] = {}
        self.fault: tuple[str | None, int] = (None, 0)
        self.num_preemptions: dict[str, int] = {}
        self.driver.runner.on_step = self.on_step

    @rule(
        prompts=st.lists(PROMPTS, min_size=1, max_size=5),
        max_tokens=st.sampled_from([0, 1, 5, 40, 120]),
        min_tokens=st.integers(0, 4),
        stop=st.sampled_from([frozenset(), frozenset(), frozenset({0})]),
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
        fault=st.sampled_from([None, None, None, None, "step", "row", "late"]),
        row=st.integers(0, 4),
    )
    def step(self, num_steps, fault, row):
        if fault == "late":
            self.driver.now_s += 3.0
        for i in range(num_steps):
            self.fault = (fault, row) if i == num_steps - 1 else (None, 0)
            if not self.driver.step():
                assert not self.those_in(SequenceState.WAITING, SequenceState.PREEMPTED, SequenceState.RUNNING)
            self.num_preemptions = self.count_preemptions()
        self.fault = (None, 0)

    def on_step(self, batch):
        """Look at what was scheduled, then let the runner fail where the step is to fail."""
        running = self.those_in(SequenceState.RUNNING)
        assert len({each.slot for each in running}) == len(running), "no slot is owned twice"
        scheduled = {row.sequence.request.id for row in batch.rows}
        sitting_out = [each for each in running if each.request.id not in scheduled]
        prompts = [each for each in running if each.num_pending_tokens > 1]
        assert all(each in prompts for each in sitting_out), "every decode is in the step"
        assert not prompts or prompts[0] not in sitting_out, "the oldest prompt advances"
        self.check_order(running)
        self.num_preemptions = self.count_preemptions()
        fault, index = self.fault
        if fault == "step":
            raise EngineError("the step failed")
        return {index: "the row failed"} if fault == "row" and index < len(batch.rows) else None

    def check_order(self, running):
        """The youngest is preempted; nobody starts before an older one that does not wait for a common prefix."""
        num_preemptions = self.count_preemptions()
        for each in self.those_in(SequenceState.PREEMPTED):
            if num_preemptions[each.request.id] > self.num_preemptions.get(each.request.id, 0):
                assert all(self.age(other) < self.age(each) for other in running)
        for waiting in self.those_in(SequenceState.WAITING):
            has_been_passed = any(
                each.started_s == self.driver.now_s and self.age(each) > self.age(waiting) for each in running
            )
            if has_been_passed:
                shared = [self.num_shared(waiting, each) for each in running]
                assert max(shared) >= MIN_SHARED_TOKENS

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
    def budget_holds(self):
        if getattr(self, "budget", None) is not None:
            stats = self.driver.policy.stats()
            assert stats.kv_usage * self.budget + stats.num_retained_tokens <= self.budget + 1e-6

    def teardown(self):
        if not hasattr(self, "driver"):
            return
        driver = self.driver
        num_tokens = sum(len(each.prompt_ids) + each.max_tokens for each in self.requests.values())
        driver.run(max_steps=20 * num_tokens + 10)
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
        assert (stats.num_running, stats.num_waiting) == (0, 0)


def run(max_examples):
    examples = settings(
        max_examples=max_examples, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(ContinuousBatching, settings=examples)


def test_any_history_gives_every_request_its_own_tokens_and_one_end():
    run(150)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_more_histories_give_every_request_its_own_tokens_and_one_end():
    run(5000)
