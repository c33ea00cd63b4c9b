"""Attention of an encoder: packed tokens to the padded view and what attention gives there, rows without direction.

Only MultiHeadAttention sees the padded view (B, S), made by gathers of queries, keys and values straight from their
packed product. Padding is masked by the rows' lengths. What depends on the distance of two tokens, a window or MPNet's
relative positions, is a bias (1, 1 or H, S, S) that is made once for all layers.

`PackedEncoderAttention` has no padded view: a kernel of CUDA's finds the rows in the packed tokens.
"""

import numpy as np
import numpy.typing as npt

from sardonyx_export.builders.encoder_linear import EncoderLinears, Linear, Product
from sardonyx_export.builders.floats import DTYPES, FloatKind, as_floats
from sardonyx_export.builders.graph import MICROSOFT, GraphWriter
from sardonyx_export.builders.weights import WeightWriter
from sardonyx_export.encoder_spec import EncoderRope, EncoderSpec, RelativeBias

# What MultiHeadAttention adds to the logits of padding, too.
_MASKED = -1e4
_SIDES = ("query", "key", "value")


class EncoderAttention:
    """Adds the attention nodes of one encoder.

    Args:
        graph: receives nodes and weights.
        weights: of the checkpoint.
        linears: adds linear layers.
        spec: what the model is.
        floats: type of all that is computed.
    """

    def __init__(
        self,
        graph: GraphWriter,
        weights: WeightWriter,
        linears: EncoderLinears,
        spec: EncoderSpec,
        floats: FloatKind = "fp32",
    ) -> None:
        self._floats: FloatKind = floats
        self._graph = graph
        self._weights = weights
        self._linears = linears
        self._spec = spec
        self._width = spec.num_heads * spec.head_size
        # The operator asks for as many rows of its tables as there are sides.
        self._num_positions = max(spec.max_model_len, len(_SIDES) - 1)
        self._windows: dict[int, str] = {}
        self._distances = ""
        self._relative_bias = ""

    def declare(self) -> None:
        """Add the graph's inputs that are attention's."""
        self._graph.input("row_scatter", np.int64, ["T"])

    def prepare(self) -> None:
        """Add what all layers share: where each side lies in a packed product, rotary tables, the relative bias."""
        self._prepare_sides()
        if self._spec.ropes:
            self._write_rope_positions()
        for i, rope in enumerate(self._spec.ropes):
            self._write_rope_tables(i, rope)
        if self._spec.relative_bias is not None:
            self._relative_bias = self._write_relative_bias(self._spec.relative_bias)

    def apply(self, index: int, hidden: str) -> str:
        """Attention of layer `index`: (T, E) → rows for `all_rows` and `wanted_rows`."""
        spec = self._spec
        prefix = f"layer.{index}.attention"
        layer, part = spec.layers[index], spec.names.layer.format(i=index)
        product = self._linears.apply(
            hidden,
            Linear(
                name=f"{prefix}.query_key_value",
                tensors=[part + name for name in spec.names.query_key_value],
                num_rows=3 * self._width,
                num_columns=spec.hidden_size,
                has_bias=spec.query_key_value_bias,
            ),
        )
        if layer.rope is not None:
            product = Product(values=self._rotate(self._linears.add_bias(product), layer.rope, prefix))
        return self._attend(product, self._distance_bias(layer.window), prefix)

    def all_rows(self, attended: str, name: str) -> str:
        """What `apply` gave, of all tokens: (T, H * D)."""
        return self._graph.node("Gather", [attended, "row_scatter"], name)

    def wanted_rows(self, attended: str, tokens: str, name: str) -> str:
        """What `apply` gave, of tokens by their packed index: (B) → (B, H * D)."""
        wanted = self._graph.node("Gather", ["row_scatter", tokens], "wanted.rows")
        return self._graph.node("Gather", [attended, wanted], name)

    def _prepare_sides(self) -> None:
        graph = self._graph
        three = graph.constant("sides.three", np.array(3, np.int64))
        first = graph.node("Mul", ["row_gather", three], "gather.query")
        for i, side in enumerate(_SIDES[1:], start=1):
            graph.node("Add", [first, graph.constant(f"sides.{side}", np.array(i, np.int64))], f"gather.{side}")

    def _attend(self, product: Product, distance_bias: str, prefix: str) -> str:
        """Queries, keys and values (T, 3 H * D) → (B * S, H * D), rows of the padded view."""
        graph = self._graph
        rows_shape = graph.constant("shape.side_rows", np.array([-1, self._width], np.int64))
        rows = graph.node("Reshape", [product.values, rows_shape], f"{prefix}.side_rows")
        padded = [graph.node("Gather", [rows, f"gather.{side}"], f"{prefix}.{side}") for side in _SIDES]
        output = graph.node(
            "MultiHeadAttention",
            [*padded, product.bias, "seqlens", distance_bias],
            f"{prefix}.padded",
            domain=MICROSOFT,
            num_heads=self._spec.num_heads,
            mask_filter_value=_MASKED,
        )
        return graph.node("Reshape", [output, rows_shape], f"{prefix}.rows")

    def _rotate(self, product: str, rope: int, prefix: str) -> str:
        """Rotary embedding of packed queries, keys and, by the row of tables that changes nothing, values.

        The operator takes each token for a row of its own, whose columns are the three sides: rows of more columns than
        its tables have are refused, and T may be more.
        """
        graph, spec = self._graph, self._spec
        shape = graph.constant("shape.sides", np.array([-1, len(_SIDES), self._width], np.int64))
        tables = [f"rope.{rope}.cos", f"rope.{rope}.sin"]
        rotary_size = spec.ropes[rope].rotary_size
        return graph.node(
            "RotaryEmbedding",
            [graph.node("Reshape", [product, shape], f"{prefix}.sides"), "rope.positions", *tables],
            f"{prefix}.rotated",
            domain=MICROSOFT,
            num_heads=spec.num_heads,
            rotary_embedding_dim=0 if rotary_size == spec.head_size else rotary_size,
        )

    def _write_rope_positions(self) -> None:
        """(T, 3) int64: a token's position for its query and its key, then the last row of the tables."""
        graph = self._graph
        axis = graph.constant("axis.side", np.array([1], np.int64))
        column = graph.node("Unsqueeze", ["position_ids", axis], "rope.column")
        factors = graph.constant("rope.factors", np.array([1, 1, 0], np.int64))
        still = graph.constant("rope.still", np.array([0, 0, self._num_positions], np.int64))
        graph.node("Add", [graph.node("Mul", [column, factors], "rope.moved"), still], "rope.positions")

    def _write_rope_tables(self, index: int, rope: EncoderRope) -> None:
        """Cosine and sine of every position, and of none: (positions + 1, rotary_size / 2)."""
        positions = np.arange(self._num_positions, dtype=np.float32)
        angles = np.outer(positions, np.array(rope.inverse_frequencies, np.float32))
        shape = (len(angles) + 1, angles.shape[1])
        for name, function in (("cos", np.cos), ("sin", np.sin)):
            still = function(np.zeros((1, shape[1]), np.float32))
            table = function(angles) * np.float32(rope.attention_factor)
            pieces = [as_floats(piece, self._floats, f"rope.{index}.{name}") for piece in (table, still)]
            self._graph.weight(f"rope.{index}.{name}", DTYPES[self._floats], shape, pieces)

    def _distance_bias(self, window: int | None) -> str:
        """Name of what is added to the logits of two tokens for their distance; empty: nothing."""
        # A window that no row outgrows is none.
        if window is None or window >= self._spec.max_model_len - 1:
            return self._relative_bias
        if window not in self._windows:
            self._windows[window] = self._write_window(window)
        return self._windows[window]

    def _write_window(self, window: int) -> str:
        """(1, 1 or H, S, S): the relative bias, and far below it beyond the window."""
        graph, name, dtype = self._graph, f"window.{window}", DTYPES[self._floats]
        distance = graph.node("Abs", [self._offsets()], f"{name}.distances")
        limit = graph.constant(f"{name}.limit", np.array(window, np.int64))
        is_far = graph.node("Greater", [distance, limit], f"{name}.is_far")
        masked = graph.constant("masked", np.array(_MASKED, dtype))
        near = self._relative_bias or graph.constant("unmasked", np.zeros((1, 1, 1, 1), dtype))
        return graph.node("Where", [is_far, masked, near], name)

    def _write_relative_bias(self, bias: RelativeBias) -> str:
        """(1, H, S, S), looked up by offset in a table of all offsets that occur."""
        graph, spec = self._graph, self._spec
        furthest = spec.max_model_len - 1
        buckets = relative_buckets(np.arange(-furthest, furthest + 1), bias)
        self._weights.table("relative_bias.table", f"{bias.name}.weight", buckets, spec.num_heads)
        middle = graph.constant("relative_bias.middle", np.array(furthest, np.int64))
        rows = graph.node("Add", [self._offsets(), middle], "relative_bias.rows")
        by_pair = graph.node("Gather", ["relative_bias.table", rows], "relative_bias.by_pair")
        by_head = graph.node("Transpose", [by_pair], "relative_bias.by_head", perm=[2, 0, 1])
        axis = graph.constant("axis.batch", np.array([0], np.int64))
        return graph.node("Unsqueeze", [by_head, axis], "relative_bias")

    def _offsets(self) -> str:
        """(S, S) int64: column of the key minus column of the query."""
        if self._distances:
            return self._distances
        graph = self._graph
        size = graph.node("Shape", ["row_gather"], "offsets.size", start=1, end=2)
        size = graph.node("Squeeze", [size], "offsets.num_columns")
        zero = graph.constant("offsets.zero", np.array(0, np.int64))
        one = graph.constant("offsets.one", np.array(1, np.int64))
        keys = graph.node("Range", [zero, size, one], "offsets.keys")
        axis = graph.constant("axis.side", np.array([1], np.int64))
        queries = graph.node("Unsqueeze", [keys, axis], "offsets.queries")
        self._distances = graph.node("Sub", [keys, queries], "offsets")
        return self._distances


