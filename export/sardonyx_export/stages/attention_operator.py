"""PagedAttention in numpy. Shares nothing with the builders, and numbers with no kernel: it adds up in float32."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx.reference.op_run import OpRun

MICROSOFT = "com.microsoft"

Tensor = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


class PagedAttention(OpRun):
    """Attention over a cache in blocks.

    Queries, keys and values are packed in one tensor (T, (H + 2K) D). Separate keys, MLA's single cache, interleaved
    rotation, non-causal masks and 4-bit caches are not implemented and refused. What the kernel takes on trust
    is checked: bounds in ``attention_metadata``, slots, and that each position a query sees is in a mapped block where
    its table says so.

    Source: com.microsoft.PagedAttention (ONNX Runtime 1.32 schema).
    """

    op_domain = MICROSOFT

    def _run(self, *inputs: Tensor | None, **attributes: Any) -> tuple[Tensor, ...]:
        named = dict.fromkeys(_INPUTS) | dict(zip(_INPUTS, present(self, inputs), strict=False))
        attention = _Attention(attributes, named)
        key_cache, value_cache = (_writable(named[name]) for name in ("key_cache", "value_cache"))
        return attention.run(key_cache, value_cache), key_cache, value_cache


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
_QUANTISED = [np.dtype(np.int8), np.dtype(ml_dtypes.float8_e4m3fn)]


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
        self._query = given(inputs["query"])
        assert self._query.dtype in (np.float16, ml_dtypes.bfloat16), f"no kernel for {self._query.dtype}"
        self._starts: Ints = given(inputs["cumulative_sequence_length"])
        self._num_past: Ints = given(inputs["past_seqlens"])
        self._table: Ints = given(inputs["block_table"])

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
        return heads if weight is None else rms_norm(heads, weight, self._attributes.get("qk_norm_epsilon", 1e-6))

    def _positions(self) -> npt.NDArray[np.int64]:
        """(T): each token's place in its sequence."""
        lengths = np.diff(self._starts)
        return np.repeat(self._num_past - self._starts[:-1], lengths) + np.arange(len(self._query))

    def _rotated(self, heads: Floats) -> Floats:
        """In halves: element i with element i + rotary_size / 2."""
        cos, sin = (
            given(self._inputs[name])[self._positions()].astype(np.float32)[:, None]
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
        """(1) or (K, D) of an int8 or fp8 cache."""
        kind = self._attributes.get(f"{side}_quant_type", "NONE")
        if kind == "NONE":
            return None
        scale = given(self._inputs[f"{side}_scale"])
        assert scale.dtype == np.float32, f"{side}_scale is {scale.dtype}, not float32"
        if kind == "PER_TENSOR":
            assert scale.shape == (1,), f"{side}_scale is {scale.shape}"
            return scale
        assert kind == "PER_CHANNEL", f"not implemented: {kind}"
        assert scale.ndim == 3, f"{side}_scale is {scale.shape}"
        assert scale.shape[:2] == (self._num_kv_heads, 1), f"{side}_scale is {scale.shape}"
        return scale[:, 0]

    def _store(self, cache: Tensor, heads: Floats, slots: npt.NDArray[np.int64], side: str) -> None:
        scale = self._scale(side)
        assert cache.dtype in (_QUANTISED if scale is not None else [self._query.dtype]), f"the cache is {cache.dtype}"
        if scale is not None:
            heads = _quantised(heads.astype(self._query.dtype), scale, cache.dtype)
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
        mixed: Floats = np.einsum("hqk,khd->qhd", shares, value)
        return mixed


def _quantised(heads: Tensor, scale: Floats, dtype: np.dtype[Any]) -> Floats:
    """Symmetric, to the nearest, cut off where the type ends; what a cache of `dtype` can hold.

    Source: ONNX Runtime, ``QuantizeToCache`` in ``paged_attention_impl.cu``.
    """
    scaled = heads.astype(np.float32) * np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    return np.clip(np.rint(scaled), -128, 127) if dtype == np.int8 else np.clip(scaled, -448, 448)


def present(operator: OpRun, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``None`` for inputs left out, for which onnx hands over what some operator gave for an output left out."""
    return [tensor if name else None for name, tensor in zip(operator.input, inputs, strict=True)]


def given(tensor: Tensor | None) -> Tensor:
    """An input that the operator needs."""
    assert tensor is not None, "a required input is missing"
    return tensor


def _writable(cache: Tensor | None) -> Tensor:
    cache = given(cache)
    assert cache.flags.writeable, "the caches are updated in place"
    return cache


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Floats:
    """RMS norm of the last axis."""
    wide = x.astype(np.float32)
    mean_square = np.mean(np.square(wide), axis=-1, keepdims=True)
    normed: Floats = wide / np.sqrt(mean_square + np.float32(epsilon)) * weight.astype(np.float32)
    return normed
