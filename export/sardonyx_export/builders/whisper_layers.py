"""What Whisper's encoder and decoder graphs have in common: norms, linear layers, feed-forward networks.

Tokens and positions lie in one packed axis here; attention is the caller's.
"""

from sardonyx_export.builders.activation import LOWEST, activate
from sardonyx_export.builders.encoder_linear import EncoderLinears, Linear
from sardonyx_export.builders.graph import GraphWriter
from sardonyx_export.builders.weights import WeightWriter
from sardonyx_export.whisper_spec import WhisperSpec

_EPSILON = 1e-5


class WhisperLayers:
    """Adds parts of one of the two halves.

    Args:
        graph: receives nodes and weights.
        weights: of the checkpoint.
        linears: adds linear layers.
        spec: what the model is.
    """

    def __init__(self, graph: GraphWriter, weights: WeightWriter, linears: EncoderLinears, spec: WhisperSpec) -> None:
        self._graph = graph
        self._weights = weights
        self._linears = linears
        self._spec = spec

    def norm(self, x: str, tensor: str) -> str:
        """(T, E) → (T, E)."""
        size = self._spec.hidden_size
        vectors = [self._weights.vector([f"{tensor}.{part}"], size) for part in ("weight", "bias")]
        return self._graph.node("LayerNormalization", [x, *vectors], tensor, axis=-1, epsilon=_EPSILON)

    def project(self, x: str, tensor: str, *, has_bias: bool = True) -> str:
        """A square linear layer, (T, E) → (T, E). Whisper's keys have no bias."""
        size = self._spec.hidden_size
        linear = Linear(name=tensor, tensors=[tensor], num_rows=size, num_columns=size, has_bias=has_bias)
        return self._linears.add_bias(self._linears.apply(x, linear))

    def query_key_value(self, x: str, prefix: str) -> str:
        """(T, E) → (T, 3 E), side by side: one product of whole weights. Whisper's keys have no bias."""
        size = self._spec.hidden_size
        tensors = [f"{prefix}{side}_proj.weight" for side in "qkv"]
        matrix = self._weights.matrix(f"{prefix}qkv_proj", tensors, 3 * size, size, self._weights.float_bits)
        bias = self._weights.vector([f"{prefix}q_proj.bias", size, f"{prefix}v_proj.bias"], 3 * size)
        return self._graph.node("Gemm", [x, matrix.codes, bias], f"{prefix}query_key_value", transB=1)

    def add(self, residual: str, added: str) -> str:
        """The residual stream with `added` in it."""
        return self._graph.node("Add", [residual, added], f"{added}.sum")

    def feed_forward(self, x: str, prefix: str, ffn_size: int) -> str:
        """(T, E) → (T, E)."""
        size, kind = self._spec.hidden_size, self._spec.activation
        up = Linear(name=f"{prefix}fc1", tensors=[f"{prefix}fc1"], num_rows=ffn_size, num_columns=size, has_bias=True)
        down = Linear(name=f"{prefix}fc2", tensors=[f"{prefix}fc2"], num_rows=size, num_columns=ffn_size, has_bias=True)
        product = self._linears.apply(x, up)
        active = activate(self._graph, kind, product.values, f"{prefix}active", bias=product.bias)
        return self._linears.add_bias(self._linears.apply(active, down, lowest=LOWEST[kind]))
