"""What the source's weights say of whole texts: an encoder's forward pass in numpy, one layer at a time.

Shares nothing with the graph builder but `EncoderSpec` and `Head`, and nothing with ONNX Runtime. It holds one weight
matrix in float32 at a time, and reads each tensor once for all rows.
"""

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.encoder_spec import (
    Activation,
    Array,
    Dense,
    EncoderRope,
    EncoderSpec,
    Head,
    Norm,
    Normalise,
    Pooling,
    RelativeBias,
)

Positions = npt.NDArray[np.int64]

# erf is 1 in float32 from 4 on. A straight line between two points is off by 2e-9 at most: h^2 / 8 * max |erf''|.
_ERF_LIMIT, _ERF_STEPS = 4.0, 8192
_ERF_POINTS = np.linspace(-_ERF_LIMIT, _ERF_LIMIT, 2 * int(_ERF_LIMIT) * _ERF_STEPS + 1)
_ERF_VALUES = np.array([math.erf(point) for point in _ERF_POINTS])
_SHORTEST = np.float32(1e-12)


class EncodedRow(msgspec.Struct, frozen=True, kw_only=True):
    """One text, or pair of texts, as the tokenizer made it."""

    token_ids: Sequence[int]
    """With special tokens, without padding."""
    token_type_ids: Sequence[int] | None = None
    """As many; ``None``: all 0."""
    num_prompt_tokens: int = 0
    """Leading tokens that take no part in pooling where the head leaves the prompt out."""


