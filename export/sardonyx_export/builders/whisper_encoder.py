"""Whisper's encoder, node by node, with the decoder's cross-attention keys and values at its end.

    mel (B, M, F) float32: whole windows of the spectrogram
    cross.{i}.key (B, H, D, P) · cross.{i}.value (B, H, P, D) float32, of decoder layer i, P = F / 2

The decoder needs nothing else of a window, so the encoder's own output never leaves the graph. Keys lie transposed: a
step of the decoder multiplies single rows by them, which is fastest along the positions (8 rows of 8 heads, 2 threads,
AVX2, ONNX Runtime 1.32: 1.9 ms with the values' product, 2.3 to 2.9 ms from keys as they come, 3.4 to 5.5 ms in
MultiHeadAttention). For CUDA, whose decoder has that operator, they lie as the values do, (B, H, P, D), and both are
fp16 or bf16. There the convolutions alone compute in float32: CUDA has none for bf16 in this opset.
"""

import numpy as np

from sardonyx_export.builders.activation import activate
from sardonyx_export.builders.floats import DTYPES, FloatKind
from sardonyx_export.builders.graph import MICROSOFT, GraphWriter, element_type
from sardonyx_export.builders.weights import WeightWriter
from sardonyx_export.builders.whisper_layers import WhisperLayers
from sardonyx_export.whisper_spec import WhisperSpec

_KERNEL = 3


class WhisperEncoderGraph:
    """Writes one encoder.

    Args:
        graph: receives nodes and weights.
        weights: of the checkpoint.
        layers: adds what is not attention.
        spec: what the model is.
        floats: what is computed in; fp32 for the CPU, fp16 or bf16 for CUDA.
    """

    def __init__(
        self,
        graph: GraphWriter,
        weights: WeightWriter,
        layers: WhisperLayers,
        spec: WhisperSpec,
        floats: FloatKind = "fp32",
    ) -> None:
        self._floats: FloatKind = floats
        self._graph = graph
        self._weights = weights
        self._layers = layers
        self._spec = spec

    def write(self) -> None:
        """Add everything to the graph."""
        spec, graph = self._spec, self._graph
        graph.input("mel", np.float32, ["B", spec.num_mels, spec.num_frames])
        stream = self._embed()
        for i in range(spec.num_encoder_layers):
            stream = self._layer(f"model.encoder.layers.{i}.", stream)
        hidden = self._layers.norm(stream, "model.encoder.layer_norm")
        for i in range(spec.num_decoder_layers):
            self._cross_attention(i, hidden)

    def _embed(self) -> str:
        """Two convolutions, the second of which halves the frames, and the positions: (B * P, E)."""
        spec, graph = self._spec, self._graph
        x = self._convolution("conv1", "mel", spec.num_mels, stride=1)
        x = self._convolution("conv2", x, spec.hidden_size, stride=2)
        by_position = graph.node("Transpose", [x], "embedded.by_position", perm=[0, 2, 1])
        if self._floats != "fp32":
            by_position = graph.node("Cast", [by_position], "embedded.narrow", to=element_type(DTYPES[self._floats]))
        tensor = "model.encoder.embed_positions.weight"
        table = self._weights.table("positions", tensor, np.arange(spec.num_positions), spec.hidden_size)
        total = graph.node("Add", [by_position, table], "embedded.windows")
        rows = graph.constant("shape.rows", np.array([-1, spec.hidden_size], np.int64))
        return graph.node("Reshape", [total, rows], "embedded")

    def _convolution(self, name: str, x: str, num_channels: int, *, stride: int) -> str:
        spec, tensor = self._spec, f"model.encoder.{name}"
        weight = self._weights.array(f"{tensor}.weight", (spec.hidden_size, num_channels, _KERNEL))
        bias = self._weights.array(f"{tensor}.bias", (spec.hidden_size,))
        pads, strides = [_KERNEL // 2, _KERNEL // 2], [stride]
        y = self._graph.node("Conv", [x, weight, bias], name, kernel_shape=[_KERNEL], pads=pads, strides=strides)
        return activate(self._graph, spec.activation, y, f"{name}.active")

    def _layer(self, prefix: str, stream: str) -> str:
        layers, spec = self._layers, self._spec
        hidden = layers.norm(stream, f"{prefix}self_attn_layer_norm")
        stream = layers.add(stream, self._attention(f"{prefix}self_attn.", hidden))
        hidden = layers.norm(stream, f"{prefix}final_layer_norm")
        return layers.add(stream, layers.feed_forward(hidden, prefix, spec.encoder_ffn_size))

    def _attention(self, prefix: str, hidden: str) -> str:
        """Every position of a window sees all others: (B * P, E) → (B * P, E)."""
        graph, spec, layers = self._graph, self._spec, self._layers
        shape = graph.constant("shape.windows", np.array([-1, spec.num_positions, spec.hidden_size], np.int64))
        sides = [
            graph.node(
                "Reshape",
                [layers.project(hidden, f"{prefix}{side}_proj", has_bias=side != "k"), shape],
                f"{prefix}{side}",
            )
            for side in "qkv"
        ]
        attended = graph.node(
            "MultiHeadAttention", sides, f"{prefix}windows", domain=MICROSOFT, num_heads=spec.num_encoder_heads
        )
        rows = graph.constant("shape.rows", np.array([-1, spec.hidden_size], np.int64))
        return layers.project(graph.node("Reshape", [attended, rows], f"{prefix}rows"), f"{prefix}out_proj")

    def _cross_attention(self, index: int, hidden: str) -> None:
        """Keys and values of one decoder layer."""
        graph, spec = self._graph, self._spec
        prefix = f"model.decoder.layers.{index}.encoder_attn."
        heads: list[int | str] = ["B", spec.num_decoder_heads]
        by_head = graph.constant(
            "shape.by_head", np.array([-1, spec.num_positions, spec.num_decoder_heads, spec.head_size], np.int64)
        )
        key = self._layers.project(hidden, f"{prefix}k_proj", has_bias=False)
        key = graph.node("Reshape", [key, by_head], f"{prefix}key")
        dtype, by_value = DTYPES[self._floats], [*heads, spec.num_positions, spec.head_size]
        if self._floats == "fp32":
            graph.node("Transpose", [key], f"cross.{index}.key", perm=[0, 2, 3, 1])
            graph.output(f"cross.{index}.key", dtype, [*heads, spec.head_size, spec.num_positions])
        else:
            graph.node("Transpose", [key], f"cross.{index}.key", perm=[0, 2, 1, 3])
            graph.output(f"cross.{index}.key", dtype, by_value)
        value = self._layers.project(hidden, f"{prefix}v_proj")
        value = graph.node("Reshape", [value, by_head], f"{prefix}value")
        graph.node("Transpose", [value], f"cross.{index}.value", perm=[0, 2, 1, 3])
        graph.output(f"cross.{index}.value", dtype, by_value)
