import pytest
from tests.repository.configs import config_of

from sardonyx.errors import ConfigError
from sardonyx.repository.accelerators import ProviderChoice
from sardonyx.repository.device_placement import DevicePlacement, read_device, without_device

ON_GPU = "instance_group [ { kind: KIND_GPU } ] "
TENSORRT = 'optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" } } } '
CUDA = ProviderChoice("cuda", {"cudnn_conv_algo_search": "HEURISTIC"})
CPU = ProviderChoice("cpu")


def read(text: str, *, needs_gpu: bool = False, num_gpus: int = 1) -> DevicePlacement:
    return read_device(config_of('name: "m" ' + text), needs_gpu=needs_gpu, num_gpus=num_gpus, file="c.pbtxt")


def refusal(text: str, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, **options)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "needs_gpu", "num_gpus", "expected"),
    [
        ("", False, 0, DevicePlacement()),
        ("", False, 1, DevicePlacement()),
        (TENSORRT, False, 1, DevicePlacement()),
        ("instance_group [ { kind: KIND_CPU } ]", False, 1, DevicePlacement()),
        ("instance_group [ { kind: KIND_AUTO } ]", False, 0, DevicePlacement()),
        ("instance_group [ { } ]", False, 1, DevicePlacement(gpu=0, providers=[CUDA, CPU])),
        (ON_GPU, False, 1, DevicePlacement(gpu=0, providers=[CUDA, CPU], is_strict=True)),
        ("", True, 1, DevicePlacement(gpu=0, providers=[CUDA, CPU], is_strict=True)),
        (
            "instance_group [ { kind: KIND_GPU gpus: [ 1 ] } ] " + TENSORRT,
            False,
            2,
            DevicePlacement(gpu=1, providers=[ProviderChoice("tensorrt"), CUDA, CPU], is_strict=True),
        ),
    ],
)
def test_device_is_what_config_and_export_ask_for(text, needs_gpu, num_gpus, expected):
    assert read(text, needs_gpu=needs_gpu, num_gpus=num_gpus) == expected


def test_options_of_cuda_are_the_operators_over_ours():
    options = [
        ("prefer_nhwc", "1"),
        ("use_tf32", "0"),
        ("gpu_mem_limit", "1073741824"),
        ("cudnn_conv_algo_search", "DEFAULT"),
    ]
    parameters = " ".join(f'parameters {{ key: "{key}" value: "{value}" }}' for key, value in options)
    text = f'optimization {{ execution_accelerators {{ gpu_execution_accelerator {{ name: "cuda" {parameters} }} }} }}'
    assert read(ON_GPU + text).providers[0] == ProviderChoice("cuda", dict(options))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            ON_GPU,
            {"num_gpus": 0},
            "c.pbtxt: instance_group[0].kind: the model asks for a card, and cuda:0 is not there",
        ),
        (
            "",
            {"needs_gpu": True, "num_gpus": 0},
            "c.pbtxt: instance_group[0].kind: the model was exported for cuda, and",
        ),
        (
            "instance_group [ { kind: KIND_GPU gpus: [ 3 ] } ]",
            {},
            "c.pbtxt: instance_group[0].gpus: the model asks for",
        ),
        ("instance_group [ { kind: KIND_CPU } ]", {"needs_gpu": True}, "c.pbtxt: instance_group[0].kind: is KIND_CPU;"),
        ("instance_group [ { kind: KIND_MODEL } ]", {}, "c.pbtxt: instance_group[0].kind: is KIND_MODEL"),
        (
            "instance_group [ { count: 2 } ]",
            {},
            "c.pbtxt: instance_group[0].count: is above 1; parameters['num_instances']",
        ),
        ("instance_group [ { gpus: [ 0, 1 ] } ]", {}, "c.pbtxt: instance_group[0].gpus: names more than one card"),
        ("instance_group [ { }, { } ]", {}, "c.pbtxt: instance_group: has more than one group"),
        ('instance_group [ { profile: [ "1" ] } ]', {}, "c.pbtxt: instance_group[0].profile: is only supported"),
        ("optimization { graph { level: 1 } }", {}, "c.pbtxt: optimization.graph: has no meaning for a model with a"),
        ("optimization { priority: PRIORITY_MAX }", {}, "c.pbtxt: optimization.priority: is not offered"),
    ],
)
def test_place_that_cannot_be_had_is_refused_by_field(text, options, message):
    assert refusal(text, **options).startswith(message)


def test_rest_of_a_config_says_nothing_of_devices():
    config = config_of('name: "m" max_batch_size: 4 ' + ON_GPU + TENSORRT)
    assert without_device(config) == config_of('name: "m" max_batch_size: 4')
    assert config.instance_group
