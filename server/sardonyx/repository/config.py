"""`config.pbtxt`: Triton's ModelConfig, the file that an operator edits, and the JSON form that a load may bring.

Floor 1. Parsed into tritonclient's own message: a second copy of those protos would clash with it in one process. A
field that a family does not honour is refused by name, never ignored. What a plain tensor model honours is
`tensor_config`'s matter.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
from google.protobuf import json_format, text_format
from msgspec import Meta
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.model_options import read_options

FILE_NAME = "config.pbtxt"
MAX_BYTES = 1 << 20
PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"
ENSEMBLE = "ensemble"
"""Platform of models that are made of other models; they have no backend and no graph."""

_FIELD_IN_MESSAGE = re.compile(r"""(?:field named|[Ff]ield|multiple) "([\w.]+)\"""")
_FIELD_IN_JSON_MESSAGE = re.compile(r"Failed to parse (\w+) field: ")
_FIELD_IN_LINE = re.compile(r"([A-Za-z_]\w*)\s*[:{\[]")


class LanguageModelOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``parameters`` of a language model. What is ``None`` comes from the server's settings, where one has the name."""

    max_num_seqs: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Sequences that run at once: KV slots."""
    max_model_len: Annotated[int, Meta(ge=1, le=1 << 24)] | None = None
    """Prompt and completion tokens of one sequence at most; never above what the graph was built for."""
    max_chunk_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    """Prompt tokens of one sequence in one step at most."""
    max_batch_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    """Tokens of one step at most."""
    kv_cache_bytes: Annotated[int, Meta(ge=1, le=1 << 50)] | None = None
    """Most memory for the KV cache; ``2GiB`` is understood."""
    max_step_ms: Annotated[float, Meta(gt=0, le=60_000)] | None = None
    """Target length of a step while others decode, in milliseconds."""
    max_cuda_graphs: Annotated[int, Meta(ge=0, le=1024)] | None = None
    """On a card: shapes of decode steps that are captured as CUDA graphs at most, 64 if left out; 0 captures none."""


def load_config(folder: Path) -> ModelConfig:
    """Read the model config of a model's folder. A missing file is an empty config.

    Returns:
        A config whose ``name`` is the folder's.

    Raises:
        ConfigError: as `parse_config`, or the file cannot be read.
    """
    path = folder / FILE_NAME
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
    return parse_config(data, name=folder.name, file=str(path))


def parse_config(data: bytes, *, name: str, file: str = FILE_NAME) -> ModelConfig:
    """Parse and check what holds for every family.

    Args:
        data: the file, UTF-8.
        name: the model's folder. An empty ``name`` in the file is filled with it.
        file: how errors call the file; the line is added.

    Raises:
        ConfigError: not a ModelConfig in text format, too large, another model's name, a platform or backend that we
            do not have, a file name that leads elsewhere, a version policy that chooses nothing.

    Source: Triton, docs/user_guide/model_configuration.md; core/src/model_config_utils.cc.
    """
    config = _parse(data, file)
    _check(config, name, file)
    return config


def parse_override(json_text: str | bytes, *, name: str, file: str = "config") -> ModelConfig:
    """Parse the JSON form of a model config, which replaces config.pbtxt for one load, and check it as `parse_config`.

    Args:
        json_text: field names as in the proto or in camel case, enum values in any case, numbers also as strings.
        name: the model's folder.
        file: how errors call the text.

    Raises:
        ConfigError: no JSON object, too large or too deep, an unknown field, a value of the wrong type; or as
            `parse_config`.

    Source: Protocol Buffers, "ProtoJSON Format"; Triton, docs/protocol/extension_model_repository.md.
    """
    if len(json_text) > MAX_BYTES:
        raise ConfigError(f"is larger than {MAX_BYTES:,} bytes", file=file)
    try:
        values = json.loads(json_text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        if not isinstance(values, dict):
            raise ValueError("is not a JSON object")
        config: ModelConfig = json_format.ParseDict(_upper_enums(values, ModelConfig.DESCRIPTOR), ModelConfig())
    except json_format.ParseError as error:
        text = str(error).partition("\n")[0]
        fields = _FIELD_IN_JSON_MESSAGE.findall(text) or _FIELD_IN_MESSAGE.findall(text)
        reason = _FIELD_IN_JSON_MESSAGE.sub("", text).rstrip(". ")
        raise ConfigError(reason, file=file, field=".".join(fields) or None) from error
    except RecursionError as error:
        raise ConfigError("is nested too deep", file=file) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"is not JSON: {error.msg} at character {error.pos}", file=file) from error
    except ValueError as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ConfigError(reason, file=file) from error
    _check(config, name, file)
    return config


def is_plain_file_name(name: str) -> bool:
    """`name` can only be a file beside where it is looked for."""
    return name not in {"", ".", ".."} and not set(name) & set("/\\\0")


def choose_versions(config: ModelConfig, present: list[int]) -> list[int]:
    """The versions to serve, ascending: the policy's choice among those that are there, by default the latest one."""
    policy = config.version_policy
    match policy.WhichOneof("policy_choice"):
        case "all":
            return sorted(present)
        case "specific":
            return sorted(set(present) & set(policy.specific.versions))
        case "latest":
            return sorted(present)[-policy.latest.num_versions :]
        case _:
            return sorted(present)[-1:]


