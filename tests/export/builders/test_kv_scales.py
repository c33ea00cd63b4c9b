"""Graphs for CUDA whose cache is quantised: what they declare, and how far their logits are from those of 16 bits."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tests.export.builders.arrays import ArrayCheckpoint
from tests.export.builders.test_decoder import CONFIG, arrays, build
from tests.export.builders.test_paged import BLOCK, Paged, build_paged, error

from sardonyx_export.builders.decoder import BuildOptions, BuildReport, build_decoder
from sardonyx_export.errors import ExportError
from sardonyx_export.families.llm import read_spec
from sardonyx_export.kv_ranges import KvCacheDtype, KvRange
from sardonyx_export.stages.calibration import measure_ranges

CHECKPOINT = ArrayCheckpoint(CONFIG, arrays(seed=4))
CALIBRATION = [np.random.default_rng(9).integers(0, 80, 40).tolist(), list(range(64)), list(range(16, 80))]
TEXT = np.random.default_rng(2).integers(0, 80, 40).tolist()


def ranges() -> list[KvRange]:
    return measure_ranges(CHECKPOINT, read_spec(CHECKPOINT.config), CALIBRATION)


def build_quantised(folder: Path, dtype: KvCacheDtype, precision: Any = "fp16") -> BuildReport:
    folder.mkdir()
    options = BuildOptions(precision=precision, target="cuda", kv_block_size=BLOCK, kv_cache_dtype=dtype)
    return build_decoder(CHECKPOINT, folder, options, kv_ranges=ranges())


@pytest.mark.parametrize(
    ("dtype", "datatype", "element_type", "kind", "shape"),
    [
        ("int8", "INT8", onnx.TensorProto.INT8, b"PER_CHANNEL", (2, 1, 16)),
        ("fp8", "FP8", onnx.TensorProto.FLOAT8E4M3FN, b"PER_TENSOR", (1,)),
    ],
)
def test_the_graph_says_of_what_type_and_by_what_scales(
    tmp_path: Path, dtype: KvCacheDtype, datatype: str, element_type: int, kind: bytes, shape: tuple[int, ...]
) -> None:
    report = build_quantised(tmp_path / "graph", dtype)
    assert report.kv.datatype == datatype
    graph = onnx.load(report.files[0]).graph
    caches = [port for port in (*graph.input, *graph.output) if port.name.startswith(("past_key_values.", "present."))]
    assert {port.type.tensor_type.elem_type for port in caches} == {element_type}
    assert len(caches) == 2 * 2 * 2
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "PagedAttention"]
    for node, reached in zip(nodes, ranges(), strict=True):
        attributes = {found.name: found.s for found in node.attribute if found.name.endswith("_quant_type")}
        assert attributes == {"k_quant_type": kind, "v_quant_type": kind}
        assert node.input[16] == "attention_metadata"
        room = 1.25 if dtype == "int8" else 1
        for name, largest in ((node.input[14], reached.key), (node.input[15], reached.value * room)):
            scale = constants[name]
            assert (scale.shape, scale.dtype) == (shape, np.float32)
            if dtype == "int8":
                np.testing.assert_allclose(scale[:, 0] * 127, largest, rtol=1e-6)
            else:
                np.testing.assert_allclose(scale * 224, largest.max(), rtol=1e-6)


def test_a_cache_of_16_bits_has_no_scales(tmp_path: Path) -> None:
    graph = onnx.load(build_paged(tmp_path, CHECKPOINT).files[0], load_external_data=False).graph
    for node in graph.node:
        if node.op_type == "PagedAttention":
            assert list(node.input[14:16]) == ["", ""]
            assert not [found for found in node.attribute if found.name.endswith("_quant_type")]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int4"])
@pytest.mark.parametrize(("dtype", "largest"), [("int8", 0.06), ("fp8", 0.16)])
def test_logits_are_near_those_of_a_cache_of_16_bits(
    tmp_path: Path, dtype: KvCacheDtype, largest: float, precision: str
) -> None:
    """As a share of the logits' deviation, over a chunk, a second one on top of it, and a decode."""
    whole = Paged(build_paged(tmp_path / "whole", CHECKPOINT, precision=precision))
    quantised = Paged(build_quantised(tmp_path / "quantised", dtype, precision))
    steps = [(TEXT[:20], 0, [7, 2, 5]), (TEXT[20:39], 20, [7, 2, 5]), (TEXT[39:], 39, [7, 2, 5])]
    expected, measured = (np.concatenate([each.run(step) for step in steps]) for each in (whole, quantised))
    assert 1e-3 < error(measured, expected) < largest
    for cache in quantised.caches.values():
        codes = np.abs(cache.astype(np.float32)).max()
        assert codes <= (128 if dtype == "int8" else 448)
        assert codes > (64 if dtype == "int8" else 100), "the codes use little of what the type can say"


def test_a_channel_that_was_always_zero_gives_zeros_and_no_nan(tmp_path: Path) -> None:
    tensors = arrays()
    tensors["model.layers.0.self_attn.v_proj.weight"][3] = 0
    checkpoint = ArrayCheckpoint(CONFIG, tensors)
    reached = measure_ranges(checkpoint, read_spec(CONFIG), CALIBRATION)
    assert reached[0].value[0, 3] == 0
    options = BuildOptions(precision="fp16", target="cuda", kv_block_size=BLOCK, kv_cache_dtype="int8")
    paged = Paged(build_decoder(checkpoint, tmp_path, options, kv_ranges=reached))
    assert np.isfinite(paged.run((TEXT, 0, [7, 2, 5]))).all()
    assert not paged.caches["past_key_values.0.value"][..., 0, 3].any()


def test_a_quantised_cache_is_refused_for_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="kv_cache_dtype: is int8; for the target cpu the cache is float32"):
        build(tmp_path, CHECKPOINT, precision="int8", kv_cache_dtype="int8")
    with pytest.raises(ExportError, match="precision: is fp32"):
        build_paged(tmp_path, CHECKPOINT, precision="fp32", kv_cache_dtype="int8")
    assert not list(tmp_path.iterdir())
