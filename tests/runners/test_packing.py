import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sardonyx.runners.packing import ForwardRow, PackedInputs, named_views, plan_runs

NUM_SLOTS, MAX_CHUNK = 12, 20
ENOUGH = 3 * NUM_SLOTS + MAX_CHUNK
"""Capacity for any past and any chunk."""


def make_rows(lengths_of_slots):
    return [
        ForwardRow(slot, [100 * slot + position for position in range(length)], num_past=3 * slot)
        for slot, length in lengths_of_slots.items()
    ]


lengths_strategy = st.dictionaries(
    st.integers(0, NUM_SLOTS - 1), st.one_of(st.just(1), st.integers(1, MAX_CHUNK)), min_size=1
)


@settings(deadline=None)
@given(lengths_strategy, st.sampled_from([-1, 0, 5, 40, 10**6]))
def test_each_row_is_in_one_run_and_each_run_holds_its_rows_in_its_window(lengths, max_padding):
    rows = make_rows(lengths)
    runs = plan_runs(rows, NUM_SLOTS, max_padding, capacity=ENOUGH)
    assert sorted(index for run in runs for index in run.row_indices) == list(range(len(rows)))
    for run in runs:
        assert run.first_slot >= 0
        assert run.first_slot + run.num_slots <= NUM_SLOTS
        assert run.chunk == max(len(rows[index].token_ids) for index in run.row_indices)
        for index in run.row_indices:
            assert run.first_slot <= rows[index].slot < run.first_slot + run.num_slots
    assert [run.chunk for run in runs] == sorted(run.chunk for run in runs)


@settings(deadline=None)
@given(lengths_strategy)
def test_padding_without_bound_makes_one_run_and_none_makes_chunks_separate(lengths):
    rows = make_rows(lengths)
    assert len(plan_runs(rows, NUM_SLOTS, 10**6, capacity=ENOUGH)) == 1
    num_chunks = sum(length > 1 for length in lengths.values())
    num_separate = num_chunks + any(length == 1 for length in lengths.values())
    assert len(plan_runs(rows, NUM_SLOTS, -(10**6), capacity=ENOUGH)) == num_separate


def test_short_chunk_joins_the_decodes_and_a_long_one_runs_alone():
    rows = make_rows({0: 1, 1: 1, 2: 1, 3: 4, 4: 20})
    runs = plan_runs(rows, NUM_SLOTS, max_padding=12, capacity=ENOUGH)
    assert [run.row_indices for run in runs] == [[0, 1, 2, 3], [4]]
    assert (runs[0].first_slot, runs[0].num_slots, runs[0].chunk) == (0, 4, 4)
    assert (runs[1].first_slot, runs[1].num_slots, runs[1].chunk) == (4, 1, 20)


def test_decodes_alone_take_the_shortest_prefix_of_a_power_of_two():
    windows = [plan_runs(make_rows({slot: 1}), NUM_SLOTS, 0, capacity=ENOUGH)[0] for slot in range(NUM_SLOTS)]
    assert [window.num_slots for window in windows] == [1, 2, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]
    assert all(window.first_slot == 0 for window in windows)


def test_decodes_end_with_the_last_busy_slot_when_idle_ones_cost():
    for slot in range(NUM_SLOTS):
        (run,) = plan_runs(make_rows({0: 1, slot: 1}), NUM_SLOTS, 0, capacity=ENOUGH, pays_for_idle=True)
        assert (run.first_slot, run.num_slots) == (0, slot + 1)


@settings(deadline=None)
@given(lengths_strategy, st.integers(3 * NUM_SLOTS, ENOUGH), st.sampled_from([5, 10**6]), st.booleans())
def test_past_and_chunk_of_every_row_of_a_shared_run_fit_the_cache(lengths, capacity, max_padding, pays_for_idle):
    rows = make_rows(lengths)
    for run in plan_runs(rows, NUM_SLOTS, max_padding, capacity=capacity, pays_for_idle=pays_for_idle):
        if len(run.row_indices) > 1:
            assert max(rows[index].num_past for index in run.row_indices) + run.chunk <= capacity


def test_row_near_its_limit_lets_longer_chunks_run_without_it():
    rows = [ForwardRow(0, [1], 38), ForwardRow(1, [1] * 2, 0), ForwardRow(2, [1] * 3, 0), ForwardRow(3, [1] * 9, 0)]
    runs = plan_runs(rows, NUM_SLOTS, 100, capacity=40)
    assert [run.row_indices for run in runs] == [[0, 1], [2, 3]]


@settings(deadline=None)
@given(lengths_strategy, st.data())
def test_filled_tensors_say_what_the_contract_says(lengths, data):
    rows = make_rows(lengths)
    wanted = [
        sorted(data.draw(st.sets(st.integers(0, len(row.token_ids) - 1), max_size=3), label="wanted")) for row in rows
    ]
    inputs = PackedInputs(NUM_SLOTS, MAX_CHUNK)
    for array in vars(inputs).values():
        array[:] = -7  # what an earlier run left must not matter
    for run in plan_runs(rows, NUM_SLOTS, 30, capacity=ENOUGH):
        num_tokens, num_logits = inputs.fill(run, rows, wanted)
        views = named_views(inputs, run, num_tokens, num_logits)
        mine = [rows[index] for index in run.row_indices]
        packed = [token_id for row in mine for token_id in row.token_ids]
        assert views["input_ids"].tolist() == packed
        positions = [row.num_past + place for row in mine for place in range(len(row.token_ids))]
        assert views["position_ids"].tolist() == positions
        # Through the padded view and back each token meets itself.
        padded = views["input_ids"][views["row_gather"]]
        assert padded.shape == (run.num_slots, run.chunk)
        assert padded.reshape(-1)[views["row_scatter"]].tolist() == packed
        by_slot = {row.slot - run.first_slot: row for row in mine}
        for place in range(run.num_slots):
            row = by_slot.get(place)
            count = len(row.token_ids) if row else 0
            assert views["query_seqlens"][place] == count
            assert views["seqlens_k"][place] == (row.num_past + count - 1 if row else 0)
            assert padded[place, :count].tolist() == (row.token_ids if row else [])
        expected = [rows[index].token_ids[position] for index in run.row_indices for position in wanted[index]]
        assert views["input_ids"][views["logits_index"]].tolist() == (expected or packed[-1:])
        assert all(view.flags.c_contiguous for view in views.values())
        assert np.shares_memory(views["row_gather"], inputs.row_gather)
