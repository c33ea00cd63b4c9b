"""Whatever arrives, is aborted, late, preempted or fails: every request gets its own tokens and one end."""

import random

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

from sardonyx.core import Batch, FinishReason, Request, SequenceState
from sardonyx.engine.kv_slots import MIN_SHARED_TOKENS
from sardonyx.errors import EngineError

MAX_MODEL_LEN = 64
VOCAB_SIZE = 5

# Prompts are the start of one of three texts and a tail, so that they share prefixes of every length.
TEXTS = [[random.Random(seed).randrange(VOCAB_SIZE) for _ in range(MAX_MODEL_LEN)] for seed in range(3)]
PROMPTS = st.builds(
    lambda text, num_shared, tail: (text[:num_shared] + tail)[:MAX_MODEL_LEN],
    st.sampled_from(TEXTS),
    st.integers(0, 48),
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=24),
)


class ContinuousBatching(RuleBasedStateMachine):
    """The driver checks one end a request, the runner slots, P + S, chunks, T and the cache of each row."""

    @initialize(
        num_slots=st.integers(1, 5),
        max_chunk_tokens=st.sampled_from([1, 5, 16, 64]),
        room=st.sampled_from([0, 3, 40]),
        budget=st.sampled_from([None, None, 64, 90, 150]),
        step_s=st.sampled_from([0.0, 0.004, 0.1]),
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
        self.order: list[str] = []

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(0, 30),
        min_tokens=st.integers(0, 4),
        stop=st.sampled_from([frozenset(), frozenset({0})]),
        is_scored=st.sampled_from([False, False, True]),
        timeout_s=st.sampled_from([None, None, 1.0, 5.0]),
        copies=st.integers(1, 3),
    )
    def submit(self, prompt, max_tokens, min_tokens, stop, is_scored, timeout_s, copies):
        for _ in range(copies):
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

    @rule(seconds=st.sampled_from([0.1, 3.0]))
    def wait(self, seconds):
        self.driver.now_s += seconds

    @rule(num_steps=st.integers(1, 8))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.check_step(self.driver.step())

    @rule()
    def step_fails(self):
        def fail(batch: Batch) -> None:
            raise EngineError("the step failed")

        self.driver.runner.on_step = fail
        self.check_step(self.driver.step())
        self.driver.runner.on_step = None

    @rule(index=st.integers(0, 4))
    def row_fails(self, index):
        self.driver.runner.on_step = lambda batch: {index: "the row failed"} if index < len(batch.rows) else None
        self.check_step(self.driver.step())
        self.driver.runner.on_step = None

    def check_step(self, has_run):
        """What holds for every step that was scheduled."""
        driver = self.driver
        unfinished = [each for each in driver.sequences.values() if each.state is not SequenceState.FINISHED]
        if not has_run:
            assert not unfinished, "None means that nothing is left"
            return
        chunks = driver.chunks()
        running = [each for each in unfinished if each.state is SequenceState.RUNNING]
        slots = [each.slot for each in running]
        assert len(set(slots)) == len(slots)
        self.check_order(unfinished)
        # Whoever ran on is in the step, but for prompts that are not the oldest.
        prompts = [each for each in running if each.request.id not in chunks]
        assert all(each.num_pending_tokens > 1 for each in prompts)
        if prompts:
            older = [each for each in unfinished if each.request.id in chunks and self.age(each) < self.age(prompts[0])]
            finished = [i for i in chunks if driver.sequences[i].state is SequenceState.FINISHED]
            assert any(chunks[each.request.id] >= 1 for each in older) or finished

    def age(self, sequence):
        return int(sequence.request.id[1:])

    def check_order(self, unfinished):
        """Nobody starts before an older one, unless that one waits for a prefix that a running one computes."""
        started = [each for each in unfinished if each.state is SequenceState.RUNNING]
        youngest_start = max((each.started_s for each in started), default=0.0)
        for waiting in unfinished:
            if waiting.state is not SequenceState.WAITING:
                continue
            passed_by = [
                each for each in started if self.age(each) > self.age(waiting) and each.started_s == youngest_start
            ]
            if passed_by and self.budget is None:
                assert any(
                    self.num_shared(waiting, each) >= MIN_SHARED_TOKENS for each in self.driver.sequences.values()
                )

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
            if driver.finish_reason(request_id) in (FinishReason.STOP, FinishReason.LENGTH):
                assert (driver.tokens(request_id), driver.finish_reason(request_id)) == (tokens, reason)
            else:
                assert driver.tokens(request_id) == tokens[: len(driver.tokens(request_id))]
            scores = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
            if request.num_prompt_logprobs is None:
                assert not scores
            elif driver.finish_reason(request_id) in (FinishReason.STOP, FinishReason.LENGTH):
                prompt = request.prompt_ids
                assert scores == [[prompt_logprob(prompt, i) for i in range(1, len(prompt))]]
        stats = driver.policy.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)


def test_any_history_gives_every_request_its_own_tokens_and_one_end():
    run_state_machine_as_test(
        ContinuousBatching,
        settings=settings(
            max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
