"""Graphs of a tiny Whisper for CUDA, their operators in numpy, against the graphs for the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from tests.export.whisper_checkpoints import make_whisper

from sardonyx.runtime.session import open_session
from sardonyx_export.builders.whisper import WhisperBuildReport, build_whisper
from sardonyx_export.builders.whisper_aligner import Alignment
from sardonyx_export.errors import ExportError
from sardonyx_export.families.whisper import read_whisper_spec
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder
from sardonyx_export.stages.whisper_operators import WHISPER_OPERATORS

MICROSOFT = "com.microsoft"
ON_THE_CPU = {"Shape", "Size", "Range", "ConstantOfShape", "NonZero", "Loop", "If"}
"""What CUDA leaves to the CPU, or makes of host memory."""


def build(folder: Path, precision: Any, **changes: Any) -> WhisperBuildReport:
    make_whisper(folder / "source", **changes)
    checkpoint = SafetensorsFolder(folder / "source", uri="tiny")
    (folder / "built").mkdir()
    alignment = Alignment(heads=[[2, 1], [0, 0]], end_id=80)
    spec = read_whisper_spec(checkpoint.config)
    return build_whisper(checkpoint, spec, folder / "built", precision=precision, alignment=alignment)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_no_node_looks_at_a_shape_and_attention_is_cudas(tmp_path: Path, precision: Any) -> None:
    report = build(tmp_path, precision)
    assert report.block_size == 256
    operators = {
        role: [node.op_type for node in onnx.load(files[0], load_external_data=False).graph.node]
        for role, files in report.graphs.items()
    }
    for role, names in operators.items():
        assert not ON_THE_CPU & set(names), role
    assert operators["decoder"].count("PagedAttention") == operators["decoder"].count("MultiHeadAttention") == 3
    assert "Softmax" not in operators["encoder"] + operators["decoder"]


def test_the_aligner_has_the_decoders_weights(tmp_path: Path) -> None:
    report = build(tmp_path, "fp16")
    assert report.graphs["aligner"][1] == report.graphs["decoder"][1]
    assert report.weights == "encoder: F32 -> fp32 and fp16. decoder: F32 -> fp16"


def test_heads_that_the_kernels_do_not_take_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="heads: are 8 wide; CUDA takes multiples of 16"):
        build(tmp_path, "fp16", decoder_attention_heads=4)


def run_both(node: onnx.NodeProto, feeds: dict[str, npt.NDArray[np.float32]], folder: Path) -> list[Any]:
    """A node's output by ONNX Runtime's CPU, and in numpy."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in feeds.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(helper.make_graph([node], "one", inputs, [output]), opset_imports=opsets, ir_version=10)
    onnx.save_model(model, folder / "one.onnx")
    expected = open_session(folder / "one.onnx", model_name="one").run(feeds)["y"]
    return [expected, ReferenceEvaluator(model, new_ops=WHISPER_OPERATORS).run(None, feeds)[0]]


def random(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


@pytest.mark.parametrize("case", ["cache", "unidirectional"])
def test_attention_in_numpy_is_onnx_runtimes(tmp_path: Path, case: str) -> None:
    """The CPU has MultiHeadAttention as well, in float32."""
    if case == "cache":
        feeds, attributes = {"q": random(3, 5, 32), "k": random(3, 2, 7, 16), "v": random(3, 2, 7, 16)[::-1]}, {}
    else:
        feeds, attributes = (
            {"q": random(1, 6, 32), "k": random(1, 6, 32) / 2, "v": random(1, 6, 32) * 2},
            {"unidirectional": 1},
        )
    feeds = {name: np.ascontiguousarray(x) for name, x in feeds.items()}
    node = helper.make_node("MultiHeadAttention", list(feeds), ["y"], domain=MICROSOFT, num_heads=2, **attributes)
    np.testing.assert_allclose(*run_both(node, feeds, tmp_path), atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_in_numpy_are_onnx_runtimes(tmp_path: Path, stride: int) -> None:
    feeds = {"x": random(2, 4, 10), "w": random(6, 4, 3), "b": random(6)}
    node = helper.make_node("Conv", list(feeds), ["y"], kernel_shape=[3], pads=[1, 1], strides=[stride])
    np.testing.assert_allclose(*run_both(node, feeds, tmp_path), atol=1e-5)
