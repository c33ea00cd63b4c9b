"""Nothing that a config can say is ignored: each field of the proto is honoured or refused."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from tests.repository.configs import HEAD, OUTPUT, TENSORS, config_of, refusal
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.config_fields import HONOURED, REFUSED, refuse_fields
from sardonyx.repository.tensor_config import TensorConfig, read_tensor_config

# What other files of the package read, with their own tests.
READ_ELSEWHERE = {
    "version_policy.latest.num_versions",  # config.choose_versions
    "version_policy.all",
    "version_policy.specific.versions",
    "default_model_filename",  # the version folder's graph
    "sequence_batching.state.initial_state.name",  # a label of the file, without effect in Triton too
}

SESSION = HEAD + TENSORS + "max_batch_size: 8 "
COMPLETE = [
    SESSION
    + """
    runtime: "libtriton_onnxruntime.so"
    instance_group { name: "g" kind: KIND_GPU count: 2 gpus: [ 0 ] }
    optimization {
        graph { level: 1 }
        execution_accelerators {
            gpu_execution_accelerator { name: "cuda" parameters { key: "use_tf32" value: "1" } }
            cpu_execution_accelerator { name: "openvino" }
        }
        input_pinned_memory { enable: true }
        output_pinned_memory { enable: true }
    }
    parameters { key: "intra_op_thread_count" value { string_value: "2" } }
    response_cache { enable: true }
    """,
    SESSION
    + """
    dynamic_batching {
        preferred_batch_size: [ 4, 8 ]
        max_queue_delay_microseconds: 100
        priority_levels: 2
        default_priority_level: 1
        default_queue_policy {
            timeout_action: DELAY default_timeout_microseconds: 5 allow_timeout_override: true max_queue_size: 7
        }
        priority_queue_policy {
            key: 2
            value {
                timeout_action: DELAY default_timeout_microseconds: 5 allow_timeout_override: true max_queue_size: 7
            }
        }
    }
    """,
    SESSION
    + """
    model_transaction_policy { decoupled: true }
    model_warmup {
        name: "w" batch_size: 2 count: 3
        inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 4 ] random_data: true } }
    }
    model_warmup {
        name: "w" batch_size: 2
        inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 4 ] zero_data: true } }
    }
    sequence_batching {
        direct { max_queue_delay_microseconds: 100 minimum_slot_utilization: 0.5 }
        max_sequence_idle_microseconds: 5
        control_input {
            name: "start" control { kind: CONTROL_SEQUENCE_START bool_false_true: [ false, true ] }
        }
        control_input {
            name: "ready" control { kind: CONTROL_SEQUENCE_READY int32_false_true: [ 0, 1 ] }
        }
        control_input {
            name: "end" control { kind: CONTROL_SEQUENCE_END fp32_false_true: [ 0, 1 ] }
        }
        control_input { name: "id" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } }
        state {
            input_name: "si" output_name: "so" data_type: TYPE_FP32 dims: [ -1 ]
            initial_state { name: "s" data_type: TYPE_FP32 dims: [ 2 ] data_file: "f" }
        }
    }
    """,
    SESSION
    + """
    sequence_batching {
        oldest {
            max_candidate_sequences: 4 preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100
            preserve_ordering: true
        }
    }
    """,
    """
    name: "m" platform: "ensemble"
    input { name: "x" data_type: TYPE_FP32 dims: [ 1, 1, 4 ] reshape { shape: [ 4 ] } format: FORMAT_NHWC }
    output {
        name: "y" data_type: TYPE_FP32 dims: [ 4 ] reshape { shape: [ 2, 2 ] } label_filename: "labels.txt"
    }
    ensemble_scheduling {
        step {
            model_name: "a" model_version: 3
            input_map { key: "in" value: "x" }
            output_map { key: "out" value: "y" }
        }
    }
    """,
]


def is_map(field: Any) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def leaf_paths(descriptor: Any, prefix: str = "") -> Iterator[str]:
    """Every plain field, every map to plain values, every message without fields; a map's messages as if repeated."""
    for field in descriptor.fields:
        path = prefix + field.name
        inner = field.message_type
        if is_map(field):
            inner = inner.fields_by_name["value"].message_type
        if inner is None or not inner.fields:
            yield path
        else:
            yield from leaf_paths(inner, f"{path}.")


LEAVES = sorted(leaf_paths(ModelConfig.DESCRIPTOR))


def refused_by(path: str) -> str | None:
    parts = path.split(".")
    return next((".".join(parts[:n]) for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in REFUSED), None)


@pytest.mark.parametrize("path", LEAVES)
def test_every_field_of_the_proto_is_either_honoured_or_refused(path):
    assert (path in HONOURED) != (refused_by(path) is not None)


