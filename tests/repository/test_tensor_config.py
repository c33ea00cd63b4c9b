import pytest
from google.protobuf import text_format
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tests.repository.configs import HEAD, TENSORS, config_of, read, refusal
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.instances import Instance
from sardonyx.repository.session_parameters import SessionParameters
from sardonyx.repository.tensor_config import ProviderChoice, TensorConfig, read_tensor_config


def test_config_without_options_runs_each_request_alone_on_the_cpu():
    config = read(TENSORS)
    assert config == TensorConfig(
        name="m",
        max_batch_size=0,
        inputs=config.inputs,
        outputs=config.outputs,
        instances=[Instance(kind="cpu", name="m_0"), Instance(kind="cpu", name="m_1")],
        session=SessionParameters(),
        providers=[ProviderChoice("cpu")],
    )


def test_config_is_not_changed_by_reading_it():
    config = config_of(HEAD + TENSORS)
    before = text_format.MessageToString(config)
    read_tensor_config(config, num_gpus=1)
    assert text_format.MessageToString(config) == before


@pytest.mark.parametrize("level", [-1, 0, 1, 2])
def test_graph_level_is_one_of_tritons(level):
    assert read(TENSORS + f"optimization {{ graph {{ level: {level} }} }}").graph_level == level


def test_decoupled_models_and_cached_ones_are_told():
    assert read(TENSORS + "model_transaction_policy { decoupled: true }").is_decoupled
    assert read(TENSORS + "response_cache { enable: true }").uses_cache


def test_runtime_is_noted():
    assert read(TENSORS + 'runtime: "x.so"').notes == ["runtime 'x.so' changes nothing: this server is its own runtime"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_size: -1", "max_batch_size: 'max_batch_size' must be non-negative value for m"),
        ("optimization { graph { level: 3 } }", "optimization.graph.level: is 3; there are 0 (all), 1 (extended)"),
        (
            "response_cache { enable: true } sequence_batching { }",
            "response_cache.enable: Response Cache does not currently support model m with sequence batching scheduler",
        ),
        (
            "response_cache { enable: true } model_transaction_policy { decoupled: true }",
            "response_cache.enable: Response Cache does not currently support model m with 'decoupled' transaction",
        ),
    ],
)
def test_contradiction_is_refused_by_field(text, message):
    assert refusal(TENSORS + text).startswith(f"c.pbtxt: {message}")


@pytest.mark.parametrize("head", ['name: "m" ', 'name: "m" platform: "onnxruntime_onnx" ', 'name: "m" backend: "x" '])
def test_config_that_nobody_completed_is_refused(head):
    assert "unexpected 'platform' and 'backend' pair, got:" in refusal(TENSORS, head=head)


def read_or_refuse(config: ModelConfig, num_gpus: int = 0) -> TensorConfig | ConfigError:
    try:
        return read_tensor_config(config, num_gpus=num_gpus)
    except ConfigError as error:
        return error


@given(st.binary(max_size=120))
def test_any_message_is_read_or_refused(data):
    """Bytes of the wire format make odd messages that no text would."""
    config = config_of(HEAD + TENSORS)
    try:
        config.MergeFromString(data)
    except DecodeError:
        return
    outcome = read_or_refuse(config)
    assert outcome.field if isinstance(outcome, ConfigError) else outcome.outputs


SIZES = st.integers(-2, 9)
ENDS = ("kind", "gpus", "count")


@given(
    st.builds(
        ModelConfig,
        max_batch_size=SIZES,
        instance_group=st.lists(
            st.fixed_dictionaries({"kind": st.integers(0, 3), "count": SIZES, "gpus": st.lists(SIZES, max_size=3)}),
            max_size=3,
        ).map(lambda groups: [ModelConfig().instance_group.add(**group) for group in groups]),
    ),
    st.integers(0, 3),
)
def test_instances_that_are_read_lie_on_cards_that_are_there(options, num_gpus):
    config = config_of(HEAD + TENSORS)
    config.MergeFrom(options)
    outcome = read_or_refuse(config, num_gpus)
    if isinstance(outcome, ConfigError):
        assert outcome.field in {"max_batch_size", *(f"instance_group[{n}].{end}" for n in range(3) for end in ENDS)}
        return
    instances = outcome.instances
    assert instances
    assert all((each.kind == "gpu") == (each.gpu in range(num_gpus)) for each in instances)