def reference_outputs(
    checkpoint: Checkpoint,
    spec: EncoderSpec,
    head: Head,
    rows: Sequence[EncodedRow],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Array:
    """The result of every row.

    Args:
        checkpoint: the weights, dequantised as they are read.
        spec: what they mean.
        head: from a row's token vectors to its result.
        rows: of 1 to ``spec.max_model_len`` tokens, at least one of them not the prompt's.
        progress: called with layers done and layers in all.

    Returns:
        (rows, width) float32: embeddings, or numbers of the labels before any softmax or sigmoid.

    Raises:
        ExportError: a tensor is missing or cannot be read.
    """
    vectors = _Encoder(checkpoint, spec, [len(row.token_ids) for row in rows]).run(rows, progress)
    return np.stack([_apply(head, x, row.num_prompt_tokens) for x, row in zip(vectors, rows, strict=True)])


class _Encoder:
    """The pass over all rows at once: matrix products see packed tokens (T, E), attention each row by itself."""

    def __init__(self, checkpoint: Checkpoint, spec: EncoderSpec, lengths: list[int]) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._ends = np.cumsum(lengths)
        self._positions: Positions = np.concatenate([np.arange(length) for length in lengths])
        bias = spec.relative_bias
        self._bias_table = self._read(f"{bias.name}.weight") if bias is not None else None

    def run(self, rows: Sequence[EncodedRow], progress: Callable[[int, int], None]) -> list[Array]:
        spec = self._spec
        x = self._embed(rows)
        for i, layer in enumerate(spec.layers):
            progress(i, len(spec.layers))
            part = spec.names.layer.format(i=i)
            attention_norm, ffn_norm = part + spec.names.attention_norm, part + spec.names.ffn_norm
            if spec.is_pre_norm:
                x = x + self._attention(self._norm(x, attention_norm) if layer.has_attention_norm else x, i)
                x = x + self._ffn(self._norm(x, ffn_norm), part)
            else:
                x = self._norm(x + self._attention(x, i), attention_norm)
                x = self._norm(x + self._ffn(x, part), ffn_norm)
        progress(len(spec.layers), len(spec.layers))
        if spec.names.final_norm is not None:
            x = self._norm(x, spec.names.final_norm)
        return np.split(x, self._ends[:-1])

    def _embed(self, rows: Sequence[EncodedRow]) -> Array:
        spec, names = self._spec, self._spec.names
        x = self._read(f"{names.word_embeddings}.weight")[np.concatenate([row.token_ids for row in rows])]
        if names.position_embeddings is not None:
            x = x + self._read(f"{names.position_embeddings}.weight")[self._positions + spec.position_offset]
        if names.token_type_embeddings is not None:
            types = [[0] * len(row.token_ids) if row.token_type_ids is None else row.token_type_ids for row in rows]
            x = x + self._read(f"{names.token_type_embeddings}.weight")[np.concatenate(types)]
        return self._norm(x, names.embeddings_norm) if names.embeddings_norm is not None else x

    def _attention(self, h: Array, index: int) -> Array:
        spec, names, layer = self._spec, self._spec.names, self._spec.layers[index]
        part = names.layer.format(i=index)
        fused = np.concatenate(
            [self._linear(h, part + name, has_bias=spec.query_key_value_bias) for name in names.query_key_value], axis=1
        )
        query, key, value = np.split(fused.reshape(len(h), -1, spec.head_size), 3, axis=1)
        if layer.rope is not None:
            query, key = (_rotate(side, self._positions, spec.ropes[layer.rope]) for side in (query, key))
        outputs = [
            self._attend(q, k, v, layer.window)
            for q, k, v in zip(*(np.split(side, self._ends[:-1]) for side in (query, key, value)), strict=True)
        ]
        return self._linear(np.concatenate(outputs), part + names.attention_output, has_bias=spec.attention_output_bias)

    def _attend(self, query: Array, key: Array, value: Array, window: int | None) -> Array:
        """Attention within one row, to both sides. Three times (P, H, D) → (P, H * D)."""
        spec = self._spec
        scores: Array = query.transpose(1, 0, 2) @ key.transpose(1, 2, 0) * np.float32(spec.head_size**-0.5)
        # Of keys from queries: (P, P).
        offset: Positions = np.arange(len(query))[None, :] - np.arange(len(query))[:, None]
        if spec.relative_bias is not None and self._bias_table is not None:
            scores = scores + self._bias_table[relative_buckets(offset, spec.relative_bias)].transpose(2, 0, 1)
        if window is not None:
            scores = np.where(np.abs(offset) > window, np.float32(-np.inf), scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed: Array = weights @ value.transpose(1, 0, 2)
        return mixed.transpose(1, 0, 2).reshape(len(query), -1)

    def _ffn(self, h: Array, part: str) -> Array:
        spec, names = self._spec, self._spec.names
        up = self._linear(h, part + names.up, has_bias=spec.ffn_bias)
        if spec.ffn == "plain":
            inner = _activate(up, spec.activation)
        elif spec.ffn == "gated":
            assert names.gate is not None
            inner = _activate(self._linear(h, part + names.gate, has_bias=spec.ffn_bias), spec.activation) * up
        else:
            gate, up = np.split(up, 2, axis=1)
            inner = _activate(gate, spec.activation) * up
        return self._linear(inner, part + names.down, has_bias=spec.ffn_bias)

    def _norm(self, x: Array, name: str) -> Array:
        bias = self._read(f"{name}.bias") if self._spec.norm_bias else None
        return _layer_norm(x, Norm(weight=self._read(f"{name}.weight"), bias=bias, epsilon=self._spec.norm_epsilon))

    def _linear(self, x: Array, name: str, *, has_bias: bool) -> Array:
        out: Array = x @ self._read(f"{name}.weight").T
        return out + self._read(f"{name}.bias") if has_bias else out

    def _read(self, name: str) -> Array:
        return self._checkpoint.tensor(name).read()


def relative_buckets(offset: Positions, bias: RelativeBias) -> Positions:
    """The bucket of each offset of a key from its query, positive to the right.

    Half of the buckets belong to either side. Of a side's, the nearer half holds one distance each, the farther half
    holds ranges that grow to `max_distance`; whatever lies beyond is in the last.
    """
    num_side = bias.num_buckets // 2
    num_near = num_side // 2
    distance = np.abs(offset)
    # In float32, as the model was trained: the borders of a few ranges depend on it.
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(num_near)
    share = np.log(ratio) / np.float32(math.log(bias.max_distance / num_near)) * np.float32(num_side - num_near)
    far = np.minimum(num_near + share.astype(np.int64), num_side - 1)
    buckets: Positions = np.where(distance < num_near, distance, far) + np.where(offset > 0, num_side, 0)
    return buckets


def _apply(head: Head, x: Array, num_prompt_tokens: int) -> Array:
    """(P, E) → (width)."""
    start = 0 if head.pools_prompt else num_prompt_tokens
    result: Array = np.concatenate([_pool(x, kind, start) for kind in head.poolings])
    for step in head.steps:
        if isinstance(step, Dense):
            result = step.weight @ result + (0 if step.bias is None else step.bias)
            result = _activate(result.astype(np.float32), step.activation)
        elif isinstance(step, Norm):
            result = _layer_norm(result, step)
        else:
            assert isinstance(step, Normalise)
            result = result / np.maximum(np.linalg.norm(result), _SHORTEST)
    return result


def _pool(x: Array, kind: Pooling, start: int) -> Array:
    """One vector (E) of a row's (P, E), without those before `start`."""
    kept = x[start:]
    pooled: Array
    if kind == "cls":
        pooled = kept[0]
    elif kind == "lasttoken":
        pooled = kept[-1]
    elif kind == "max":
        pooled = kept.max(axis=0)
    elif kind == "mean":
        pooled = kept.mean(axis=0)
    elif kind == "mean_sqrt_len_tokens":
        pooled = kept.sum(axis=0) / np.float32(math.sqrt(len(kept)))
    else:
        assert kind == "weightedmean", kind
        weights = np.arange(start + 1, len(x) + 1, dtype=np.float32)
        pooled = weights @ kept / weights.sum()
    return pooled


def _layer_norm(x: Array, norm: Norm) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(np.square(centred), axis=-1, keepdims=True)
    normed: Array = centred / np.sqrt(variance + np.float32(norm.epsilon)) * norm.weight
    return normed if norm.bias is None else normed + norm.bias


def _rotate(x: Array, positions: Positions, rope: EncoderRope) -> Array:
    """Rotary embedding of the leading elements of each head, in halves. (T, heads, D)."""
    angles = positions[:, None].astype(np.float32) * np.array(rope.inverse_frequencies, np.float32)
    cos = (np.cos(angles) * np.float32(rope.attention_factor))[:, None]
    sin = (np.sin(angles) * np.float32(rope.attention_factor))[:, None]
    first, second, rest = np.split(x, [rope.rotary_size // 2, rope.rotary_size], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _activate(x: Array, kind: Activation) -> Array:
    return _ACTIVATIONS[kind](x)


def gelu(x: Array) -> Array:
    """The exact one, by the error function."""
    erf = np.interp(x * np.float32(math.sqrt(0.5)), _ERF_POINTS, _ERF_VALUES).astype(np.float32)
    activated: Array = np.float32(0.5) * x * (1 + erf)
    return activated


def _gelu_tanh(x: Array) -> Array:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
    activated: Array = np.float32(0.5) * x * (1 + np.tanh(inner))
    return activated


def _sigmoid(x: Array) -> Array:
    # As 0.5 (1 + tanh(x / 2)): exp would overflow for large negative x.
    activated: Array = np.float32(0.5) * (1 + np.tanh(x * np.float32(0.5)))
    return activated


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _relu(x: Array) -> Array:
    activated: Array = np.maximum(x, np.float32(0))
    return activated


def _tanh(x: Array) -> Array:
    activated: Array = np.tanh(x)
    return activated


def _identity(x: Array) -> Array:
    return x


_ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "silu": _silu,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "identity": _identity,
}