def test_tables_name_fields_that_the_proto_has():
    assert set(LEAVES) >= HONOURED
    assert all(any(f"{leaf}.".startswith(f"{path}.") for leaf in LEAVES) for path in REFUSED)


def set_leaf(message: Any, names: list[str]) -> None:
    """Give the field at the end of `names` a value that is not its default, in entries of their own."""
    name, *rest = names
    field = message.DESCRIPTOR.fields_by_name[name]
    if is_map(field):
        value = field.message_type.fields_by_name["value"]
        key = "k" if field.message_type.fields_by_name["key"].type == field.TYPE_STRING else 1
        if value.message_type is None:
            getattr(message, name)[key] = "v"
        else:
            set_leaf(getattr(message, name)[key], rest)
    elif field.message_type is not None and rest:
        set_leaf(getattr(message, name).add() if field.is_repeated else getattr(message, name), rest)
    elif field.message_type is not None:
        getattr(message, name).SetInParent()
    else:
        plain = {field.CPPTYPE_STRING: "v", field.CPPTYPE_BOOL: True}.get(field.cpp_type, 1)
        if field.enum_type is not None:
            # An enum of one value has none but its default; in a list it is there all the same.
            plain = field.enum_type.values[-1].number
        if field.is_repeated:
            getattr(message, name).append(plain)
        else:
            setattr(message, name, plain)


@pytest.mark.parametrize("path", [path for path in LEAVES if refused_by(path)])
def test_refused_field_is_named_when_it_is_set(path):
    config = config_of(SESSION)
    set_leaf(config, path.split("."))
    with pytest.raises(ConfigError) as caught:
        read_tensor_config(config, file="c.pbtxt")
    assert re.sub(r"\[[^]]*\]", "", caught.value.field or "") == refused_by(path)
    assert caught.value.reason == REFUSED[refused_by(path) or ""]


def outcome(config: ModelConfig) -> TensorConfig | str:
    try:
        return read_tensor_config(config, num_gpus=2)
    except ConfigError as error:
        return str(error)


def others(field: Any, value: Any) -> Iterator[Any]:
    """Other values than `value`."""
    if field.enum_type is not None:
        yield from (each.number for each in field.enum_type.values if each.number != value)
    elif field.cpp_type == field.CPPTYPE_STRING:
        yield value + "x"
    elif field.cpp_type == field.CPPTYPE_BOOL:
        yield not value
    else:
        yield value + (0.25 if field.cpp_type == field.CPPTYPE_FLOAT else 1)


def changed(root: ModelConfig, message: Any, names: list[str]) -> Iterator[ModelConfig]:
    """`root` with one change at a time of the field at the end of `names`, wherever `message`, a part of it, has it."""
    name, *rest = names
    field = message.DESCRIPTOR.fields_by_name[name]
    value = getattr(message, name)
    if rest:
        children = [value[key] for key in value] if is_map(field) else value if field.is_repeated else [value]
        for child in children if field.is_repeated else children * message.HasField(name):
            yield from changed(root, child, rest)
        return
    before = type(message)()
    before.CopyFrom(message)
    if is_map(field):
        value["added"] = "added"
        yield root
        value.clear()
        yield root
    elif field.is_repeated:
        for index in range(len(value)):
            for other in others(field, value[index]):
                old, value[index] = value[index], other
                yield root
                value[index] = old
        value.extend(value[:1] or [1])
        yield root
    else:
        for other in others(field, value):
            setattr(message, name, other)
            yield root
    message.CopyFrom(before)


@pytest.mark.parametrize("text", COMPLETE)
def test_complete_config_is_accepted(text):
    assert isinstance(outcome(config_of(text)), TensorConfig)


@pytest.mark.parametrize("path", sorted(HONOURED - READ_ELSEWHERE))
def test_change_of_an_honoured_field_changes_what_is_read(path):
    for text in COMPLETE:
        original = outcome(config_of(text))
        config = config_of(text)
        if any(outcome(variant) != original for variant in changed(config, config, path.split("."))):
            return
    pytest.fail("no change of the field shows in the TensorConfig, in its notes or in a refusal")


def test_enum_value_that_the_proto_does_not_name_is_refused():
    assert refusal(OUTPUT + 'input { name: "x" data_type: 99 dims: 4 }').startswith(
        "c.pbtxt: input[0].data_type: is 99, which is no DataType"
    )


def test_empty_message_that_would_hold_refused_fields_is_no_error():
    refuse_fields(config_of(SESSION + "optimization { graph { } } dynamic_batching { default_queue_policy { } }"))
