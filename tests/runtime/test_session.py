import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests import tiny_tensors

from sardonyx.errors import ConfigError, EngineError
from sardonyx.runtime import session as session_module
from sardonyx.runtime.providers import execution_provider
from sardonyx.runtime.session import KeptInputs, SessionConfig, configure_threads, open_session


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


def test_kept_input_serves_runs_of_any_shape_until_it_is_replaced(tmp_path):
    write_graph(
        tmp_path / "model.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["product"]), helper.make_node("Add", ["product", "b"], ["y"])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("x", ["N", 2]), ("w", [2, 2]), ("b", [2]))
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
    )
    session = open_session(tmp_path / "model.onnx", model_name="kept")
    runs = KeptInputs(session)
    w, b = np.array([[1, 2], [3, 4]], np.float32), np.array([10, 20], np.float32)
    runs.keep("w", w)
    runs.keep("b", b)
    first = np.ones((3, 2), np.float32)
    outputs = [runs.run({"x": x}, "y") for x in (first, first[:1] * 2, np.full((5, 2), 3, np.float32).T.copy().T)]
    runs.keep("b", b * 0)
    outputs.append(runs.run({"x": first}, "y"))
    for output, expected in zip(
        outputs, (first @ w + b, first[:1] * 2 @ w + b, np.full((5, 2), 3) @ w + b, first @ w), strict=True
    ):
        np.testing.assert_array_equal(output, expected)
    with pytest.raises(EngineError, match="model kept failed"):
        runs.run({"x": np.ones((2, 3), np.float32)}, "y")
    with pytest.raises(EngineError, match="model kept failed"):
        runs.keep("z", b)
    np.testing.assert_array_equal(runs.run({"x": first}, "y"), first @ w)
    runs.close()
    with pytest.raises(EngineError, match="unloaded"):
        runs.run({"x": first}, "y")
    session.close()


def test_run_without_an_input_that_nothing_keeps_fails(double):
    session = open_session(double, model_name="double")
    with pytest.raises(EngineError):
        KeptInputs(session).run({}, next(iter(session.outputs)))
    session.close()


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
    # In a process of its own: other tests' threads and heaps would be counted here.
    script = """
import sys
from pathlib import Path

import psutil
from sardonyx.runtime.session import open_session

for _ in range(4):
    session = open_session(Path(sys.argv[1]), model_name="many")
    opened = psutil.Process().memory_info().rss
    session.close()
    print(opened, psutil.Process().memory_info().rss)
"""
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    rounds = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    opened, closed = rounds[-1]
    assert closed < opened - (10 << 20)
    # Three more rounds would show three times what one holds.
    assert closed < rounds[0][1] + (opened - closed)


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


def write(tmp_path, model):
    path = tmp_path / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else tiny_tensors.serialize(model))
    return path


def options_of(session):
    return session._open().get_session_options()


def test_operators_choices_reach_the_runtime(double):
    config = SessionConfig(
        num_threads=3,
        num_parallel_threads=2,
        is_parallel=True,
        enable_arena=False,
        enable_mem_pattern=True,
        graph_level=2,
        session_entries={"session.use_device_allocator_for_initializers": "1"},
    )
    options = options_of(open_session(double, model_name="double", config=config))
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 2)
    assert options.execution_mode == ort.ExecutionMode.ORT_PARALLEL
    assert (options.enable_cpu_mem_arena, options.enable_mem_pattern) == (False, True)
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert options.get_session_config_entry("session.use_device_allocator_for_initializers") == "1"


def test_without_choices_the_process_decides_on_threads_and_patterns_are_off(double, threads):
    threads(2, allow_spinning=False)
    options = options_of(open_session(double, model_name="double", config=SessionConfig()))
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.execution_mode == ort.ExecutionMode.ORT_SEQUENTIAL
    assert (options.enable_cpu_mem_arena, options.enable_mem_pattern) == (True, False)
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL


@pytest.mark.parametrize(("level", "folds"), [(0, True), (1, True), (-1, True), (2, False)])
def test_optimisation_level_decides_whether_constants_are_computed_ahead(tmp_path, level, folds):
    nodes = [helper.make_node("Add", ["one", "one"], ["two"]), helper.make_node("Mul", ["INPUT0", "two"], ["OUTPUT0"])]
    port = ("FP32", (1,))
    constants = [numpy_helper.from_array(np.ones(1, np.float32), "one")]
    path = write(tmp_path, tiny_tensors.graph(nodes, [("INPUT0", *port)], [("OUTPUT0", *port)], constants=constants))
    profile = tmp_path / "profile"
    options = session_module._session_options(execution_provider("cpu"), SessionConfig(graph_level=level))
    options.enable_profiling, options.profile_file_prefix = True, str(profile)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {"INPUT0": np.ones((1, 1), np.float32)})
    ran = {event["args"].get("op_name") for event in json.loads(Path(session.end_profiling()).read_text())}
    assert ("Add" not in ran) is folds


