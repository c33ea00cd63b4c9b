import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sardonyx.errors import ConfigError
from sardonyx.runtime.graph_inputs import DeclaredTensor, read_graph


def write(path, nodes, inputs, outputs, initializers=(), domain=""):
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def value(name, kind, dims):
    return helper.make_tensor_value_info(name, kind, dims)


def test_inputs_are_told_with_types_and_open_axes(tmp_path):
    path = write(
        tmp_path / "model.onnx",
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [value("x", TensorProto.FLOAT16, ["N", 3, None]), value("w", TensorProto.FLOAT16, [1]), value("s", 7, [])],
        [value("y", TensorProto.FLOAT16, ["N", 3, None])],
        [numpy_helper.from_array(np.ones(1, np.float16), "w")],
    )
    graph = read_graph(path)
    assert graph.inputs == [
        DeclaredTensor("x", 10, (-1, 3, -1)),
        DeclaredTensor("w", 10, (1,), is_initializer=True),
        DeclaredTensor("s", 7, ()),
    ]
    assert graph.outputs == [DeclaredTensor("y", 10, (-1, 3, -1))]
    assert not graph.is_compiled


def test_model_that_holds_an_engine_is_told_apart(tmp_path):
    node = helper.make_node(
        "EPContext", ["x"], ["y"], domain="com.microsoft", embed_mode=0, ep_cache_context="e.engine"
    )
    path = write(tmp_path / "m_ctx.onnx", [node], [value("x", 1, ["N"])], [value("y", 1, ["N"])])
    assert read_graph(path).is_compiled


def test_what_is_no_tensor_is_refused(tmp_path):
    sequence = helper.make_tensor_sequence_value_info("x", 1, None)
    path = write(
        tmp_path / "model.onnx", [helper.make_node("SequenceLength", ["x"], ["y"])], [sequence], [value("y", 7, [])]
    )
    with pytest.raises(ConfigError, match=r"model.onnx: 'x' is no tensor"):
        read_graph(path)


@pytest.mark.parametrize("data", [b"", b"\x08", b"no model at all"])
def test_what_is_no_model_is_refused_by_file(tmp_path, data):
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"^model\.onnx: "):
        read_graph(path)
