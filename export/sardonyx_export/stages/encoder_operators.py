"""Operators of encoders for CUDA in numpy, beside those of `stages.operators`.

Numbers are computed in float32 and rounded where an operator ends. What kernels take on trust is checked.
"""

import itertools
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from sardonyx_export.stages.attention_operator import MICROSOFT, Floats, Tensor, given, present
from sardonyx_export.stages.encoder_reference import gelu
from sardonyx_export.stages.operators import OPERATORS


class LayerNormalization(OpRun):
    """ONNX's own, of the last axis."""

    op_domain = ""

    def _run(self, *inputs: Tensor | None, **attributes: Any) -> tuple[Tensor, ...]:
        x, weight, *rest = present(self, inputs)
        x = given(x)
        assert attributes.get("axis", -1) in (-1, x.ndim - 1)
        wide = x.astype(np.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        normed = centred / np.sqrt(variance + np.float32(attributes.get("epsilon", 1e-5)))
        normed = normed * given(weight).astype(np.float32)
        if rest and rest[0] is not None:
            normed = normed + rest[0].astype(np.float32)
        return (normed.astype(x.dtype),)


class Gelu(OpRun):
    """ONNX's own, exact or by its tanh formula."""

    op_domain = ""

    def _run(self, *inputs: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        x = inputs[0].astype(np.float32)
        if attributes.get("approximate", "none") == "none":
            return (gelu(x).astype(inputs[0].dtype),)
        inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)
        return ((np.float32(0.5) * x * (1 + np.tanh(inner))).astype(inputs[0].dtype),)


class RotaryEmbedding(OpRun):
    """ONNX Runtime's, in halves, of (B, S, H * D) at positions (B, S)."""

    op_domain = MICROSOFT

    def _run(self, *inputs: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        x, positions, cos, sin = inputs
        assert not attributes.get("interleaved", 0), "not implemented: interleaved"
        assert x.shape[1] <= len(cos), "a row has more columns than the tables have positions"
        assert cos.dtype == sin.dtype == x.dtype
        half = cos.shape[-1]
        num_heads = attributes.get("num_heads") or x.shape[-1] // (2 * half)
        rotary_size = attributes.get("rotary_embedding_dim") or x.shape[-1] // num_heads
        assert rotary_size == 2 * half
        heads = x.astype(np.float32).reshape(*x.shape[:2], num_heads, -1)
        wide_cos, wide_sin = (table[positions].astype(np.float32)[:, :, None] for table in (cos, sin))
        first, second, rest = np.split(heads, [half, 2 * half], axis=-1)
        turned = [first * wide_cos - second * wide_sin, second * wide_cos + first * wide_sin, rest]
        return (np.concatenate(turned, axis=-1).reshape(x.shape).astype(x.dtype),)


class PackedMultiHeadAttention(OpRun):
    """Attention of rows that lie packed (T, H * D) one behind the other, each token seeing all of its row.

    Source: com.microsoft.PackedMultiHeadAttention (ONNX Runtime 1.31 schema).
    """

    op_domain = MICROSOFT

    def _run(self, *inputs: Tensor | None, **attributes: Any) -> tuple[Tensor, ...]:
        query, key, value, bias, offsets, starts, distances = [*present(self, inputs), None][:7]
        query, key, value, offsets, starts = map(given, (query, key, value, offsets, starts))
        assert bias is None, "not implemented: a bias of queries, keys and values"
        assert query.dtype in (np.float16, np.float32), f"no kernel for {query.dtype}"
        assert query.shape == key.shape, "queries and keys have one shape"
        _check_rows(offsets, starts, len(query))
        output: Floats = np.zeros(value.shape, np.float32)
        for row, (start, end) in enumerate(itertools.pairwise(starts)):
            heads = [_heads(side[start:end], attributes["num_heads"]) for side in (query, key, value)]
            added = None if distances is None else distances[row % len(distances), :, : end - start, : end - start]
            output[start:end] = attend(heads, added).reshape(end - start, -1)
        return (output.astype(query.dtype),)


class MultiHeadAttention(OpRun):
    """Attention of rows that are filled up on the right: (B, S, H * D), and the lengths of rows of keys, (B).

    Keys and values may be a cross-attention's cache, (B, H, L, D).
    """

    op_domain = MICROSOFT

    def _run(self, *inputs: Tensor | None, **attributes: Any) -> tuple[Tensor, ...]:
        query, key, value, bias, lengths, distances = [*present(self, inputs), None, None, None][:6]
        query, key, value = map(given, (query, key, value))
        assert bias is None, "not implemented: a bias of queries, keys and values"
        assert lengths is None or lengths.shape == (len(query),), "not implemented: other masks than lengths"
        assert len(query) == len(key) == len(value), "a row of queries has its own of keys and values"
        assert query.dtype == key.dtype == value.dtype
        if key.ndim == 4:
            assert key.shape == value.shape == (len(query), attributes["num_heads"], *key.shape[2:])
            assert lengths is None, "not implemented: lengths of a cache"
            key, value = (side.transpose(0, 2, 1, 3) for side in (key, value))
        if attributes.get("unidirectional", 0):
            assert distances is None, "not implemented: a bias beside the order"
            assert key.shape[1] == query.shape[1], "not implemented: a past"
            distances = np.triu(np.full((1, 1, key.shape[1], key.shape[1]), -np.inf, np.float32), 1)
        output: Floats = np.zeros(query.shape, np.float32)
        for row in range(len(query)):
            length = key.shape[1] if lengths is None else int(lengths[row])
            sides = (query[row], key[row, :length], value[row, :length])
            added = None if distances is None else distances[row % len(distances), :, :, :length]
            heads = [_heads(side, attributes["num_heads"]) for side in sides]
            output[row] = attend(heads, added).reshape(query.shape[1], -1)
        return (output.astype(query.dtype),)


ENCODER_OPERATORS: list[type[OpRun]] = [
    *OPERATORS,
    LayerNormalization,
    Gelu,
    RotaryEmbedding,
    PackedMultiHeadAttention,
    MultiHeadAttention,
]


def attend(sides: list[Floats], added: Tensor | None) -> Floats:
    """Queries (n, H, D), keys and values (m, H, D) → (n, H, D); `added` (1 or H, n, m) to the scaled products."""
    query, key, value = sides
    scores = np.einsum("qhd,khd->hqk", query, key) * np.float32(query.shape[-1] ** -0.5)
    if added is not None:
        scores = scores + added.astype(np.float32)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed: Floats = np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), value)
    return mixed


def _heads(side: Tensor, num_heads: int) -> Floats:
    return side.astype(np.float32).reshape(len(side), num_heads, -1)


def _check_rows(offsets: Tensor, starts: Tensor, num_tokens: int) -> None:
    """`token_offset` and `cumulative_sequence_length` describe the same rows."""
    assert offsets.dtype == starts.dtype == np.int32, "both are int32"
    num_rows, longest = offsets.shape
    lengths = np.diff(starts)
    assert starts.shape == (num_rows + 1,), "cumulative_sequence_length is (B + 1)"
    assert (starts[0], starts[-1]) == (0, num_tokens), "it begins with 0 and ends with T"
    assert (lengths >= 0).all(), "it descends"
    assert lengths.max() <= longest, "a row is longer than S"
    is_token = np.arange(longest) < lengths[:, None]
    flat = offsets.reshape(-1)
    assert np.array_equal(flat[:num_tokens], np.flatnonzero(is_token)), "token_offset begins with the tokens, in order"
    assert np.array_equal(np.sort(flat), np.arange(offsets.size)), "token_offset names each position once"
