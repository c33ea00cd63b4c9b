import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests import tiny_tensors

from sardonyx.runtime import quick_graphs
from sardonyx.runtime.quick_graphs import has_bounded_work


def write(path, model):
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("model", [tiny_tensors.add_sub(), tiny_tensors.identity("INT8"), tiny_tensors.add_sub("FP16")])
def test_elementwise_graphs_have_bounded_work(tmp_path, model):
    assert has_bounded_work(write(tmp_path / "model.onnx", model))


def test_a_loop_has_not(tmp_path):
    assert not has_bounded_work(write(tmp_path / "model.onnx", tiny_tensors.slow()))


@pytest.mark.parametrize("operator", ["Range", "Expand", "Tile", "ConstantOfShape", "RandomNormal", "com.example:Add"])
def test_an_operator_whose_work_follows_from_values_or_that_we_do_not_know_has_not(tmp_path, operator):
    domain, _, name = operator.rpartition(":")
    node = helper.make_node(name, ["x"], ["y"], domain=domain)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", ports[:1], ports[1:]))
    assert not has_bounded_work(write(tmp_path / "model.onnx", model))


def test_an_unbounded_operator_inside_a_branch_is_found(tmp_path):
    inner = helper.make_graph(
        [helper.make_node("Range", ["a", "a", "a"], ["z"])],
        "inner",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])],
    )
    node = helper.make_node("Add", ["x", "x"], ["y"], body=inner)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", ports[:1], ports[1:]))
    assert not has_bounded_work(write(tmp_path / "model.onnx", model))


def test_onnx_own_domain_may_be_spelt_out(tmp_path):
    model = tiny_tensors.add_sub()
    for node in model.graph.node:
        node.domain = "ai.onnx"
    assert has_bounded_work(write(tmp_path / "model.onnx", model))


def test_a_large_file_and_weights_elsewhere_are_not_looked_into(tmp_path, monkeypatch):
    path = write(tmp_path / "model.onnx", tiny_tensors.add_sub())
    monkeypatch.setattr(quick_graphs, "MAX_FILE_BYTES", path.stat().st_size - 1)
    assert not has_bounded_work(path)
    monkeypatch.undo()
    model = tiny_tensors.add_sub()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(2048, np.float32), "w"))
    onnx.save_model(model, path, save_as_external_data=True, location="w.data")
    assert not has_bounded_work(path)


def test_what_is_no_model_has_not(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 100)
    assert not has_bounded_work(tmp_path / "model.onnx")
