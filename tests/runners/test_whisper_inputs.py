"""The tensors of a step of Whisper's decoder over blocks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.runners.packing import ForwardRow
from sardonyx.runners.whisper_inputs import divide_rows, layout, max_step_bytes, step_tensors, write_tensors
from sardonyx.runtime.device import ALIGNMENT

ROWS = [ForwardRow(0, [7, 8, 9], 0), ForwardRow(1, [5], 30), ForwardRow(2, [3, 4], 15)]
BLOCKS = np.array([[4, 5], [0, 1], [2, 3]], np.int32)


def test_a_step_has_each_token_where_its_row_and_its_blocks_say():
    tensors, metadata = step_tensors(ROWS, [[0, 2], [0], [1]], BLOCKS, 16)
    assert {name: values.tolist() for name, values in tensors.items()} == {
        "input_ids": [7, 8, 9, 5, 3, 4],
        "position_ids": [0, 1, 2, 30, 15, 16],
        "logits_index": [0, 2, 3, 5],
        "row_gather": [[0, 1, 2], [3, 4, 5], [4, 5, 5]],
        "row_scatter": [0, 1, 2, 3, 6, 7],
        "cumulative_sequence_length": [0, 3, 4, 6],
        "past_seqlens": [0, 30, 15],
        "block_table": [[4, 5], [0, 1], [2, 3]],
        "slot_mapping": [64, 65, 66, 30, 47, 48],
    }
    assert metadata.tolist() == [3, 31, 31]
    assert all(
        values.dtype == (np.int64 if "_i" in name or "row_" in name else np.int32) for name, values in tensors.items()
    )


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([1, 1, 1], [range(3)]),
        ([4, 1, 4], [range(2), range(2, 3)]),
        ([1, 20, 1, 1], [range(1), range(1, 2), range(2, 4)]),
        ([1] * 10, [range(8), range(8, 10)]),
    ],
)
def test_rows_share_a_run_while_their_padded_view_is_small(lengths, parts):
    rows = [ForwardRow(slot, [0] * length, 0) for slot, length in enumerate(lengths)]
    assert divide_rows(rows, 8) == parts


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 4))
def test_every_part_fits_the_memory_that_is_kept_for_it(lengths, columns):
    rows = [ForwardRow(slot, [0] * length, 0) for slot, length in enumerate(lengths)]
    most = max_step_bytes(len(rows), max(32, *lengths, 1), columns)
    parts = divide_rows(rows, 32)
    assert [index for part in parts for index in part] == list(range(len(rows)))
    for part in parts:
        chosen = rows[part.start : part.stop]
        wanted = [[0, len(row.token_ids) - 1] if len(row.token_ids) > 1 else [0] for row in chosen]
        tensors, _ = step_tensors(chosen, wanted, np.zeros((len(chosen), columns), np.int32), 64)
        placed, num_bytes = layout(tensors, 1024)
        assert num_bytes <= most
        memory = np.zeros(num_bytes, np.uint8)
        write_tensors(tensors, memory)
        for name, tensor in placed.items():
            assert tensor.address % ALIGNMENT == 0
            start = tensor.address - 1024
            found = memory[start : start + tensor.num_bytes].view(tensors[name].dtype).reshape(tensor.shape)
            np.testing.assert_array_equal(found, tensors[name])
