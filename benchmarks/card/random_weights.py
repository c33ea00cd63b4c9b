"""Random weights of any shape, made as they are read: no file, no second copy, the same in every process.

Fresh normal numbers for 8 billion weights would take minutes on one core. All tensors are cut from one long sequence of
random numbers instead, each from a place that its name gives; its length is a prime, so that no row repeats another.
Nothing but numpy is needed, so that a rival's interpreter can read the same weights.
"""

import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from card.shapes import Shape

_LENGTH = 16_777_213
_PIECE = 1 << 20
_BLOCK, _BLOCK_BYTES = 32, 18  # of GGUF's Q4_0: an fp16 scale, and 32 codes of 4 bits
_CODE_SPREAD = 4.61
"""Standard deviation of a code from 0 to 15, all equally likely."""
_HEAD_GAIN = 2.0
"""Makes the likeliest token a clear one in most places."""


class RandomWeights:
    """A `sardonyx_export.checkpoint.Checkpoint`.

    Args:
        shape: of the model.
        has_blocks: the layers' matrices are stored as Q4_0. Other numbers than without.
        seed: of all numbers.
    """

    uri = "random"
    licence = None
    sha256 = None

    def __init__(self, shape: Shape, *, has_blocks: bool = False, seed: int = 0) -> None:
        self.config: dict[str, Any] = shape.config()
        self._shapes = shape.tensors()
        self._has_blocks = has_blocks
        draw = np.random.default_rng(seed)
        self._values = draw.standard_normal(_LENGTH, np.float32)
        self._bytes = draw.integers(0, 256, _LENGTH, dtype=np.uint8)

    def names(self) -> Iterable[str]:
        return self._shapes

    def tensor(self, name: str) -> "RandomTensor":
        shape = self._shapes[name]
        is_blocks = self._has_blocks and len(shape) == 2 and name.startswith("model.layers.")
        return RandomTensor(name, shape, is_blocks=is_blocks, values=self._values, codes=self._bytes)

    def texts(self) -> dict[str, bytes]:
        return {}


class RandomTensor:
    """A `sardonyx_export.checkpoint.StoredTensor`."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        is_blocks: bool,
        values: npt.NDArray[np.float32],
        codes: npt.NDArray[np.uint8],
    ) -> None:
        self.name = name
        self.shape = shape
        self.storage = "Q4_0" if is_blocks else "F16"
        self._values = values
        self._codes = codes
        self._start = zlib.crc32(name.encode()) % _LENGTH
        self._scale = 1.0 if "embed" in name else shape[-1] ** -0.5 * (_HEAD_GAIN if "head" in name else 1.0)

    def read(self) -> npt.NDArray[np.float32]:
        """Norms are ones. Of Q4_0 this is never asked."""
        assert self.storage == "F16", self.name
        if len(self.shape) == 1:
            return np.ones(self.shape, np.float32)
        found = np.empty(self.shape[0] * self.shape[1], np.float32)

        def fill(place: int, part: npt.NDArray[np.float32]) -> None:
            np.multiply(part, np.float32(self._scale), out=found[place : place + part.size])

        # What takes long is fresh memory, a page at a time; threads share that.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda piece: fill(*piece), self._parts(self._values, found.size)))
        return found.reshape(self.shape)

    def blocks(self) -> npt.NDArray[np.uint8]:
        """(out, bytes per row)."""
        num_rows, num_columns = self.shape
        found = np.empty(num_rows * num_columns // _BLOCK * _BLOCK_BYTES, np.uint8)
        for place, part in self._parts(self._codes, found.size):
            found[place : place + part.size] = part
        scale = np.array([self._scale / _CODE_SPREAD], "<f2").view(np.uint8)
        found.reshape(-1, _BLOCK_BYTES)[:, :2] = scale
        return found.reshape(num_rows, -1)

    def _parts(self, source: npt.NDArray[Any], size: int) -> Iterable[tuple[int, npt.NDArray[Any]]]:
        """Stretches of the sequence that together have `size` numbers, and where each goes."""
        place, start = 0, self._start
        while place < size:
            part = source[start : start + min(size - place, _PIECE)]
            yield place, part
            place, start = place + part.size, (start + part.size) % _LENGTH