def test_given_providers_replace_the_default_one(double):
    session = open_session(double, model_name="double", config=SessionConfig(providers=(execution_provider("cpu"),)))
    assert session.provider == "cpu"
    assert session._open().get_providers() == ["CPUExecutionProvider"]


def test_run_entries_reach_each_run_and_a_wrong_one_fails_it(double, caplog):
    x = {"x": np.ones((1, 3), np.float32)}
    entry = "memory.enable_memory_arena_shrinkage"
    fine = open_session(double, model_name="double", config=SessionConfig(run_entries={entry: "cpu:0"}))
    assert fine.run(x)["y"].tolist() == [[2.0, 2.0, 2.0]]
    wrong = open_session(double, model_name="double", config=SessionConfig(run_entries={entry: "gpu:0"}))
    with pytest.raises(EngineError):
        wrong.run(x)


@pytest.mark.parametrize("operand", ["same", "other"])
def test_bfloat16_goes_in_and_out_as_its_bits(tmp_path, operand):
    session = open_session(write(tmp_path, tiny_tensors.add_sub("BF16", shape=(3,))), model_name="m")
    a = bf16([[1.0, -2.0, 0.5]])
    b = a if operand == "same" else bf16([[3.0, 2.0, 0.25]])
    outputs = session.run({"INPUT0": a, "INPUT1": b}, ["OUTPUT1", "OUTPUT0"])
    assert list(outputs) == ["OUTPUT1", "OUTPUT0"]
    np.testing.assert_array_equal(outputs["OUTPUT0"], bf16(float32(a) + float32(b)))
    np.testing.assert_array_equal(outputs["OUTPUT1"], bf16(float32(a) - float32(b)))


