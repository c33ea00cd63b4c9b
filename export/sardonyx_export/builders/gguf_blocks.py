"""GGUF's block formats as codes, scales and minima, without rounding anything.

Only the formats whose blocks of 32 MatMulNBits can carry: Q4_0 and Q8_0 as they are, Q4_1 and Q4_K with an offset for
each block. All others are dequantised by the source and fitted anew.

Source: ggml, ``ggml-common.h`` (struct block_q4_0, block_q4_1, block_q8_0, block_q4_K).
"""

import numpy as np
import numpy.typing as npt

from sardonyx_export.builders.blocks import Blocks, from_affine

BLOCK_SIZE = 32
_SUPER_BLOCK = 256


def decode(storage: str, raw: npt.NDArray[np.uint8], num_columns: int) -> Blocks:
    """Blocks of rows stored in a GGUF format.

    Args:
        storage: one of `FORMATS`.
        raw: (n, bytes per row).
        num_columns: weights in a row; GGUF stores whole blocks only.
    """
    block_size = _SUPER_BLOCK if storage == "Q4_K" else BLOCK_SIZE
    return FORMATS[storage](raw.reshape(len(raw), num_columns // block_size, -1))


def _q4_0(raw: npt.NDArray[np.uint8]) -> Blocks:
    scales = _half(raw[..., 0:2])
    return Blocks(4, _nibbles(raw[..., 2:]), scales, np.full(scales.shape, 8, np.uint8))


def _q4_1(raw: npt.NDArray[np.uint8]) -> Blocks:
    return from_affine(_nibbles(raw[..., 4:]), _half(raw[..., 0:2]), _half(raw[..., 2:4]), 4)


def _q8_0(raw: npt.NDArray[np.uint8]) -> Blocks:
    scales = _half(raw[..., 0:2])
    return Blocks(8, raw[..., 2:] ^ np.uint8(0x80), scales, np.full(scales.shape, 128, np.uint8))


def _q4_k(raw: npt.NDArray[np.uint8]) -> Blocks:
    """A super-block of 256: two half floats, 8 scales and 8 minima of 6 bits, and 8 blocks of 32 codes of 4 bits."""
    num_rows = len(raw)
    packed = raw[..., 4:16]
    low, mid, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)], axis=-1)
    minima = np.concatenate([mid & 0x3F, (high >> 4) | ((mid >> 2) & 0x30)], axis=-1)
    # 32 bytes hold two blocks: the first in the low halves, the second in the high ones.
    pairs = raw[..., 16:].reshape(num_rows, -1, 4, 1, BLOCK_SIZE)
    codes = np.concatenate([pairs & 0x0F, pairs >> 4], axis=-2)
    return from_affine(
        codes.reshape(num_rows, -1, BLOCK_SIZE),
        (_half(raw[..., 0:2])[..., None] * scales).reshape(num_rows, -1),
        (-_half(raw[..., 2:4])[..., None] * minima).reshape(num_rows, -1),
        4,
    )


def _half(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(n, b, 2) bytes as (n, b) little-endian half floats."""
    return np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float32)


def _nibbles(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(n, b, 16) bytes as (n, b, 32) codes: the first 16 in the low halves, the others in the high ones."""
    return np.concatenate([raw & 0x0F, raw >> 4], axis=-1)


FORMATS = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k, "Q8_0": _q8_0}
FOUR_BIT_FORMATS = frozenset({"Q4_0", "Q4_1", "Q4_K"})
OFFSET_FORMATS = frozenset({"Q4_1", "Q4_K"})