class PackedEncoderAttention(EncoderAttention):
    """An `EncoderAttention` by PackedMultiHeadAttention, which CUDA has in fp16: no row is padded anywhere.

    Its inputs, where the other has row_scatter (T):
        token_offset (B, S) int32: b * S + s of each packed token, then those of padding
        cumulative_sequence_length (B + 1) int32: where rows begin, and their end
    """

    def declare(self) -> None:
        """See `EncoderAttention`."""
        self._graph.input("token_offset", np.int32, ["B", "S"])
        self._graph.input("cumulative_sequence_length", np.int32, ["B + 1"])

    def all_rows(self, attended: str, name: str) -> str:
        """See `EncoderAttention`."""
        return attended

    def wanted_rows(self, attended: str, tokens: str, name: str) -> str:
        """See `EncoderAttention`."""
        return self._graph.node("Gather", [attended, tokens], name)

    def _prepare_sides(self) -> None:
        pass

    def _attend(self, product: Product, distance_bias: str, prefix: str) -> str:
        """Queries, keys and values (T, 3 H * D) or (T, 3, H * D) → (T, H * D).

        Apart from each other and without a bias the kernel reads them where they lie.
        """
        graph = self._graph
        flat = graph.constant("shape.flat_sides", np.array([-1, len(_SIDES) * self._width], np.int64))
        values = graph.node("Reshape", [self._linears.add_bias(product), flat], f"{prefix}.flat")
        sides = [f"{prefix}.{side}" for side in _SIDES]
        graph.node_with_outputs("Split", [values], sides, axis=1, num_outputs=len(_SIDES))
        return graph.node(
            "PackedMultiHeadAttention",
            [*sides, "", "token_offset", "cumulative_sequence_length", distance_bias],
            f"{prefix}.attended",
            domain=MICROSOFT,
            num_heads=self._spec.num_heads,
        )


def relative_buckets(offsets: npt.NDArray[np.int64], bias: RelativeBias) -> npt.NDArray[np.int64]:
    """The bucket of each offset of a key from its query.

    Keys to the right have the upper half of the buckets. In either half, the first part holds one distance each, the
    rest ranges that grow by a constant factor up to `max_distance`; the last takes all beyond.

    Source: ``MPNetEncoder.relative_position_bucket``, transformers 5.24, whose float32 decides at the borders.
    """
    half = bias.num_buckets // 2
    num_single = half // 2
    distances = np.abs(offsets)
    logs = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(num_single))
    steps = logs / np.float32(np.log(bias.max_distance / num_single)) * np.float32(half - num_single)
    ranges = np.minimum(num_single + steps.astype(np.int64), half - 1)
    buckets: npt.NDArray[np.int64] = np.where(distances < num_single, distances, ranges) + half * (offsets > 0)
    return buckets
