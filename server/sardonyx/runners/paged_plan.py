"""From the rows of a batch to the arrays of a step over blocks, checked against the limits.

Floor 3. Pure numpy. The kernel trusts what it is told, so whatever it could be told wrongly is refused here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sardonyx.core import Batch, BatchRow, RunnerLimits
from sardonyx.errors import EngineError
from sardonyx.runners.paged_draws import needs_host
from sardonyx.runners.paged_inputs import StepRows
from sardonyx.runners.paged_sequences import SequenceTable
from sardonyx.runners.prompt_scores import num_prompt_positions

Ints = npt.NDArray[np.int64]

NOT_DRAWN = -1


@dataclass(slots=True, frozen=True)
class HostRow:
    """A row whose logits come to the host."""

    index: int
    """Of the row in its batch."""
    first: int
    """Of its logits, among those that come to the host."""
    num_positions: int
    """Prompt positions to score, the first of its logits."""
    is_drawn: bool
    """The last of its logits give its token."""


@dataclass(slots=True)
class StepPlan:
    """A step before it is launched."""

    rows: StepRows
    drawn_at: list[int]
    """For each row of the batch its place among the sampler's outputs, or `NOT_DRAWN`."""
    num_drawn: int
    host_rows: list[HostRow]
    num_host_logits: int


class Planner:
    """Plans the steps of one model. Used by one thread.

    Args:
        model_name: for messages.
        limits: to keep.
        max_tokens: T at most.
    """

    def __init__(self, model_name: str, limits: RunnerLimits, max_tokens: int) -> None:
        self._model_name = model_name
        self._limits = limits
        self._max_tokens = max_tokens
        self.max_columns = -(-limits.max_model_len // limits.block_size)
        self._table = SequenceTable(2 * limits.num_slots, self.max_columns)

    def plan(self, batch: Batch, drawn_before: Sequence[int]) -> StepPlan:
        """Arrays of a step.

        Args:
            batch: the step.
            drawn_before: `StepPlan.drawn_at` of the step launched before it.

        Raises:
            EngineError: the batch breaks a limit, or the contract with the step before it.
        """
        rows = batch.rows
        if not 1 <= len(rows) <= self._limits.num_slots or batch.copies:
            raise self._broken(f"{len(rows)} rows and {len(batch.copies)} copies of slots")
        num_new = np.array([row.num_new_tokens for row in rows], np.int64)
        num_past = np.array([row.num_past for row in rows], np.int64)
        self._check_lengths(rows, num_new, num_past)
        places = self._table.find(row.sequence for row in rows)
        num_columns = -(-(num_past + num_new) // self._limits.block_size)
        blocks = self._table.blocks[places, : num_columns.max()]
        is_used = np.arange(blocks.shape[1]) < num_columns[:, None]
        if not np.where(is_used, (blocks > 0) & (blocks < self._limits.num_blocks), True).all():
            raise self._broken("a row has too few blocks, or one that is not there")
        tokens, source = self._tokens(rows, drawn_before)
        starts = num_new.cumsum() - num_new
        drawn = [index for index, row in enumerate(rows) if row.is_sampled and not needs_host(row)]
        host_rows, host_index = _host_rows(rows, starts.tolist())
        self._check_scores(sum(row.num_positions for row in host_rows))
        ends = starts + num_new - 1
        logits_index = [*ends[drawn].tolist(), *host_index] or [len(tokens) - 1]
        drawn_at = [NOT_DRAWN] * len(rows)
        for place, index in enumerate(drawn):
            drawn_at[index] = place
        return StepPlan(
            StepRows(
                tokens=tokens,
                source=source,
                num_new=num_new,
                num_past=num_past,
                blocks=np.where(is_used, blocks, np.int32(-1)),
                logits_index=np.array(logits_index, np.int64),
                draws=self._table.draws(places[drawn], (num_past + num_new)[drawn]),
            ),
            drawn_at,
            len(drawn),
            host_rows,
            len(host_index),
        )

    def _check_lengths(self, rows: Sequence[BatchRow], num_new: Ints, num_past: Ints) -> None:
        limits = self._limits
        if num_new.min() < 1 or num_new.max() > limits.max_chunk_tokens or num_new.sum() > self._max_tokens:
            raise self._broken(f"rows of {num_new.min()} to {num_new.max()} tokens, {num_new.sum()} in all")
        if num_past.min() < 0 or (num_past + num_new).max() > limits.max_model_len:
            raise self._broken(f"tokens after {num_past.max()} exceed {limits.max_model_len} positions")
        if max(len(row.sequence.blocks) for row in rows) > self.max_columns:
            raise self._broken(f"a sequence has more than {self.max_columns} blocks")

    def _check_scores(self, num_scored: int) -> None:
        most = self._limits.max_scored_tokens
        if most is not None and num_scored > most:
            raise self._broken(f"{num_scored} prompt tokens to score")

    def _tokens(self, rows: Sequence[BatchRow], drawn_before: Sequence[int]) -> tuple[Ints, Ints]:
        """``(T,)`` ids, and for each where it was drawn, or -1."""
        ids: list[int] = []
        fed: list[tuple[int, int]] = []
        for row in rows:
            if row.fed_by >= 0:
                place = drawn_before[row.fed_by] if row.fed_by < len(drawn_before) else NOT_DRAWN
                if place == NOT_DRAWN or row.num_new_tokens != 1:
                    raise self._broken("a row waits for a token that the step before does not draw on the device")
                fed.append((len(ids), place))
                ids.append(0)
            else:
                known = row.sequence.token_ids[row.num_past : row.num_past + row.num_new_tokens]
                if len(known) != row.num_new_tokens:
                    raise self._broken("a row has more new tokens than its sequence has left")
                ids += known
        tokens, source = np.array(ids, np.int64), np.full(len(ids), -1, np.int64)
        for index, place in fed:
            source[index] = place
        if tokens.min() < 0 or tokens.max() >= self._limits.vocab_size:
            raise self._broken("a token is not in the vocabulary")
        return tokens, source

    def _broken(self, reason: str) -> EngineError:
        return EngineError(f"model {self._model_name} was given a batch that breaks its limits: {reason}")


def _host_rows(rows: Sequence[BatchRow], starts: Sequence[int]) -> tuple[list[HostRow], list[int]]:
    """Rows whose logits come to the host, and the packed indices of those logits."""
    found: list[HostRow] = []
    index: list[int] = []
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        if needs_host(row):
            num_positions = num_prompt_positions(row)
            found.append(HostRow(number, len(index), num_positions, row.is_sampled))
            index += range(start, start + num_positions)
            if row.is_sampled:
                index.append(start + row.num_new_tokens - 1)
    return found, index
