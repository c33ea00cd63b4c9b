"""The tensors of a step of Whisper's decoder over blocks, and where they lie in the one copy to the device.

Floor 3. Pure numpy: no device, no sequences.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sardonyx.runners.packing import ForwardRow
from sardonyx.runtime.device import Bytes, DeviceTensor, aligned
from sardonyx.runtime.dtypes import DATATYPES

STEP_INPUTS = (
    *("input_ids", "position_ids", "logits_index", "row_gather", "row_scatter"),
    *("cumulative_sequence_length", "past_seqlens", "block_table", "slot_mapping"),
)

Tensors = dict[str, npt.NDArray[Any]]
_DATATYPES = {np.dtype(np.int32): DATATYPES["INT32"], np.dtype(np.int64): DATATYPES["INT64"]}


def divide_rows(rows: Sequence[ForwardRow], max_positions: int) -> list[range]:
    """Indices of neighbouring rows that go through the graph together.

    Cross-attention sees a padded view: as many positions for each row as the longest one has tokens. Together they
    have at most `max_positions` there, which bounds what a step takes; a row alone may have more.
    """
    parts: list[range] = []
    start, longest = 0, 0
    for index, row in enumerate(rows):
        longest = max(longest, len(row.token_ids))
        if index > start and (index + 1 - start) * longest > max_positions:
            parts.append(range(start, index))
            start, longest = index, len(row.token_ids)
    parts.append(range(start, len(rows)))
    return parts


def step_tensors(
    rows: Sequence[ForwardRow], wanted: Sequence[Sequence[int]], blocks: npt.NDArray[np.int32], block_size: int
) -> tuple[Tensors, npt.NDArray[np.int32]]:
    """Inputs of a step, by their names, and `paged_inputs.METADATA`, which stays on the host.

    Args:
        rows: at least one.
        wanted: for each row, positions among its new tokens whose logits are wanted; at least one in all.
        blocks: (B, M) of each row.
        block_size: positions of a block.
    """
    counts = np.array([len(row.token_ids) for row in rows])
    past = np.array([row.num_past for row in rows])
    starts = counts.cumsum() - counts
    num_tokens, longest = int(counts.sum()), int(counts.max())
    places = np.arange(num_tokens) - np.repeat(starts, counts)
    row_of = np.repeat(np.arange(len(rows)), counts)
    positions = past[row_of] + places
    columns, offsets = np.divmod(positions, block_size)
    index = [start + place for start, each in zip(starts.tolist(), wanted, strict=True) for place in each]
    tensors: Tensors = {
        "input_ids": np.array([token_id for row in rows for token_id in row.token_ids], np.int64),
        "position_ids": positions.astype(np.int64),
        "logits_index": np.array(index, np.int64),
        "row_gather": np.minimum(starts[:, None] + np.arange(longest), num_tokens - 1).astype(np.int64),
        "row_scatter": (row_of * longest + places).astype(np.int64),
        "cumulative_sequence_length": np.append(0, counts.cumsum()).astype(np.int32),
        "past_seqlens": past.astype(np.int32),
        "block_table": np.ascontiguousarray(blocks, np.int32),
        "slot_mapping": (blocks[row_of, columns] * block_size + offsets).astype(np.int32),
    }
    length = int((past + counts).max())
    return tensors, np.array([longest, length, length], np.int32)


def layout(tensors: Mapping[str, npt.NDArray[Any]], base: int) -> tuple[dict[str, DeviceTensor], int]:
    """Where each lies from address `base` on, `ALIGNMENT` apart, and how many bytes all take."""
    placed, end = {}, 0
    for name, values in tensors.items():
        placed[name] = DeviceTensor(base + end, values.shape, _DATATYPES[values.dtype])
        end += aligned(values.nbytes)
    return placed, end


def write_tensors(tensors: Mapping[str, npt.NDArray[Any]], memory: Bytes) -> None:
    """Fill the host's side of a `layout`."""
    end = 0
    for values in tensors.values():
        memory[end : end + values.nbytes] = values.reshape(-1).view(np.uint8)
        end += aligned(values.nbytes)


def max_step_bytes(num_rows: int, max_tokens: int, num_blocks: int) -> int:
    """What a `layout` takes at most.

    Args:
        num_rows: of a step.
        max_tokens: of a step, and positions of its padded view.
        num_blocks: of a row.
    """
    row = ForwardRow(0, range(1), 0)
    tensors, _ = step_tensors([row], [[0]], np.zeros((1, num_blocks), np.int32), 1)
    per_token = sum(values.itemsize for values in tensors.values())
    return len(tensors) * aligned(1) + per_token * max_tokens + 4 * (num_rows + 1) * (num_blocks + 2)
