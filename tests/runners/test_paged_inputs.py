import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.runners.paged_draws import Draws
from sardonyx.runners.paged_inputs import Bucket, Buckets, StepLayout, StepRows, StepSizes
from sardonyx.runtime.device import ALIGNMENT

BLOCK_SIZE = 16


def make_rows(num_new, num_past, blocks):
    num_rows, num_tokens = len(num_new), sum(num_new)
    table = np.full((num_rows, max(map(len, blocks))), -1, np.int32)
    for row, each in enumerate(blocks):
        table[row, : len(each)] = each
    return StepRows(
        tokens=np.arange(num_tokens) + 7,
        source=np.full(num_tokens, -1),
        num_new=np.array(num_new),
        num_past=np.array(num_past),
        blocks=table,
        logits_index=np.arange(num_rows),
        draws=Draws(*(np.full(num_rows, value, kind) for value, kind in DRAWS)),
    )


DRAWS = ((0.5, np.float32), (3, np.int64), (0.9, np.float32), (0.1, np.float32), (0.25, np.float32))


def views_of(layout, rows, num_bytes=None):
    memory = np.full(num_bytes or layout.num_bytes, 0xEE, np.uint8)
    layout.fill(rows, BLOCK_SIZE, memory)
    return {name: layout.view(name, memory) for name in layout._parts}


def test_a_step_of_chunks_and_decodes_has_the_tensors_of_the_contract():
    rows = make_rows([20, 1], [12, 40], [[3, 5], [9, 8, 2]])
    views = views_of(StepLayout(rows.sizes), rows)
    assert views["tokens"].tolist() == list(range(7, 28))
    assert views["cumulative_sequence_length"].tolist() == [0, 20, 21]
    assert views["past_seqlens"].tolist() == [12, 40]
    assert views["block_table"].tolist() == [[3, 5, -1], [9, 8, 2]]
    expected = [3 * 16 + offset for offset in range(12, 16)] + [5 * 16 + offset for offset in range(16)]
    assert views["slot_mapping"].tolist() == [*expected, 2 * 16 + 8]
    assert views["slot_mapping"].dtype == np.int32
    assert views["top_k"].tolist() == [3, 3]


def test_what_fills_a_bucket_up_is_a_token_in_block_0_that_nobody_draws_from():
    rows = make_rows([1], [20], [[4, 6]])
    views = views_of(StepLayout(StepSizes.of(Bucket(4, 8))), rows)
    assert views["tokens"].tolist() == [7, 0, 0, 0]
    assert views["source"].tolist() == [-1] * 4
    assert views["cumulative_sequence_length"].tolist() == [0, 1, 2, 3, 4]
    assert views["past_seqlens"].tolist() == [20, 0, 0, 0]
    assert views["slot_mapping"].tolist() == [6 * 16 + 4, 0, 1, 2]
    assert views["block_table"].tolist() == [[4, 6, *[-1] * 6], *[[0, *[-1] * 7]] * 3]
    assert views["temperature"].tolist() == [0.5, 0, 0, 0]
    assert views["top_p"].tolist() == [np.float32(0.9), 1, 1, 1]


@given(
    st.builds(
        StepSizes, st.integers(1, 600), st.integers(1, 40), st.integers(1, 600), st.integers(0, 40), st.integers(1, 70)
    )
)
def test_tensors_of_a_step_do_not_overlap_and_begin_where_the_device_wants_it(sizes):
    layout = StepLayout(sizes)
    end = 0
    for name in layout._parts:
        tensor = layout.tensor(name, 0)
        assert tensor.address == end
        assert tensor.address % ALIGNMENT == 0
        end = -(-(tensor.address + tensor.num_bytes) // ALIGNMENT) * ALIGNMENT
    assert layout.num_bytes == end


def test_buckets_of_as_many_rows_differ_in_the_block_table_alone():
    narrow, wide = (StepLayout(StepSizes.of(Bucket(4, columns))) for columns in (8, 32))
    for name in narrow._parts:
        if name != "block_table":
            assert narrow.tensor(name, 0) == wide.tensor(name, 0)


@given(st.integers(1, 256), st.integers(1, 600), st.data())
def test_the_bucket_of_a_step_is_the_smallest_that_holds_it_and_its_bounds_hold(max_rows, max_columns, data):
    buckets = Buckets(max_rows, max_columns, 1000)
    num_rows, num_columns = data.draw(st.integers(1, max_rows)), data.draw(st.integers(1, max_columns))
    bucket = buckets.find(num_rows, num_columns)
    assert bucket is not None
    assert num_rows <= bucket.num_rows < 2 * num_rows
    assert num_columns <= bucket.num_columns < max(9, 2 * num_columns)
    longest = data.draw(st.integers((num_columns - 1) * BLOCK_SIZE + 1, num_columns * BLOCK_SIZE))
    query, upper, lower = buckets.bounds(bucket, BLOCK_SIZE)
    assert query == 1
    assert lower <= longest <= upper


def test_graphs_have_numbers_from_1_and_narrow_buckets_come_first():
    buckets = Buckets(5, 20, 6)
    assert list(buckets.chosen) == [(1, 8), (2, 8), (4, 8), (8, 8), (1, 16), (2, 16)]
    assert list(buckets.chosen.values()) == [1, 2, 3, 4, 5, 6]
    assert buckets.find(4, 9) is None
    assert Buckets(5, 20, 0).chosen == {}
