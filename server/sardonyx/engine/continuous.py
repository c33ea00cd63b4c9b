"""The *continuous* policy: token sequences join and leave between steps.

Floor 3. Decides what a step computes and what its outcome means for each sequence. It owns every `Sequence` from
`ContinuousPolicy.add` to its last event, and knows neither tensors nor threads nor what time it is.
"""

import math
from collections import deque
from typing import Any

import msgspec

from sardonyx.core import (
    Batch,
    BatchRow,
    FinishReason,
    Request,
    RunnerLimits,
    Sequence,
    SequenceEvent,
    SequenceState,
    SlotCopy,
    StepOutput,
    TokenLogprobs,
)
from sardonyx.engine.chunks import ChunkLimits, Prefill, divide_chunks
from sardonyx.engine.deadlines import Deadlines
from sardonyx.engine.paged_roster import PagedRoster
from sardonyx.engine.roster import Roster, is_scored
from sardonyx.engine.slot_roster import SlotRoster
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
    `sardonyx.engine.slot_roster`. ``None``: as many as the slots hold, and the only choice where there are blocks."""


_NO_ROW: tuple[int, BatchRow | None] = (-1, None)


class ContinuousPolicy:
    """Continuous batching over slots or blocks; a `sardonyx.engine.policy.Policy`, and for blocks an `AheadPolicy`.

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
        self._roster: Roster[Any] = (  # what it matches prompts with is its own business
            PagedRoster(limits, max_num_seqs)
            if limits.block_size
            else SlotRoster(limits, max_num_seqs, options.kv_budget_tokens)
        )
        self._deadlines = Deadlines(self._roster.get)
        self._events: list[SequenceEvent] = []
        self._cost = StepCost()
        self._scheduled: deque[tuple[StepLoad, float]] = deque()
        self._updated_s = -math.inf
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
        """End a sequence as CANCELLED and free its part of the cache. Unknown and ended ones are ignored."""
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
        self._end_late(now_s)
        copies = self._roster.settle(now_s)
        return self._make_batch(now_s, {}, copies)

    def schedule_ahead(self, batch: Batch, now_s: float) -> Batch | None:
        """Choose what the step behind `batch` computes, which is out and whose outcome is not known.

        As `schedule`, but for sequences that `batch` certainly ends: they have no row. One that it ends unforeseen, by
        a stop token or a failure, has a row in the step ahead that comes to nothing, as has one that is aborted or late
        while a step is out. It ends at once, `PagedRoster` says why its blocks may go to others, and `update` passes
        over its row. Nobody is preempted: where blocks are short there is no step ahead, and `schedule` sorts it out.

        Args:
            batch: the last one scheduled; the only one that is out.
            now_s: as for `schedule`.

        Returns:
            A batch to launch before `update` or `fail` is called for `batch`, or ``None``: do that first. Both calls
            come in the order in which batches were scheduled.
        """
        self._end_late(now_s)
        out = {
            row.sequence.request.id: (index, row)
            for index, row in enumerate(batch.rows)
            if row.sequence.state is SequenceState.RUNNING
        }
        num_out = {request_id: row.num_new_tokens for request_id, (_, row) in out.items()}
        growing = [row.sequence for _, row in out.values() if row.is_sampled and not self._is_last(row.sequence)]
        if not self._roster.settle_ahead(now_s, num_out, growing):
            return None
        return self._make_batch(now_s, out, [])

    def _end_late(self, now_s: float) -> None:
        for sequence, what in self._deadlines.late(now_s):
            self._end(sequence, FinishReason.CANCELLED, what)

    def _is_last(self, sequence: Sequence) -> bool:
        """Whatever token comes next, it is the sequence's last."""
        is_long = len(sequence.token_ids) + 1 >= self._limits.max_model_len
        return is_long or sequence.num_completion_tokens + 1 >= sequence.request.max_tokens

    def _make_batch(self, now_s: float, out: dict[str, tuple[int, BatchRow]], copies: list[SlotCopy]) -> Batch | None:
        """The next step; `out` has the rows of the step before it by request, where that is out, with their places."""
        load = StepLoad()
        rows, prompts = self._choose_decodes(out, load)
        if prompts:
            limits = self._chunk_limits(prompts[0][0].arrival_s, now_s, load)
            chunks = divide_chunks(self._prefills(prompts), limits, self._cost)
            for (sequence, num_ahead), chunk in zip(prompts, chunks, strict=True):
                if chunk:
                    row = BatchRow(sequence, chunk, num_ahead)
                    rows.append(row)
                    load.add_chunk(row.num_past, chunk)
        if not rows:
            return None
        self._scheduled.append((load, now_s))
        return Batch(rows, copies)

    def _choose_decodes(
        self, out: dict[str, tuple[int, BatchRow]], load: StepLoad
    ) -> tuple[list[BatchRow], list[tuple[Sequence, int]]]:
        """Rows for all with one token to go, and who has more, with its tokens that are on their way."""
        rows: list[BatchRow] = []
        prompts: list[tuple[Sequence, int]] = []
        for sequence in self._roster.running:
            index, before = out.get(sequence.request.id, _NO_ROW)
            num_ahead = before.num_new_tokens if before is not None else 0
            if before is not None and before.is_sampled:
                if self._is_last(sequence):
                    continue
                rows.append(BatchRow(sequence, 1, num_ahead, index))
            elif sequence.num_pending_tokens - num_ahead == 1:
                rows.append(BatchRow(sequence, 1, num_ahead))
            else:
                prompts.append((sequence, num_ahead))
        load.num_decode_rows = len(rows)
        load.num_decode_past = sum(row.num_past for row in rows)
        return rows, prompts

    def _prefills(self, prompts: list[tuple[Sequence, int]]) -> list[Prefill]:
        """Of the room for prompts that are scored the oldest of them takes what it can, then the next."""
        prefills, num_left = [], self._limits.max_scored_tokens
        for sequence, num_ahead in prompts:
            num_pending = sequence.num_pending_tokens - num_ahead
            max_tokens = num_left if is_scored(sequence) else None
            prefills.append(Prefill(sequence.num_computed_tokens + num_ahead, num_pending, max_tokens))
            if max_tokens is not None:
                num_left = max(0, max_tokens - num_pending)
        return prefills

    def _chunk_limits(self, oldest_arrival_s: float, now_s: float, decodes: StepLoad) -> ChunkLimits:
        options = self._options
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
        """Take in what the runner made of the oldest batch that is out."""
        load, start_s = self._scheduled.popleft()
        self._cost.observe(load, now_s - max(start_s, self._updated_s))
        self._updated_s = now_s
        answers = zip(batch.rows, output.token_ids, output.logprobs, output.prompt_logprobs, strict=True)
        for index, (row, token_id, logprobs, prompt_logprobs) in enumerate(answers):
            sequence = row.sequence
            if sequence.state is SequenceState.FINISHED:
                continue
            if index in output.failed:
                self._end(sequence, FinishReason.ERROR, output.failed[index], is_valid=False)
                continue
            self._roster.advance(sequence, row.num_new_tokens)
            if not sequence.num_completion_tokens:
                sequence.prompt_logprobs += prompt_logprobs
            if row.is_sampled:
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
        self._scheduled.popleft()
        for row in batch.rows:
            if row.sequence.state is not SequenceState.FINISHED:
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
    if limits.block_size and options.kv_budget_tokens is not None:
        raise ConfigError("is for slots; a cache of blocks holds what its blocks hold", field="kv_budget_tokens")
    if limits.block_size and (limits.num_blocks - 1) * limits.block_size < limits.max_model_len:
        message = f"{limits.num_blocks} blocks do not hold a sequence of {limits.max_model_len} tokens beside block 0"
        raise ConfigError(message, field="num_blocks")
    if not options.max_step_ms > 0:
        raise ConfigError("must be above 0", field="max_step_ms")
