"""What an operator decides about an encoder model, a reranker or a classifier: its config.pbtxt.

Floor 1.
"""

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.config import FILE_NAME
from sardonyx.repository.model_options import read_parameter, refuse_other_fields, unknown_parameter

CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
"""Of ``/v1/moderations``. Source: OpenAI's reference."""

_MODERATION = "moderation."
_RULE = re.compile(r"\s*([a-z/-]+)\s+(\d+(?:\.\d*)?|\.\d+)\s*")


class EncoderOptions(msgspec.Struct, frozen=True, kw_only=True):
    """``parameters`` of such a model. What is ``None`` comes from the server's settings or from the manifest."""

    max_batch_tokens: Annotated[int, Meta(ge=1, le=1 << 22)] | None = None
    """Tokens of a step at most; a longer text runs alone."""
    max_batch_size: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    """Texts or pictures of a step at most."""
    max_model_len: Annotated[int, Meta(ge=1, le=1 << 24)] | None = None
    """Tokens of a text at most; never above what the graph was built for."""
    num_instances: Annotated[int, Meta(ge=1, le=64)] | None = None
    """Steps at once; they divide the threads."""
    truncate: bool = False
    """Cut texts that are too long where a request does not say."""
    allow_any_dimensions: bool = False
    """Let callers cut embeddings that were not trained for it."""
    moderation: dict[str, list[tuple[str, float]]] = {}
    """By label: categories with the score from which they are flagged."""


def encoder_options(config: ModelConfig, *, file: str = FILE_NAME) -> EncoderOptions:
    """Read the parameters of an encoder model.

    ``moderation.<label>`` has the form ``harassment 0.5, hate 0.8``.

    Raises:
        ConfigError: an unknown parameter or category, a value of the wrong type or out of range, or a field of
            ModelConfig that such a model does not honour.
    """
    refuse_other_fields(config, ["max_batch_size"], owner="an encoder model", file=file)
    types = {field.name: field.type for field in msgspec.structs.fields(EncoderOptions) if field.name != "moderation"}
    values: dict[str, Any] = {}
    moderation = {}
    for key in sorted(config.parameters):
        text = config.parameters[key].string_value.strip()
        if key.startswith(_MODERATION):
            moderation[key.removeprefix(_MODERATION)] = _rules(key, text, file)
            continue
        if key not in types:
            raise unknown_parameter(key, [*types, "moderation.<label>"], owner="an encoder model", file=file)
        values[key] = read_parameter(key, text, types[key], file=file)
    return EncoderOptions(**values, moderation=moderation)


def _rules(key: str, text: str, file: str) -> list[tuple[str, float]]:
    rules = []
    for part in text.split(","):
        match = _RULE.fullmatch(part)
        if match is None or not 0 < float(match[2]) <= 1:
            raise ConfigError(
                f"expected categories with thresholds above 0 and up to 1, as in 'harassment 0.5, hate 0.8', "
                f"not {part!r}",
                file=file,
                field=f"parameters[{key!r}]",
            )
        if match[1] not in CATEGORIES:
            raise ConfigError(
                f"{match[1]!r} is no moderation category; there are {', '.join(CATEGORIES)}",
                file=file,
                field=f"parameters[{key!r}]",
            )
        rules.append((match[1], float(match[2])))
    return rules