def language_model_options(config: ModelConfig, *, file: str = FILE_NAME) -> LanguageModelOptions:
    """Read the parameters of a language model.

    Raises:
        ConfigError: an unknown parameter, a value of the wrong type or out of range, or a field of ModelConfig that a
            language model does not honour (batching, tensors and instances are the engine's own matter).
    """
    if config.platform == ENSEMBLE:
        raise ConfigError("has no meaning for a language model", file=file, field="platform")
    return read_options(config, LanguageModelOptions, owner="a language model", file=file)


def _check(config: ModelConfig, name: str, file: str) -> None:
    """Check what holds for every family, and fill an empty name."""
    if config.name and config.name != name:
        raise ConfigError(
            f"is {config.name!r}, but the folder is {name!r}: they must be equal", file=file, field="name"
        )
    config.name = name
    _check_platform(config, file)
    graph = config.default_model_filename
    if graph and not is_plain_file_name(graph):
        raise ConfigError("is not a plain file name", file=file, field="default_model_filename")
    policy = config.version_policy
    kind = policy.WhichOneof("policy_choice")
    if kind == "latest" and policy.latest.num_versions < 1:
        raise ConfigError("is 0: no version would be served", file=file, field="version_policy.latest.num_versions")
    if kind == "specific" and (not policy.specific.versions or min(policy.specific.versions) < 1):
        raise ConfigError("needs versions from 1 up", file=file, field="version_policy.specific.versions")


def _check_platform(config: ModelConfig, file: str) -> None:
    platform, backend = config.platform, config.backend
    if platform == ENSEMBLE and backend:
        raise ConfigError(
            f"Ensemble model '{config.name}' must have platform type '{platform}' and empty backend type",
            file=file,
            field="backend",
        )
    if platform and backend and (platform, backend) != (PLATFORM, BACKEND):
        reason = f"unexpected 'platform' and 'backend' pair, got:{platform}, {backend}"
        raise ConfigError(reason, file=file, field="backend" if platform == PLATFORM else "platform")
    if platform not in {"", PLATFORM, ENSEMBLE}:
        raise ConfigError(
            f"is {platform!r}; this server has {PLATFORM!r} and {ENSEMBLE!r}", file=file, field="platform"
        )
    if backend not in {"", BACKEND}:
        raise ConfigError(f"is {backend!r}; this server has {BACKEND!r}", file=file, field="backend")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("names a key twice in one object")
    return values


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _upper_enums(values: dict[str, Any], descriptor: Any) -> dict[str, Any]:  # protobuf's own, untyped in tritonclient
    """A JSON object with the values of enum fields in upper case: Triton's parser takes any, Python's does not."""
    fields = {name: field for field in descriptor.fields for name in (field.name, field.json_name)}
    return {key: _upper_value(value, fields.get(key)) for key, value in values.items()}


def _upper_value(value: Any, field: Any) -> Any:
    if isinstance(value, list) and (field is None or field.is_repeated):
        return [_upper_value(each, field) for each in value]
    if field is None:
        return value
    if field.enum_type is not None:
        return value.upper() if isinstance(value, str) else value
    if field.message_type is None or value is None:
        return value
    if not isinstance(value, dict):
        # Python's parser reads an empty list as an empty message.
        raise json_format.ParseError(f"Failed to parse {field.name} field: expected an object")
    if field.message_type.GetOptions().map_entry:
        inner = field.message_type.fields_by_name["value"]
        return {key: _upper_value(each, inner) for key, each in value.items()}
    return _upper_enums(value, field.message_type)


def _parse(data: bytes, file: str) -> ModelConfig:
    if len(data) > MAX_BYTES:
        raise ConfigError(f"is larger than {MAX_BYTES:,} bytes", file=file)
    try:
        text = data.decode()
        config: ModelConfig = text_format.Parse(text, ModelConfig())
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 at byte {error.start}", file=file) from error
    except text_format.ParseError as error:
        line = error.GetLine() or 1
        reason = str(error).partition(" : ")[2] or str(error)
        # The parser quotes the whole line before its reason.
        reason = reason.rpartition("': ")[2] if reason.startswith("'") else reason
        raise ConfigError(reason, file=f"{file}:{line}", field=_field_at(error, text)) from error
    return config


def _field_at(error: text_format.ParseError, text: str) -> str | None:
    """The field that the parser stopped at: named in its message, or the last one before that column."""
    if found := _FIELD_IN_MESSAGE.search(str(error)):
        return found[1]
    lines = text.split("\n")
    line = error.GetLine() or 1
    before = lines[line - 1][: error.GetColumn()] if line <= len(lines) else ""
    names = _FIELD_IN_LINE.findall(before)
    return names[-1] if names else None