def bf16(values):
    """Of numbers that it can hold."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def float32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_bfloat16_outputs_outlive_the_run_that_made_them(tmp_path):
    session = open_session(write(tmp_path, tiny_tensors.identity("BF16")), model_name="m")
    array = np.arange(1 << 16, dtype=np.uint16)[np.newaxis]
    outputs = [session.run({"INPUT0": array + np.uint16(n)})["OUTPUT0"] for n in range(8)]
    for n, output in enumerate(outputs):
        np.testing.assert_array_equal(output, array + np.uint16(n))


def test_other_datatypes_cross_beside_bfloat16(tmp_path):
    nodes = [tiny_tensors.cast("INPUT0", "number", "FP32"), tiny_tensors.cast("number", "OUTPUT0", "BYTES")]
    nodes += [helper.make_node("Identity", [f"INPUT{n}"], [f"OUTPUT{n}"]) for n in (1, 2)]
    inputs = [("INPUT0", "BF16", (-1,)), ("INPUT1", "FP16", (-1,)), ("INPUT2", "BOOL", (-1,))]
    model = tiny_tensors.graph(
        nodes, inputs, [("OUTPUT0", "BYTES", (-1,)), *((f"OUTPUT{n}", *inputs[n][1:]) for n in (1, 2))]
    )
    session = open_session(write(tmp_path, model), model_name="m")
    half, empty = np.array([[1.5]], np.float16), np.zeros((1, 0), np.bool_)
    outputs = session.run({"INPUT0": bf16([[2.0, 0.5]]), "INPUT1": half, "INPUT2": empty})
    assert outputs["OUTPUT0"].tolist() == [["2", "0.5"]]
    np.testing.assert_array_equal(outputs["OUTPUT1"], half)
    assert (outputs["OUTPUT2"].shape, outputs["OUTPUT2"].dtype) == ((1, 0), np.bool_)


def test_strings_that_would_have_to_go_in_beside_bfloat16_are_refused(tmp_path):
    nodes = [helper.make_node("Identity", [f"INPUT{n}"], [f"OUTPUT{n}"]) for n in range(2)]
    inputs, outputs = (
        [(f"{side}{n}", d, (-1,)) for n, d in enumerate(("BF16", "BYTES"))] for side in ("INPUT", "OUTPUT")
    )
    path = write(tmp_path, tiny_tensors.graph(nodes, inputs, outputs))
    with pytest.raises(ConfigError, match=r"model\.onnx: takes strings and has BF16"):
        open_session(path, model_name="m")


def test_empty_bfloat16_comes_back_in_its_shape(tmp_path):
    session = open_session(write(tmp_path, tiny_tensors.identity("BF16")), model_name="m")
    assert session.run({"INPUT0": np.zeros((3, 0), np.uint16)})["OUTPUT0"].shape == (3, 0)


def test_unknown_input_of_a_bfloat16_graph_is_an_engine_error(tmp_path, caplog):
    session = open_session(write(tmp_path, tiny_tensors.identity("BF16")), model_name="m")
    with pytest.raises(EngineError):
        session.run({"NOTHING": np.zeros((1, 1), np.uint16)})


def overridable(datatype="FP32"):
    """OUTPUT0 = INPUT0 + BIAS, where BIAS is 5 unless a run brings another."""
    bias = helper.make_tensor("BIAS", tiny_tensors.element_type(datatype), [1], [5.0])
    ports = [("INPUT0", datatype, (1,)), ("BIAS", datatype, (1,))]
    nodes = [helper.make_node("Add", ["INPUT0", "BIAS"], ["OUTPUT0"])]
    if datatype == "BF16":
        nodes = [
            tiny_tensors.cast("INPUT0", "a", "FP32"),
            tiny_tensors.cast("BIAS", "b", "FP32"),
            helper.make_node("Add", ["a", "b"], ["c"]),
            tiny_tensors.cast("c", "OUTPUT0", "BF16"),
        ]
    return tiny_tensors.graph(nodes, ports, [("OUTPUT0", datatype, (1,))], constants=[bias], is_batched=False)


def test_initializer_that_is_also_an_input_may_be_overridden(tmp_path):
    session = open_session(write(tmp_path, overridable()), model_name="m")
    assert list(session.inputs) == ["INPUT0"]
    assert session.optional_inputs["BIAS"].shape == (1,)
    one = np.ones(1, np.float32)
    assert session.run({"INPUT0": one})["OUTPUT0"].tolist() == [6.0]
    assert session.run({"INPUT0": one, "BIAS": one})["OUTPUT0"].tolist() == [2.0]


def test_optional_input_of_bfloat16_goes_in_as_its_bits(tmp_path):
    session = open_session(write(tmp_path, overridable("BF16")), model_name="m")
    one = bf16([1.0])
    np.testing.assert_array_equal(session.run({"INPUT0": one})["OUTPUT0"], bf16([6.0]))
    np.testing.assert_array_equal(session.run({"INPUT0": one, "BIAS": one})["OUTPUT0"], bf16([2.0]))


@pytest.mark.parametrize("text", ["INPUT0", "batch"])
def test_names_that_are_not_utf8_are_a_config_error(tmp_path, text):
    data = tiny_tensors.serialize(tiny_tensors.identity())
    path = write(tmp_path, data.replace(text.encode(), b"\xff\xfe" + text.encode()[2:]))
    with pytest.raises(ConfigError, match=r"model\.onnx: names an input, an output or a dimension"):
        open_session(path, model_name="m")


def doubled(num_times, kind="Concat"):
    """OUTPUT0 = INPUT0 + the sum of a one that was doubled so many times: all of it can be computed ahead."""
    nodes = [
        helper.make_node(kind, [f"c{n}", f"c{n}"], [f"c{n + 1}"], **({"axis": 0} if kind == "Concat" else {}))
        for n in range(num_times)
    ]
    nodes += [
        helper.make_node("ReduceSum", [f"c{num_times}"], ["sum"], keepdims=0),
        helper.make_node("Add", ["INPUT0", "sum"], ["OUTPUT0"]),
    ]
    port = ("FP32", (1,))
    constants = [numpy_helper.from_array(np.ones(1, np.float32), "c0")]
    return tiny_tensors.graph(nodes, [("INPUT0", *port)], [("OUTPUT0", *port)], constants=constants)


def test_small_file_cannot_have_much_computed_ahead(tmp_path):
    path = write(tmp_path, doubled(30))
    before = psutil.Process().memory_info().rss
    session = open_session(path, model_name="m")
    assert psutil.Process().memory_info().rss - before < 200 << 20
    session.close()


def test_small_constants_are_still_computed_ahead_and_right(tmp_path):
    session = open_session(write(tmp_path, doubled(12)), model_name="m")
    assert session.run({"INPUT0": np.ones((1, 1), np.float32)})["OUTPUT0"].tolist() == [[4097.0]]


def test_libraries_of_cuda_are_loaded_before_the_first_session_and_failures_logged(monkeypatch, caplog, capsys):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcudart.so.13"))
    with caplog.at_level(logging.INFO, "sardonyx.onnxruntime"):
        session_module._prepare_process.__wrapped__()
    assert "Failed to load libcudart.so.13" in caplog.text
    assert capsys.readouterr().out == ""


def test_runtime_that_hands_its_log_to_nobody_is_told_how_much_to_print(monkeypatch):
    """1.31, the newest for CUDA on the package index."""
    levels = []
    monkeypatch.delattr(ort, "set_default_logger_callback", raising=False)
    monkeypatch.setattr(ort, "set_default_logger_severity", levels.append)
    session_module._prepare_process.__wrapped__()
    assert levels == [2]
