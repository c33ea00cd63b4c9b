"""The *continuous* policy: token sequences join and leave between steps.

Floor 3. Decides what a step computes and what its outcome means for each sequence. It owns every `Sequence` from
`ContinuousPolicy.add` to its last event, and knows neither tensors nor threads nor what time it is.
"""

import math

import msgspec

from sardonyx.core import (
    Batch,
    BatchRow,
    FinishReason,
    Request,
    RunnerLimits,
    Sequence,
    SequenceEvent,
    StepOutput,
    TokenLogprobs,
)
from sardonyx.engine.chunks import ChunkLimits, divide_chunks
from sardonyx.engine.deadlines import Deadlines
from sardonyx.engine.roster import Roster
from sardonyx.engine.stats import PolicyStats
from sardonyx.engine.step_cost import StepCost, StepLoad
from sardonyx.errors import ConfigError, ContextLengthExceeded, InvalidRequest


class ContinuousOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator decides about the continuous policy."""

    max_num_seqs: int = 32
    """Sequences that run at once; more than the runner has slots means all of them. Slots beyond it keep prefixes."""
    max_batch_tokens: int = 512
    """Tokens of one step at most; no fewer than sequences that run at once."""
    max_step_ms: float = 200.0
    """How long a step with decodes in it should take at most: prompt chunks are cut to fit."""
    min_prefill_tokens: int = 16
    """Prompt tokens of a step at least, even where decodes alone take `max_step_ms`."""
    prefill_guard_s: float = 15.0
    """Once the oldest prompt in prefill is older than this it gets `guard_chunk_tokens`, however long the step
    takes."""
    guard_chunk_tokens: int = 32
    """At least, and within the runner's limit. 32 tokens after 4,000 take SmolLM2-135M 0.1 to 0.2 s on two cores."""
    kv_budget_tokens: int | None = None
    """Tokens that may be cached at once in all slots, at least those of one sequence of `max_model_len`; see
    `sardonyx.engine.roster`. ``None``: as many as the slots hold."""


