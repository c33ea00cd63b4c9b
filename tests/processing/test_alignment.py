import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sardonyx.processing.alignment import align, median_filter, row_starts

floats = st.floats(-100, 100, width=32)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=floats)
few_values = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(-2, 2).map(float)
)


def plain_row_starts(costs: np.ndarray) -> list[int]:
    """One place at a time, and the whole path."""
    num_rows, num_columns = costs.shape
    totals: dict[tuple[int, int], float] = {}
    came_from: dict[tuple[int, int], tuple[int, int]] = {}
    for i in range(num_rows):
        for j in range(num_columns):
            ways = [(i, j - 1), (i - 1, j), (i - 1, j - 1)]
            ways = [way for way in ways if way in totals]
            best = min(ways, key=totals.__getitem__, default=None)
            totals[i, j] = float(costs[i, j]) + (0.0 if best is None else totals[best])
            if best is not None:
                came_from[i, j] = best
    place: tuple[int, int] | None = (num_rows - 1, num_columns - 1)
    starts = [0] * num_rows
    while place is not None:
        starts[place[0]] = place[1]
        place = came_from.get(place)
    return starts


@given(costs=matrices | few_values)
def test_path_is_that_of_the_plain_algorithm(costs: np.ndarray) -> None:
    assert row_starts(costs).tolist() == plain_row_starts(costs)


def test_path_follows_a_cheap_ridge() -> None:
    starts = np.sort(np.random.default_rng(0).choice(np.arange(1, 300), 39, replace=False))
    starts = np.concatenate([[0], starts])
    costs = np.ones((40, 300), np.float32)
    for row, (begin, end) in enumerate(zip(starts, [*starts[1:], 300], strict=True)):
        costs[row, begin:end] = 0
    np.testing.assert_array_equal(row_starts(costs), starts)


def test_path_ends_when_costs_are_no_numbers() -> None:
    assert len(row_starts(np.full((5, 3), np.nan, np.float32))) == 5


def plain_median(row: list[float], width: int) -> list[float]:
    edge, last = width // 2, len(row) - 1
    mirrored = [row[last - abs(last - abs(i))] for i in range(-edge, len(row) + edge)]
    return [sorted(mirrored[i : i + width])[edge] for i in range(len(row))]


@pytest.mark.parametrize("width", [1, 3, 5, 7, 9])
@given(x=hnp.arrays(np.float32, st.tuples(st.integers(1, 20), st.integers(5, 20)), elements=floats))
def test_median_is_that_of_the_neighbours(width: int, x: np.ndarray) -> None:
    assert median_filter(x, width).tolist() == [plain_median(row, width) for row in x.tolist()]


def test_rows_too_short_to_mirror_stay() -> None:
    x = np.array([[3, 1, 2]], np.float32)
    np.testing.assert_array_equal(median_filter(x, 7), x)


def plain_align(attention: np.ndarray, num_skipped: int, num_positions: int) -> list[int]:
    x = attention[:, :, :num_positions].astype(np.float64)
    powers = np.exp(x - x.max(axis=2, keepdims=True))
    x = powers / powers.sum(axis=2, keepdims=True)
    x = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)
    x = np.array([[plain_median(row, 7) for row in head] for head in x.tolist()])
    return plain_row_starts(-x.mean(axis=0)[num_skipped:-1])


def test_alignment_is_that_of_plain_steps() -> None:
    generator = np.random.default_rng(3)
    attention = generator.normal(0, 2, (3, 12, 60)).astype(np.float32)
    for num_skipped, num_positions in ((0, 60), (3, 60), (3, 41)):
        aligned = align(attention, num_skipped=num_skipped, num_positions=num_positions)
        assert aligned.tolist() == plain_align(attention, num_skipped, num_positions)


def test_positions_behind_the_sound_do_not_count() -> None:
    attention = np.random.default_rng(5).normal(0, 2, (2, 9, 50)).astype(np.float32)
    changed = attention.copy()
    changed[:, :, 30:] = 50
    expected = align(attention, num_skipped=2, num_positions=30)
    np.testing.assert_array_equal(align(changed, num_skipped=2, num_positions=30), expected)


@given(
    attention=hnp.arrays(
        np.float32, st.tuples(st.integers(1, 2), st.integers(2, 8), st.integers(1, 12)), elements=floats
    ),
    data=st.data(),
)
def test_starts_never_fall_and_lie_in_the_sound(attention: np.ndarray, data: st.DataObject) -> None:
    num_skipped = data.draw(st.integers(0, attention.shape[1] - 2))
    num_positions = data.draw(st.integers(1, attention.shape[2]))
    starts = align(attention, num_skipped=num_skipped, num_positions=num_positions)
    assert len(starts) == attention.shape[1] - num_skipped - 1
    assert starts[0] == 0
    assert (np.diff(starts) >= 0).all()
    assert starts[-1] < num_positions
