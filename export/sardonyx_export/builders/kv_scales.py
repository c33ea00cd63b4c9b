"""The scales of a quantised cache: what PagedAttention divides keys and values by before it stores them.

They are constants of the graph, from calibration. The operator rounds ``x / scale`` to the nearest int8 or fp8 and cuts
off what lies beyond -128 and 127, or -448 and 448.

int8 has a scale for each channel of each head, since its steps are equally wide and channels may differ a hundredfold.
Values get room for a quarter more than calibration saw; keys have theirs, since a range is that of a rotated pair. fp8
(e4m3) has steps as wide as its numbers are large, so one scale for a layer's keys and one for its values do, and room
for twice of what calibration saw costs nothing.

Source: com.microsoft.PagedAttention (ONNX Runtime 1.32 schema); ``QuantizeToCache`` in its ``paged_attention_impl.cu``.
"""

from collections.abc import Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np

from sardonyx_export.builders.graph import GraphWriter
from sardonyx_export.kv_ranges import Array, KvCacheDtype, KvRange

_DTYPES: dict[KvCacheDtype, np.dtype[Any]] = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
DATATYPES: dict[KvCacheDtype, Literal["INT8", "FP8"]] = {"int8": "INT8", "fp8": "FP8"}
"""The manifest's words."""
_INT8_MAX, _FP8_MAX = 127, 448
_FP8_HEADROOM = 2
_INT8_VALUE_HEADROOM = 1.25
"""Random weights, 725 positions: int8 is 0.0025 nats from 16 bits without it and 0.0015 with it. What was cut off costs
more than coarser steps."""


class KvScales:
    """Of all layers.

    Args:
        graph: receives the constants.
        dtype: of the cache.
        ranges: one for each layer.
    """

    def __init__(self, graph: GraphWriter, dtype: KvCacheDtype, ranges: Sequence[KvRange]) -> None:
        self._graph = graph
        self._ranges = ranges
        self._is_by_channel = dtype == "int8"
        self.dtype = _DTYPES[dtype]
        """What the graph's cache has."""

    @property
    def attributes(self) -> dict[str, str]:
        """PagedAttention's, by name."""
        kind = "PER_CHANNEL" if self._is_by_channel else "PER_TENSOR"
        return {"k_quant_type": kind, "v_quant_type": kind}

    def write(self, index: int) -> list[str]:
        """Names of ``k_scale`` and ``v_scale`` of layer `index`."""
        sides = {"k": self._ranges[index].key, "v": self._ranges[index].value}
        if self._is_by_channel:
            sides["v"] = sides["v"] * np.float32(_INT8_VALUE_HEADROOM)
        return [
            self._graph.constant(f"model.layers.{index}.self_attn.{side}_scale", self._scale(reached))
            for side, reached in sides.items()
        ]

    def _scale(self, reached: Array) -> Array:
        """(K, 1, D) or (1) float32. A channel that was always zero has 1."""
        scale = reached[:, None] / np.float32(_INT8_MAX)
        if not self._is_by_channel:
            scale = reached.max(keepdims=True).reshape(1) * np.float32(_FP8_HEADROOM / _FP8_MAX)
        return np.where(scale > 0, scale, np.float32(1))
