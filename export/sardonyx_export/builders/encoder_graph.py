"""The packed graph of a text encoder, node by node.

All tokens of all rows lie in one axis T; only attention and pooling see the padded view (B, S). Where the head wants
one token of each row, the last layer goes on with these alone after its attention. Inputs and output are those of the
packed layout of `families.Encoder`. In fp16 and bf16, for CUDA, all but pooling and head is of that type, and fp16 has
no padded view in attention.
"""

import numpy as np
from msgspec import Struct

from sardonyx_export.builders.activation import LOWEST, activate
from sardonyx_export.builders.encoder_attention import EncoderAttention, PackedEncoderAttention
from sardonyx_export.builders.encoder_linear import EncoderLinears, Linear, Product
from sardonyx_export.builders.floats import FloatKind
from sardonyx_export.builders.graph import MICROSOFT, GraphWriter, element_type
from sardonyx_export.builders.head import HeadGraph, declare_lengths
from sardonyx_export.builders.linear import Linears
from sardonyx_export.builders.weights import WeightWriter
from sardonyx_export.encoder_spec import EncoderSpec, Head, Pooling


class _Stream(Struct, frozen=True):
    """The residual stream, ``residual + added``, where the sum is still to be made."""

    residual: str
    added: Product | None = None


class EncoderGraph:
    """Writes one encoder and its head.

    Args:
        graph: receives nodes and weights.
        weights: of the checkpoint.
        spec: what the model is.
        head: from token vectors to results.
        block_size: of the word table, where it is quantised.
        is_quantised: layers compute in integers; else all is of the type of `floats`.
        floats: what is computed in; fp32 for the CPU, fp16 or bf16 for CUDA.
    """

    def __init__(
        self,
        graph: GraphWriter,
        weights: WeightWriter,
        spec: EncoderSpec,
        head: Head,
        *,
        block_size: int | None,
        is_quantised: bool,
        floats: FloatKind = "fp32",
    ) -> None:
        self._floats: FloatKind = floats
        self._graph = graph
        self._weights = weights
        self._spec = spec
        self._head = head
        self._block_size = block_size
        linears = Linears(graph, block_size or 0, has_exact_activations=False, floats=floats)
        self._linears = EncoderLinears(graph, weights, linears, is_quantised=is_quantised)
        # The packed kernel knows no bf16.
        attention = PackedEncoderAttention if floats == "fp16" else EncoderAttention
        self._attention = attention(graph, weights, self._linears, spec, floats)
        self._head_graph = HeadGraph(graph, head, grid="row_gather")
        # What the last layer leaves of each row; without layers nothing does.
        self._picked = self._head_graph.picked if spec.layers else None

    def write(self, output: str) -> None:
        """Add everything to the graph, whose output gets this name."""
        spec = self._spec
        self._declare_ports(output)
        self._attention.prepare()
        stream = _Stream(self._embed())
        for i in range(len(spec.layers)):
            stream = self._layer(i, stream)
        hidden = self._sum(stream, "hidden")
        if spec.names.final_norm is not None:
            hidden = self._normed(hidden, spec.names.final_norm)
        self._pool(hidden, output)

    def _declare_ports(self, output: str) -> None:
        graph, spec = self._graph, self._spec
        graph.input("input_ids", np.int64, ["T"])
        if self._has_token_types:
            graph.input("token_type_ids", np.int64, ["T"])
        graph.input("position_ids", np.int64, ["T"])
        graph.input("row_gather", np.int64, ["B", "S"])
        self._attention.declare()
        declare_lengths(graph, self._head)
        graph.output(output, np.float32, ["B", self._head.width(spec.hidden_size)])

    @property
    def _has_token_types(self) -> bool:
        """One type is no choice: its vector is a constant, and the graph takes no types."""
        return self._spec.num_token_types > 1

    def _embed(self) -> str:
        """The embedded tokens, (T, E)."""
        graph, spec, names = self._graph, self._spec, self._spec.names
        width = spec.hidden_size
        parts = [self._look_up_words()]
        if names.position_embeddings is not None:
            rows = np.arange(spec.position_offset, spec.position_offset + spec.max_model_len)
            table = self._weights.table("embeddings.positions", f"{names.position_embeddings}.weight", rows, width)
            parts.append(graph.node("Gather", [table, "position_ids"], "embedded.positions"))
        if names.token_type_embeddings is not None and spec.num_token_types:
            rows = np.arange(spec.num_token_types)
            table = self._weights.table("embeddings.types", f"{names.token_type_embeddings}.weight", rows, width)
            if self._has_token_types:
                parts.append(graph.node("Gather", [table, "token_type_ids"], "embedded.types"))
            else:
                parts.append(table)
        total = parts[0]
        for part in parts[1:]:
            total = graph.node("Add", [total, part], f"{part}.sum")
        return total if names.embeddings_norm is None else self._normed(total, names.embeddings_norm)

    def _look_up_words(self) -> str:
        graph, spec = self._graph, self._spec
        tensor, shape = f"{spec.names.word_embeddings}.weight", (spec.vocab_size, spec.hidden_size)
        if self._block_size is None:
            table = self._weights.matrix("embeddings.words", [tensor], *shape, bits=self._weights.float_bits)
            return graph.node("Gather", [table.codes, "input_ids"], "embedded.words")
        table = self._weights.matrix("embeddings.words", [tensor], *shape, bits=8)
        # As the gather wants them; the blocks' own axis is for products.
        rows = graph.reshape(table.codes, shape)
        return graph.node(
            "GatherBlockQuantized",
            [rows, "input_ids", table.scales],
            "embedded.words",
            domain=MICROSOFT,
            bits=8,
            block_size=self._block_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def _layer(self, index: int, stream: _Stream) -> _Stream:
        spec = self._spec
        part = spec.names.layer.format(i=index)
        attention_norm, ffn_norm = part + spec.names.attention_norm, part + spec.names.ffn_norm
        if spec.is_pre_norm:
            residual = self._sum(stream, f"layer.{index}.input")
            hidden = self._normed(residual, attention_norm) if spec.layers[index].has_attention_norm else residual
            residual = self._sum(self._attend(index, hidden, residual), f"layer.{index}.attended")
            return _Stream(residual, self._ffn(index, self._normed(residual, ffn_norm)))
        hidden = self._norm(self._attend(index, stream.residual, stream.residual), attention_norm)
        return _Stream(self._norm(_Stream(hidden, self._ffn(index, hidden)), ffn_norm))

    def _attend(self, index: int, hidden: str, residual: str) -> _Stream:
        """Attention of packed `hidden`, and the stream that it is added to."""
        graph, spec = self._graph, self._spec
        rows = self._attention.apply(index, hidden)
        prefix = f"layer.{index}.attention"
        if index == len(spec.layers) - 1 and self._picked is not None:
            tokens = self._head_graph.pick(self._picked)
            attended = self._attention.wanted_rows(rows, tokens, f"{prefix}.wanted")
            residual = graph.node("Gather", [residual, tokens], "wanted.residual")
        else:
            attended = self._attention.all_rows(rows, f"{prefix}.packed")
        output = Linear(
            name=f"{prefix}.output",
            tensors=[spec.names.layer.format(i=index) + spec.names.attention_output],
            num_rows=spec.hidden_size,
            num_columns=spec.num_heads * spec.head_size,
            has_bias=spec.attention_output_bias,
        )
        return _Stream(residual, self._linears.apply(attended, output))

    def _ffn(self, index: int, hidden: str) -> Product:
        """The feed-forward network, (T, E) → (T, E)."""
        graph, spec, names = self._graph, self._spec, self._spec.names
        prefix, part = f"layer.{index}.ffn", names.layer.format(i=index)
        is_gated = spec.ffn != "plain"
        up = Linear(
            name=f"{prefix}.up",
            tensors=[part + name for name in ([names.gate, names.up] if names.gate is not None else [names.up])],
            num_rows=spec.ffn_size * (2 if is_gated else 1),
            num_columns=spec.hidden_size,
            has_bias=spec.ffn_bias,
        )
        product = self._linears.apply(hidden, up)
        if is_gated:
            both = self._linears.add_bias(product)
            halves = [f"{prefix}.gate", f"{prefix}.ungated"]
            graph.node_with_outputs("Split", [both], halves, axis=1, num_outputs=2)
            active = activate(graph, spec.activation, halves[0], f"{prefix}.active")
            inner, lowest = graph.node("Mul", [active, halves[1]], f"{prefix}.gated"), None
        else:
            inner = activate(graph, spec.activation, product.values, f"{prefix}.active", bias=product.bias)
            lowest = LOWEST.get(spec.activation)
        down = Linear(
            name=f"{prefix}.down",
            tensors=[part + names.down],
            num_rows=spec.hidden_size,
            num_columns=spec.ffn_size,
            has_bias=spec.ffn_bias,
        )
        return self._linears.apply(inner, down, lowest=lowest)

    def _norm(self, stream: _Stream, tensor: str) -> str:
        """The normed stream, which is the stream from here on in a post-norm encoder."""
        return self._normed(self._sum(stream, f"{tensor}.residual"), tensor)

    def _normed(self, x: str, tensor: str) -> str:
        """A norm of its own: SkipLayerNormalization, which adds both summands itself, takes three times as long.

        (T, E) = (320, 384), 2 threads, AVX2, ONNX Runtime 1.32: 0.41 ms instead of 0.13 ms with both additions.
        """
        spec = self._spec
        vectors = [self._weights.vector([f"{tensor}.weight"], spec.hidden_size)]
        if spec.norm_bias:
            vectors.append(self._weights.vector([f"{tensor}.bias"], spec.hidden_size))
        return self._graph.node("LayerNormalization", [x, *vectors], tensor, axis=-1, epsilon=spec.norm_epsilon)

    def _sum(self, stream: _Stream, output: str) -> str:
        if stream.added is None:
            return stream.residual
        return self._graph.node("Add", [self._linears.add_bias(stream.added), stream.residual], output)

    def _pool(self, hidden: str, output: str) -> None:
        graph, pooler = self._graph, self._head_graph
        if self._picked is not None:
            pooler.finish(self._widened(hidden), output)
            return

        def pick(kind: Pooling) -> str:
            return self._widened(graph.node("Gather", [hidden, pooler.pick(kind)], f"pooled.{kind}"))

        def pad() -> str:
            return self._widened(graph.node("Gather", [hidden, "row_gather"], "padded"))

        pooler.finish(pooler.pool(pad, pick), output)

    def _widened(self, x: str) -> str:
        """As float32, in which pooling and head compute."""
        if self._floats == "fp32":
            return x
        return self._graph.node("Cast", [x], f"{x}.float32", to=element_type(np.float32))
