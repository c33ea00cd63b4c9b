from pathlib import Path

import msgspec
import pytest
from tests.repository.configs import TENSORS, read, refusal

from sardonyx.repository.accelerators import PATH_OPTIONS, ProviderChoice, cuda_options, tensorrt_options

GOLDEN = msgspec.json.decode((Path(__file__).parent / "provider_options.json").read_bytes())

CUDA = ProviderChoice("cuda", {"cudnn_conv_algo_search": "HEURISTIC"})
CPU = ProviderChoice("cpu")


def accelerators(gpu: str = "", cpu: str = "") -> str:
    sides = [
        f"gpu_execution_accelerator {{ {gpu} }}" if gpu else "",
        f"cpu_execution_accelerator {{ {cpu} }}" if cpu else "",
    ]
    return TENSORS + f"optimization {{ execution_accelerators {{ {' '.join(sides)} }} }} "


@pytest.mark.parametrize("case", GOLDEN["tensorrt"], ids=lambda case: next(iter(case["parameters"])))
def test_tensorrt_parameters_become_onnx_runtimes_options(case):
    assert tensorrt_options(case["parameters"]) == case["options"]


@pytest.mark.parametrize("case", GOLDEN["cuda"], ids=lambda case: next(iter(case["parameters"])))
def test_cuda_parameters_become_onnx_runtimes_options(case):
    assert cuda_options(case["parameters"]) == case["options"]


@pytest.mark.parametrize(
    ("text", "num_gpus", "expected"),
    [
        (TENSORS, 0, [CPU]),
        (TENSORS, 1, [CUDA, CPU]),
        (accelerators(gpu='name: "tensorrt"'), 1, [ProviderChoice("tensorrt"), CUDA, CPU]),
        (accelerators(gpu='name: "tensorrt"'), 0, [CPU]),
        (
            accelerators(gpu='name: "tensorrt"', cpu='name: "openvino"'),
            1,
            [ProviderChoice("tensorrt"), CUDA, ProviderChoice("openvino", {"device_type": "CPU"}), CPU],
        ),
        (accelerators(cpu='name: "openvino"'), 0, [ProviderChoice("openvino", {"device_type": "CPU"}), CPU]),
        (
            TENSORS
            + "optimization { execution_accelerators { gpu_execution_accelerator "
            + '[ { name: "cuda" }, { name: "tensorrt" } ] } }',
            1,
            [ProviderChoice("tensorrt"), CUDA, CPU],
        ),
    ],
)
def test_providers_are_asked_in_tritons_order(text, num_gpus, expected):
    assert read(text, num_gpus=num_gpus).providers == expected


def test_options_of_an_accelerator_win_over_parameters_and_those_over_our_default():
    text = accelerators(gpu='name: "cuda" parameters { key: "gpu_mem_limit" value: "1" }')
    text += 'parameters { key: "gpu_mem_limit" value { string_value: "2" } } '
    text += 'parameters { key: "cudnn_conv_algo_search" value { string_value: "0" } } '
    assert read(text, num_gpus=1).providers[0] == ProviderChoice(
        "cuda", {"cudnn_conv_algo_search": "EXHAUSTIVE", "gpu_mem_limit": "1"}
    )


def test_parameters_that_say_nothing_of_cuda_leave_an_accelerators_options_alone():
    text = accelerators(gpu='name: "cuda" parameters { key: "arena_extend_strategy" value: "kSameAsRequested" }')
    text += 'parameters { key: "execution_mode" value { string_value: "1" } } '
    assert read(text, num_gpus=1).providers[0].options == {
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
    }


def test_options_of_gpu_providers_are_noted_where_no_instance_is_on_a_gpu():
    notes = read(accelerators(gpu='name: "tensorrt"')).notes
    assert notes == ["options of GPU providers change nothing: no instance is on a GPU"]


