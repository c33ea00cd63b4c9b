"""The packed-step graph of a decoder language model, node by node.

All new tokens of all sequences lie in one axis T; only GroupQueryAttention sees the padded view (B, S), made by two
gathers. Rotary embedding and the cache's append happen inside that operator. For tokens whose logits nobody wants, the
last layer computes keys and values only.

Names and shapes of inputs and outputs are those of the packed-step contract:
    input_ids (T) · row_gather (B, S) · row_scatter (T) · logits_index (N), all int64
    seqlens_k (B) · query_seqlens (B) · total_sequence_length (), all int32
    past_key_values.{i}.key|value → present.{i}.key|value (B, K, C, D) float32, the same buffer bound twice
    logits (N, V) float32

``total_sequence_length`` is an upper bound that the kernel refuses above C and above the rotary tables' rows: the
smaller of C and ``max_model_len``.
"""

import numpy as np

from sardonyx_export.builders.graph import MICROSOFT, GraphWriter
from sardonyx_export.builders.linear import Linears
from sardonyx_export.builders.weights import Matrix, MatrixKind, Precision, WeightWriter
from sardonyx_export.spec import DecoderSpec, Layer, Rope

_ROPE_CHUNK_ROWS = 1 << 14


class DecoderGraph:
    """Writes one decoder.

    Args:
        graph: receives nodes and weights.
        weights: of the checkpoint.
        linears: adds its linear layers.
        spec: what the model is.
        layer_kind: of the layers' matrices.
        head_precision: of head and embedding; fp32 or int8.
        block_size: of quantised matrices.
    """

    def __init__(
        self,
        graph: GraphWriter,
        weights: WeightWriter,
        linears: Linears,
        spec: DecoderSpec,
        *,
        layer_kind: MatrixKind,
        head_precision: Precision,
        block_size: int,
    ) -> None:
        self._graph = graph
        self._weights = weights
        self._linears = linears
        self._spec = spec
        self._layer_kind = layer_kind
        self._head_precision = head_precision
        self._block_size = block_size

    def write(self) -> None:
        """Add everything to the graph."""
        spec = self._spec
        self._declare_ports()
        for i, rope in enumerate(spec.ropes):
            self._write_rope_tables(i, rope)
        head, residual = self._embed()
        added: str | None = None
        for i, layer in enumerate(spec.layers):
            added, residual = self._layer(i, layer, added, residual)
        hidden, _ = self._norm(spec.names.final_norm, added, residual, scale=spec.logits_scale)
        if spec.logits_softcap:
            self._soft_cap(self._linears.apply(hidden, head, output="logits.uncapped"))
        else:
            self._linears.apply(hidden, head, output="logits")

    def _declare_ports(self) -> None:
        graph, spec = self._graph, self._spec
        graph.input("input_ids", np.int64, ["T"])
        graph.input("row_gather", np.int64, ["B", "S"])
        graph.input("row_scatter", np.int64, ["T"])
        graph.input("seqlens_k", np.int32, ["B"])
        graph.input("query_seqlens", np.int32, ["B"])
        graph.input("total_sequence_length", np.int32, [])
        graph.input("logits_index", np.int64, ["N"])
        graph.output("logits", np.float32, ["N", spec.vocab_size])
        cache: list[int | str] = ["B", spec.num_kv_heads, "C", spec.head_size]
        for i in range(len(spec.layers)):
            for side in ("key", "value"):
                graph.input(f"past_key_values.{i}.{side}", np.float32, cache)
                graph.output(f"present.{i}.{side}", np.float32, cache)

    def _write_rope_tables(self, index: int, rope: Rope) -> None:
        """Cosine and sine of every position, (max_model_len, rotary_size / 2) float32."""
        frequencies = np.array(rope.inverse_frequencies, np.float32)
        shape = (self._spec.max_model_len, len(frequencies))
        for name, function in (("cos", np.cos), ("sin", np.sin)):
            pieces = (
                function(
                    np.outer(np.arange(start, min(start + _ROPE_CHUNK_ROWS, shape[0]), dtype=np.float32), frequencies)
                )
                * np.float32(rope.attention_factor)
                for start in range(0, shape[0], _ROPE_CHUNK_ROWS)
            )
            self._graph.weight(f"rope.{index}.{name}", np.float32, shape, pieces)

    def _embed(self) -> tuple[Matrix, str]:
        """The head's matrix and the embedded tokens (T, E)."""
        spec, names = self._spec, self._spec.names
        shape = (spec.vocab_size, spec.hidden_size)
        head_bits = self._weights.bits([], self._head_precision)
        # The quantised gather wants whole blocks, the quantised product does not.
        embedding_bits = head_bits if shape[1] % self._block_size == 0 else 32
        embedding = self._weights.matrix("embedding", [f"{names.embedding}.weight"], *shape, embedding_bits)
        if spec.tied_head and embedding_bits == head_bits:
            return embedding, self._look_up(embedding)
        tensor = names.embedding if spec.tied_head else names.head
        head = self._weights.matrix("head", [f"{tensor}.weight"], *shape, head_bits)
        return head, self._look_up(embedding)

    def _look_up(self, embedding: Matrix) -> str:
        graph, scale = self._graph, self._spec.embedding_scale
        output = "embedded" if scale == 1 else "embedded.unscaled"
        if embedding.bits == 32:
            graph.node("Gather", [embedding.codes, "input_ids"], output)
        else:
            # The gather wants the codes as (V, E), the product as (V, blocks, block): the same bytes under two names.
            flat = graph.share("embedding.rows", embedding.codes, (embedding.num_rows, embedding.num_columns))
            graph.node(
                "GatherBlockQuantized",
                [flat, "input_ids", embedding.scales],
                output,
                domain=MICROSOFT,
                bits=embedding.bits,
                block_size=self._block_size,
                gather_axis=0,
                quantize_axis=1,
            )
        if scale == 1:
            return output
        return graph.node("Mul", [output, graph.constant("embedding.scale", np.array(scale, np.float32))], "embedded")

    def _layer(self, index: int, layer: Layer, added: str | None, residual: str) -> tuple[str, str]:
        """One layer. The residual stream is ``residual + added``, kept apart because the next norm adds them itself."""
        spec, names = self._spec, self._spec.names
        prefix = f"model.layers.{index}."
        is_last = index == len(spec.layers) - 1
        hidden, residual = self._norm(prefix + names.attention_norm, added, residual)
        attended = self._attention(index, layer, hidden)
        if is_last:
            attended, residual = self._keep_wanted_rows(attended, residual)
        else:
            attended = self._graph.node("Gather", [attended, "row_scatter"], f"{prefix}attention")
        width = spec.num_heads * spec.head_size
        added = self._project(prefix + names.attention_output, width, attended, has_bias=spec.attention_output_bias)
        added = self._post_norm(names.attention_post_norm, prefix, added)
        hidden, residual = self._norm(prefix + names.ffn_norm, added, residual)
        gated = self._gated(prefix, hidden)
        added = self._project(prefix + names.down, spec.ffn_size, gated, has_bias=spec.ffn_bias)
        return self._post_norm(names.ffn_post_norm, prefix, added), residual

    def _attention(self, index: int, layer: Layer, hidden: str) -> str:
        """(T, E) → (B * S, H * D), rows of the padded view."""
        spec, graph = self._spec, self._graph
        prefix = f"model.layers.{index}.self_attn."
        num_rows = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_size
        packed = self._stack(
            f"{prefix}qkv",
            [f"model.layers.{index}.{name}" for name in spec.names.query_key_value],
            num_rows,
            hidden,
            has_bias=spec.query_key_value_bias,
        )
        if spec.names.query_norm is None:
            padded = graph.node("Gather", [packed, "row_gather"], f"{prefix}padded")
        else:
            padded = self._normed_heads(index, packed)
        tables = ["", ""] if layer.rope is None else [f"rope.{layer.rope}.cos", f"rope.{layer.rope}.sin"]
        # A window that no sequence outgrows is none. Like ours, the kernel's counts the query's own token.
        window = layer.window if layer.window is not None and layer.window < spec.max_model_len else -1
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
            local_window_size=window,
            do_rotary=int(layer.rope is not None),
        )
        shape = graph.constant("shape.heads", np.array([-1, spec.num_heads * spec.head_size], np.int64))
        return graph.node("Reshape", [output, shape], f"{prefix}rows")

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

    def _keep_wanted_rows(self, attended: str, residual: str) -> tuple[str, str]:
        """In the last layer, go on with the N rows of ``logits_index`` only."""
        index = self._graph.node("Gather", ["row_scatter", "logits_index"], "wanted.index")
        attended = self._graph.node("Gather", [attended, index], "wanted.attention")
        return attended, self._graph.node("Gather", [residual, "logits_index"], "wanted.residual")

    def _gated(self, prefix: str, hidden: str) -> str:
        """activation(gate) * up, (T, F)."""
        spec, graph = self._spec, self._graph
        both = self._stack(
            f"{prefix}mlp.gate_up",
            [prefix + name for name in spec.names.gate_up],
            2 * spec.ffn_size,
            hidden,
            has_bias=spec.ffn_bias,
        )
        gate, up = graph.node_with_outputs(
            "Split", [both], [f"{prefix}mlp.gate", f"{prefix}mlp.up"], axis=1, num_outputs=2
        )
        active = f"{prefix}mlp.active"
        if spec.activation == "silu":
            graph.node("QuickGelu", [gate], active, domain=MICROSOFT, alpha=1.0)
        else:
            graph.node("Gelu", [gate], active, approximate="tanh")
        return graph.node("Mul", [active, up], f"{prefix}mlp.gated")

    def _stack(self, name: str, tensors: list[str], num_rows: int, x: str, *, has_bias: bool) -> str:
        """Several tensors as one layer, from the residual stream's width."""
        weights = [f"{tensor}.weight" for tensor in tensors]
        bits = self._weights.bits(weights, self._layer_kind)
        matrix = self._weights.matrix(name, weights, num_rows, self._spec.hidden_size, bits)
        bias = self._weights.vector([f"{tensor}.bias" for tensor in tensors], num_rows) if has_bias else ""
        return self._linears.apply(x, matrix, bias=bias)

    def _project(self, tensor: str, num_columns: int, x: str, *, has_bias: bool) -> str:
        """Back to the residual stream's width, times what the model scales that by."""
        scale, width = self._spec.residual_scale, self._spec.hidden_size
        bits = self._weights.bits([f"{tensor}.weight"], self._layer_kind)
        matrix = self._weights.matrix(tensor, [f"{tensor}.weight"], width, num_columns, bits, scale)
        bias = self._weights.vector([f"{tensor}.bias"], width, scale=scale) if has_bias else ""
        return self._linears.apply(x, matrix, bias=bias)

    def _norm(self, tensor: str, added: str | None, residual: str, *, scale: float = 1.0) -> tuple[str, str]:
        """The normed residual stream, and the stream itself with `added` in it."""
        spec = self._spec
        weight = self._weights.vector([f"{tensor}.weight"], spec.hidden_size, offset=spec.norm_offset, scale=scale)
        if added is None:
            normed = self._graph.node(
                "SimplifiedLayerNormalization", [residual, weight], tensor, axis=-1, epsilon=spec.norm_epsilon
            )
            return normed, residual
        outputs = [tensor, "", "", f"{tensor}.residual"]
        self._graph.node_with_outputs(
            "SkipSimplifiedLayerNormalization",
            [added, residual, weight],
            outputs,
            domain=MICROSOFT,
            epsilon=spec.norm_epsilon,
        )
        return tensor, outputs[3]

    def _post_norm(self, name: str | None, prefix: str, added: str) -> str:
        return added if name is None else self._norm(prefix + name, None, added)[0]

    def _soft_cap(self, logits: str) -> str:
        graph = self._graph
        cap = graph.constant("logits.cap", np.array(self._spec.logits_softcap, np.float32))
        bounded = graph.node("Tanh", [graph.node("Div", [logits, cap], "logits.divided")], "logits.bounded")
        return graph.node("Mul", [bounded, cap], "logits")
