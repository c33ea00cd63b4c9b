"""What a text model is made of, and what it may be asked for. Floor 4."""

from typing import Protocol

import msgspec

from sardonyx.engine.stats import LoopStats
from sardonyx.processing.chat_template import ChatTemplate
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.repository.manifest import Manifest
from sardonyx.serving.dispatch import Engine


class TextLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one API call may ask for; the settings of the same names."""

    max_choices: int = 128
    request_timeout_s: float = 600.0
    queue_timeout_s: float = 60.0


class TextVersion(msgspec.Struct, frozen=True, kw_only=True):
    """What a version folder says about its model."""

    name: str
    version: int
    manifest: Manifest
    created: int
    """Unix time of the export."""
    size_bytes: int
    """Of the version's files."""
    max_model_len: int
    """Prompt and completion tokens of one sequence at most."""
    vocab_size: int
    eos_token_ids: frozenset[int]
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None


class TextEngine(Engine, Protocol):
    """What a text model asks of its step loop."""

    def stats(self) -> LoopStats: ...

    def close(self) -> None:
        """End everything, join the thread, free the memory. Blocks for a step at most; idempotent."""
        ...
