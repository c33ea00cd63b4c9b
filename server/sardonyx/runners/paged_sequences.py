"""What a step needs of its sequences and what seldom changes from step to step, kept in arrays.

Floor 3. Pure numpy. A step of 256 rows would otherwise copy 256 lists of blocks, one by one, in Python.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from sardonyx.core import Sequence
from sardonyx.runners.paged_draws import Draws, uniforms
from sardonyx.runners.sampler import MIN_TEMPERATURE

Places = npt.NDArray[np.intp]


class SequenceTable:
    """Blocks and sampling of sequences, each in a place of its own for as long as it is seen again and again.

    Args:
        num_places: more than the sequences of two steps together.
        num_columns: blocks of a sequence at most.
    """

    def __init__(self, num_places: int, num_columns: int) -> None:
        self.blocks = np.full((num_places, num_columns), -1, np.int32)
        """Of each place, in order, -1 behind the last."""
        self._temperature = np.zeros(num_places, np.float32)
        self._top_k = np.zeros(num_places, np.int64)
        self._top_p = np.ones(num_places, np.float32)
        self._min_p = np.zeros(num_places, np.float32)
        self._seeds = np.zeros(num_places, np.uint64)
        self._places: dict[Sequence, tuple[int, list[int]]] = {}
        self._free = list(range(num_places))

    def find(self, sequences: Iterable[Sequence]) -> Places:
        """Places of a step's sequences, their blocks as they are now."""
        sequences = list(sequences)
        if len(sequences) > len(self._free):
            self._forget_all_but(sequences)
        return np.array([self._find(sequence) for sequence in sequences], np.intp)

    def draws(self, places: Places, positions: npt.NDArray[np.int64]) -> Draws:
        """What the device's sampler is told of them, for tokens at these positions of their sequences."""
        return Draws(
            temperature=self._temperature[places],
            top_k=self._top_k[places],
            top_p=self._top_p[places],
            min_p=self._min_p[places],
            uniform=uniforms(self._seeds[places], positions),
        )

    def _find(self, sequence: Sequence) -> int:
        known = self._places.get(sequence)
        # Compared whole: blocks come and go with preemptions, and a list of integers is compared in no time.
        if known is not None and known[1] == sequence.blocks:
            return known[0]
        place = self._take(sequence) if known is None else known[0]
        blocks = list(sequence.blocks)
        row: npt.NDArray[Any] = self.blocks[place]
        row[: len(blocks)] = blocks
        row[len(blocks) :] = -1
        self._places[sequence] = (place, blocks)
        return place

    def _take(self, sequence: Sequence) -> int:
        place, params = self._free.pop(), sequence.request.sampling
        self._temperature[place] = params.temperature if params.temperature >= MIN_TEMPERATURE else 0.0
        self._top_k[place] = params.top_k
        self._top_p[place] = params.top_p
        self._min_p[place] = params.min_p
        self._seeds[place] = sequence.seed & 0xFFFFFFFFFFFFFFFF
        return place

    def _forget_all_but(self, sequences: list[Sequence]) -> None:
        kept = set(sequences)
        for sequence in [each for each in self._places if each not in kept]:
            self._free.append(self._places.pop(sequence)[0])
