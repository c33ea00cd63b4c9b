"""A checkpoint made of arrays."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sardonyx_export.errors import ExportError

Stored = tuple[str, npt.NDArray[np.uint8], npt.NDArray[np.float32]]
"""Storage, raw blocks, weights."""


@dataclass
class ArrayTensor:
    """One weight in memory."""

    name: str
    storage: str
    raw: npt.NDArray[np.uint8] | None
    values: npt.NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self) -> npt.NDArray[np.float32]:
        return self.values.copy()

    def blocks(self) -> npt.NDArray[np.uint8]:
        if self.raw is None:
            raise ValueError(self.storage)
        return self.raw


class ArrayCheckpoint:
    """A `checkpoint.Checkpoint` over arrays, or over blocks together with what they stand for."""

    uri = "arrays"
    licence = None
    sha256 = None

    def __init__(self, config: dict[str, Any], tensors: Mapping[str, npt.NDArray[np.float32] | Stored]) -> None:
        self.config = config
        self._tensors = {
            name: ArrayTensor(name, *stored) if isinstance(stored, tuple) else ArrayTensor(name, "F32", None, stored)
            for name, stored in tensors.items()
        }

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def tensor(self, name: str) -> ArrayTensor:
        if name not in self._tensors:
            raise ExportError(f"the checkpoint has no tensor {name}")
        return self._tensors[name]

    def texts(self) -> dict[str, bytes]:
        return {}
