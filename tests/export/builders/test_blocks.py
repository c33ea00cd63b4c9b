import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sardonyx_export.builders.blocks import Blocks, fit, from_affine, pack, widen

_WEIGHTS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 70)),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
)


def _block_ranges(weights: npt.NDArray[np.float32], block_size: int) -> npt.NDArray[np.float32]:
    """For each weight, from the smallest to the largest weight of its block, zero included."""
    short = -weights.shape[1] % block_size
    blocks = np.pad(weights, ((0, 0), (0, short))).reshape(len(weights), -1, block_size)
    ranges = np.maximum(blocks.max(-1), 0) - np.minimum(blocks.min(-1), 0)
    return np.repeat(ranges, block_size, axis=1)[:, : weights.shape[1]]


@given(weights=_WEIGHTS, block_size=st.sampled_from([16, 32, 64]))
@settings(deadline=None)
def test_eight_bits_are_within_half_a_step(weights: npt.NDArray[np.float32], block_size: int) -> None:
    blocks = fit(weights, 8, block_size)
    error = np.abs(blocks.dequantise(weights.shape[1]) - weights)
    assert (error <= _block_ranges(weights, block_size) / 127 * 0.501 + 1e-30).all()


@given(weights=_WEIGHTS, block_size=st.sampled_from([16, 32, 64]))
@settings(deadline=None)
def test_four_bits_are_no_worse_than_rounding_to_nearest(weights: npt.NDArray[np.float32], block_size: int) -> None:
    blocks = fit(weights, 4, block_size)
    error = blocks.dequantise(weights.shape[1]).astype(np.float64) - weights
    # Rounding over the full range errs by half a step at most, and by as much again where the zero point is rounded.
    assert (error**2).sum() <= ((_block_ranges(weights, block_size) / 15) ** 2).sum() * 1.01 + 1e-30


@given(weights=_WEIGHTS, bits=st.sampled_from([4, 8]), block_size=st.sampled_from([16, 32]))
@settings(deadline=None)
def test_padding_beyond_a_row_weighs_nothing(weights: npt.NDArray[np.float32], bits: int, block_size: int) -> None:
    blocks = fit(weights, bits, block_size)
    whole = blocks.dequantise(blocks.codes.shape[1] * block_size)
    assert whole.shape[1] == -(-weights.shape[1] // block_size) * block_size
    assert (whole[:, weights.shape[1] :] == 0).all()


def test_gaussian_weights_lose_less_than_eight_percent_in_four_bits() -> None:
    weights = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    error = fit(weights, 4, 32).dequantise(1024) - weights
    assert np.sqrt((error**2).mean()) < 0.08


def test_a_block_of_zeros_stays_zero() -> None:
    for bits in (4, 8):
        assert (fit(np.zeros((2, 32), np.float32), bits, 32).dequantise(32) == 0).all()


@given(values=hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.integers(0, 15)))
def test_packing_puts_the_first_of_two_codes_into_the_low_half(values: npt.NDArray[np.uint8]) -> None:
    packed = pack(values, 4)
    unpacked = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(values), -1)
    assert (unpacked[:, : values.shape[1]] == values).all()
    assert (unpacked[:, values.shape[1] :] == 0).all()
    assert (pack(values, 8) == values).all()


def test_an_affine_block_keeps_its_minimum_as_an_offset_from_the_default_zero_point() -> None:
    codes = np.arange(16, dtype=np.uint8).reshape(1, 1, 16)
    blocks = from_affine(codes, np.array([[0.5]], np.float32), np.array([[-3.25]], np.float32), 4)
    assert blocks.zero_points.tolist() == [[8]]
    assert blocks.dequantise(16).tolist() == [[0.5 * code - 3.25 for code in range(16)]]


@pytest.mark.parametrize("zero_point", [0, 8, 15])
def test_widening_changes_no_weight(zero_point: int) -> None:
    codes = np.arange(16, dtype=np.uint8).reshape(1, 1, 16)
    narrow = Blocks(4, codes, np.array([[0.25]], np.float32), np.array([[zero_point]], np.uint8))
    wide = widen(narrow)
    assert wide.bits == 8
    assert wide.zero_points.tolist() == [[128]]
    assert (wide.dequantise(16) == narrow.dequantise(16)).all()
