"""The graph of a decoder language model, node by node.

All new tokens of all sequences lie in one axis T. Only the attention operator knows which token belongs to whom, and
how the cache is laid out: see `slot_attention` and `paged_attention`. Rotary embedding and the cache's append happen
inside that operator. For tokens whose logits nobody wants, the last layer computes keys and values only.

Inputs and outputs, besides the attention operator's own:
    input_ids (T) · logits_index (N), both int64
    logits (N, V) float32
"""

from typing import Protocol

import numpy as np

from sardonyx_export.builders.floats import DTYPES, FloatKind, as_floats
from sardonyx_export.builders.graph import MICROSOFT, GraphWriter, element_type
from sardonyx_export.builders.linear import Linears
from sardonyx_export.builders.weights import Matrix, MatrixKind, Precision, WeightWriter
from sardonyx_export.spec import DecoderSpec, Layer, Rope

_ROPE_CHUNK_ROWS = 1 << 14


class Attention(Protocol):
    """How a graph's tokens attend to a cache."""

    def declare(self) -> None:
        """Declare the inputs and outputs of the operator's own."""
        ...

    def attend(self, index: int, layer: Layer, packed: str) -> str:
        """Packed heads (T, (H + 2K) D) through norms, rotation, cache and attention, for layer `index`."""
        ...

    def all_rows(self, attended: str, name: str) -> str:
        """What `attend` gave as (T, H * D), by the name `name` where that takes a node."""
        ...

    def wanted_rows(self, attended: str, name: str) -> str:
        """The rows of ``logits_index`` alone, (N, H * D)."""
        ...


