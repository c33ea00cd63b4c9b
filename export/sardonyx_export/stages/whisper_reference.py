"""What the source's weights say of windows of sound and of texts to them: Whisper's forward pass in numpy.

Shares nothing with the graph builders but `WhisperSpec`, and nothing with ONNX Runtime. It holds one weight matrix in
float32 at a time, and reads each tensor once for all windows and texts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.stages.encoder_reference import gelu
from sardonyx_export.whisper_spec import WhisperSpec

Array = npt.NDArray[np.float32]

_EPSILON = np.float32(1e-5)
_KERNEL = 3


@dataclass(slots=True)
class WhisperPass:
    """What a model makes of windows and of one text to each. Graphs, this module and transformers fill the same one."""

    cross: dict[str, Array] = field(default_factory=dict)
    """``cross.{i}.key`` (B, H, D, P) and ``cross.{i}.value`` (B, H, P, D)."""
    logits: list[Array] = field(default_factory=list)
    """Of each text, (S, V)."""
    attention: list[Array] = field(default_factory=list)
    """Of each text, (A, S, P): scaled products before the softmax. Empty: not asked for, or not known."""


def reference_pass(
    checkpoint: Checkpoint,
    spec: WhisperSpec,
    mel: Array,
    rows: Sequence[Sequence[int]],
    heads: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WhisperPass:
    """Encode the windows, then let the decoder read a text to each.

    Args:
        checkpoint: the weights, dequantised as they are read.
        spec: what they mean.
        mel: (B, M, F) float32.
        rows: B texts, token ids from ``<|startoftranscript|>`` on.
        heads: layer and head of each attention wanted.
        progress: called with layers done and layers in all.

    Raises:
        ExportError: a tensor is missing or cannot be read.
    """
    return _Reference(checkpoint, spec, heads, progress).run(mel, rows)


class _Reference:
    """Matrix products see the tokens or positions of all rows in one axis, attention each row by itself."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: WhisperSpec,
        heads: Sequence[Sequence[int]],
        progress: Callable[[int, int], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._heads = heads
        self._progress = progress

    def run(self, mel: Array, rows: Sequence[Sequence[int]]) -> WhisperPass:
        done = WhisperPass()
        hidden = self._encode(mel)
        self._decode(hidden, rows, done)
        return done

    def _encode(self, mel: Array) -> Array:
        """(B, M, F) → (B * P, E)."""
        spec = self._spec
        windows = np.stack([self._convolve(window) for window in mel])
        x = (windows + self._read("model.encoder.embed_positions.weight")).reshape(-1, spec.hidden_size)
        ends = np.arange(1, len(mel)) * spec.num_positions
        for i in range(spec.num_encoder_layers):
            self._advance(i)
            part = f"model.encoder.layers.{i}."
            x = x + self._mix(x, part, ends, num_heads=spec.num_encoder_heads, is_causal=False)
            x = x + self._feed_forward(x, part)
        return self._norm(x, "model.encoder.layer_norm")

    def _convolve(self, window: Array) -> Array:
        """(M, F) → (P, E)."""
        x = window
        for name, stride in (("conv1", 1), ("conv2", 2)):
            weight = self._read(f"model.encoder.{name}.weight")
            padded = np.pad(x, ((0, 0), (_KERNEL // 2, _KERNEL // 2)))
            last = padded.shape[1] - _KERNEL + 1
            taps = [weight[:, :, k] @ padded[:, k : k + last : stride] for k in range(_KERNEL)]
            x = gelu(np.sum(taps, axis=0, dtype=np.float32) + self._read(f"model.encoder.{name}.bias")[:, None])
        return x.T

    def _mix(self, x: Array, part: str, ends: npt.NDArray[np.int64], *, num_heads: int, is_causal: bool) -> Array:
        """Attention of rows, which end at `ends`, to themselves: (T, E) → (T, E)."""
        h = self._norm(x, f"{part}self_attn_layer_norm")
        sides = [self._linear(h, f"{part}self_attn.{side}_proj", has_bias=side != "k") for side in "qkv"]
        rows = zip(*(np.split(side, ends) for side in sides), strict=True)
        mixed = [_attend(*row, num_heads=num_heads, is_causal=is_causal) for row in rows]
        return self._linear(np.concatenate(mixed), f"{part}self_attn.out_proj")

    def _decode(self, hidden: Array, rows: Sequence[Sequence[int]], done: WhisperPass) -> None:
        spec = self._spec
        ends = np.cumsum([len(row) for row in rows])[:-1]
        positions = np.concatenate([np.arange(len(row)) for row in rows])
        table = self._read("model.decoder.embed_tokens.weight")
        x = table[np.concatenate(rows)] + self._read("model.decoder.embed_positions.weight")[positions]
        products: dict[tuple[int, int], list[Array]] = {}
        for i in range(spec.num_decoder_layers):
            self._advance(spec.num_encoder_layers + i)
            part = f"model.decoder.layers.{i}."
            x = x + self._mix(x, part, ends, num_heads=spec.num_decoder_heads, is_causal=True)
            h = self._norm(x, f"{part}encoder_attn_layer_norm")
            mixed = self._look(i, h, ends, hidden, done, products)
            x = x + self._linear(np.concatenate(mixed), f"{part}encoder_attn.out_proj")
            x = x + self._feed_forward(x, part)
        self._advance(spec.num_encoder_layers + spec.num_decoder_layers)
        x = self._norm(x, "model.decoder.layer_norm")
        done.logits = [part @ table.T for part in np.split(x, ends)]
        if self._heads:
            chosen = [products[layer, head] for layer, head in self._heads]
            done.attention = [np.stack([of_rows[row] for of_rows in chosen]) for row in range(len(rows))]

    def _look(
        self,
        index: int,
        h: Array,
        ends: npt.NDArray[np.int64],
        hidden: Array,
        done: WhisperPass,
        products: dict[tuple[int, int], list[Array]],
    ) -> list[Array]:
        """Cross-attention of each row to its window; notes keys, values and the products that were asked for."""
        spec, part = self._spec, f"model.decoder.layers.{index}.encoder_attn."
        shape = (-1, spec.num_positions, spec.num_decoder_heads, spec.head_size)
        key = self._linear(hidden, f"{part}k_proj", has_bias=False).reshape(shape).transpose(0, 2, 3, 1)
        value = self._linear(hidden, f"{part}v_proj").reshape(shape).transpose(0, 2, 1, 3)
        done.cross |= {f"cross.{index}.key": key, f"cross.{index}.value": value}
        mixed = []
        for row, query in enumerate(np.split(self._linear(h, f"{part}q_proj"), ends)):
            by_head = query.reshape(len(query), -1, spec.head_size).transpose(1, 0, 2) * _scale(spec.head_size)
            scores: Array = by_head @ key[row]
            for layer, head in self._heads:
                if layer == index:
                    products.setdefault((layer, head), []).append(scores[head])
            mixed.append((_softmax(scores) @ value[row]).transpose(1, 0, 2).reshape(len(query), -1))
        return mixed

    def _feed_forward(self, x: Array, part: str) -> Array:
        h = self._norm(x, f"{part}final_layer_norm")
        return self._linear(gelu(self._linear(h, f"{part}fc1")), f"{part}fc2")

    def _norm(self, x: Array, name: str) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + _EPSILON)
        normed: Array = centred / deviation * self._read(f"{name}.weight") + self._read(f"{name}.bias")
        return normed

    def _linear(self, x: Array, name: str, *, has_bias: bool = True) -> Array:
        product: Array = x @ self._read(f"{name}.weight").T
        return product + self._read(f"{name}.bias") if has_bias else product

    def _read(self, name: str) -> Array:
        return self._checkpoint.tensor(name).read()

    def _advance(self, num_layers: int) -> None:
        self._progress(num_layers, self._spec.num_encoder_layers + self._spec.num_decoder_layers)


def _attend(query: Array, key: Array, value: Array, *, num_heads: int, is_causal: bool) -> Array:
    """Self-attention of one row, head by head, so that one square of scores is held. (S, E) each → (S, E)."""
    mixed: Array = np.empty_like(query)
    size = query.shape[1] // num_heads
    for head in range(num_heads):
        part = np.s_[:, head * size : (head + 1) * size]
        scaled: Array = query[part] * _scale(size)
        scores = scaled @ key[part].T
        if is_causal:
            scores[np.triu_indices(len(scores), 1)] = -np.inf
        mixed[part] = _softmax(scores) @ value[part]
    return mixed


def _scale(head_size: int) -> Array:
    return np.array(1 / math.sqrt(head_size), np.float32)


def _softmax(scores: Array) -> Array:
    shares: Array = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return shares
