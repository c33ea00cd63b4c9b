"""What a quantised KV cache may be, and what its scales are made of: what `stages.calibration` tells the builders."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
KvCacheDtype = Literal["int8", "fp8"]
"""vLLM's words; fp8 is e4m3."""


@dataclass(frozen=True, slots=True)
class KvRange:
    """Of one layer: the largest magnitude of each channel of each head, over many tokens."""

    key: Array
    """(K, D), of keys as the cache holds them, normed and rotated, whatever their position."""
    value: Array
    """(K, D)"""
