"""ONNX Runtime's side of a device with its CPU provider, whose memory is what a made driver allocates."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from tests.runtime.made_driver import make_driver, needs_compiler

from sardonyx.errors import ConfigError, EngineError
from sardonyx.runtime import device_cuda
from sardonyx.runtime.device import EAGER, DeviceTensor
from sardonyx.runtime.device_cuda import SESSION_ENTRIES, SessionDevice, open_cuda_device, provider_options, run_options
from sardonyx.runtime.device_driver import CudaStream
from sardonyx.runtime.dtypes import DATATYPES, FP8
from sardonyx.runtime.providers import ExecutionProvider, execution_provider
from sardonyx_export.builders.feed import build_feed

INT64 = DATATYPES["INT64"]


@pytest.fixture
def driver(tmp_path, monkeypatch):
    return make_driver(tmp_path, monkeypatch)


def open_device():
    return SessionDevice(execution_provider("cpu"), {}, "cpu", 0, CudaStream(1))


def on_device(device, values):
    values = np.array(values, np.int64)
    host = device.allocate_host(values.nbytes)
    host[:] = values.view(np.uint8)
    address = device.allocate(values.nbytes)
    device.write(address, host)
    return DeviceTensor(address, values.shape, INT64)


@needs_compiler
def test_a_run_reads_what_was_written_before_it_and_its_output_comes_back(driver, tmp_path):
    device = open_device()
    graph = device.open(build_feed(tmp_path)[0], model_name="tiny")
    assert graph.inputs["tokens"].datatype == INT64
    binding = graph.new_binding()
    output = on_device(device, [0, 0, 0])
    binding.bind_input("tokens", on_device(device, [5, 6, 7]))
    binding.bind_input("token_ids", on_device(device, [100, 101]))
    source = np.array([-1, 1, -1], np.int64)
    binding.bind_input("source", source)
    binding.bind_output("input_ids", output)
    result = device.allocate_host(24)
    for number, expected in enumerate(([5, 101, 7], [100, 6, 7])):
        source[:] = [-1, 1, -1] if number == 0 else [0, -1, -1]
        binding.run()
        device.read(output.address, result)
        device.mark().wait()
        assert result.view(np.int64).tolist() == expected
    assert driver.waits() == 2
    del binding
    graph.close()
    device.close()
    device.close()
    assert driver.num_held() == 0


@needs_compiler
def test_a_binding_may_be_bound_anew_in_another_shape(driver, tmp_path):
    device = open_device()
    binding = device.open(build_feed(tmp_path)[0], model_name="tiny").new_binding()
    binding.bind_input("token_ids", on_device(device, [9]))
    result = device.allocate_host(16)
    for values in ([1, 2], [3]):
        output = on_device(device, values)
        binding.bind_input("tokens", on_device(device, values))
        binding.bind_input("source", np.full(len(values), -1, np.int64))
        binding.bind_output("input_ids", output)
        binding.run()
        device.read(output.address, result[: output.num_bytes])
        device.mark().wait()
        assert result[: output.num_bytes].view(np.int64).tolist() == values
    device.close()


@needs_compiler
def test_fp8_is_bound_by_its_address(driver, tmp_path):
    kind, floats = onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT
    port = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Cast", ["codes"], ["values"], to=floats)
    graph = onnx.helper.make_graph([node], "cast", [port("codes", kind, ["n"])], [port("values", floats, ["n"])])
    opsets = [onnx.helper.make_opsetid("", 21)]
    onnx.save_model(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "cast.onnx")
    device = open_device()
    session = device.open(tmp_path / "cast.onnx", model_name="tiny")
    assert session.inputs["codes"].datatype == FP8
    values = np.array([1.5, -448, 0.25, 3], np.float32)
    codes, result = device.allocate_host(4), device.allocate_host(16)
    codes[:] = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    source = DeviceTensor(device.allocate(4), (4,), FP8)
    target = DeviceTensor(device.allocate(16), (4,), DATATYPES["FP32"])
    device.write(source.address, codes)
    binding = session.new_binding()
    binding.bind_input("codes", source)
    binding.bind_output("values", target)
    binding.run()
    device.read(target.address, result)
    device.mark().wait()
    np.testing.assert_array_equal(result.view(np.float32), values)
    device.close()


@needs_compiler
def test_a_run_that_is_not_taken_is_an_engine_error(driver, tmp_path):
    device = open_device()
    binding = device.open(build_feed(tmp_path)[0], model_name="tiny").new_binding()
    with pytest.raises(EngineError, match="model tiny failed on the execution provider cpu"):
        binding.run()
    with pytest.raises(EngineError, match="0 is no id for a captured graph"):
        binding.capture(0)
    device.close()


@needs_compiler
def test_runs_are_given_their_options(driver, tmp_path, monkeypatch):
    device = open_device()
    binding = device.open(build_feed(tmp_path)[0], model_name="tiny").new_binding()
    seen = []
    monkeypatch.setattr(
        ort.InferenceSession,
        "run_with_iobinding",
        lambda session, io_binding, options: seen.append(
            {key: options.get_run_config_entry(key) for key in RUN_ENTRIES}
        ),
    )
    binding.run()
    binding.run(3)
    binding.capture(4)
    binding.run(3)
    graph_ids, unsynchronised = (
        [options["gpu_graph_id"] for options in seen],
        [options["disable_synchronize_execution_providers"] for options in seen],
    )
    assert graph_ids == ["-1", "3", "4", "3"]
    assert unsynchronised == ["1", "1", "0", "1"]
    device.close()


RUN_ENTRIES = ("gpu_graph_id", "disable_synchronize_execution_providers")


@pytest.mark.parametrize(
    ("graph_id", "is_synchronous", "expected"),
    [(EAGER, False, ("-1", "1")), (7, False, ("7", "1")), (7, True, ("7", "0"))],
)
def test_options_of_a_run(graph_id, is_synchronous, expected):
    options = run_options(graph_id, is_synchronous=is_synchronous)
    assert tuple(options.get_run_config_entry(key) for key in RUN_ENTRIES) == expected


@needs_compiler
def test_a_card_is_opened_with_its_stream_and_without_the_cpu(driver, monkeypatch):
    known = {
        "cuda": ExecutionProvider("cuda", "CUDAExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"}),
    }
    monkeypatch.setattr(
        device_cuda,
        "execution_provider",
        lambda name, options=None: ExecutionProvider(
            name, known[name].ort_name, known[name].options | dict(options or {})
        ),
    )
    device = open_cuda_device(1)
    assert device.name == "cuda:1"
    (provider,) = device._config.providers
    assert (provider.ort_name, provider.options) == (
        "CUDAExecutionProvider",
        {
            "arena_extend_strategy": "kSameAsRequested",
            "device_id": "1",
            "user_compute_stream": str(0x5151),
            "enable_cuda_graph": "1",
        },
    )
    assert device._config.session_entries == SESSION_ENTRIES
    assert SESSION_ENTRIES == {"session.disable_cpu_ep_fallback": "1", "ep.cuda.fpa_intb_gemm": "1"}
    device.close()
    assert driver.num_held() == 0


def test_a_stream_is_handed_over_as_a_number():
    assert provider_options(2, 1 << 40)["user_compute_stream"] == str(1 << 40)


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this ONNX Runtime has CUDA")
def test_an_onnx_runtime_without_cuda_is_told_what_to_install():
    with pytest.raises(ConfigError, match=r"install sardonyx\[cuda\]"):
        open_cuda_device(0)
