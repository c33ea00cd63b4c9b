"""What an operator decides about a speech model: its config.pbtxt.

Floor 1.
"""

from typing import Annotated

import msgspec
from msgspec import Meta
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.repository.config import FILE_NAME
from sardonyx.repository.model_options import read_options


class SpeechModelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """``parameters`` of such a model. What is ``None`` is the server's choice."""

    max_num_seqs: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Windows that are decoded at once, of all requests together."""
    max_batch_windows: Annotated[int, Meta(ge=1, le=64)] | None = None
    """Windows of one encoder step at most."""
    kv_cache_bytes: Annotated[int, Meta(ge=1, le=1 << 50)] | None = None
    """Most memory for the windows that are decoded; ``2GiB`` is understood."""


def speech_model_options(config: ModelConfig, *, file: str = FILE_NAME) -> SpeechModelOptions:
    """Read the parameters of a speech model.

    Raises:
        ConfigError: an unknown parameter, a value of the wrong type or out of range, or a field of ModelConfig that a
            speech model does not honour.
    """
    return read_options(config, SpeechModelOptions, owner="a speech model", file=file)
