"""Graphs for CUDA from tiny checkpoints in memory, their operators in numpy, beside the graphs for the CPU."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from tests.export.builders.arrays import ArrayCheckpoint
from tests.export.builders.test_decoder import CONFIG, arrays, as_gguf, build, logits, operators
from tests.paged_reference import evaluator, feeds_of

from sardonyx.repository.families import KvLayout
from sardonyx_export.builders.blocks import Blocks, fit
from sardonyx_export.builders.decoder import BuildReport
from sardonyx_export.errors import ExportError
from sardonyx_export.stages.paged_verify import empty_caches

Array = npt.NDArray[np.float32]
BLOCK = 16


class Paged:
    """A graph and its cache of ten blocks."""

    def __init__(self, report: BuildReport) -> None:
        self.graph = evaluator(report.files[0])
        self.caches = empty_caches(self.graph, 10)

    def run(self, *rows: tuple[list[int], int, list[int]], wanted: list[int] | None = None) -> Array:
        """Logits of a step; each row is new tokens, the number of those before, and blocks."""
        wanted = list(range(sum(len(ids) for ids, _, _ in rows))) if wanted is None else wanted
        feeds = feeds_of(rows, BLOCK, wanted)
        result: Array = self.graph.run(["logits"], feeds | self.caches)[0]
        return result


def build_paged(folder: Path, checkpoint: ArrayCheckpoint, **options: Any) -> BuildReport:
    return build(folder, checkpoint, **{"precision": "fp16", "target": "cuda", "kv_block_size": BLOCK, **options})


def error(actual: Array, expected: Array) -> float:
    return float(np.sqrt(np.square(actual - expected).mean()) / expected.std())


def test_the_report_states_layout_and_sampler(tmp_path: Path) -> None:
    report = build(tmp_path, ArrayCheckpoint(CONFIG, arrays()), precision="bf16", target="cuda")
    kv = KvLayout(num_layers=2, num_kv_heads=2, head_size=16, datatype="BF16", block_size=256)
    assert (report.kv, report.activations, report.weights) == (kv, "bf16", "F32 -> bf16")
    assert [file.name for file in report.sampler] == ["sampler.onnx"]


@pytest.mark.parametrize(("head_size", "block_size"), [(64, 256), (80, 128), (128, 128), (256, 64)])
def test_blocks_are_as_small_as_flash_attention_reads_them(tmp_path: Path, head_size: int, block_size: int) -> None:
    sizes = {"hidden_size": head_size, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    report = build(tmp_path, ArrayCheckpoint(CONFIG | sizes, arrays(**sizes)), precision="fp16", target="cuda")
    assert report.kv.block_size == block_size


def test_ports_are_those_of_the_contract(tmp_path: Path) -> None:
    model = onnx.load(build_paged(tmp_path, ArrayCheckpoint(CONFIG, arrays())).files[0], load_external_data=False)
    types = {
        value.name: (value.type.tensor_type.elem_type, [axis.dim_value or axis.dim_param for axis in dims])
        for value in (*model.graph.input, *model.graph.output)
        if "1" not in value.name.split(".")[1:2]
        for dims in [value.type.tensor_type.shape.dim]
    }
    int32, half = onnx.TensorProto.INT32, onnx.TensorProto.FLOAT16
    cache = (half, ["blocks", BLOCK, 2, 16])
    assert types == {
        "input_ids": (onnx.TensorProto.INT64, ["T"]),
        "logits_index": (onnx.TensorProto.INT64, ["N"]),
        "block_table": (int32, ["B", "M"]),
        "cumulative_sequence_length": (int32, ["B + 1"]),
        "past_seqlens": (int32, ["B"]),
        "slot_mapping": (int32, ["T"]),
        "attention_metadata": (int32, ["bounds"]),
        "logits": (onnx.TensorProto.FLOAT, ["N", 80]),
        **{f"{side}.0.{part}": cache for side in ("past_key_values", "present") for part in ("key", "value")},
    }


def test_greedy_tokens_are_those_of_the_graph_for_the_cpu(tmp_path: Path) -> None:
    checkpoint = ArrayCheckpoint(CONFIG, arrays(seed=4))
    slots = build(tmp_path / "slots", checkpoint, precision="fp32")
    paged = Paged(build_paged(tmp_path / "paged", checkpoint))
    ids = np.random.default_rng(2).integers(0, 80, 20).tolist()
    blocks = [7, 2, 5]
    paged.run((ids[:13], 0, blocks), wanted=[])
    num_past, num_clear = 13, 0
    while len(ids) < 32:
        expected = logits(slots, ids)[-1]
        measured = paged.run((ids[num_past:], num_past, blocks), wanted=[len(ids) - num_past - 1])[0]
        num_past = len(ids)
        second, first = np.sort(expected)[-2:]
        if first - second > 0.1:  # rounding cannot turn it
            assert measured.argmax() == expected.argmax()
            num_clear += 1
        ids.append(int(expected.argmax()))
    assert num_clear > 8


def test_sequences_share_the_blocks_of_a_prefix(tmp_path: Path) -> None:
    report = build_paged(tmp_path, ArrayCheckpoint(CONFIG, arrays(seed=1)))
    prefix = np.random.default_rng(0).integers(0, 80, 2 * BLOCK).tolist()
    tails = [[1, 2, 3], [70, 60, 50, 40]]
    shared = Paged(report)
    shared.run((prefix, 0, [8, 3]), wanted=[])
    together = shared.run((tails[0], 32, [8, 3, 1]), (tails[1], 32, [8, 3, 6]))
    for part, tail in zip(np.split(together, [3]), tails, strict=True):
        alone = Paged(report).run((prefix + tail, 0, [4, 5, 9]))[32:]
        assert error(part, alone) < 5e-3


def test_only_wanted_rows_have_logits(tmp_path: Path) -> None:
    report = build_paged(tmp_path, ArrayCheckpoint(CONFIG, arrays()))
    rows = [(list(range(5)), 0, [1]), ([9, 8, 7], 0, [2])]
    everything = Paged(report).run(*rows)
    some = Paged(report).run(*rows, wanted=[7, 4])
    assert some.shape == (2, 80)
    np.testing.assert_allclose(some, everything[[7, 4]], atol=0.02)
    assert Paged(report).run(*rows, wanted=[]).shape == (0, 80)


@pytest.mark.parametrize("activations", ["fp16", "bf16"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_products_are_what_cuda_fuses(tmp_path: Path, precision: str, activations: str) -> None:
    # 96 words: as wide as fused products of 8 bits have to be, unlike 80.
    sizes = {"vocab_size": 96, "tie_word_embeddings": False}
    checkpoint = ArrayCheckpoint(CONFIG | sizes, arrays(**sizes))
    whole = Paged(build_paged(tmp_path / "whole", checkpoint, precision=activations))
    report = build_paged(tmp_path / "blocks", checkpoint, precision=precision, activations=activations)
    bits = {"int8": 8, "int4": 4}[precision]
    model = onnx.load(report.files[0], load_external_data=False)
    scales = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 4 * 2 + 1
    for node in products:
        found = {attribute.name: attribute.i for attribute in node.attribute}
        assert found["accuracy_level"] == 0
        assert found["bits"] == (8 if node.output[0] == "logits.rounded" else bits)
        dtype = np.float16 if activations == "fp16" else ml_dtypes.bfloat16
        assert scales[node.input[2]] == onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    assert operators(report)[0] == "GatherBlockQuantized"
    rows = [(list(range(30)), 0, [3, 1]), ([5, 6], 0, [4])]
    assert 1e-3 < error(Paged(report).run(*rows), whole.run(*rows)) < (0.06 if precision == "int8" else 0.25)
    assert report.weights.endswith(f"; activations {activations}")


def test_a_shape_that_cuda_does_not_fuse_stays_whole(tmp_path: Path) -> None:
    report = build_paged(tmp_path, ArrayCheckpoint(CONFIG, arrays()), precision="int8")
    assert operators(report)[0] == "Gather"  # 80 words
    assert operators(report).count("Gemm") == 1
    assert operators(report).count("MatMulNBits") == 4 * 2
    assert report.weights == "F32 -> fp16 and int8 in blocks of 32, re-quantised; activations fp16"


@pytest.mark.parametrize("storage", ["Q4_0", "Q4_1"])
def test_gguf_blocks_are_kept(tmp_path: Path, storage: str) -> None:
    checkpoint = ArrayCheckpoint(CONFIG, as_gguf(arrays(), storage, "Q8_0"))
    report = build_paged(tmp_path / "kept", checkpoint, precision="int4")
    assert f"{storage} -> int4 in blocks of 32, lossless" in report.weights
    model = onnx.load(report.files[0], load_external_data=False)
    points = {tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith("zero_points")}
    assert points == (set() if storage == "Q4_0" else {onnx.TensorProto.FLOAT16})
    rows = [(list(range(30)), 0, [3, 1]), ([5, 6], 0, [4])]
    expected = Paged(build_paged(tmp_path / "whole", checkpoint)).run(*rows)
    assert error(Paged(report).run(*rows), expected) < 0.01


def test_a_flat_block_s_offset_becomes_its_scale() -> None:
    codes = np.full((1, 2, 4), 3, np.uint8)
    codes[0, 1] = [0, 5, 9, 15]
    points = np.full((1, 2), 8, np.uint8)
    blocks = Blocks(4, codes, np.array([[0, 0.5]], np.float32), points, np.array([[-0.75, 0.125]], np.float32))
    expected = blocks.dequantise(8)
    scales, float_points = blocks.with_float_zero_points()
    measured = (scales[..., None] * (blocks.codes - float_points[..., None])).reshape(1, 8)
    np.testing.assert_allclose(measured, expected, rtol=1e-6)


def test_eight_bit_codes_make_up_for_rounded_scales() -> None:
    weights = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    errors = []
    for dtype in (np.float32, ml_dtypes.bfloat16):
        blocks = fit(weights, 8, 32, dtype)
        np.testing.assert_array_equal(blocks.scales, blocks.scales.astype(dtype).astype(np.float32))
        errors.append(error(blocks.dequantise(128), weights))
    assert errors[1] < 1.05 * errors[0]


def test_norms_of_queries_and_keys_are_the_operator_s_own(tmp_path: Path) -> None:
    tensors = arrays()
    for i in range(2):
        for side in "qk":
            tensors[f"model.layers.{i}.self_attn.{side}_norm.weight"] = np.linspace(0.5, 2, 16, dtype=np.float32)
    config = CONFIG | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
    checkpoint = ArrayCheckpoint(config, tensors)
    report = build_paged(tmp_path / "paged", checkpoint)
    assert operators(report).count("SimplifiedLayerNormalization") == 1
    ids = list(range(20))
    expected = logits(build(tmp_path / "slots", checkpoint, precision="fp32"), ids)
    assert error(Paged(report).run((ids, 0, [3, 1])), expected) < 5e-3


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"precision": "fp32"}, "precision: is fp32"),
        ({"precision": "fp16", "target": "cpu"}, "precision: is fp16"),
        ({"precision": "int8", "activations": "int8"}, "activations: is int8"),
        ({"precision": "fp16", "activations": "bf16"}, "activations: is bf16"),
        ({"precision": "int8", "activations": "fp16", "target": "cpu"}, "activations: is fp16"),
        ({"precision": "int4", "block_size": 16}, "block_size: is 16"),
        ({"kv_block_size": 48}, "kv_block_size: is 48"),
        ({"kv_block_size": 8}, "kv_block_size: is 8"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(ExportError, match=field):
        build_paged(tmp_path, ArrayCheckpoint(CONFIG, arrays()), **options)
    assert not list(tmp_path.iterdir())


def test_heads_that_no_kernel_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="head_dim: is 272"):
        build_paged(tmp_path, ArrayCheckpoint(CONFIG | {"head_dim": 272}, arrays()))


def test_weights_beyond_fp16_are_refused_with_the_way_out(tmp_path: Path) -> None:
    tensors = arrays()
    tensors["model.norm.weight"][3] = 1e5
    with pytest.raises(ExportError, match=r"model\.norm\.weight: holds 1e\+05.*bf16"):
        build_paged(tmp_path / "fp16", ArrayCheckpoint(CONFIG, tensors))
    build_paged(tmp_path / "bf16", ArrayCheckpoint(CONFIG, tensors), precision="bf16")


def test_activations_are_wide_where_the_weights_were_stored_so(tmp_path: Path) -> None:
    tensors = {
        name: ("BF16", np.empty(0, np.uint8), values) if values.ndim == 2 else values
        for name, values in arrays().items()
    }
    report = build_paged(tmp_path, ArrayCheckpoint(CONFIG, tensors), precision="int8")
    assert report.activations == "bf16"
    assert report.kv.datatype == "BF16"
