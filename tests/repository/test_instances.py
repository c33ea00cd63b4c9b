import pytest
from tests.repository.configs import TENSORS, config_of, read, refusal
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.repository.instances import Instance, normalize_instance_groups


def normalized(text: str, num_gpus: int) -> list[tuple[str, str, int, list[int]]]:
    config = config_of('name: "m" ' + text)
    normalize_instance_groups(config, num_gpus)
    groups = config.instance_group
    return [(group.name, group.Kind.Name(group.kind), group.count, list(group.gpus)) for group in groups]


@pytest.mark.parametrize(
    ("text", "num_gpus", "expected"),
    [
        ("", 0, [("m", "KIND_CPU", 2, [])]),
        ("", 2, [("m", "KIND_GPU", 1, [0, 1])]),
        ("instance_group { count: 3 }", 0, [("m_0", "KIND_CPU", 3, [])]),
        ("instance_group { kind: KIND_CPU }", 2, [("m_0", "KIND_CPU", 2, [])]),
        ("instance_group { kind: KIND_GPU }", 2, [("m_0", "KIND_GPU", 1, [0, 1])]),
        ("instance_group { gpus: 1 }", 2, [("m_0", "KIND_GPU", 1, [1])]),
        ("instance_group { gpus: [ 1, 7 ] }", 2, [("m_0", "KIND_CPU", 2, [1, 7])]),
        (
            'instance_group { name: "a" kind: KIND_CPU count: 1 } instance_group { kind: KIND_GPU gpus: 0 count: 2 }',
            1,
            [("a", "KIND_CPU", 1, []), ("m_1", "KIND_GPU", 2, [0])],
        ),
    ],
)
def test_groups_are_completed(text, num_gpus, expected):
    assert normalized(text, num_gpus) == expected


def test_ensemble_gets_no_group():
    config = ModelConfig(name="m", platform="ensemble")
    normalize_instance_groups(config, 1)
    assert not config.instance_group


def test_group_has_its_count_of_instances_on_each_card():
    text = "instance_group { kind: KIND_GPU count: 2 gpus: [ 0, 2 ] } instance_group { kind: KIND_CPU count: 1 }"
    assert read(TENSORS + text, num_gpus=3).instances == [
        Instance(kind="gpu", gpu=0, name="m_0_0"),
        Instance(kind="gpu", gpu=0, name="m_0_1"),
        Instance(kind="gpu", gpu=2, name="m_0_2"),
        Instance(kind="gpu", gpu=2, name="m_0_3"),
        Instance(kind="cpu", name="m_1_0"),
    ]


@pytest.mark.parametrize(
    ("group", "num_gpus", "message"),
    [
        ("kind: KIND_GPU", 0, "kind: instance group g of model m has kind KIND_GPU but no GPUs are available"),
        (
            "kind: KIND_GPU gpus: [ 0, 2 ]",
            2,
            "gpus: instance group g of model m specifies invalid or unsupported gpu id 2. "
            "GPUs that are available: 0, 1",
        ),
        (
            "kind: KIND_GPU gpus: -1",
            0,
            "gpus: instance group g of model m specifies invalid or unsupported gpu id -1. "
            "GPUs that are available: none",
        ),
        (
            "kind: KIND_CPU gpus: 0",
            1,
            "gpus: instance group g of model m has kind KIND_CPU but specifies one or more GPUs",
        ),
        ("kind: KIND_MODEL", 1, "kind: instance group g of model m has kind KIND_MODEL"),
        ("kind: KIND_CPU count: 1025", 0, "count: makes more than 1,024 instances of model m"),
        ("kind: KIND_GPU count: 1024", 2, "count: makes more than 1,024 instances of model m"),
    ],
)
def test_impossible_group_is_refused(group, num_gpus, message):
    text = TENSORS + f'instance_group {{ name: "g" {group} }}'
    assert refusal(text, num_gpus=num_gpus).startswith(f"c.pbtxt: instance_group[0].{message}")
