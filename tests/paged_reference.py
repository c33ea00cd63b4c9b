"""ONNX Runtime's own operators in numpy, so that graphs which only its CUDA provider runs can be run by tests.

`evaluator` opens an exported file in `onnx.reference`; `OPERATORS` are the classes that it adds. Numbers are computed
in float32 and rounded where an operator ends, to the datatype that the graph has there. Slow: for tiny models.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

MICROSOFT = "com.microsoft"

Tensor = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


def evaluator(path: Path) -> ReferenceEvaluator:
    """A graph with its external data, ready to ``run(None, feeds)``; bfloat16 is `ml_dtypes.bfloat16`.

    Caches are updated in place, as CUDA does: each ``present`` that comes back is the array that was given as past.
    """
    return ReferenceEvaluator(onnx.load(path), new_ops=OPERATORS)


class PagedAttention(OpRun):
    """Attention over a cache in blocks.

    Queries, keys and values are packed in one tensor (T, (H + 2K) D). Separate keys, MLA's single cache, interleaved
    rotation, non-causal masks and 4-bit or fp8 caches are not implemented and refused. What the kernel takes on trust
    is checked: bounds in ``attention_metadata``, slots, and that each position a query sees is in a mapped block where
    its table says so.

    Source: com.microsoft.PagedAttention (ONNX Runtime 1.32 schema).
    """

    op_domain = MICROSOFT

    def _run(self, *inputs: Tensor | None, **attributes: Any) -> tuple[Tensor, ...]:
        named = dict(zip(_INPUTS, inputs, strict=False))
        attention = _Attention(attributes, named)
        key_cache, value_cache = (_writable(named[name]) for name in ("key_cache", "value_cache"))
        return attention.run(key_cache, value_cache), key_cache, value_cache


class SimplifiedLayerNormalization(OpRun):
    """RMS norm of the last axis."""

    op_domain = ""

    def _run(self, *inputs: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        x, weight = inputs
        assert attributes.get("axis", -1) in (-1, x.ndim - 1)
        return (_rms_norm(x, weight, attributes.get("epsilon", 1e-5)).astype(x.dtype),)


class SkipSimplifiedLayerNormalization(OpRun):
    """RMS norm of a sum, and the sum as fourth output."""

    op_domain = MICROSOFT

    def _run(self, *inputs: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        x, skip, weight = inputs
        total = (x.astype(np.float32) + skip.astype(np.float32)).astype(x.dtype)
        empty = np.empty(0, np.float32)
        return _rms_norm(total, weight, attributes.get("epsilon", 1e-12)).astype(x.dtype), empty, empty, total


class QuickGelu(OpRun):
    """``x * sigmoid(alpha * x)``."""

    op_domain = MICROSOFT

    def _run(self, *inputs: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        x = inputs[0].astype(np.float32)
        # As tanh: exp would overflow for large negative x.
        sigmoid = 0.5 * (1 + np.tanh(0.5 * np.float32(attributes.get("alpha", 1.702)) * x))
        return ((x * sigmoid).astype(inputs[0].dtype),)


class FastGelu(OpRun):
    """GELU by its tanh formula."""

    op_domain = MICROSOFT

    def _run(self, *inputs: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        x = inputs[0].astype(np.float32)
        inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)
        return ((0.5 * x * (1 + np.tanh(inner))).astype(inputs[0].dtype),)


class Gemm(OpRun):
    """ONNX's own, in float32 whatever the datatype: onnx's adds 16-bit products up in 16 bits."""

    op_domain = ""

    def _run(self, *inputs: Tensor | None, **attributes: Any) -> tuple[Tensor, ...]:
        a, b = (_given(x).astype(np.float32) for x in inputs[:2])
        a = a.T if attributes.get("transA") else a
        product = np.float32(attributes.get("alpha", 1.0)) * (a @ (b.T if attributes.get("transB") else b))
        if len(inputs) > 2 and inputs[2] is not None:
            product = product + np.float32(attributes.get("beta", 1.0)) * inputs[2].astype(np.float32)
        return (product.astype(_given(inputs[0]).dtype),)


class MatMulNBits(OpRun):
    """A product with block-quantised weights of 4 or 8 bits; zero points packed or none."""

    op_domain = MICROSOFT

    def _run(self, *inputs: Tensor | None, **attributes: Any) -> tuple[Tensor, ...]:
        x, codes, scales, zero_points, _, bias = (*inputs, *[None] * (6 - len(inputs)))
        x, bits, num_rows = _given(x), attributes["bits"], attributes["N"]
        assert _given(scales).dtype == x.dtype, "scales have the datatype of the activations"
        steps = _unpack(_given(codes), bits).reshape(num_rows, -1, attributes["block_size"]).astype(np.float32)
        points: Floats = np.full(steps.shape[:2], 1 << (bits - 1), np.float32)
        if zero_points is not None:
            points = _unpack(zero_points, bits)[:, : steps.shape[1]].astype(np.float32)
        weights = (steps - points[..., None]) * _given(scales).astype(np.float32).reshape(points.shape)[..., None]
        product = x.astype(np.float32) @ weights.reshape(num_rows, -1)[:, : attributes["K"]].T
        return ((product if bias is None else product + bias.astype(np.float32)).astype(x.dtype),)


class GatherBlockQuantized(OpRun):
    """Rows of a block-quantised table of 4 or 8 bits, with its default zero point."""

    op_domain = MICROSOFT

    def _run(self, *inputs: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        table, indices, scales = inputs
        bits, block_size = attributes["bits"], attributes["block_size"]
        assert (attributes.get("gather_axis", 0), attributes.get("quantize_axis", 1)) == (0, 1)
        steps = _unpack(table[indices], bits).astype(np.float32) - (1 << (bits - 1))
        wide = np.repeat(scales[indices].astype(np.float32), block_size, axis=-1)[..., : steps.shape[-1]]
        return ((steps * wide).astype(scales.dtype),)


OPERATORS: list[type[OpRun]] = [
    PagedAttention,
    SimplifiedLayerNormalization,
    SkipSimplifiedLayerNormalization,
    QuickGelu,
    FastGelu,
    Gemm,
    MatMulNBits,
    GatherBlockQuantized,
]

_INPUTS = (
    "query",
    "key",
    "value",
    "key_cache",
    "value_cache",
    "cumulative_sequence_length",
    "past_seqlens",
    "block_table",
    "cos_cache",
    "sin_cache",
    "slot_mapping",
    "head_sink",
    "q_norm_weight",
    "k_norm_weight",
    "k_scale",
    "v_scale",
    "attention_metadata",
)
_ATTRIBUTES = {
    "num_heads",
    "kv_num_heads",
    "scale",
    "softcap",
    "local_window_size",
    "do_rotary",
    "qk_norm_epsilon",
    "k_quant_type",
    "v_quant_type",
}


class _Attention:
    """One call of PagedAttention, caches aside."""

    def __init__(self, attributes: dict[str, Any], inputs: dict[str, Tensor | None]) -> None:
        assert set(attributes) <= _ATTRIBUTES, f"not implemented: {set(attributes) - _ATTRIBUTES}"
        assert inputs["key"] is None, "not implemented: separate keys and values"
        assert inputs["value"] is None, "not implemented: separate keys and values"
        self._attributes = attributes
        self._inputs = inputs
        self._num_heads: int = attributes["num_heads"]
        self._num_kv_heads: int = attributes["kv_num_heads"]
        self._query = _given(inputs["query"])
        assert self._query.dtype in (np.float16, ml_dtypes.bfloat16), f"no kernel for {self._query.dtype}"
        self._starts: Ints = _given(inputs["cumulative_sequence_length"])
        self._num_past: Ints = _given(inputs["past_seqlens"])
        self._table: Ints = _given(inputs["block_table"])

    def run(self, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        """(T, H * D); keys and values are written first, so that queries find them in the cache."""
        num_tokens, num_heads, num_kv_heads = len(self._query), self._num_heads, self._num_kv_heads
        head_size = key_cache.shape[-1]
        self._check(key_cache)
        heads = self._query.reshape(num_tokens, num_heads + 2 * num_kv_heads, head_size).astype(np.float32)
        query, key, value = np.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
        query, key = self._normed(query, "q"), self._normed(key, "k")
        if self._attributes.get("do_rotary"):
            query, key = self._rotated(query), self._rotated(key)
        slots = self._slots(key_cache)
        self._store(key_cache, key, slots, "k")
        self._store(value_cache, value, slots, "v")
        output = np.zeros((num_tokens, num_heads, head_size), np.float32)
        for row, (start, end) in enumerate(zip(self._starts[:-1], self._starts[1:], strict=True)):
            if end > start:
                keys, mapped = self._load(key_cache, row, "k")
                values, _ = self._load(value_cache, row, "v")
                output[start:end] = self._attend(query[start:end], keys, values, mapped)
        return output.reshape(num_tokens, -1).astype(self._query.dtype)

    def _check(self, cache: Tensor) -> None:
        num_blocks, block_size, num_kv_heads, head_size = cache.shape
        assert num_kv_heads == self._num_kv_heads
        assert block_size >= 16, f"block_size {block_size} is below 16"
        assert block_size & (block_size - 1) == 0, f"block_size {block_size} is no power of two"
        assert head_size % 8 == 0, f"head_size {head_size} is no multiple of 8"
        for name in ("cumulative_sequence_length", "past_seqlens", "block_table", "slot_mapping", "attention_metadata"):
            given = self._inputs.get(name)
            assert given is None or given.dtype == np.int32, f"{name} is {given.dtype}, not int32"
        num_rows = len(self._num_past)
        assert self._starts.shape == (num_rows + 1,), "cumulative_sequence_length is (B + 1)"
        assert self._table.shape[0] == num_rows, "block_table is (B, M)"
        assert self._starts[0] == 0, "cumulative_sequence_length begins with 0"
        assert self._starts[-1] == len(self._query), "cumulative_sequence_length ends with T"
        assert (np.diff(self._starts) >= 0).all(), "cumulative_sequence_length descends"
        assert (self._table < num_blocks).all(), "block_table names a block that the cache has not"
        metadata = self._inputs.get("attention_metadata")
        if metadata is not None and num_rows:
            lengths = np.diff(self._starts)
            longest = (self._num_past + lengths).max()
            assert metadata.shape in ((2,), (3,))
            assert metadata[0] == 0 or lengths.max() <= metadata[0], (
                "a row has more tokens than attention_metadata says"
            )
            assert metadata[1] == 0 or longest <= metadata[1], "a sequence is longer than attention_metadata says"
            assert len(metadata) == 2 or metadata[2] <= longest, "attention_metadata's lower bound is too high"

    def _normed(self, heads: Floats, side: str) -> Floats:
        weight = self._inputs.get(f"{side}_norm_weight")
        return heads if weight is None else _rms_norm(heads, weight, self._attributes.get("qk_norm_epsilon", 1e-6))

    def _positions(self) -> npt.NDArray[np.int64]:
        """(T): each token's place in its sequence."""
        lengths = np.diff(self._starts)
        return np.repeat(self._num_past - self._starts[:-1], lengths) + np.arange(len(self._query))

    def _rotated(self, heads: Floats) -> Floats:
        """In halves: element i with element i + rotary_size / 2."""
        cos, sin = (
            _given(self._inputs[name])[self._positions()].astype(np.float32)[:, None]
            for name in ("cos_cache", "sin_cache")
        )
        half = cos.shape[-1]
        first, second, rest = np.split(heads, [half, 2 * half], axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

    def _slots(self, cache: Tensor) -> npt.NDArray[np.int64]:
        given = self._inputs.get("slot_mapping")
        num_blocks, block_size = cache.shape[:2]
        if given is None:
            rows = np.repeat(np.arange(len(self._num_past)), np.diff(self._starts))
            blocks = self._table[rows, self._positions() // block_size].astype(np.int64)
            return np.where(blocks < 0, -1, blocks * block_size + self._positions() % block_size)
        assert given.shape == (len(self._query),), "slot_mapping is (T)"
        assert ((given >= -1) & (given < num_blocks * block_size)).all(), "slot_mapping leads outside of the cache"
        return given.astype(np.int64)

    def _scale(self, side: str) -> Floats | None:
        """(1) or (K, D) of an int8 cache."""
        kind = self._attributes.get(f"{side}_quant_type", "NONE")
        if kind == "NONE":
            return None
        scale = _given(self._inputs[f"{side}_scale"]).astype(np.float32)
        assert kind == ("PER_TENSOR" if scale.size == 1 else "PER_CHANNEL")
        return scale if scale.size == 1 else scale[:, 0]

    def _store(self, cache: Tensor, heads: Floats, slots: npt.NDArray[np.int64], side: str) -> None:
        scale = self._scale(side)
        assert (cache.dtype == np.int8) if scale is not None else (cache.dtype == self._query.dtype)
        if scale is not None:
            heads = np.clip(np.rint(heads / scale), -128, 127)
        kept = slots >= 0
        blocks, offsets = np.divmod(slots[kept], cache.shape[1])
        cache[blocks, offsets] = heads[kept].astype(cache.dtype)

    def _load(self, cache: Tensor, row: int, side: str) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """(length, K, D) of a sequence, and which of its positions lie in mapped blocks."""
        length = int(self._num_past[row] + self._starts[row + 1] - self._starts[row])
        positions = np.arange(length)
        assert length <= self._table.shape[1] * cache.shape[1], "block_table is too narrow for a sequence"
        blocks = self._table[row, positions // cache.shape[1]]
        heads = cache[np.maximum(blocks, 0), positions % cache.shape[1]].astype(np.float32)
        scale = self._scale(side)
        return heads if scale is None else heads * scale, blocks >= 0

    def _attend(self, query: Floats, key: Floats, value: Floats, mapped: npt.NDArray[np.bool_]) -> Floats:
        """(n, H, D), (length, K, D), (length, K, D) → (n, H, D), the queries being the last n positions."""
        attributes, groups = self._attributes, self._num_heads // self._num_kv_heads
        # 0 is the attribute's default and means as much as its absence.
        scale = attributes.get("scale") or query.shape[-1] ** -0.5
        cap, window = attributes.get("softcap", 0.0), attributes.get("local_window_size", -1)
        key, value = np.repeat(key, groups, axis=1), np.repeat(value, groups, axis=1)
        scores = np.einsum("qhd,khd->hqk", query, key) * np.float32(scale)
        if cap:
            scores = np.tanh(scores / np.float32(cap)) * np.float32(cap)
        positions = np.arange(len(key) - len(query), len(key))
        distance = positions[:, None] - np.arange(len(key))
        seen = (distance >= 0) & mapped
        if window >= 0:
            seen &= distance < window
        scores = np.where(seen, scores, np.float32(-np.inf))
        sink = self._inputs.get("head_sink")
        peaks = np.maximum(scores.max(axis=-1, keepdims=True), np.finfo(np.float32).min)
        weights = np.exp(scores - peaks)
        total = weights.sum(axis=-1, keepdims=True)
        if sink is not None:
            total = total + np.exp(sink.astype(np.float32)[:, None, None] - peaks)
        # A query that sees nothing gives zeros.
        shares = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        return np.einsum("hqk,khd->qhd", shares, value)


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a required input is missing"
    return tensor


def _writable(cache: Tensor | None) -> Tensor:
    cache = _given(cache)
    assert cache.flags.writeable, "the caches are updated in place"
    return cache


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Floats:
    wide = x.astype(np.float32)
    mean_square = np.mean(np.square(wide), axis=-1, keepdims=True)
    normed: Floats = wide / np.sqrt(mean_square + np.float32(epsilon)) * weight.astype(np.float32)
    return normed


def _unpack(packed: Tensor, bits: int) -> npt.NDArray[np.uint8]:
    """Codes along the last axis; of 4 bits, the low half first."""
    assert bits in (4, 8), f"not implemented: {bits} bits"
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def feeds_of(
    rows: Sequence[tuple[Sequence[int], int, Sequence[int]]], block_size: int, wanted: Sequence[int]
) -> dict[str, Tensor]:
    """A step's inputs without caches, by the graph's names.

    Args:
        rows: for each its new token ids, the number of tokens before them, and its blocks.
        block_size: positions of a block.
        wanted: packed indices of the tokens whose logits are wanted.
    """
    lengths = np.array([len(ids) for ids, _, _ in rows], np.int32)
    num_past = np.array([past for _, past, _ in rows], np.int32)
    table = np.full((len(rows), max(len(blocks) for *_, blocks in rows)), -1, np.int32)
    slots = []
    for row, (ids, past, blocks) in enumerate(rows):
        table[row, : len(blocks)] = blocks
        slots += [
            blocks[position // block_size] * block_size + position % block_size
            for position in range(past, past + len(ids))
        ]
    return {
        "input_ids": np.array([token for ids, _, _ in rows for token in ids], np.int64),
        "logits_index": np.array(wanted, np.int64),
        "block_table": table,
        "cumulative_sequence_length": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        "past_seqlens": num_past,
        "slot_mapping": np.array(slots, np.int32),
        "attention_metadata": np.array([lengths.max(), (num_past + lengths).max(), 0], np.int32),
    }
