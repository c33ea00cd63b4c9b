"""What an operator decides about a model with a manifest: ``parameters`` of its config, and few fields beside them.

Floor 1. Each family has its own struct of parameters.
"""

import difflib
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.settings import parse_size

_COMMON_FIELDS = frozenset({"name", "platform", "backend", "version_policy", "parameters"})
"""That every model with a manifest honours."""

P = TypeVar("P", bound=msgspec.Struct)


def read_options(config: ModelConfig, kind: type[P], *, owner: str, file: str) -> P:
    """``parameters`` of a model with a manifest as a struct: one field each, all with a default.

    Args:
        config: the operator's.
        kind: the struct; each field may be ``None``.
        owner: what messages call such a model.
        file: for messages.

    Raises:
        ConfigError: an unknown parameter, a value of the wrong type or out of range, or a field that such models do not
            honour.
    """
    refuse_other_fields(config, owner=owner, file=file)
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    values: dict[str, Any] = {}
    for key in sorted(config.parameters):
        if key not in types:
            raise unknown_parameter(key, types, owner=owner, file=file)
        values[key] = read_parameter(key, config.parameters[key].string_value.strip(), types[key], file=file)
    return kind(**values)


def refuse_other_fields(config: ModelConfig, more: Iterable[str] = (), *, owner: str, file: str) -> None:
    """Raise ConfigError for a field that a model with a manifest does not honour: the engine sees to batches, say.

    Args:
        config: the operator's.
        more: fields that it honours beside the common ones.
        owner: what messages call such a model.
        file: for messages.
    """
    for field, _ in config.ListFields():
        if field.name not in {*_COMMON_FIELDS, *more}:
            raise ConfigError(f"has no meaning for {owner}", file=file, field=field.name)


def read_parameter(key: str, text: str, type_: Any, *, file: str) -> Any:
    """One parameter's value; sizes in bytes may have a unit.

    Raises:
        ConfigError: it is of the wrong type or out of range.
    """
    value = parse_size(text) if key.endswith("_bytes") else None
    # The bare type: with `| None` the text "null" would pass as None.
    bare_type = (typing.get_args(type_) or (type_,))[0]
    try:
        return msgspec.convert(text if value is None else value, bare_type, strict=False)
    except msgspec.ValidationError as error:
        reason = str(error).partition(", got")[0].replace("`", "").replace("Expected", "expected")
        raise ConfigError(f"{reason}, not {text!r}", file=file, field=f"parameters[{key!r}]") from error


def unknown_parameter(key: str, known: Iterable[str], *, owner: str, file: str) -> ConfigError:
    """The refusal of a key of ``parameters`` that nothing reads, with the likeliest one that was meant."""
    names = list(known)
    close = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
    return ConfigError(f"is not a parameter of {owner}; {hint}", file=file, field=f"parameters[{key!r}]")
