import logging

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from sardonyx.errors import ConfigError, EngineError
from sardonyx.runtime import session as session_module
from sardonyx.runtime.session import configure_threads, open_session


def write_graph(path, nodes, inputs, outputs):
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.fixture
def double(tmp_path):
    """y = x + x, x of shape (N, 3)."""
    return write_graph(
        tmp_path / "model.onnx",
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
    )


@pytest.fixture
def threads():
    before = session_module._threads
    yield configure_threads
    configure_threads(before.num_threads, allow_spinning=before.allow_spinning)


def test_session_tells_its_inputs_and_outputs(double):
    session = open_session(double, model_name="double")
    assert list(session.inputs) == ["x"]
    assert session.inputs["x"].datatype.name == "FP32"
    assert session.inputs["x"].shape == ("N", 3)
    assert session.outputs["y"].shape == ("N", 3)


def test_session_runs_on_arrays(double):
    session = open_session(double, model_name="double")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(session.run({"x": x})["y"], 2 * x)
    assert list(session.run({"x": x}, outputs=["y"])) == ["y"]


def test_binding_reads_and_writes_the_arrays_in_place_at_each_run(double):
    session = open_session(double, model_name="double")
    x, y = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    binding = session.new_binding()
    binding.bind_input("x", x)
    binding.bind_output("y", y)
    binding.run()
    assert (y == 2).all()
    x[:] = 5
    binding.run()
    assert (y == 10).all()


def test_failing_run_is_an_engine_error_and_the_runtimes_text_goes_to_the_log(double, caplog):
    session = open_session(double, model_name="double")
    with caplog.at_level(logging.ERROR, "sardonyx.onnxruntime"), pytest.raises(EngineError) as caught:
        session.run({"x": np.ones((2, 4), np.float32)})
    assert caught.value.message == "model double failed on the execution provider cpu"
    assert "Got invalid dimensions" in caplog.text
    np.testing.assert_array_equal(session.run({"x": np.ones((1, 3), np.float32)})["y"], np.full((1, 3), 2))


def test_kernel_errors_reach_the_standard_logger(tmp_path, caplog, capfd):
    path = write_graph(
        tmp_path / "model.onnx",
        [helper.make_node("Gather", ["x", "i"], ["y"], name="pick")],
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [3]),
            helper.make_tensor_value_info("i", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    session = open_session(path, model_name="pick")
    with caplog.at_level(logging.ERROR, "sardonyx.onnxruntime"), pytest.raises(EngineError):
        session.run({"x": np.ones(3, np.float32), "i": np.array([7])})
    assert any("ExecuteKernel" in record.message for record in caplog.records)
    assert capfd.readouterr() == ("", "")


def test_closed_session_runs_nothing(double):
    session = open_session(double, model_name="double")
    binding = session.new_binding()
    session.close()
    with pytest.raises(EngineError, match="model double is unloaded"):
        session.run({"x": np.ones((1, 3), np.float32)})
    with pytest.raises(EngineError, match="model double is unloaded"):
        binding.run()


def test_closed_session_gives_its_memory_back(tmp_path):
    # Many small weights: the C library keeps those in its heap, where large ones go back by themselves.
    weights = [onnx.numpy_helper.from_array(np.full((100, 100), i, np.float32), f"w{i}") for i in range(500)]
    nodes = [helper.make_node("MatMul", [f"y{i}", f"w{i}"], [f"y{i + 1}"]) for i in range(500)]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 100]) for name in ("y0", "y500")]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], weights)
    path = tmp_path / "model.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    sizes = []
    for _ in range(4):
        session = open_session(path, model_name="many")
        opened = psutil.Process().memory_info().rss
        session.close()
        sizes.append(psutil.Process().memory_info().rss)
    assert sizes[-1] < opened - (10 << 20)
    assert sizes[-1] < sizes[0] + (4 << 20)


def test_file_that_is_no_graph_is_a_config_error_without_its_path(tmp_path, caplog):
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(helper.make_graph([], "g", [], [])).SerializeToString()[:4])
    with pytest.raises(ConfigError) as caught:
        open_session(path, model_name="broken")
    assert "model.onnx" in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_graph_with_an_unknown_operator_is_a_config_error_and_the_log_says_why(tmp_path, caplog):
    path = write_graph(
        tmp_path / "model.onnx",
        [helper.make_node("NoSuchOperator", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    with pytest.raises(ConfigError, match=r"model\.onnx: ONNX Runtime [\d.]+ cannot open it .* the log says why"):
        open_session(path, model_name="odd")
    assert "NoSuchOperator" in caplog.text


def test_graph_with_a_sequence_input_is_refused_by_the_inputs_name(tmp_path):
    path = write_graph(
        tmp_path / "model.onnx",
        [helper.make_node("SequenceLength", ["s"], ["y"])],
        [helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [])],
    )
    with pytest.raises(ConfigError, match=r"model\.onnx: s: type seq\(tensor\(float\)\) cannot be served"):
        open_session(path, model_name="sequences")


def test_provider_that_is_missing_is_refused_before_the_file_is_read(tmp_path):
    with pytest.raises(ConfigError, match="'cuda' is not part of the installed"):
        open_session(tmp_path / "nothing.onnx", model_name="any", provider="cuda")


def test_each_session_has_as_many_threads_as_were_configured(double, threads):
    threads(3, allow_spinning=False)
    before = psutil.Process().num_threads()
    session = open_session(double, model_name="double")
    assert psutil.Process().num_threads() == before + 2  # the third is the one that calls
    session.close()
    assert psutil.Process().num_threads() == before


def test_spinning_is_bounded_unless_asked_for(double, threads):
    threads(2, allow_spinning=False)
    options = open_session(double, model_name="double")._open().get_session_options()
    assert options.get_session_config_entry("session.intra_op.spin_duration_us") == "20"
    threads(2, allow_spinning=True)
    options = open_session(double, model_name="double")._open().get_session_options()
    with pytest.raises(RuntimeError, match="spin_duration_us"):
        options.get_session_config_entry("session.intra_op.spin_duration_us")
