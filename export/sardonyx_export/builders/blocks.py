"""Block-quantised weights in numpy: fitting them, and packing them the way MatMulNBits reads them.

A block is ``block_size`` neighbours of one output row. Its weights are ``scale * (code - zero_point)``, plus an offset
where the source had one that no integer zero point expresses. Knows no graph and no file.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Ranges tried for each 4-bit block, as parts of the full one. On SmolLM2's weights, one range leaves 7.9 % root mean
# square error, these four 7.0 %, twenty-five 6.8 % at six times the time.
_RANGE_PARTS = (1.05, 0.95, 0.85, 0.75)


@dataclass(slots=True)
class Blocks:
    """Rows of a weight matrix, ``(n, in)``, as blocks: n rows of b blocks of s codes."""

    bits: int
    codes: npt.NDArray[np.uint8]
    """(n, b, s), each below ``2 ** bits``; beyond the row's end they equal the zero point."""
    scales: npt.NDArray[np.float32]
    """(n, b)"""
    zero_points: npt.NDArray[np.uint8]
    """(n, b), each below ``2 ** bits``."""
    offsets: npt.NDArray[np.float32] | None = None
    """(n, b), added to each weight of the block; ``None``: none."""

    def with_float_zero_points(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Scales and zero points, both (n, b) float32, that take the offsets in: ``scale * (code - zero_point)``.

        A block of one value may have the scale 0 and all of its weight in the offset. It gets the offset as scale, and
        codes of 1 over a zero point of 0; `codes` are changed for that.
        """
        assert self.offsets is not None
        is_flat = self.scales == 0
        self.codes[is_flat] = 1
        scales = np.where(is_flat, self.offsets, self.scales)
        with np.errstate(divide="ignore", invalid="ignore"):
            points = self.zero_points - self.offsets / self.scales
        return scales, np.where(is_flat, np.float32(0), points).astype(np.float32)

    def dequantise(self, num_columns: int) -> npt.NDArray[np.float32]:
        """The weights these blocks stand for, (n, num_columns) float32."""
        weights = self.scales[..., None] * (self.codes.astype(np.float32) - self.zero_points[..., None])
        if self.offsets is not None:
            weights += self.offsets[..., None]
        return weights.reshape(len(weights), -1)[:, :num_columns]


def default_zero_point(bits: int) -> int:
    """What MatMulNBits subtracts where it is given no zero points."""
    return 1 << (bits - 1)


def fit(
    weights: npt.NDArray[np.float32], bits: int, block_size: int, scale_dtype: npt.DTypeLike = np.float32
) -> Blocks:
    """Quantise rows so that the squared error of each block is small.

    8 bits round to nearest symmetrically: their error drowns in that of the int8 activations. 4 bits try several ranges
    for each block, with the zero point that each asks for, refit the scale by least squares and keep the best.

    Args:
        weights: (n, in) float32, finite.
        bits: 4 or 8.
        block_size: of MatMulNBits; a short last block is filled up with zeros.
        scale_dtype: what scales will be rounded to. The 8-bit codes make up for it; beside 4 bits it is nothing.
    """
    rows = _blocked(weights, block_size)
    return _round_symmetric(rows, scale_dtype) if bits == 8 else _search(rows, bits)


def fit_channels(
    weights: npt.NDArray[np.float32], bits: int = 7
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round rows symmetrically, to codes from -63 to 63 or from -127 to 127: (n, in) int8 and (n) float32.

    7 bits, as the AVX2 kernel without VNNI adds pairs of products with uint8 activations in int16. With 8 bits these
    saturate; 2 * 255 * 63 still fits.
    """
    scales = np.abs(weights).max(axis=-1) / np.float32((1 << (bits - 1)) - 1)
    return np.rint(weights * _inverse(scales)[:, None]).astype(np.int8), scales


def from_affine(
    codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32], minima: npt.NDArray[np.float32], bits: int
) -> Blocks:
    """Blocks of weights ``scale * code + minimum``: the default zero point, and the rest of the minimum as offset.

    Args:
        codes: (n, b, s).
        scales: (n, b).
        minima: (n, b).
        bits: of the codes.
    """
    zero_point = default_zero_point(bits)
    return Blocks(bits, codes, scales, np.full(scales.shape, zero_point, np.uint8), minima + scales * zero_point)


def widen(blocks: Blocks) -> Blocks:
    """The same weights with 8-bit codes and the default zero point."""
    shifted = blocks.codes + (np.uint8(128) - blocks.zero_points)[..., None]
    return Blocks(8, shifted, blocks.scales, np.full_like(blocks.zero_points, 128), blocks.offsets)


def pack(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Pack the last axis: 8 bits as they are; 4 bits two to a byte, the first in the low half, an odd end with 0."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return values[..., 0::2] | (values[..., 1::2] << np.uint8(4))


def _blocked(weights: npt.NDArray[np.float32], block_size: int) -> npt.NDArray[np.float32]:
    short = -weights.shape[1] % block_size
    if short:
        weights = np.pad(weights, ((0, 0), (0, short)))
    return weights.reshape(len(weights), -1, block_size)


def _round_symmetric(rows: npt.NDArray[np.float32], scale_dtype: npt.DTypeLike) -> Blocks:
    scales = (np.abs(rows).max(axis=-1) / np.float32(127)).astype(scale_dtype).astype(np.float32)
    codes = np.clip(np.rint(rows * _inverse(scales)[..., None]) + 128, 0, 255)
    return Blocks(8, codes.astype(np.uint8), scales, np.full(scales.shape, 128, np.uint8))


def _search(rows: npt.NDArray[np.float32], bits: int) -> Blocks:
    top = np.float32((1 << bits) - 1)
    low, high = np.minimum(rows.min(axis=-1), 0), np.maximum(rows.max(axis=-1), 0)
    best_gain = np.full(low.shape, -1, np.float32)
    scales, inverses, zeros = np.empty_like(low), np.empty_like(low), np.empty_like(low)
    for part in _RANGE_PARTS:
        inverse = _inverse((high - low) * np.float32(part) / top)
        zero = np.clip(np.rint(-low * np.float32(part) * inverse), 0, top)
        steps = _steps(rows, inverse, zero, top)
        product, square = np.einsum("nbs,nbs->nb", rows, steps), np.einsum("nbs,nbs->nb", steps, steps)
        # With the least-squares scale product / square the squared error is |w|^2 - product^2 / square.
        scale = product * _inverse(square)
        better = product * scale > best_gain
        for target, found in ((best_gain, product * scale), (scales, scale), (inverses, inverse), (zeros, zero)):
            np.copyto(target, found, where=better)
    codes = _steps(rows, inverses, zeros, top) + zeros[..., None]
    return Blocks(bits, codes.astype(np.uint8), scales, zeros.astype(np.uint8))


def _steps(
    rows: npt.NDArray[np.float32],
    inverse: npt.NDArray[np.float32],
    zero: npt.NDArray[np.float32],
    top: np.float32,
) -> npt.NDArray[np.float32]:
    """Weights in scale units, rounded, and clipped to what codes from 0 to `top` can say."""
    steps = rows * inverse[..., None]
    np.rint(steps, out=steps)
    return np.clip(steps, -zero[..., None], (top - zero)[..., None], out=steps)


def _inverse(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """1 / x, and 0 where x is too small to divide by."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(np.abs(values) >= np.finfo(np.float32).tiny, np.float32(1) / values, np.float32(0))
