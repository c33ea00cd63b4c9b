from pathlib import Path

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tests.repository.configs import config_of
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.autocomplete import GraphTensor, check_graph, complete_config
from sardonyx.repository.tensor_config import read_tensor_config

GOLDEN = Path(__file__).parent / "completed"
INT32 = DataType.Value("TYPE_INT32")
INT8 = DataType.Value("TYPE_INT8")


def graph(*dims: int) -> tuple[list[GraphTensor], list[GraphTensor]]:
    """Two inputs and two outputs of one shape."""
    return (
        [GraphTensor("INPUT0", INT32, dims), GraphTensor("INPUT1", INT32, dims)],
        [GraphTensor("OUTPUT0", INT8, dims), GraphTensor("OUTPUT1", INT8, dims)],
    )


BATCHING = graph(-1, 16)
FIXED = graph(16)


@pytest.mark.parametrize(
    ("case", "text", "tensors", "num_gpus"),
    [
        ("empty_config", "", BATCHING, 1),
        ("no_config", 'name: "no_config"', BATCHING, 0),
        ("no_config_no_batch", "instance_group { kind: KIND_CPU }", FIXED, 1),
        ("cpu_instance", 'instance_group { name: "cpu_instance" kind: KIND_CPU }', BATCHING, 1),
        ("only_inputs", 'input [ { name: "INPUT1" data_type: TYPE_INT32 dims: 16 } ]', BATCHING, 0),
        ("only_outputs", 'output [ { name: "OUTPUT1" data_type: TYPE_INT8 dims: 16 } ]', BATCHING, 0),
        ("max_batch_size_set", "max_batch_size: 8", BATCHING, 0),
        ("max_batch_size_one", "max_batch_size: 1", BATCHING, 0),
        ("rows_alone", "", graph(-1), 0),
        ("scalars", "", graph(), 0),
    ],
)
def test_config_is_completed_as_triton_does(case, text, tensors, num_gpus):
    config = config_of(text)
    config.name = case
    completed = complete_config(config, *tensors, num_gpus=num_gpus)
    expected = text_format.Parse((GOLDEN / f"{case}.pbtxt").read_text(), ModelConfig())
    assert text_format.MessageToString(completed) == text_format.MessageToString(expected)


@pytest.mark.parametrize("text", ["", "max_batch_size: 8 dynamic_batching { }", "instance_group { count: 2 }"])
def test_completed_config_stays_as_it_is_when_completed_again(text):
    config = config_of('name: "m" ' + text)
    once = complete_config(config, *BATCHING, num_gpus=1)
    assert complete_config(once, *BATCHING, num_gpus=1) == once


def test_config_that_is_given_is_not_changed():
    config = config_of('name: "m"')
    complete_config(config, *BATCHING, num_gpus=0)
    assert config == config_of('name: "m"')


BOTH = """
    name: "m"
    input { name: "INPUT0" data_type: TYPE_INT32 dims: [ -1, 16 ] }
    output { name: "OUTPUT0" data_type: TYPE_INT8 dims: [ -1, 16 ] }
"""


def test_nothing_is_derived_where_both_sides_are_given():
    completed = complete_config(config_of(BOTH), *BATCHING, num_gpus=0)
    assert (completed.max_batch_size, completed.HasField("dynamic_batching")) == (0, False)
    assert completed.input == config_of(BOTH).input


def test_nothing_is_derived_where_the_server_is_told_not_to():
    completed = complete_config(config_of('name: "m"'), *BATCHING, num_gpus=0, auto_complete=False)
    assert (len(completed.input), len(completed.output), completed.max_batch_size) == (0, 0, 0)
    assert completed.version_policy.latest.num_versions == 1
    assert completed.platform == "onnxruntime_onnx"


def test_graph_that_cannot_batch_refuses_a_batch_size():
    config = config_of('name: "bad_max_batch_size" max_batch_size: 8')
    with pytest.raises(ConfigError) as caught:
        complete_config(config, *FIXED, num_gpus=0)
    assert caught.value.reason == (
        "autofill failed for model 'bad_max_batch_size': model does not support batching while non-zero "
        "max_batch_size is specified"
    )


def test_one_fixed_first_dimension_keeps_a_model_from_batching():
    inputs, outputs = BATCHING
    outputs = [outputs[0], GraphTensor("OUTPUT1", INT8, (16,))]
    completed = complete_config(config_of('name: "m"'), inputs, outputs, num_gpus=0)
    assert completed.max_batch_size == 0
    assert [list(item.dims) for item in completed.input] == [[-1, 16], [-1, 16]]


def test_operators_default_batch_size_is_taken():
    config = config_of('name: "m"')
    assert complete_config(config, *BATCHING, num_gpus=0, default_max_batch_size=32).max_batch_size == 32
    alone = complete_config(config, *BATCHING, num_gpus=0, default_max_batch_size=0)
    assert (alone.max_batch_size, list(alone.input[0].dims)) == (0, [-1, 16])


def test_stateful_model_gets_no_dynamic_batching_and_hides_what_the_server_feeds():
    config = config_of(
        """
        name: "m"
        sequence_batching {
            oldest { max_candidate_sequences: 2 }
            control_input { name: "START" control { int32_false_true: [ 0, 1 ] } }
            state { input_name: "INPUT1" output_name: "OUTPUT1" data_type: TYPE_INT32 dims: 16 }
        }
        """
    )
    inputs, outputs = BATCHING
    completed = complete_config(config, [*inputs, GraphTensor("START", INT32, (-1, 1))], outputs, num_gpus=0)
    assert [item.name for item in completed.input] == ["INPUT0"]
    assert [item.name for item in completed.output] == ["OUTPUT0"]
    assert not completed.HasField("dynamic_batching")
    assert completed.sequence_batching.max_sequence_idle_microseconds == 1_000_000
    assert list(completed.sequence_batching.oldest.preferred_batch_size) == [4]


def test_initializers_are_not_derived():
    inputs, outputs = BATCHING
    completed = complete_config(
        config_of('name: "m"'), [*inputs, GraphTensor("w", INT32, (3,), is_optional=True)], outputs, num_gpus=0
    )
    assert [item.name for item in completed.input] == ["INPUT0", "INPUT1"]
    assert completed.max_batch_size == 4


def test_ensemble_gets_a_version_policy_and_nothing_else():
    config = config_of('name: "m" platform: "ensemble" ensemble_scheduling { step { model_name: "a" } }')
    completed = complete_config(config, [], [], num_gpus=1)
    config.version_policy.latest.num_versions = 1
    assert completed == config


DIMS = st.lists(st.sampled_from([-1, 1, 3]), max_size=3).map(tuple)


@given(st.lists(DIMS, min_size=1, max_size=3), st.lists(DIMS, min_size=1, max_size=3), st.integers(0, 2))
def test_whatever_is_derived_from_a_graph_suits_it(inputs, outputs, num_gpus):
    tensors = (
        [GraphTensor(f"i{number}", INT32, dims) for number, dims in enumerate(inputs)],
        [GraphTensor(f"o{number}", INT8, dims) for number, dims in enumerate(outputs)],
    )
    completed = complete_config(ModelConfig(name="m"), *tensors, num_gpus=num_gpus)
    assert read_tensor_config(completed, num_gpus=num_gpus).outputs
    assert check_graph(completed, *tensors) == []
