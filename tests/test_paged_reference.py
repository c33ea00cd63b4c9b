"""The numpy operators against naive formulas, and against ONNX Runtime's CPU kernels where those exist."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from tests.paged_reference import MICROSOFT, OPERATORS, feeds_of

from sardonyx.runtime.session import open_session

Tensor = npt.NDArray[Any]
H, K, D = 4, 2, 16
BLOCK = 16
NUM_BLOCKS = 9


def model_of(node: onnx.NodeProto, arrays: dict[str, Tensor], outputs: Sequence[str]) -> onnx.ModelProto:
    """One node; shapes and datatypes are left open where nobody needs them."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in arrays.items()
    ]
    results = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    graph = helper.make_graph([node], "one", inputs, results)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def attend(arrays: dict[str, Tensor], **attributes: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run one PagedAttention; `arrays` by the operator's names."""
    names = [
        *("query", "", "", "key_cache", "value_cache", "cumulative_sequence_length", "past_seqlens", "block_table"),
        *(
            "cos_cache",
            "sin_cache",
            "slot_mapping",
            "head_sink",
            "q_norm_weight",
            "k_norm_weight",
            "k_scale",
            "v_scale",
        ),
        "attention_metadata",
    ]
    node = helper.make_node(
        "PagedAttention",
        [name if name in arrays else "" for name in names],
        ["output", "keys", "values"],
        domain=MICROSOFT,
        num_heads=H,
        kv_num_heads=K,
        **attributes,
    )
    session = ReferenceEvaluator(model_of(node, arrays, ["output", "keys", "values"]), new_ops=OPERATORS)
    return tuple(session.run(None, arrays))


def naive(packed: Tensor, cos: Tensor, sin: Tensor, *, window: int | None = None, cap: float = 0.0) -> Tensor:
    """One whole sequence (n, (H + 2K) D) in float64, a query and a head at a time."""
    heads = packed.astype(np.float64).reshape(len(packed), H + 2 * K, D)
    turned = heads.copy()
    for position in range(len(heads)):
        for i in range(D // 2):
            x, y = heads[position, : H + K, i], heads[position, : H + K, i + D // 2]
            c, s = float(cos[position, i]), float(sin[position, i])
            turned[position, : H + K, i], turned[position, : H + K, i + D // 2] = x * c - y * s, y * c + x * s
    output = np.empty((len(packed), H, D))
    for position in range(len(heads)):
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(H):
            keys, values = turned[first : position + 1, H + head // 2], turned[first : position + 1, H + K + head // 2]
            scores = keys @ turned[position, head] * D**-0.5
            scores = cap * np.tanh(scores / cap) if cap else scores
            weights = np.exp(scores - scores.max())
            output[position, head] = weights @ values / weights.sum()
    return output.reshape(len(packed), -1)


def case(dtype: Any = np.float16) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Empty caches and tables, and three sequences of 40, 17 and 5 tokens."""
    rng = np.random.default_rng(0)
    angles = np.outer(np.arange(64), 10.0 ** -np.arange(D // 2))
    arrays = {
        "key_cache": np.zeros((NUM_BLOCKS, BLOCK, K, D), dtype),
        "value_cache": np.zeros((NUM_BLOCKS, BLOCK, K, D), dtype),
        "cos_cache": np.cos(angles).astype(dtype),
        "sin_cache": np.sin(angles).astype(dtype),
    }
    return arrays, [rng.standard_normal((length, (H + 2 * K) * D)).astype(dtype) for length in (40, 17, 5)]


BLOCKS = [[7, 2, 5], [4, 0], [8]]


def step(parts: Sequence[tuple[int, int, int]], sequences: list[Tensor]) -> dict[str, Tensor]:
    """A step of (sequence, first token, end)."""
    rows = [([0] * (end - start), start, BLOCKS[which]) for which, start, end in parts]
    feeds = feeds_of(rows, BLOCK, [])
    del feeds["input_ids"], feeds["logits_index"]
    return feeds | {"query": np.concatenate([sequences[which][start:end] for which, start, end in parts])}


@pytest.mark.parametrize(
    ("attributes", "options"),
    [
        ({}, {}),
        ({"local_window_size": 6}, {"window": 6}),
        ({"softcap": 2.0, "scale": D**-0.5}, {"cap": 2.0}),
    ],
)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_chunks_in_shuffled_blocks_attend_like_whole_sequences(
    dtype: Any, attributes: dict[str, Any], options: dict[str, Any]
) -> None:
    arrays, sequences = case(dtype)
    steps = [[(0, 0, 23), (1, 0, 16)], [(1, 16, 17), (0, 23, 39), (2, 0, 4)], [(2, 4, 5), (0, 39, 40)]]
    outputs: list[list[Tensor]] = [[] for _ in sequences]
    for parts in steps:
        output, keys, values = attend(arrays | step(parts, sequences), do_rotary=1, **attributes)
        assert keys is arrays["key_cache"]
        assert values is arrays["value_cache"]
        assert output.dtype == dtype
        for (which, start, end), part in zip(
            parts, np.split(output, np.cumsum([end - start for _, start, end in parts])[:-1]), strict=True
        ):
            assert len(part) == end - start
            outputs[which].append(part)
    tolerance = 4e-3 if dtype == np.float16 else 4e-2
    for sequence, parts in zip(sequences, outputs, strict=True):
        expected = naive(sequence, arrays["cos_cache"], arrays["sin_cache"], **options)
        assert np.abs(np.concatenate(parts).astype(np.float64) - expected).max() < tolerance


def test_the_same_slots_are_found_without_a_mapping() -> None:
    arrays, sequences = case()
    feeds = step([(0, 0, 40), (1, 0, 17)], sequences)
    output, keys, _ = attend(arrays | feeds, do_rotary=1)
    other, _ = case()
    del feeds["slot_mapping"], feeds["attention_metadata"]
    output_without, keys_without, _ = attend(other | feeds, do_rotary=1)
    np.testing.assert_array_equal(output, output_without)
    np.testing.assert_array_equal(keys, keys_without)


def test_a_token_without_a_slot_is_not_stored_and_one_without_blocks_sees_nothing() -> None:
    arrays, sequences = case()
    feeds = step([(0, 0, 3), (2, 0, 1)], sequences)
    feeds["slot_mapping"] = np.array([-1, -1, -1, -1], np.int32)
    feeds["block_table"][1] = -1
    output, keys, values = attend(arrays | feeds, do_rotary=1)
    assert not keys.any()
    assert not values.any()
    assert not output[3].any()


def test_int8_caches_stay_near_sixteen_bits() -> None:
    arrays, sequences = case()
    feeds = step([(0, 0, 40)], sequences)
    exact = attend(arrays | feeds, do_rotary=1)[0]
    quantised = arrays | {name: np.zeros((NUM_BLOCKS, BLOCK, K, D), np.int8) for name in ("key_cache", "value_cache")}
    scales = {name: np.array([4 / 127], np.float32) for name in ("k_scale", "v_scale")}
    types = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"}
    output, keys, _ = attend(quantised | scales | feeds, do_rotary=1, **types)
    assert keys.dtype == np.int8
    difference = np.abs(output.astype(np.float32) - exact).max()
    assert 1e-4 < difference < 0.1


def test_fp8_caches_stay_near_sixteen_bits() -> None:
    arrays, sequences = case()
    feeds = step([(0, 0, 40)], sequences)
    exact = attend(arrays | feeds, do_rotary=1)[0]
    empty = np.zeros((NUM_BLOCKS, BLOCK, K, D), ml_dtypes.float8_e4m3fn)
    quantised = arrays | {"key_cache": empty, "value_cache": empty.copy()}
    scales = {name: np.array([4 / 448], np.float32) for name in ("k_scale", "v_scale")}
    types = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"}
    output, keys, _ = attend(quantised | scales | feeds, do_rotary=1, **types)
    assert keys.dtype == ml_dtypes.float8_e4m3fn
    assert 1e-4 < np.abs(output.astype(np.float32) - exact).max() < 0.2


@pytest.mark.parametrize(("dtype", "lowest", "highest"), [(np.int8, -128, 127), (ml_dtypes.float8_e4m3fn, -448, 448)])
def test_each_channel_has_its_scale_and_what_lies_beyond_is_cut_off(dtype: Any, lowest: int, highest: int) -> None:
    arrays, (sequence, *_) = case()
    query = np.zeros((1, H + 2 * K, D), np.float16)
    query[0, H:] = np.resize([1, -2, 1000, -1000], (2 * K, D))
    arrays |= {name: np.zeros((NUM_BLOCKS, BLOCK, K, D), dtype) for name in ("key_cache", "value_cache")}
    key_scale = np.arange(1, K * D + 1, dtype=np.float32).reshape(K, 1, D) / 8
    scales = {"k_scale": key_scale, "v_scale": np.zeros(1, np.float32)}
    types = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_TENSOR"}
    feeds = step([(0, 0, 1)], [sequence]) | {"query": query.reshape(1, -1)}
    _, keys, values = attend(arrays | scales | feeds, **types)
    stored = keys[7, 0].astype(np.float32)
    scaled = query[0, H : H + K].astype(np.float32) / key_scale[:, 0]
    expected = np.clip(np.rint(scaled) if dtype == np.int8 else scaled, lowest, highest)
    np.testing.assert_array_equal(stored, expected.astype(dtype).astype(np.float32))
    assert (stored.min(), stored.max()) == (lowest, highest)
    assert not values.astype(np.float32).any()


@pytest.mark.parametrize("shape", [(K, D), (K, D, 1), (1,)])
def test_scales_by_channel_of_another_shape_are_told(shape: tuple[int, ...]) -> None:
    arrays, sequences = case()
    quantised = arrays | {name: np.zeros((NUM_BLOCKS, BLOCK, K, D), np.int8) for name in ("key_cache", "value_cache")}
    scales = {name: np.ones(shape, np.float32) for name in ("k_scale", "v_scale")}
    types = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    with pytest.raises(AssertionError, match="k_scale is"):
        attend(quantised | scales | step([(0, 0, 4)], sequences), **types)


def test_norms_of_queries_and_keys_come_before_the_rotation() -> None:
    arrays, sequences = case()
    weights = {"q_norm_weight": np.full(D, 2, np.float16), "k_norm_weight": np.full(D, 0.5, np.float16)}
    feeds = step([(0, 0, 40)], sequences)
    output = attend(arrays | weights | feeds, do_rotary=1)[0]
    heads = sequences[0].astype(np.float64).reshape(40, H + 2 * K, D)
    heads[:, : H + K] /= np.sqrt((heads[:, : H + K] ** 2).mean(-1, keepdims=True) + 1e-6)
    heads[:, :H] *= 2
    heads[:, H : H + K] *= 0.5
    expected = naive(heads.reshape(40, -1), arrays["cos_cache"], arrays["sin_cache"])
    assert np.abs(output - expected).max() < 4e-3


@pytest.mark.parametrize(("index", "bound"), [(0, 15), (1, 39)])
def test_a_bound_that_is_too_low_is_told(index: int, bound: int) -> None:
    arrays, sequences = case()
    feeds = step([(0, 24, 40)], sequences)
    feeds["attention_metadata"][index] = bound
    with pytest.raises(AssertionError, match="attention_metadata"):
        attend(arrays | feeds, do_rotary=1)


def both(folder: Path, node: onnx.NodeProto, arrays: dict[str, Tensor], output: str) -> tuple[Tensor, Tensor]:
    """From the numpy operator and from ONNX Runtime's."""
    model = model_of(node, arrays, [output])
    onnx.save_model(model, folder / "one.onnx")
    session = open_session(folder / "one.onnx", model_name="one")
    try:
        measured = session.run(arrays)[output].copy()
    finally:
        session.close()
    return ReferenceEvaluator(model, new_ops=OPERATORS).run([output], arrays)[0], measured


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_zero_points", [False, True])
def test_products_with_blocks_agree_with_the_cpu(tmp_path: Path, bits: int, has_zero_points: bool) -> None:
    rng = np.random.default_rng(bits)
    num_rows, num_columns = 24, 80
    arrays: dict[str, Tensor] = {
        "A": rng.standard_normal((5, num_columns)).astype(np.float32),
        "B": rng.integers(0, 256, (num_rows, 3, 32 * bits // 8)).astype(np.uint8),
        "scales": rng.random((num_rows, 3)).astype(np.float32) / (1 << bits),
        "zero_points": rng.integers(0, 256, (num_rows, -(-3 * bits // 8))).astype(np.uint8),
        "bias": rng.standard_normal(num_rows).astype(np.float32),
    }
    if not has_zero_points:
        del arrays["zero_points"]
    names = ["A", "B", "scales", "zero_points" if has_zero_points else "", "", "bias"]
    node = helper.make_node(
        "MatMulNBits", names, ["Y"], domain=MICROSOFT, K=num_columns, N=num_rows, bits=bits, block_size=32
    )
    expected, measured = both(tmp_path, node, arrays, "Y")
    np.testing.assert_allclose(measured, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_blocks_agree_with_the_cpu(tmp_path: Path, bits: int) -> None:
    rng = np.random.default_rng(bits)
    arrays: dict[str, Tensor] = {
        "table": rng.integers(0, 256, (12, 64 * bits // 8)).astype(np.uint8),
        "indices": np.array([3, 0, 11, 3], np.int64),
        "scales": rng.random((12, 2)).astype(np.float32),
    }
    node = helper.make_node(
        "GatherBlockQuantized",
        list(arrays),
        ["Y"],
        domain=MICROSOFT,
        bits=bits,
        block_size=32,
        gather_axis=0,
        quantize_axis=1,
    )
    expected, measured = both(tmp_path, node, arrays, "Y")
    np.testing.assert_allclose(measured, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "domain", "names", "attributes", "output"),
    [
        ("SimplifiedLayerNormalization", "", ["x", "weight"], {"axis": -1, "epsilon": 1e-5}, "Y"),
        ("SkipSimplifiedLayerNormalization", MICROSOFT, ["x", "skip", "weight"], {"epsilon": 1e-5}, "Y"),
        ("SkipSimplifiedLayerNormalization", MICROSOFT, ["x", "skip", "weight"], {"epsilon": 1e-5}, "sum"),
        ("QuickGelu", MICROSOFT, ["x"], {"alpha": 1.0}, "Y"),
        ("FastGelu", MICROSOFT, ["x"], {}, "Y"),
        ("Gemm", "", ["x", "matrix", "bias"], {"transB": 1}, "Y"),
    ],
)
def test_other_operators_agree_with_the_cpu(
    tmp_path: Path, kind: str, domain: str, names: list[str], attributes: dict[str, Any], output: str
) -> None:
    rng = np.random.default_rng(1)
    shapes = {"x": (5, 32), "skip": (5, 32), "weight": (32,), "matrix": (7, 32), "bias": (7,)}
    arrays: dict[str, Tensor] = {name: rng.standard_normal(shapes[name]).astype(np.float32) for name in names}
    outputs = ["Y", "", "", "sum"] if kind.startswith("Skip") else ["Y"]
    node = helper.make_node(kind, names, outputs, domain=domain, **attributes)
    expected, measured = both(tmp_path, node, arrays, output)
    np.testing.assert_allclose(measured, expected, rtol=1e-5, atol=1e-5)
