"""What the source's weights say: a forward pass in numpy, one layer at a time.

Shares nothing with the graph builder but `DecoderSpec`, and nothing with ONNX Runtime. It holds one weight matrix in
float32 at a time, so it needs little memory whatever the model's size, and reads each tensor once for all prompts.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.spec import DecoderSpec, Layer, Rope

Array = npt.NDArray[np.float32]


def reference_logits(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Array]:
    """Logits after every token of every prompt.

    Args:
        checkpoint: the weights, dequantised as they are read.
        spec: what they mean.
        prompts: token ids, each prompt of its own length.
        progress: called with layers done and layers in all.

    Returns:
        One (length, V) float32 array for each prompt.

    Raises:
        ExportError: a tensor is missing or cannot be read.
    """
    return _Reference(checkpoint, spec, prompts).logits(progress)


def watch_attention(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    prompts: Sequence[Sequence[int]],
    watch: Callable[[Layer, Array, Array], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """The pass without logits, for what its layers attend to.

    Args:
        checkpoint: as for `reference_logits`.
        spec: likewise.
        prompts: likewise.
        watch: called for one layer after the other with keys, normed and rotated, and values, both (T, K, D) of all
            prompts' tokens.
        progress: called with layers done and layers in all.

    Raises:
        ExportError: a tensor is missing or cannot be read.
    """
    _Reference(checkpoint, spec, prompts, watch).hidden(progress)


class _Reference:
    """The pass over all prompts at once: matrix products see packed tokens (T, E), attention each prompt by itself."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        prompts: Sequence[Sequence[int]],
        watch: Callable[[Layer, Array, Array], None] = lambda layer, keys, values: None,
    ) -> None:
        lengths = [len(prompt) for prompt in prompts]
        self._checkpoint = checkpoint
        self._spec = spec
        self._watch = watch
        self._token_ids = np.concatenate(prompts)
        self._ends = np.cumsum(lengths)
        self._positions = np.concatenate([np.arange(length) for length in lengths])

    def logits(self, progress: Callable[[int, int], None]) -> list[Array]:
        """After every token, (length, V) of each prompt."""
        spec, names = self._spec, self._spec.names
        x = self._norm(self.hidden(progress), names.final_norm)
        head = names.embedding if spec.tied_head else names.head
        logits = x @ self._read(f"{head}.weight").T
        logits *= np.float32(spec.logits_scale)
        progress(len(spec.layers), len(spec.layers))
        return np.split(_soft_cap(logits, spec.logits_softcap), self._ends[:-1])

    def hidden(self, progress: Callable[[int, int], None]) -> Array:
        """The residual stream behind the last layer, (T, E)."""
        spec, names = self._spec, self._spec.names
        x: Array = self._read(f"{names.embedding}.weight")[self._token_ids] * np.float32(spec.embedding_scale)
        for i in range(len(spec.layers)):
            progress(i, len(spec.layers))
            layer = f"model.layers.{i}."
            h = self._norm(x, layer + names.attention_norm)
            x = x + self._branch(self._attention(h, i), layer, names.attention_post_norm)
            h = self._norm(x, layer + names.ffn_norm)
            x = x + self._branch(self._ffn(h, layer), layer, names.ffn_post_norm)
        return x

    def _attention(self, h: Array, index: int) -> Array:
        spec, names, layer = self._spec, self._spec.names, self._spec.layers[index]
        part = f"model.layers.{index}."
        fused = np.concatenate(
            [self._linear(h, part + name, has_bias=spec.query_key_value_bias) for name in names.query_key_value], axis=1
        )
        heads = fused.reshape(len(h), -1, spec.head_size)
        query, key, value = np.split(heads, [spec.num_heads, spec.num_heads + spec.num_kv_heads], axis=1)
        if names.query_norm and names.key_norm:
            query, key = self._norm(query, part + names.query_norm), self._norm(key, part + names.key_norm)
        if layer.rope is not None:
            query, key = (_rotate(side, self._positions, spec.ropes[layer.rope]) for side in (query, key))
        self._watch(layer, key, value)
        outputs = [
            self._attend(q, k, v, layer.window)
            for q, k, v in zip(*(np.split(side, self._ends[:-1]) for side in (query, key, value)), strict=True)
        ]
        return self._linear(np.concatenate(outputs), part + names.attention_output, has_bias=spec.attention_output_bias)

    def _attend(self, query: Array, key: Array, value: Array, window: int | None) -> Array:
        """Causal attention within one prompt. (P, H, D), (P, K, D), (P, K, D) → (P, H * D)."""
        spec = self._spec
        groups = spec.num_heads // spec.num_kv_heads
        key, value = np.repeat(key, groups, axis=1), np.repeat(value, groups, axis=1)
        scores = np.einsum("qhd,khd->hqk", query, key) * np.float32(spec.attention_scale)
        scores = _soft_cap(scores, spec.attention_softcap)
        distance = np.arange(len(query))[:, None] - np.arange(len(query))[None, :]
        hidden = (distance < 0) | (distance >= window) if window is not None else distance < 0
        scores = np.where(hidden, np.float32(-np.inf), scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed: Array = np.einsum("hqk,khd->qhd", weights, value)
        return mixed.reshape(len(query), -1)

    def _ffn(self, h: Array, layer: str) -> Array:
        spec, names = self._spec, self._spec.names
        sides = [self._linear(h, layer + name, has_bias=spec.ffn_bias) for name in names.gate_up]
        gate, up = np.split(np.concatenate(sides, axis=1), 2, axis=1)
        return self._linear(_activate(gate, spec.activation) * up, layer + names.down, has_bias=spec.ffn_bias)

    def _branch(self, out: Array, layer: str, post_norm: str | None) -> Array:
        """What a branch adds to the residual stream."""
        normed = self._norm(out, layer + post_norm) if post_norm else out
        return normed * np.float32(self._spec.residual_scale)

    def _norm(self, x: Array, name: str) -> Array:
        weight = self._read(f"{name}.weight") + np.float32(self._spec.norm_offset)
        mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
        normed: Array = x / np.sqrt(mean_square + np.float32(self._spec.norm_epsilon)) * weight
        return normed

    def _linear(self, x: Array, name: str, *, has_bias: bool) -> Array:
        out: Array = x @ self._read(f"{name}.weight").T
        return out + self._read(f"{name}.bias") if has_bias else out

    def _read(self, name: str) -> Array:
        return self._checkpoint.tensor(name).read()


def _rotate(x: Array, positions: npt.NDArray[np.int64], rope: Rope) -> Array:
    """Rotary embedding of the leading elements of each head, in halves. (T, heads, D)."""
    angles = positions[:, None].astype(np.float32) * np.array(rope.inverse_frequencies, np.float32)
    cos = (np.cos(angles) * np.float32(rope.attention_factor))[:, None]
    sin = (np.sin(angles) * np.float32(rope.attention_factor))[:, None]
    first, second, rest = np.split(x, [rope.rotary_size // 2, rope.rotary_size], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _activate(x: Array, kind: str) -> Array:
    if kind == "silu":
        # As 0.5 x (1 + tanh(x / 2)): exp would overflow for large negative x.
        halved: Array = x * np.float32(0.5)
        silu: Array = halved * (1 + np.tanh(halved))
        return silu
    assert kind == "gelu_tanh", kind
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)
    activated: Array = np.float32(0.5) * x * (1 + np.tanh(inner))
    return activated


def _soft_cap(x: Array, cap: float) -> Array:
    capped: Array = np.tanh(x / np.float32(cap)) * np.float32(cap) if cap else x
    return capped
