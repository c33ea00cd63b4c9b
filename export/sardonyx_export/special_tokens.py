"""Which tokens begin, end and fill a sequence, as a checkpoint's files say."""

from typing import Any

import msgspec
import tokenizers

from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.errors import ExportError
from sardonyx_export.sources.texts import parse_object


class SpecialTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Ids for the manifest."""

    bos: int | None
    eos: list[int]
    """Every token that ends a completion."""
    pad: int | None
    add_bos: bool
    """The tokenizer puts BOS before a plain prompt: tried, not read from a flag."""


def load_tokenizer(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """The checkpoint's tokenizer.

    Raises:
        ExportError: tokenizer.json is no tokenizer.
    """
    try:
        return tokenizers.Tokenizer.from_buffer(checkpoint.texts()["tokenizer.json"])
    except Exception as error:  # the library raises bare Exception, whatever is wrong
        raise ExportError(f"cannot be loaded: {error}", file="tokenizer.json") from error


def read_special_tokens(checkpoint: Checkpoint, tokenizer: tokenizers.Tokenizer, *, vocab_size: int) -> SpecialTokens:
    """Ids from generation_config.json, where it lacks them from config.json, and at last the tokenizer's own names.

    Raises:
        ExportError: a file is not JSON, or an id is outside the vocabulary.
    """
    texts = checkpoint.texts()
    generation, named = (
        parse_object(texts.get(file, b"{}"), file=file) for file in ("generation_config.json", "tokenizer_config.json")
    )

    def ids(role: str) -> list[int]:
        for source in (generation, checkpoint.config):
            value = source.get(f"{role}_token_id")
            if value is not None:
                return _checked(value, vocab_size, f"{role}_token_id")
        token = named.get(f"{role}_token")
        token_id = tokenizer.token_to_id(_content(token)) if token else None
        return [] if token_id is None else [token_id]

    bos = next(iter(ids("bos")), None)
    begins = tokenizer.encode("a").ids
    return SpecialTokens(
        bos=bos,
        eos=list(dict.fromkeys(ids("eos"))),
        pad=next(iter(ids("pad")), None),
        add_bos=bos is not None and bool(begins) and begins[0] == bos,
    )


def _checked(value: Any, vocab_size: int, field: str) -> list[int]:
    values = value if isinstance(value, list) else [value]
    # Some checkpoints say -1 where they have no such token.
    values = [item for item in values if item != -1]
    if not all(isinstance(item, int) and 0 <= item < vocab_size for item in values):
        raise ExportError(f"{value!r:.80} is outside the vocabulary of {vocab_size:,}", field=field)
    return values


def _content(token: Any) -> str:
    """A token's text; older files write it as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)
