"""The packed-step graph of Whisper's decoder, node by node.

As `builders.decoder_graph`, with learned positions and with cross-attention over each row's own window:

    input_ids (T) · position_ids (T) · row_gather (B, S) · row_scatter (T) · logits_index (N), all int64
    seqlens_k (B) · query_seqlens (B) · total_sequence_length (), all int32
    past_key_values.{i}.key|value → present.{i}.key|value (B, H, C, D) float32, the same buffer bound twice
    cross.{i}.key (B, H, D, P) · cross.{i}.value (B, H, P, D) float32, as the encoder's graph gives them
    logits (N, V) float32
"""

import numpy as np

from sardonyx_export.builders.floats import DTYPES, FloatKind
from sardonyx_export.builders.graph import MICROSOFT, GraphWriter, element_type
from sardonyx_export.builders.linear import Linears
from sardonyx_export.builders.weights import Matrix, WeightWriter
from sardonyx_export.builders.whisper_layers import WhisperLayers
from sardonyx_export.whisper_spec import WhisperSpec


class WhisperDecoderGraph:
    """Writes one decoder.

    Args:
        graph: receives nodes and weights.
        weights: of the checkpoint.
        linears: adds the head.
        layers: adds the rest but attention.
        spec: what the model is.
        head_bits: of head and embedding: those of `floats`, or 8.
        block_size: of head and embedding, where they are quantised.
        floats: what is computed in; logits are fp32.
    """

    def __init__(
        self,
        graph: GraphWriter,
        weights: WeightWriter,
        linears: Linears,
        layers: WhisperLayers,
        spec: WhisperSpec,
        *,
        head_bits: int,
        block_size: int,
        floats: FloatKind = "fp32",
    ) -> None:
        self._graph = graph
        self._weights = weights
        self._linears = linears
        self._layers = layers
        self._spec = spec
        self._head_bits = head_bits
        self._block_size = block_size
        self._floats: FloatKind = floats

    def write(self) -> None:
        """Add everything to the graph."""
        spec, graph = self._spec, self._graph
        self._declare_ports()
        head, stream = self._embed("input_ids")
        for i in range(spec.num_decoder_layers):
            stream = self._layer(i, stream)
        self._logits(graph.node("Gather", [stream, "logits_index"], "wanted"), head)

    def _logits(self, x: str, head: Matrix) -> str:
        """(N, E) of the residual stream → (N, V) float32, called ``logits``."""
        normed = self._layers.norm(x, "model.decoder.layer_norm")
        if self._floats == "fp32":
            return self._linears.apply(normed, head, output="logits")
        narrow = self._linears.apply(normed, head, output="logits.narrow")
        return self._graph.node("Cast", [narrow], "logits", to=element_type(np.float32))

    def _declare_ports(self) -> None:
        graph, spec = self._graph, self._spec
        for name in ("input_ids", "position_ids", "row_scatter"):
            graph.input(name, np.int64, ["T"])
        graph.input("row_gather", np.int64, ["B", "S"])
        graph.input("seqlens_k", np.int32, ["B"])
        graph.input("query_seqlens", np.int32, ["B"])
        graph.input("total_sequence_length", np.int32, [])
        graph.input("logits_index", np.int64, ["N"])
        graph.output("logits", np.float32, ["N", spec.vocab_size])
        heads: list[int | str] = ["B", spec.num_decoder_heads]
        for i in range(spec.num_decoder_layers):
            for side in ("key", "value"):
                graph.input(f"past_key_values.{i}.{side}", np.float32, [*heads, "C", spec.head_size])
                graph.output(f"present.{i}.{side}", np.float32, [*heads, "C", spec.head_size])
            graph.input(f"cross.{i}.key", np.float32, [*heads, spec.head_size, spec.num_positions])
            graph.input(f"cross.{i}.value", np.float32, [*heads, spec.num_positions, spec.head_size])

    def _embed(self, ids: str) -> tuple[Matrix, str]:
        """The head's matrix and the embedded tokens (T, E), of ids (T)."""
        graph, spec = self._graph, self._spec
        tensor, shape = "model.decoder.embed_tokens.weight", (spec.vocab_size, spec.hidden_size)
        head = self._weights.matrix("embedding", [tensor], *shape, self._head_bits)
        if head.is_whole:
            words = graph.node("Gather", [head.codes, ids], "embedded.words")
        else:
            rows = graph.share("embedding.rows", head.codes, shape)
            words = graph.node(
                "GatherBlockQuantized",
                [rows, ids, head.scales],
                "embedded.words",
                domain=MICROSOFT,
                bits=head.bits,
                block_size=self._block_size,
                gather_axis=0,
                quantize_axis=1,
            )
        tensor = "model.decoder.embed_positions.weight"
        table = self._weights.table("positions", tensor, np.arange(spec.max_model_len), spec.hidden_size)
        positions = graph.node("Gather", [table, "position_ids"], "embedded.positions")
        return head, graph.node("Add", [words, positions], "embedded")

    def _layer(self, index: int, stream: str) -> str:
        layers, prefix = self._layers, f"model.decoder.layers.{index}."
        hidden = layers.norm(stream, f"{prefix}self_attn_layer_norm")
        stream = layers.add(stream, self._self_attention(index, hidden))
        hidden = layers.norm(stream, f"{prefix}encoder_attn_layer_norm")
        stream = layers.add(stream, self._cross_attention(index, hidden))
        hidden = layers.norm(stream, f"{prefix}final_layer_norm")
        return layers.add(stream, layers.feed_forward(hidden, prefix, self._spec.decoder_ffn_size))

    def _self_attention(self, index: int, hidden: str) -> str:
        """(T, E) → (T, E), appended to the cache in place."""
        graph, spec = self._graph, self._spec
        prefix = f"model.decoder.layers.{index}.self_attn."
        sides = [self._padded(self._layers.project(hidden, f"{prefix}{s}_proj", has_bias=s != "k")) for s in "qkv"]
        past = [f"past_key_values.{index}.{side}" for side in ("key", "value")]
        output, *_ = graph.node_with_outputs(
            "GroupQueryAttention",
            [*sides, *past, "seqlens_k", "total_sequence_length", *[""] * 9, "query_seqlens"],
            [f"{prefix}output", f"present.{index}.key", f"present.{index}.value"],
            domain=MICROSOFT,
            num_heads=spec.num_decoder_heads,
            kv_num_heads=spec.num_decoder_heads,
        )
        return self._layers.project(self._packed(output), f"{prefix}out_proj")

    def _cross_attention(self, index: int, hidden: str) -> str:
        """(T, E) → (T, E). Each row sees all positions of its window, so nothing is masked."""
        graph, spec = self._graph, self._spec
        prefix = f"model.decoder.layers.{index}.encoder_attn."
        scale = graph.constant("query.scale", np.array(spec.head_size**-0.5, np.float32))
        query = self._widened(self._layers.project(hidden, f"{prefix}q_proj"))
        query = graph.node("Mul", [query, scale], f"{prefix}scaled")
        shape = graph.constant("shape.heads", np.array([0, 0, spec.num_decoder_heads, spec.head_size], np.int64))
        query = graph.node("Reshape", [self._padded(query), shape], f"{prefix}query")
        query = graph.node("Transpose", [query], f"{prefix}by_head", perm=[0, 2, 1, 3])
        logits = graph.node("MatMul", [query, self._cross_key(index)], f"{prefix}logits")
        shares = graph.node("Softmax", [logits], f"{prefix}shares", axis=-1)
        heads = graph.node("MatMul", [shares, self._widened(f"cross.{index}.value")], f"{prefix}heads")
        by_token = graph.node("Transpose", [heads], f"{prefix}by_token", perm=[0, 2, 1, 3])
        return self._layers.project(self._packed(self._narrowed(by_token)), f"{prefix}out_proj")

    def _cross_key(self, index: int) -> str:
        """(B, H, D, P) float32."""
        return f"cross.{index}.key"

    def _widened(self, x: str) -> str:
        """As float32."""
        if self._floats == "fp32":
            return x
        return self._graph.node("Cast", [x], f"{x}.wide", to=element_type(np.float32))

    def _narrowed(self, x: str) -> str:
        """As the graph's floats."""
        if self._floats == "fp32":
            return x
        return self._graph.node("Cast", [x], f"{x}.narrow", to=element_type(DTYPES[self._floats]))

    def _padded(self, x: str) -> str:
        """(T, E) → (B, S, E)."""
        return self._graph.node("Gather", [x, "row_gather"], f"{x}.padded")

    def _packed(self, x: str) -> str:
        """(B, S, ...) of E values a token → (T, E)."""
        graph = self._graph
        rows = graph.constant("shape.rows", np.array([-1, self._spec.hidden_size], np.int64))
        return graph.node("Gather", [graph.node("Reshape", [x, rows], f"{x}.rows"), "row_scatter"], f"{x}.packed")
