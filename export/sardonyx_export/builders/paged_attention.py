"""Attention over a cache in blocks: PagedAttention, which CUDA has. Tokens stay packed all the way.

Its ports are those of the paged-step contract (B rows, M blocks of the longest):
    block_table (B, M) · cumulative_sequence_length (B + 1) · past_seqlens (B) · slot_mapping (T), all int32
    attention_metadata (2 or 3) int32, in host memory: bounds of what any row has, see the operator
    past_key_values.{i}.key|value → present.{i}.key|value (blocks, block_size, K, D), the same buffer bound twice

Norms of queries and keys are inputs of the operator: its kernel passes over both for the rotation anyway, so that they
cost neither a node nor memory traffic, and it computes them in float32.
"""

import numpy as np

from sardonyx_export.builders.floats import DTYPES, FloatKind
from sardonyx_export.builders.graph import MICROSOFT, GraphWriter
from sardonyx_export.builders.kv_scales import KvScales
from sardonyx_export.builders.slot_attention import window_size
from sardonyx_export.builders.weights import WeightWriter
from sardonyx_export.errors import ExportError
from sardonyx_export.spec import DecoderSpec, Layer

_HEAD_MULTIPLE = 16
_MAX_HEAD_SIZE = 256


class PagedAttention:
    """A `decoder_graph.Attention`.

    Args:
        graph: receives nodes and ports.
        weights: of the checkpoint: norms of queries and keys.
        spec: what the model is.
        floats: fp16 or bf16, of the cache as well where it has no scales.
        block_size: positions of a block.
        scales: of a quantised cache.

    Raises:
        ExportError: CUDA's kernels do not take heads of this size.
    """

    def __init__(
        self,
        graph: GraphWriter,
        weights: WeightWriter,
        spec: DecoderSpec,
        floats: FloatKind,
        block_size: int,
        scales: KvScales | None = None,
    ) -> None:
        _check_sizes(spec)
        self._graph = graph
        self._weights = weights
        self._spec = spec
        self._scales = scales
        self._dtype = DTYPES[floats] if scales is None else scales.dtype
        self._block_size = block_size

    def declare(self) -> None:
        """See `decoder_graph.Attention`."""
        graph, spec = self._graph, self._spec
        graph.input("block_table", np.int32, ["B", "M"])
        graph.input("cumulative_sequence_length", np.int32, ["B + 1"])
        graph.input("past_seqlens", np.int32, ["B"])
        graph.input("slot_mapping", np.int32, ["T"])
        graph.input("attention_metadata", np.int32, ["bounds"])
        cache: list[int | str] = ["blocks", self._block_size, spec.num_kv_heads, spec.head_size]
        for i in range(len(spec.layers)):
            for side in ("key", "value"):
                graph.input(f"past_key_values.{i}.{side}", self._dtype, cache)
                graph.output(f"present.{i}.{side}", self._dtype, cache)

    def attend(self, index: int, layer: Layer, packed: str) -> str:
        """(T, (H + 2K) D) → (T, H * D)."""
        spec, names = self._spec, self._spec.names
        prefix = f"model.layers.{index}."
        tables = ["", ""] if layer.rope is None else [f"rope.{layer.rope}.cos", f"rope.{layer.rope}.sin"]
        norms, norm_attributes = ["", ""], {}
        scales, scale_attributes = ["", ""], {}
        if self._scales is not None:
            scales, scale_attributes = self._scales.write(index), self._scales.attributes
        if names.query_norm is not None:
            norms = [
                self._weights.vector([f"{prefix}{name}.weight"], spec.head_size, offset=spec.norm_offset)
                for name in (names.query_norm, names.key_norm)
            ]
            norm_attributes = {"qk_norm_epsilon": spec.norm_epsilon}
        past = [f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
        rows = ["cumulative_sequence_length", "past_seqlens", "block_table"]
        output, *_ = self._graph.node_with_outputs(
            "PagedAttention",
            [packed, "", "", *past, *rows, *tables, "slot_mapping", "", *norms, *scales, "attention_metadata"],
            [f"{prefix}self_attn.output", f"present.{index}.key", f"present.{index}.value"],
            domain=MICROSOFT,
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            scale=spec.attention_scale,
            softcap=spec.attention_softcap,
            local_window_size=window_size(spec, layer),
            do_rotary=int(layer.rope is not None),
            **norm_attributes,
            **scale_attributes,
        )
        return output

    def all_rows(self, attended: str, name: str) -> str:
        """See `decoder_graph.Attention`."""
        return attended

    def wanted_rows(self, attended: str, name: str) -> str:
        """See `decoder_graph.Attention`."""
        return self._graph.node("Gather", [attended, "logits_index"], name)


def default_block_size(head_size: int) -> int:
    """Positions of the smallest block that FlashAttention reads.

    Source: ONNX Runtime 1.31, ``paged_attention.cc``: the size of a tile of keys must divide a block's.
    """
    return 256 if head_size <= 64 else 128 if head_size <= 128 else 64


def _check_sizes(spec: DecoderSpec) -> None:
    """Source: ONNX Runtime 1.31, ``paged_attention_helper.h`` and ``group_query_attention_helper.h``."""
    if spec.head_size % _HEAD_MULTIPLE or spec.head_size > _MAX_HEAD_SIZE:
        raise ExportError(
            f"is {spec.head_size}; CUDA takes multiples of {_HEAD_MULTIPLE} to {_MAX_HEAD_SIZE}", field="head_dim"
        )
