"""Whisper's decoder and aligner for CUDA, in fp16 or bf16: `whisper_decoder` and `whisper_aligner` but for attention.

The decoder's own is PagedAttention: its ports are those of `paged_attention`, caches as (blocks, block_size, H, D).
Cross-attention is MultiHeadAttention over keys and values of a window, which take the place of its cache. It alone sees
the padded view (B, S): a row has its own window, and in most steps one token. So row b of the step attends to row b of

    cross.{i}.key (B, H, P, D) · cross.{i}.value (B, H, P, D), as the encoder's graph gives them for CUDA

The aligner has the plain operators, in float32 from the queries to the mix of the values. No node of it looks at a
shape, which the CPU would do: its positions are an input, position_ids (S) int64.

Source: com.microsoft.MultiHeadAttention (ONNX Runtime 1.31): keys and values of rank 4 are a cross-attention's cache.
"""

import numpy as np

from sardonyx_export.builders.floats import DTYPES
from sardonyx_export.builders.graph import MICROSOFT
from sardonyx_export.builders.whisper_aligner import WhisperAlignerGraph
from sardonyx_export.builders.whisper_decoder import WhisperDecoderGraph


class PagedWhisperDecoderGraph(WhisperDecoderGraph):
    """Writes one decoder. Its `block_size` is that of the cache."""

    def _declare_ports(self) -> None:
        graph, spec, dtype = self._graph, self._spec, DTYPES[self._floats]
        for name in ("input_ids", "position_ids", "row_scatter"):
            graph.input(name, np.int64, ["T"])
        graph.input("row_gather", np.int64, ["B", "S"])
        graph.input("block_table", np.int32, ["B", "M"])
        graph.input("cumulative_sequence_length", np.int32, ["B + 1"])
        graph.input("past_seqlens", np.int32, ["B"])
        graph.input("slot_mapping", np.int32, ["T"])
        graph.input("attention_metadata", np.int32, ["bounds"])
        graph.input("logits_index", np.int64, ["N"])
        graph.output("logits", np.float32, ["N", spec.vocab_size])
        cache: list[int | str] = ["blocks", self._block_size, spec.num_decoder_heads, spec.head_size]
        cross: list[int | str] = ["B", spec.num_decoder_heads, spec.num_positions, spec.head_size]
        for i in range(spec.num_decoder_layers):
            for side in ("key", "value"):
                graph.input(f"past_key_values.{i}.{side}", dtype, cache)
                graph.output(f"present.{i}.{side}", dtype, cache)
                graph.input(f"cross.{i}.{side}", dtype, cross)

    def _self_attention(self, index: int, hidden: str) -> str:
        """(T, E) → (T, E), appended to the cache in place."""
        prefix = f"model.decoder.layers.{index}.self_attn."
        past = [f"past_key_values.{index}.{side}" for side in ("key", "value")]
        rows = ["cumulative_sequence_length", "past_seqlens", "block_table"]
        packed = self._layers.query_key_value(hidden, prefix)
        output, *_ = self._graph.node_with_outputs(
            "PagedAttention",
            [packed, "", "", *past, *rows, "", "", "slot_mapping", *[""] * 5, "attention_metadata"],
            [f"{prefix}output", f"present.{index}.key", f"present.{index}.value"],
            domain=MICROSOFT,
            num_heads=self._spec.num_decoder_heads,
            kv_num_heads=self._spec.num_decoder_heads,
        )
        return self._layers.project(output, f"{prefix}out_proj")

    def _cross_attention(self, index: int, hidden: str) -> str:
        prefix = f"model.decoder.layers.{index}.encoder_attn."
        query = self._padded(self._layers.project(hidden, f"{prefix}q_proj"))
        attended = self._graph.node(
            "MultiHeadAttention",
            [query, f"cross.{index}.key", f"cross.{index}.value"],
            f"{prefix}output",
            domain=MICROSOFT,
            num_heads=self._spec.num_decoder_heads,
        )
        return self._layers.project(self._packed(attended), f"{prefix}out_proj")


class PagedWhisperAlignerGraph(WhisperAlignerGraph):
    """Writes one aligner. All weights are the decoder's, as that one stacks them."""

    def _declare_aligner(self, num_heads: int) -> None:
        graph, spec = self._graph, self._spec
        graph.input("input_ids", np.int64, [1, "S"])
        graph.input("position_ids", np.int64, ["S"])
        for i in range(spec.num_decoder_layers):
            for side in ("key", "value"):
                shape = [1, spec.num_decoder_heads, spec.num_positions, spec.head_size]
                graph.input(f"cross.{i}.{side}", DTYPES[self._floats], shape)
        graph.output("attention", np.float32, [num_heads, "S", spec.num_positions])
        graph.output("logprobs", np.float32, ["S - 1"])

    def _number(self, ids: str) -> None:
        pass

    def _sides(self, hidden: str, prefix: str) -> list[str]:
        sides = [f"{prefix}{side}" for side in "qkv"]
        packed = self._layers.query_key_value(hidden, prefix)
        self._graph.node_with_outputs("Split", [packed], sides, axis=1, num_outputs=len(sides))
        return sides

    def _cross_key(self, index: int) -> str:
        wide = self._widened(f"cross.{index}.key")
        return self._graph.node("Transpose", [wide], f"{wide}.transposed", perm=[0, 1, 3, 2])