class ContinuousPolicy:
    """Continuous batching over a pool of slots; a `sardonyx.engine.loop.Policy`.

    Args:
        limits: the runner's.
        options: the operator's.

    Raises:
        ConfigError: `options` contradict `limits` or themselves.
    """

    def __init__(self, limits: RunnerLimits, options: ContinuousOptions | None = None) -> None:
        options = options or ContinuousOptions()
        max_num_seqs = min(options.max_num_seqs, limits.num_slots)
        _check_options(options, limits, max_num_seqs)
        self._limits = limits
        self._options = options
        self._roster = Roster(limits, max_num_seqs, options.kv_budget_tokens)
        self._deadlines = Deadlines(self._roster.get)
        self._events: list[SequenceEvent] = []
        self._cost = StepCost()
        self._load = StepLoad()
        self._scheduled_s = 0.0
        self._generated_tokens = 0

    def check(self, request: Request) -> None:
        """Refuse what could never run, or would fail the step of its neighbours.

        Raises:
            ContextLengthExceeded: the prompt alone is longer than the model's limit.
            InvalidRequest: no prompt token, or one outside the vocabulary.
        """
        ids, limits = request.prompt_ids, self._limits
        if not ids:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        if len(ids) > limits.max_model_len:
            message = f"the prompt has {len(ids)} tokens; the model accepts {limits.max_model_len}"
            raise ContextLengthExceeded(message, param="prompt")
        if min(ids) < 0 or max(ids) >= limits.vocab_size:
            raise InvalidRequest(f"token ids must lie between 0 and {limits.vocab_size - 1}", param="prompt")

    def add(self, sequence: Sequence) -> None:
        """Take over a new sequence whose request passed `check`."""
        self._roster.add(sequence)
        self._deadlines.add(sequence.request)

    def abort(self, request_id: str) -> None:
        """End a sequence as CANCELLED and free its slot. Unknown and ended ones are ignored."""
        sequence = self._roster.get(request_id)
        if sequence is not None:
            self._end(sequence, FinishReason.CANCELLED)

    def schedule(self, now_s: float) -> Batch | None:
        """Choose what the next step computes, or ``None`` when no sequence is left.

        Every running sequence with one token to go, so every decode, is in the step. Prompts share the rest of
        `max_batch_tokens` as `divide_chunks` says: all of it while nobody decodes, else as much as the step is foreseen
        to manage within `max_step_ms`. Who runs is the business of `Roster`.

        Args:
            now_s: monotonic, on the clock of `Sequence.arrival_s` and `Request.deadline_s`.

        Returns:
            A batch of at least one row that respects `RunnerLimits`; `update` or `fail` must follow.
        """
        self._scheduled_s = now_s
        for sequence, what in self._deadlines.late(now_s):
            self._end(sequence, FinishReason.CANCELLED, what)
        copies = self._roster.settle(now_s)
        rows = self._choose_rows(now_s)
        return Batch(rows, copies) if rows else None

    def _choose_rows(self, now_s: float) -> list[BatchRow]:
        rows, prompts, num_past = [], [], 0
        for sequence in self._roster.running:
            if sequence.num_pending_tokens == 1:
                rows.append(BatchRow(sequence, 1))
                num_past += sequence.num_computed_tokens
            else:
                prompts.append(sequence)
        self._load = StepLoad(num_decode_past=num_past, num_decode_rows=len(rows))
        if prompts:
            limits = self._chunk_limits(prompts[0].arrival_s, now_s)
            for sequence, chunk in zip(prompts, divide_chunks(prompts, limits, self._cost), strict=True):
                if chunk:
                    rows.append(BatchRow(sequence, chunk))
                    self._load.add_chunk(sequence.num_computed_tokens, chunk)
        return rows

    def _chunk_limits(self, oldest_arrival_s: float, now_s: float) -> ChunkLimits:
        options, decodes = self._options, self._load
        is_overdue = now_s - oldest_arrival_s > options.prefill_guard_s
        left_s = max(0.0, options.max_step_ms / 1e3 - self._cost.predict(decodes))
        return ChunkLimits(
            max_chunk_tokens=self._limits.max_chunk_tokens,
            max_tokens=options.max_batch_tokens - decodes.num_decode_rows,
            max_s=left_s if decodes.num_decode_rows else math.inf,
            min_tokens=options.min_prefill_tokens,
            min_oldest_tokens=options.guard_chunk_tokens if is_overdue else 0,
        )

    def update(self, batch: Batch, output: StepOutput, now_s: float) -> None:
        """Take in what the runner made of the last batch."""
        self._cost.observe(self._load, now_s - self._scheduled_s)
        answers = zip(batch.rows, output.token_ids, output.logprobs, output.prompt_logprobs, strict=True)
        for index, (row, token_id, logprobs, prompt_logprobs) in enumerate(answers):
            sequence, is_sampled = row.sequence, row.is_sampled
            if index in output.failed:
                self._end(sequence, FinishReason.ERROR, output.failed[index], is_valid=False)
                continue
            self._roster.advance(sequence, row.num_new_tokens)
            if not sequence.num_completion_tokens:
                sequence.prompt_logprobs += prompt_logprobs
            if is_sampled:
                self._extend(sequence, token_id, logprobs)

    def _extend(self, sequence: Sequence, token_id: int | None, logprobs: TokenLogprobs | None) -> None:
        """A sequence's known tokens are all computed: deliver the next one, and end the sequence where it ends."""
        request, event = sequence.request, _event(sequence)
        if not sequence.num_completion_tokens and request.num_prompt_logprobs is not None:
            event.prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, []
        if request.max_tokens == 0 or len(sequence.token_ids) == self._limits.max_model_len:
            event.finish_reason = FinishReason.LENGTH
        else:
            assert token_id is not None, "a sampled row has a token"
            self._roster.append(sequence, token_id)
            self._generated_tokens += 1
            event.token_ids.append(token_id)
            if logprobs is not None:
                event.logprobs.append(logprobs)
            event.finish_reason = self._finish_reason(sequence, token_id)
        self._events.append(event)
        if event.finish_reason is not None:
            self._roster.remove(sequence)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        request, num_tokens = sequence.request, sequence.num_completion_tokens
        if token_id in request.stop_token_ids and num_tokens > request.min_tokens:
            return FinishReason.STOP
        if num_tokens >= request.max_tokens or len(sequence.token_ids) == self._limits.max_model_len:
            return FinishReason.LENGTH
        return None

    def fail(self, batch: Batch, error: str) -> None:
        """The step failed as a whole: its sequences end with ERROR, and nothing that it wrote is used again."""
        for row in batch.rows:
            self._end(row.sequence, FinishReason.ERROR, error, is_valid=False)
        # Copies bring a prefix to sequences that may have no row in the same step.
        self._roster.restart({copy.target for copy in batch.copies})

    def _end(
        self, sequence: Sequence, reason: FinishReason, error: str | None = None, *, is_valid: bool = True
    ) -> None:
        event = _event(sequence)
        event.finish_reason, event.error = reason, error
        self._events.append(event)
        self._roster.remove(sequence, is_valid=is_valid)

    def take_events(self) -> list[SequenceEvent]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def stats(self) -> PolicyStats:
        roster = self._roster
        return PolicyStats(
            num_waiting=roster.num_waiting,
            num_running=roster.num_running,
            kv_usage=roster.kv_usage,
            num_retained_tokens=roster.num_retained_tokens,
            num_preemptions=roster.num_preemptions,
            prompt_tokens=roster.prompt_tokens,
            prefix_hit_tokens=roster.prefix_hit_tokens,
            generated_tokens=self._generated_tokens,
        )


def _event(sequence: Sequence) -> SequenceEvent:
    return SequenceEvent(
        request_id=sequence.request.id, num_cached_tokens=sequence.num_cached_tokens, started_s=sequence.started_s
    )


def _check_options(options: ContinuousOptions, limits: RunnerLimits, max_num_seqs: int) -> None:
    least = {
        "max_num_seqs": 1,
        "max_batch_tokens": max_num_seqs,
        "min_prefill_tokens": 1,
        "guard_chunk_tokens": 1,
        "kv_budget_tokens": limits.max_model_len,
    }
    for field, minimum in least.items():
        value = getattr(options, field)
        if value is not None and value < minimum:
            raise ConfigError(f"must be at least {minimum}", field=field)
    if not options.max_step_ms > 0:
        raise ConfigError("must be above 0", field="max_step_ms")
