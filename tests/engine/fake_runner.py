"""A runner whose cache is plain token ids, so that a wrong slot, copy or position changes the tokens that come out."""

from collections.abc import Callable, Sequence

from sardonyx.core import (
    Batch,
    BatchRow,
    FinishReason,
    Request,
    RunnerLimits,
    StepOutput,
    TokenLogprobs,
)
from sardonyx.errors import EngineError


def next_token(prefix: Sequence[int], vocab_size: int) -> int:
    """Stands for a model: depends on every token before."""
    return hash(tuple(prefix)) % vocab_size


def prompt_logprob(prompt: Sequence[int], index: int) -> TokenLogprobs:
    """Stands for the score of ``prompt[index]`` after those before it."""
    return TokenLogprobs(token_id=prompt[index], logprob=-float(hash(tuple(prompt[:index])) % 100), top=[])


def complete(request: Request, limits: RunnerLimits) -> tuple[list[int], FinishReason]:
    """What the request gives alone, token by token."""
    tokens = list(request.prompt_ids)
    completion: list[int] = []
    while len(completion) < request.max_tokens and len(tokens) < limits.max_model_len:
        tokens.append(next_token(tokens, limits.vocab_size))
        completion.append(tokens[-1])
        if completion[-1] in request.stop_token_ids and len(completion) > request.min_tokens:
            return completion, FinishReason.STOP
    return completion, FinishReason.LENGTH


class FakeRunner:
    """Keeps the promises of `core.Runner` and no others: whatever the contract leaves unspecified is destroyed.

    Args:
        limits: what batches are held to.
        max_batch_tokens: T at most.
        on_step: called before each step with its batch; may raise, or name rows that fail.
    """

    def __init__(
        self,
        limits: RunnerLimits,
        *,
        max_batch_tokens: int = 1 << 30,
        on_step: Callable[[Batch], dict[int, str] | None] | None = None,
    ) -> None:
        self.limits = limits
        self.capacity = limits.max_model_len + limits.max_chunk_tokens - 1
        self.cache: list[list[int | None]] = [[None] * self.capacity for _ in range(limits.num_slots)]
        self.max_batch_tokens = max_batch_tokens
        self.on_step = on_step
        self.num_computed_tokens = 0
        self.num_closed = 0

    def execute(self, batch: Batch) -> StepOutput:
        self._check(batch)
        try:
            failed = (self.on_step(batch) if self.on_step else None) or {}
        except EngineError:
            for slot in {row.sequence.slot for row in batch.rows} | {copy.target for copy in batch.copies}:
                self.cache[slot] = [None] * self.capacity
            raise
        for copy in batch.copies:
            self.cache[copy.target][: copy.num_tokens] = self.cache[copy.source][: copy.num_tokens]
        output = StepOutput(token_ids=[], logprobs=[], prompt_logprobs=[], failed=failed)
        for index, row in enumerate(batch.rows):
            self._compute(row, output)
            if index in failed:
                output.token_ids[-1] = None
                self.cache[row.sequence.slot] = [None] * self.capacity
        self.num_computed_tokens += batch.num_tokens
        return output

    def _check(self, batch: Batch) -> None:
        assert batch.rows
        assert batch.num_tokens <= self.max_batch_tokens
        slots = [row.sequence.slot for row in batch.rows]
        assert len(set(slots)) == len(slots), "no slot is owned twice"
        padded = max(row.num_new_tokens for row in batch.rows)
        for row in batch.rows:
            assert 0 <= row.sequence.slot < self.limits.num_slots
            assert 1 <= row.num_new_tokens <= row.sequence.num_pending_tokens
            assert row.num_new_tokens <= self.limits.max_chunk_tokens
            assert row.sequence.num_computed_tokens + padded <= self.capacity, "P + S <= C"
            assert len(row.sequence.token_ids) <= self.limits.max_model_len
        for copy in batch.copies:
            assert copy.source != copy.target
            assert copy.num_tokens > 0

    def _compute(self, row: BatchRow, output: StepOutput) -> None:
        sequence, slot = row.sequence, self.cache[row.sequence.slot]
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + row.num_new_tokens
        slot[start:end] = sequence.token_ids[start:end]
        slot[end:] = [None] * (self.capacity - end)
        prefix = [token for token in slot[:end] if token is not None]
        assert prefix == sequence.token_ids[:end], "the cache holds what the sequence thinks it holds"
        is_wanted = row.is_sampled and sequence.request.max_tokens > 0
        output.token_ids.append(next_token(prefix, self.limits.vocab_size) if is_wanted else None)
        asked = sequence.request.sampling.num_logprobs is not None and row.is_sampled
        output.logprobs.append(TokenLogprobs(token_id=0, logprob=-1.0, top=[]) if asked else None)
        predicted = range(start + 1, min(end + 1, sequence.num_prompt_tokens))
        scored = sequence.request.num_prompt_logprobs is not None
        output.prompt_logprobs.append(
            [prompt_logprob(prefix + sequence.token_ids[end:], i) for i in predicted] if scored else []
        )

    def close(self) -> None:
        self.num_closed += 1