class DecoderGraph:
    """Writes one decoder.

    Args:
        graph: receives nodes and weights.
        weights: of the checkpoint.
        linears: adds its linear layers.
        attention: adds its operator.
        spec: what the model is.
        layer_kind: of the layers' matrices.
        head_precision: of head and embedding; whole or int8.
        block_size: of quantised matrices.
        floats: what the graph computes in, logits aside.
    """

    def __init__(
        self,
        graph: GraphWriter,
        weights: WeightWriter,
        linears: Linears,
        attention: Attention,
        spec: DecoderSpec,
        *,
        layer_kind: MatrixKind,
        head_precision: Precision,
        block_size: int,
        floats: FloatKind = "fp32",
    ) -> None:
        self._graph = graph
        self._weights = weights
        self._linears = linears
        self._attention = attention
        self._spec = spec
        self._layer_kind = layer_kind
        self._head_precision = head_precision
        self._block_size = block_size
        self._floats: FloatKind = floats

    def write(self) -> None:
        """Add everything to the graph."""
        spec, graph = self._spec, self._graph
        graph.input("input_ids", np.int64, ["T"])
        graph.input("logits_index", np.int64, ["N"])
        graph.output("logits", np.float32, ["N", spec.vocab_size])
        self._attention.declare()
        for i, rope in enumerate(spec.ropes):
            self._write_rope_tables(i, rope)
        head, residual = self._embed()
        added: str | None = None
        for i, layer in enumerate(spec.layers):
            added, residual = self._layer(i, layer, added, residual)
        hidden, _ = self._norm(spec.names.final_norm, added, residual, scale=spec.logits_scale)
        self._write_logits(hidden, head)

    def _write_logits(self, hidden: str, head: Matrix) -> None:
        """float32 whatever the graph computes in, since sampling goes on from there."""
        graph, cap = self._graph, self._spec.logits_softcap
        logits = "logits.uncapped" if cap else "logits"
        if self._floats == "fp32":
            self._linears.apply(hidden, head, output=logits)
        else:
            graph.node(
                "Cast",
                [self._linears.apply(hidden, head, output="logits.rounded")],
                logits,
                to=element_type(np.float32),
            )
        if cap:
            self._soft_cap(logits)

    def _write_rope_tables(self, index: int, rope: Rope) -> None:
        """Cosine and sine of every position, (max_model_len, rotary_size / 2) in the graph's floats."""
        frequencies = np.array(rope.inverse_frequencies, np.float32)
        shape = (self._spec.max_model_len, len(frequencies))
        for name, function in (("cos", np.cos), ("sin", np.sin)):
            table = f"rope.{index}.{name}"
            pieces = (
                function(
                    np.outer(np.arange(start, min(start + _ROPE_CHUNK_ROWS, shape[0]), dtype=np.float32), frequencies)
                )
                * np.float32(rope.attention_factor)
                for start in range(0, shape[0], _ROPE_CHUNK_ROWS)
            )
            rounded = (as_floats(piece, self._floats, table) for piece in pieces)
            self._graph.weight(table, DTYPES[self._floats], shape, rounded)

    def _embed(self) -> tuple[Matrix, str]:
        """The head's matrix and the embedded tokens (T, E)."""
        spec, names = self._spec, self._spec.names
        shape = (spec.vocab_size, spec.hidden_size)
        head_bits = self._weights.bits([], self._head_precision, *shape)
        # The quantised gather wants whole blocks, CPU's quantised product does not.
        is_gathered = shape[1] % self._block_size == 0
        embedding_bits = head_bits if is_gathered else self._weights.bits([], self._floats, *shape)
        embedding = self._weights.matrix("embedding", [f"{names.embedding}.weight"], *shape, embedding_bits)
        if spec.tied_head and embedding_bits == head_bits:
            return embedding, self._look_up(embedding)
        tensor = names.embedding if spec.tied_head else names.head
        head = self._weights.matrix("head", [f"{tensor}.weight"], *shape, head_bits)
        return head, self._look_up(embedding)

    def _look_up(self, embedding: Matrix) -> str:
        graph, scale = self._graph, self._spec.embedding_scale
        output = "embedded" if scale == 1 else "embedded.unscaled"
        if embedding.is_whole:
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
        return graph.node(
            "Mul", [output, graph.constant("embedding.scale", np.array(scale, DTYPES[self._floats]))], "embedded"
        )

    def _layer(self, index: int, layer: Layer, added: str | None, residual: str) -> tuple[str, str]:
        """One layer. The residual stream is ``residual + added``, kept apart because the next norm adds them itself."""
        spec, names = self._spec, self._spec.names
        prefix = f"model.layers.{index}."
        is_last = index == len(spec.layers) - 1
        hidden, residual = self._norm(prefix + names.attention_norm, added, residual)
        attended = self._attention.attend(index, layer, self._heads(prefix, hidden))
        if is_last:
            attended = self._attention.wanted_rows(attended, "wanted.attention")
            residual = self._graph.node("Gather", [residual, "logits_index"], "wanted.residual")
        else:
            attended = self._attention.all_rows(attended, f"{prefix}attention")
        width = spec.num_heads * spec.head_size
        added = self._project(prefix + names.attention_output, width, attended, has_bias=spec.attention_output_bias)
        added = self._post_norm(names.attention_post_norm, prefix, added)
        hidden, residual = self._norm(prefix + names.ffn_norm, added, residual)
        gated = self._gated(prefix, hidden)
        added = self._project(prefix + names.down, spec.ffn_size, gated, has_bias=spec.ffn_bias)
        return self._post_norm(names.ffn_post_norm, prefix, added), residual

    def _heads(self, prefix: str, hidden: str) -> str:
        """(T, E) → (T, (H + 2K) D): queries, keys and values."""
        spec = self._spec
        return self._stack(
            f"{prefix}self_attn.qkv",
            [prefix + name for name in spec.names.query_key_value],
            (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_size,
            hidden,
            has_bias=spec.query_key_value_bias,
        )

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
        elif self._floats == "fp32":
            graph.node("Gelu", [gate], active, approximate="tanh")
        else:  # CUDA has no Gelu in bfloat16
            graph.node("FastGelu", [gate], active, domain=MICROSOFT)
        return graph.node("Mul", [active, up], f"{prefix}mlp.gated")

    def _stack(self, name: str, tensors: list[str], num_rows: int, x: str, *, has_bias: bool) -> str:
        """Several tensors as one layer, from the residual stream's width."""
        weights = [f"{tensor}.weight" for tensor in tensors]
        bits = self._weights.bits(weights, self._layer_kind, num_rows, self._spec.hidden_size)
        matrix = self._weights.matrix(name, weights, num_rows, self._spec.hidden_size, bits)
        bias = self._weights.vector([f"{tensor}.bias" for tensor in tensors], num_rows) if has_bias else ""
        return self._linears.apply(x, matrix, bias=bias)

    def _project(self, tensor: str, num_columns: int, x: str, *, has_bias: bool) -> str:
        """Back to the residual stream's width, times what the model scales that by."""
        scale, width = self._spec.residual_scale, self._spec.hidden_size
        bits = self._weights.bits([f"{tensor}.weight"], self._layer_kind, width, num_columns)
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
