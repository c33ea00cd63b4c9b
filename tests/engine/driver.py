"""Runs a policy step by step over a `FakeRunner`, with a clock that only the test moves."""

from collections.abc import Callable
from typing import Any

from tests.engine.fake_runner import FakeRunner

from sardonyx.core import Batch, FinishReason, Request, RunnerLimits, Sequence, SequenceEvent
from sardonyx.engine.continuous import ContinuousOptions, ContinuousPolicy
from sardonyx.errors import EngineError


def make_limits(**changes: int) -> RunnerLimits:
    values = {"num_slots": 4, "max_model_len": 256, "max_chunk_tokens": 32, "vocab_size": 1000}
    return RunnerLimits(**(values | changes))


class Driver:
    """Holds what a test looks at: sequences and their events by request id, and the last batch."""

    def __init__(
        self,
        limits: RunnerLimits | None = None,
        *,
        step_s: Callable[[Batch], float] = lambda batch: 0.0,
        **options: Any,  # fields of ContinuousOptions
    ) -> None:
        self.limits = limits or make_limits()
        self.policy = ContinuousPolicy(self.limits, ContinuousOptions(**options))
        self.runner = FakeRunner(self.limits, max_batch_tokens=options.get("max_batch_tokens", 512))
        self.step_s = step_s
        self.now_s = 100.0
        self.sequences: dict[str, Sequence] = {}
        self.events: dict[str, list[SequenceEvent]] = {}
        self.batch: Batch | None = None

    def submit(self, request_id: str, prompt_ids: list[int], **fields: Any) -> Request:  # fields of Request
        request = Request(id=request_id, prompt_ids=prompt_ids, **fields)
        self.policy.check(request)
        sequence = Sequence(request, 0, self.now_s, token_ids=list(prompt_ids))
        self.sequences[request_id], self.events[request_id] = sequence, []
        self.policy.add(sequence)
        return request

    def step(self) -> bool:
        """Run one step, with the copies and rows it had in `batch`; false when there was nothing to run."""
        self.batch = self.policy.schedule(self.now_s)
        if self.batch is not None:
            try:
                output = self.runner.execute(self.batch)
                self.now_s += self.step_s(self.batch)
                self.policy.update(self.batch, output, self.now_s)
            except EngineError as error:
                self.policy.fail(self.batch, error.message)
        self.take_events()
        return self.batch is not None

    def take_events(self) -> None:
        for event in self.policy.take_events():
            past = self.events[event.request_id]
            assert not past or past[-1].finish_reason is None, "nothing comes after a finish reason"
            past.append(event)

    def run(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError(f"not done after {max_steps} steps")

    def chunks(self) -> dict[str, int]:
        """New tokens of the last batch by request id."""
        assert self.batch is not None
        return {row.sequence.request.id: row.num_new_tokens for row in self.batch.rows}

    def tokens(self, request_id: str) -> list[int]:
        return [token for event in self.events[request_id] for token in event.token_ids]

    def finish_reason(self, request_id: str) -> FinishReason | None:
        events = self.events[request_id]
        return events[-1].finish_reason if events else None
