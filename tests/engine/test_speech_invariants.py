"""Whatever arrives, is aborted, late or fails: every request gets what is said in its own window, and one end."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from tests.engine.speech_driver import SpeechDriver, complete, language_probs, make_window, no_speech_prob

from sardonyx.core import FinishReason, RunnerLimits, SequenceState
from sardonyx.errors import EngineError
from sardonyx.speech import SpeechBatch, SpeechTask

NUM_FLOWS = 3
MAX_TOKENS = 12
MAX_MODEL_LEN = 14
COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)
LONGEST_WAIT = 2 * (NUM_FLOWS + 1) * (MAX_TOKENS + 4)
"""Steps of a call of which nothing runs. Every second one is a pass, and other calls have one turn each."""
LONGEST_ALIGNMENT = 6
"""Steps: its window, its words, and beside each a pass or somebody else's window."""


class Speech(RuleBasedStateMachine):
    """The driver checks one end a request; its runner the slots, whose window and which tokens are in each."""

    @initialize(
        num_slots=st.integers(1, 5),
        max_num_seqs=st.sampled_from([1, 2, 3, 9]),
        max_batch_windows=st.integers(1, 3),
        has_places=st.booleans(),
    )
    def start(self, num_slots, max_num_seqs, max_batch_windows, has_places):
        self.num_places = min(num_slots, max_num_seqs)
        self.max_batch_windows = max_batch_windows
        limits = RunnerLimits(num_slots, MAX_MODEL_LEN, MAX_MODEL_LEN, 1000)
        self.limits = limits
        self.driver = SpeechDriver(
            limits,
            on_step=self.on_step,
            has_places=has_places,
            max_num_seqs=max_num_seqs,
            max_batch_windows=max_batch_windows,
        )
        self.windows = [make_window(0)]
        self.fault: tuple[str | None, int] = (None, 0)
        self.previous = ""
        self.waits: dict[int, int] = {}
        """By flow of which something waits and nothing runs."""
        self.unaligned: str | None = None
        """Whose words are next."""
        self.alignment_wait = 0

    @rule(
        flow=st.integers(1, NUM_FLOWS),
        count=st.sampled_from([1, 1, 2, 8]),
        has_new_window=st.booleans(),
        task=st.sampled_from([SpeechTask.TEXT, SpeechTask.TEXT, SpeechTask.TEXT, *SpeechTask]),
        num_prompt_tokens=st.integers(1, 5),
        max_tokens=st.sampled_from([1, 2, 7, MAX_TOKENS]),
        stop=st.sampled_from([frozenset(), frozenset(range(100))]),
        timeout_s=st.sampled_from([None, None, None, 1.0, 9.0]),
    )
    def submit(self, flow, count, has_new_window, task, num_prompt_tokens, max_tokens, stop, timeout_s):
        for _ in range(count):
            if has_new_window:
                self.windows.append(make_window(len(self.windows)))
            self.driver.submit(
                f"r{len(self.driver.requests)}",
                self.windows[-1],
                flow=flow,
                task=task,
                prompt_ids=list(range(num_prompt_tokens)),
                max_tokens=max_tokens,
                stop_token_ids=stop,
                deadline_s=None if timeout_s is None else self.driver.now_s + timeout_s,
                start_by_s=None if timeout_s is None else self.driver.now_s + timeout_s / 2,
            )

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data())
    def abort(self, data):
        self.driver.policy.abort(data.draw(st.sampled_from(sorted(self.driver.requests))))

    @rule(
        num_steps=st.sampled_from([1, 2, 5, 20]),
        fault=st.sampled_from([None, None, None, None, "step", "row", "late"]),
        row=st.integers(0, 4),
    )
    def steps(self, num_steps, fault, row):
        if fault == "late":
            self.driver.now_s += 3.0
        for i in range(num_steps):
            self.fault = (fault, row) if i == num_steps - 1 else (None, 0)
            self.step()
        self.fault = (None, 0)

    def step(self):
        num_ended = len(self.driver.events)
        running = self.those_in(SequenceState.RUNNING)
        if not self.driver.step():
            assert len(self.driver.events) == len(self.driver.requests), "work stops only when there is none"
            return
        kind = self.driver.kinds()[-1]
        if running and len(self.driver.events) == num_ended:
            assert "pass" in (kind, self.previous), "those that run have every second step"
        self.previous = kind
        self.note_waits()

    def note_waits(self):
        """Nobody waits for ever."""
        waiting = [self.driver.requests[each] for each in self.those_in(SequenceState.WAITING)]
        batch = self.driver.batches[-1]
        flows = {request.flow for request in waiting if request.task is not SpeechTask.ALIGNMENT}
        flows -= {row.sequence.request.flow for row in batch.rows}
        flows -= {self.driver.requests[each].flow for each in self.those_in(SequenceState.RUNNING)}
        self.waits = {flow: self.waits.get(flow, 0) + 1 for flow in flows}
        assert max(self.waits.values(), default=0) <= LONGEST_WAIT
        unaligned = next((request.id for request in waiting if request.task is SpeechTask.ALIGNMENT), None)
        self.alignment_wait = self.alignment_wait + 1 if unaligned == self.unaligned else 0
        self.unaligned = unaligned
        assert unaligned is None or self.alignment_wait <= LONGEST_ALIGNMENT

    def on_step(self, batch: SpeechBatch) -> dict[int, str]:
        """Look at what was scheduled, then fail where the step is to fail."""
        assert len(batch.windows) <= self.max_batch_windows
        if batch.rows:
            assert len(batch.rows) <= self.num_places
            assert {row.sequence.request.id for row in batch.rows} == set(self.those_in(SequenceState.RUNNING))
        fault, index = self.fault
        if fault == "step":
            raise EngineError("the step failed")
        return {index: "the row failed"} if fault == "row" and index < len(batch.rows) else {}

    def those_in(self, state):
        """Oldest first."""
        return [request_id for request_id, each in self.driver.sequences.items() if each.state is state]

    def teardown(self):
        if not hasattr(self, "driver"):
            return
        driver = self.driver
        for _ in range(20 * (MAX_TOKENS + 6) * (len(driver.requests) + 1)):
            if len(driver.events) == len(driver.requests):
                break
            self.step()
        assert not driver.step()
        assert driver.events.keys() == driver.requests.keys()
        for request_id in driver.requests:
            self.check_result(request_id)
        stats = driver.policy.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)

    def check_result(self, request_id):
        """What it would be alone, or the beginning of that where it ended early."""
        request, event = self.driver.requests[request_id], self.driver.events[request_id]
        is_complete = event.finish_reason in COMPLETE
        assert is_complete == (event.error is None and event.finish_reason is not FinishReason.CANCELLED)
        if request.task is SpeechTask.TEXT:
            tokens, reason = complete(request, self.limits)
            if is_complete:
                assert (event.token_ids, event.finish_reason) == (tokens, reason)
                assert event.no_speech_prob == no_speech_prob(request)
            assert event.token_ids == tokens[: len(event.token_ids)]
            assert len(event.token_logprobs) == len(event.token_ids) + (event.finish_reason is FinishReason.STOP)
        else:
            assert event.token_ids == []
        asked = request.task is SpeechTask.LANGUAGES and is_complete
        assert event.language_probs == (language_probs(request) if asked else {})
        if request.task is SpeechTask.ALIGNMENT and is_complete:
            assert event.alignment is not None
            assert event.alignment.attention[0, 0, 0] == request.window.num_frames
        else:
            assert event.alignment is None


def run(max_examples):
    examples = settings(
        max_examples=max_examples, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Speech, settings=examples)


def test_any_history_gives_every_request_what_its_window_says_and_one_end():
    run(150)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_more_histories_give_every_request_what_its_window_says_and_one_end():
    run(5000)
