"""Attention over a cache in slots: GroupQueryAttention, which the CPU has.

The operator alone sees the padded view (B, S), made by two gathers. Its ports are those of the packed-step contract:
    row_gather (B, S) · row_scatter (T), both int64
    seqlens_k (B) · query_seqlens (B) · total_sequence_length (), all int32
    past_key_values.{i}.key|value → present.{i}.key|value (B, K, C, D) float32, the same buffer bound twice

``total_sequence_length`` is an upper bound that the kernel refuses above C and above the rotary tables' rows: the
smaller of C and ``max_model_len``.
"""

import numpy as np

from sardonyx_export.builders.graph import MICROSOFT, GraphWriter
from sardonyx_export.builders.weights import WeightWriter
from sardonyx_export.spec import DecoderSpec, Layer


class SlotAttention:
    """A `decoder_graph.Attention`.

    Args:
        graph: receives nodes and ports.
        weights: of the checkpoint: norms of queries and keys.
        spec: what the model is.
    """

    def __init__(self, graph: GraphWriter, weights: WeightWriter, spec: DecoderSpec) -> None:
        self._graph = graph
        self._weights = weights
        self._spec = spec

    def declare(self) -> None:
        """See `decoder_graph.Attention`."""
        graph, spec = self._graph, self._spec
        graph.input("row_gather", np.int64, ["B", "S"])
        graph.input("row_scatter", np.int64, ["T"])
        graph.input("seqlens_k", np.int32, ["B"])
        graph.input("query_seqlens", np.int32, ["B"])
        graph.input("total_sequence_length", np.int32, [])
        cache: list[int | str] = ["B", spec.num_kv_heads, "C", spec.head_size]
        for i in range(len(spec.layers)):
            for side in ("key", "value"):
                graph.input(f"past_key_values.{i}.{side}", np.float32, cache)
                graph.output(f"present.{i}.{side}", np.float32, cache)

    def attend(self, index: int, layer: Layer, packed: str) -> str:
        """(T, (H + 2K) D) → (B * S, H * D), rows of the padded view."""
        spec, graph = self._spec, self._graph
        prefix = f"model.layers.{index}.self_attn."
        if spec.names.query_norm is None:
            padded = graph.node("Gather", [packed, "row_gather"], f"{prefix}padded")
        else:
            padded = self._normed_heads(index, packed)
        tables = ["", ""] if layer.rope is None else [f"rope.{layer.rope}.cos", f"rope.{layer.rope}.sin"]
        past = [f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
        output, *_ = graph.node_with_outputs(
            "GroupQueryAttention",
            [padded, "", "", *past, "seqlens_k", "total_sequence_length", *tables, *[""] * 7, "query_seqlens"],
            [f"{prefix}output", f"present.{index}.key", f"present.{index}.value"],
            domain=MICROSOFT,
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            scale=spec.attention_scale,
            softcap=spec.attention_softcap,
            local_window_size=window_size(spec, layer),
            do_rotary=int(layer.rope is not None),
        )
        shape = graph.constant("shape.heads", np.array([-1, spec.num_heads * spec.head_size], np.int64))
        return graph.node("Reshape", [output, shape], f"{prefix}rows")

    def all_rows(self, attended: str, name: str) -> str:
        """See `decoder_graph.Attention`."""
        return self._graph.node("Gather", [attended, "row_scatter"], name)

    def wanted_rows(self, attended: str, name: str) -> str:
        """See `decoder_graph.Attention`."""
        index = self._graph.node("Gather", ["row_scatter", "logits_index"], "wanted.index")
        return self._graph.node("Gather", [attended, index], name)

    def _normed_heads(self, index: int, packed: str) -> str:
        """Query and key heads through their norms: (T, (H + 2K) D) → (B, S, (H + 2K) D).

        CPU's GroupQueryAttention refuses to do it itself (ONNX Runtime 1.32: CUDA and WebGPU only). One norm serves
        both, its weights laid out as (H + K, D).
        """
        spec, graph, names = self._spec, self._graph, self._spec.names
        prefix = f"model.layers.{index}.self_attn."
        num_normed = spec.num_heads + spec.num_kv_heads
        heads_shape = graph.constant("shape.by_head", np.array([0, -1, spec.head_size], np.int64))
        heads = graph.node("Reshape", [packed, heads_shape], f"{prefix}heads")
        sizes = graph.constant("sizes.normed_value", np.array([num_normed, spec.num_kv_heads], np.int64))
        normed, value = graph.node_with_outputs(
            "Split", [heads, sizes], [f"{prefix}query_key", f"{prefix}value"], axis=1
        )
        tensors = [f"model.layers.{index}.{names.query_norm}.weight"] * spec.num_heads
        tensors += [f"model.layers.{index}.{names.key_norm}.weight"] * spec.num_kv_heads
        weight = self._weights.vector(tensors, num_normed * spec.head_size, offset=spec.norm_offset)
        weight = graph.share(f"{prefix}norm", weight, (num_normed, spec.head_size))
        normed = graph.node(
            "SimplifiedLayerNormalization", [normed, weight], f"{prefix}normed", axis=-1, epsilon=spec.norm_epsilon
        )
        heads = graph.node("Concat", [normed, value], f"{prefix}normed_heads", axis=1)
        padded = graph.node("Gather", [heads, "row_gather"], f"{prefix}padded_heads")
        flat = graph.constant("shape.flat_heads", np.array([0, 0, -1], np.int64))
        return graph.node("Reshape", [padded, flat], f"{prefix}padded")


def window_size(spec: DecoderSpec, layer: Layer) -> int:
    """The attribute ``local_window_size``. A window that no sequence outgrows is none.

    Like ours, the kernels' counts the query's own token.
    """
    return layer.window if layer.window is not None and layer.window < spec.max_model_len else -1
