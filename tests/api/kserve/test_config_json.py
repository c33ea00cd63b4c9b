import json
from collections.abc import Iterator
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.api.kserve.config_json import config_to_json

# What Triton itself expects to find (core/src/model_config_utils.cc); a new one asks for a look at its rules.
WIDE_FIELDS = {
    "input.dims",
    "input.reshape.shape",
    "output.dims",
    "output.reshape.shape",
    "version_policy.specific.versions",
    "dynamic_batching.max_queue_delay_microseconds",
    "dynamic_batching.priority_levels",
    "dynamic_batching.default_priority_level",
    "dynamic_batching.default_queue_policy.default_timeout_microseconds",
    "dynamic_batching.priority_queue_policy.key",
    "dynamic_batching.priority_queue_policy.value.default_timeout_microseconds",
    "sequence_batching.max_sequence_idle_microseconds",
    "sequence_batching.direct.max_queue_delay_microseconds",
    "sequence_batching.oldest.max_queue_delay_microseconds",
    "sequence_batching.state.dims",
    "sequence_batching.state.initial_state.dims",
    "ensemble_scheduling.step.model_version",
    "model_warmup.inputs.value.dims",
    "optimization.cuda.graph_spec.input.value.dim",
    "optimization.cuda.graph_spec.graph_lower_bound.input.value.dim",
    "instance_group.secondary_devices.device_id",
}


def wide_fields(descriptor: Any, prefix: str = "") -> Iterator[str]:
    for field in descriptor.fields:
        if field.message_type is not None:
            yield from wide_fields(field.message_type, f"{prefix}{field.name}.")
        elif field.cpp_type in {field.CPPTYPE_INT64, field.CPPTYPE_UINT64}:
            yield prefix + field.name


def filled(message: Any) -> Any:
    """`message` with 7 in every 64-bit field, as far as its oneofs allow: the last member of each stays."""
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            inner = field.message_type.fields_by_name["value"]
            key = 7 if field.message_type.fields_by_name["key"].cpp_type == field.CPPTYPE_UINT64 else "k"
            if inner.message_type is not None:
                filled(value[key])
        elif field.message_type is not None:
            filled(value.add() if field.is_repeated else value).SetInParent()
        elif field.cpp_type in {field.CPPTYPE_INT64, field.CPPTYPE_UINT64}:
            value.append(7) if field.is_repeated else setattr(message, field.name, 7)
    return message


def at(value: Any, names: list[str]) -> list[Any]:
    """Every value at a dotted name; ``value`` and ``key`` step into a map."""
    if isinstance(value, list):
        return [found for each in value for found in at(each, names)]
    if not names:
        return [value]
    name, *rest = names
    if name in {"value", "key"}:
        return [found for key, each in value.items() for found in at(key if name == "key" else each, rest)]
    return at(value[name], rest) if name in value else []


def test_proto_has_the_wide_fields_that_triton_knows():
    assert set(wide_fields(ModelConfig.DESCRIPTOR)) == WIDE_FIELDS


def test_wide_fields_are_numbers_except_for_keys():
    config = filled(ModelConfig())
    values = {name: set() for name in WIDE_FIELDS}
    for scheduling in ("dynamic_batching", "sequence_batching", "ensemble_scheduling"):
        part = ModelConfig()
        part.CopyFrom(config)
        filled(getattr(part, scheduling)).SetInParent()
        for strategy in ("direct", "oldest") if scheduling == "sequence_batching" else [""]:
            if strategy:
                filled(getattr(part.sequence_batching, strategy)).SetInParent()
            part.version_policy.specific.versions[:] = [7]
            shown = config_to_json(part)
            for name, found in values.items():
                found.update(map(repr, at(shown, name.split("."))))
    key = "dynamic_batching.priority_queue_policy.key"
    assert values == {name: {"'7'"} if name == key else {"7"} for name in WIDE_FIELDS}


def test_plain_fields_are_shown_with_their_defaults_and_messages_only_if_they_are_there():
    assert config_to_json(ModelConfig(name="m")) == {
        "name": "m",
        "platform": "",
        "backend": "",
        "runtime": "",
        "max_batch_size": 0,
        "input": [],
        "output": [],
        "batch_input": [],
        "batch_output": [],
        "instance_group": [],
        "default_model_filename": "",
        "cc_model_filenames": {},
        "metric_tags": {},
        "parameters": {},
        "model_warmup": [],
    }


def test_config_is_shown_as_clients_of_triton_know_it():
    config = text_format.Parse(
        """
        name: "simple" platform: "onnxruntime_onnx" max_batch_size: 8
        input { name: "INPUT0" data_type: TYPE_INT32 dims: 16 }
        input { name: "INPUT1" data_type: TYPE_INT32 dims: 1 reshape { } }
        version_policy { latest { num_versions: 1 } }
        instance_group { name: "simple" kind: KIND_CPU count: 2 }
        dynamic_batching { preferred_batch_size: 8 priority_queue_policy { key: 1 value { max_queue_size: 2 } } }
        parameters { key: "a" value { string_value: "1" } }
        """,
        ModelConfig(),
    )
    shown = json.loads(json.dumps(config_to_json(config)))
    plain = {"is_shape_tensor": False, "allow_ragged_batch": False, "optional": False, "format": "FORMAT_NONE"}
    plain["is_non_linear_format_io"] = False
    assert shown["input"] == [
        {"name": "INPUT0", "data_type": "TYPE_INT32", "dims": [16], **plain},
        {"name": "INPUT1", "data_type": "TYPE_INT32", "dims": [1], "reshape": {"shape": []}, **plain},
    ]
    assert shown["version_policy"] == {"latest": {"num_versions": 1}}
    assert shown["dynamic_batching"] == {
        "preferred_batch_size": [8],
        "max_queue_delay_microseconds": 0,
        "preserve_ordering": False,
        "priority_levels": 0,
        "default_priority_level": 0,
        "priority_queue_policy": {
            "1": {
                "timeout_action": "REJECT",
                "default_timeout_microseconds": 0,
                "allow_timeout_override": False,
                "max_queue_size": 2,
            }
        },
    }
    assert shown["parameters"] == {"a": {"string_value": "1"}}
    assert shown["instance_group"] == [
        {
            "name": "simple",
            "kind": "KIND_CPU",
            "count": 2,
            "gpus": [],
            "secondary_devices": [],
            "profile": [],
            "passive": False,
            "host_policy": "",
        }
    ]


def test_config_is_not_changed():
    config = ModelConfig(name="m")
    config_to_json(config)
    assert config == ModelConfig(name="m")