def test_pinned_memory_is_noted_where_it_is_turned_off():
    notes = read(TENSORS + "optimization { input_pinned_memory { } output_pinned_memory { enable: true } }").notes
    assert notes == ["optimization.input_pinned_memory changes nothing: ONNX Runtime decides where it copies"]


@pytest.mark.parametrize("option", sorted(PATH_OPTIONS))
@pytest.mark.parametrize("path", ["/tmp/x", "../x", "a/../../x", "a\\b", "", "a\nb"])
def test_path_that_leads_out_of_the_model_is_refused(option, path):
    key = option.removeprefix("trt_") if "int8" in option else option
    with pytest.raises(ValueError, match=f"^{key}: "):
        tensorrt_options({key: path})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"precision_mode": "FP8"}, "unsupported precision mode 'FP8' is requested"),
        ({"foo": "1"}, "unknown parameter 'foo' is provided for TensorRT Execution Accelerator"),
        ({"device_id": "1"}, "unknown parameter 'device_id' is provided for TensorRT Execution Accelerator"),
        ({"trt_extra_plugin_lib_paths": "x.so"}, "trt_extra_plugin_lib_paths loads code into the server"),
        ({"trt_dla_enable": "on"}, "trt_dla_enable: failed to convert 'on' to boolean value"),
        ({"trt_dla_core": "one"}, "trt_dla_core: failed to convert 'one' to integral number"),
        ({"max_workspace_size_bytes": "1e9"}, "max_workspace_size_bytes: failed to convert '1e9' to integral number"),
        ({"trt_cuda_graph_enable": "1"}, "trt_cuda_graph_enable is not offered: it replays one shape at one address"),
        ({"trt_engine_cache_prefix": "a/b"}, "trt_engine_cache_prefix: must not hold '/'"),
    ],
)
def test_wrong_tensorrt_parameter_is_refused(parameters, message):
    with pytest.raises(ValueError) as caught:
        tensorrt_options(parameters)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"foo": "1"}, "unknown parameter 'foo' is provided for CUDA Execution Accelerator"),
        ({"device_id": "1"}, "device_id is not offered: instance_group says which card"),
        ({"user_compute_stream": "140737488355328"}, "user_compute_stream is not offered: it is an address"),
        ({"gpu_external_free": "1"}, "gpu_external_free is not offered: it is an address in the process"),
        ({"enable_cuda_graph": "1"}, "enable_cuda_graph is not offered: it replays one shape at one address"),
        ({"cudnn_conv_algo_search": "FAST"}, "cudnn_conv_algo_search: is 'FAST'; there are EXHAUSTIVE, HEURISTIC"),
    ],
)
def test_wrong_cuda_parameter_is_refused(parameters, message):
    with pytest.raises(ValueError) as caught:
        cuda_options(parameters)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            accelerators(gpu='name: "auto_mixed_precision"'),
            "gpu_execution_accelerator[0].name: unknown Execution Accelerator 'auto_mixed_precision' is requested",
        ),
        (
            accelerators(cpu='name: "cuda"'),
            "cpu_execution_accelerator[0].name: unknown Execution Accelerator 'cuda' is requested",
        ),
        (
            accelerators(gpu='name: "tensorrt" } gpu_execution_accelerator { name: "tensorrt"'),
            "gpu_execution_accelerator[1].name: 'tensorrt' is there twice",
        ),
        (
            accelerators(gpu='name: "tensorrt" parameters { key: "foo" value: "1" }'),
            "gpu_execution_accelerator[0].parameters: unknown parameter 'foo' is provided for TensorRT",
        ),
        (
            accelerators(cpu='name: "openvino" parameters { key: "foo" value: "1" }'),
            "cpu_execution_accelerator[0].parameters: unknown parameter 'foo' is provided for OpenVINO",
        ),
    ],
)
def test_wrong_accelerator_is_refused_by_field(text, message):
    assert refusal(text).startswith(f"c.pbtxt: optimization.execution_accelerators.{message}")
