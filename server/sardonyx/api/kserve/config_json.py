"""A model config as the JSON that Triton's config endpoint shows.

Floor 5.
"""

from typing import Any

from google.protobuf import json_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

_WIDE_TYPES = frozenset({"INT64", "UINT64", "SINT64", "FIXED64", "SFIXED64"})


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The config with the proto's own field names, and every plain field, also where it has its default.

    64-bit numbers, which protobuf writes as strings, are numbers. Keys of maps stay strings, as JSON wants.

    Source: Protocol Buffers, "ProtoJSON Format"; Triton, docs/protocol/extension_model_configuration.md.
    """
    values = json_format.MessageToDict(
        config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _number_fields(values, config.DESCRIPTOR)
    return values


def _number_fields(values: dict[str, Any], descriptor: Any) -> None:
    for field in descriptor.fields:
        if field.name not in values:
            continue
        value = values[field.name]
        if field.message_type is None:
            if _is_wide(field):
                values[field.name] = [int(each) for each in value] if field.is_repeated else int(value)
            continue
        if field.message_type.GetOptions().map_entry:
            inner = field.message_type.fields_by_name["value"].message_type
            children = list(value.values()) if inner is not None else []
        else:
            inner = field.message_type
            children = value if field.is_repeated else [value]
        for child in children:
            _number_fields(child, inner)


def _is_wide(field: Any) -> bool:
    return any(field.type == getattr(field, f"TYPE_{name}") for name in _WIDE_TYPES)
