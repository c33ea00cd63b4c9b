"""How the rows of a step become session runs, and each run the tensors of the packed-step contract.

Floor 3. Pure numpy: no session, no cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sardonyx.core import BatchRow


@dataclass(slots=True, frozen=True)
class ForwardRow:
    """New tokens of one slot."""

    slot: int
    token_ids: Sequence[int]
    """At least one."""
    num_past: int
    """Positions of the slot that are computed already; the new tokens follow them."""

    @staticmethod
    def of(row: BatchRow) -> "ForwardRow":
        """A row of a batch."""
        token_ids = row.sequence.token_ids[row.num_past : row.num_past + row.num_new_tokens]
        return ForwardRow(row.sequence.slot, token_ids, row.num_past)


@dataclass(slots=True)
class Run:
    """Rows that go through the session together, and the window of neighbouring slots that is bound for them."""

    row_indices: list[int]
    first_slot: int
    num_slots: int
    """B: rows of the padded view. Slots of the window without a row in the run are idle."""
    chunk: int
    """S."""

    def num_padding(self, num_tokens: int) -> int:
        """Positions of the padded view that hold no token."""
        return self.num_slots * self.chunk - num_tokens


def plan_runs(
    rows: Sequence[ForwardRow], num_slots: int, max_padding: int, *, capacity: int, pays_for_idle: bool = False
) -> list[Run]:
    """Divide a step's rows among session runs so that little time goes into padding.

    Every run pays once for reading the weights, every padded position for gathers and the attention operator's rows
    (which do no attention: the cost does not grow with P). So rows share a run while that adds at most `max_padding`
    positions, and leaves past + S of every row within `capacity`, C, as the kernel wants it. Time of one run over that
    of two, for the 135M demo model on 2 cores, B decodes with P = 256 (in brackets 2,000) beside one chunk; the border
    is between 1,000 and 2,000 positions in all precisions:

        decodes + chunk   padding    fp32          int8    int4
        1 + 64                 63    0.82 (0.83)   0.95    0.90 (0.97)
        8 + 32                248    0.80 (0.85)   0.94    0.75 (0.95)
        8 + 64                504    0.85 (0.90)   0.98    0.90 (1.02)
        32 + 32               992    0.90 (0.98)   1.00    0.86 (0.99)
        8 + 128             1,016    0.97 (0.97)   0.93    0.93 (1.04)
        16 + 128            2,032    1.04          1.08    1.08
        32 + 128            4,064    1.14 (1.03)   1.16    1.19 (1.13)

    Chunks group alike: 4 of 16 tokens 0.59 to 0.63, 4 of 64 0.80 to 0.95 of separate runs. Rows with one token always
    share one run: with S = 1 idle slots are skipped (8 rows in a window of 32 take the time of 8 in 8), so their window
    is the pool's shortest power-of-two prefix, which keeps the number of windows, and with it of bindings, small. A
    graph that also computes for idle slots (`pays_for_idle`: cross-attention over each slot's own window of sound) has
    a prefix that ends with the last busy one.

    Returns:
        Runs, shortest chunks first; each row in exactly one.
    """
    singles = [index for index, row in enumerate(rows) if len(row.token_ids) == 1]
    chunks = sorted((len(row.token_ids), row.slot, index) for index, row in enumerate(rows) if len(row.token_ids) > 1)
    runs: list[Run] = []
    if singles:
        last_slot = max(rows[index].slot for index in singles)
        length = last_slot + 1 if pays_for_idle else min(1 << last_slot.bit_length(), num_slots)
        runs.append(Run(singles, 0, length, 1))
    num_tokens = len(singles)
    for length, slot, index in chunks:
        if runs:
            joined = _join(runs[-1], rows, index)
            added = joined.num_padding(num_tokens + length) - runs[-1].num_padding(num_tokens)
            if added <= max_padding and _longest_past(joined, rows) + joined.chunk <= capacity:
                runs[-1], num_tokens = joined, num_tokens + length
                continue
        runs.append(Run([index], slot, 1, length))
        num_tokens = length
    return runs


def _join(run: Run, rows: Sequence[ForwardRow], index: int) -> Run:
    indices = [*run.row_indices, index]
    slots = [rows[row_index].slot for row_index in indices]
    first_slot = min(slots)
    return Run(indices, first_slot, max(slots) + 1 - first_slot, max(run.chunk, len(rows[index].token_ids)))


def _longest_past(run: Run, rows: Sequence[ForwardRow]) -> int:
    """Of its rows, and of idle slots, which have one token; see `PackedInputs.fill`."""
    return max(1, *(rows[index].num_past for index in run.row_indices))


class PackedInputs:
    """The small inputs of a run, in arrays that stay where they are, so that bindings to them stay good.

    Args:
        num_slots: B at most.
        max_chunk_tokens: S at most.
    """

    def __init__(self, num_slots: int, max_chunk_tokens: int) -> None:
        max_tokens = num_slots * max_chunk_tokens
        self.input_ids = np.zeros(max_tokens, np.int64)
        self.position_ids = np.zeros(max_tokens, np.int64)
        self.row_gather = np.zeros(max_tokens, np.int64)
        self.row_scatter = np.zeros(max_tokens, np.int64)
        self.seqlens_k = np.zeros(num_slots, np.int32)
        self.query_seqlens = np.zeros(num_slots, np.int32)
        self.logits_index = np.zeros(max_tokens, np.int64)

    def fill(self, run: Run, rows: Sequence[ForwardRow], wanted: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Write the inputs of a run at the start of each array.

        `wanted` says of each of the step's rows which of its new tokens' logits to compute. An idle slot gets
        ``seqlens_k`` 0 and ``query_seqlens`` 0: one past token, none new, which satisfies past + S <= C as every row
        must, whatever the slot really holds.

        Returns:
            T and N. N is at least 1, since the graph cannot do with none.
        """
        mine = [rows[index] for index in run.row_indices]
        counts = np.array([len(row.token_ids) for row in mine])
        places = np.array([row.slot for row in mine]) - run.first_slot
        starts = counts.cumsum() - counts
        num_tokens = int(counts.sum())
        self.input_ids[:num_tokens] = [token_id for row in mine for token_id in row.token_ids]
        firsts = np.array([row.num_past for row in mine]) - starts
        self.position_ids[:num_tokens] = np.arange(num_tokens) + np.repeat(firsts, counts)
        self.row_scatter[:num_tokens] = np.arange(num_tokens) + np.repeat(places * run.chunk - starts, counts)
        self.row_gather[: run.num_slots * run.chunk] = 0
        self.row_gather[self.row_scatter[:num_tokens]] = np.arange(num_tokens)
        self.seqlens_k[: run.num_slots] = 0
        self.seqlens_k[places] = counts + [row.num_past - 1 for row in mine]
        self.query_seqlens[: run.num_slots] = 0
        self.query_seqlens[places] = counts
        index = [
            start + position
            for start, row_index in zip(starts.tolist(), run.row_indices, strict=True)
            for position in wanted[row_index]
        ]
        self.logits_index[: len(index)] = index
        if not index:
            self.logits_index[0] = num_tokens - 1
        return num_tokens, max(len(index), 1)


def named_views(
    inputs: PackedInputs, run: Run, num_tokens: int, num_logits: int
) -> dict[str, npt.NDArray[np.int64] | npt.NDArray[np.int32]]:
    """The arrays by the names of the contract, in the shapes of the run."""
    padded = inputs.row_gather[: run.num_slots * run.chunk].reshape(run.num_slots, run.chunk)
    return {
        "input_ids": inputs.input_ids[:num_tokens],
        "position_ids": inputs.position_ids[:num_tokens],
        "row_gather": padded,
        "row_scatter": inputs.row_scatter[:num_tokens],
        "seqlens_k": inputs.seqlens_k[: run.num_slots],
        "query_seqlens": inputs.query_seqlens[: run.num_slots],
        "logits_index": inputs.logits_index[:num_logits],
    }
