"""Prompts of image models as tokens. Floor 2. Needs the `tokenizers` library only."""

from pathlib import Path

import tokenizers

from sardonyx.errors import ConfigError, ContextLengthExceeded, InvalidRequest

_MAX_CHARS_PER_TOKEN = 64
"""More cannot fit, and need not be tokenised to be refused."""


class PromptTokenizer:
    """One text encoder's tokenizer. Immutable, shared by all threads.

    Args:
        path: of its tokenizer.json.
        max_tokens: that the encoder takes, those put around a text among them.
        pad_token_id: fills shorter prompts up.

    Raises:
        ConfigError: the file is missing or is no tokenizer.
    """

    def __init__(self, path: Path, max_tokens: int, pad_token_id: int) -> None:
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"is not a tokenizer: {error}", file=path.name) from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._max_tokens = max_tokens
        self._pad_token_id = pad_token_id

    def encode(self, text: str, *, param: str) -> tuple[list[int], int]:
        """As many ids as the encoder takes, and how many of them the text has.

        Args:
            text: the prompt.
            param: the field that errors name.

        Raises:
            ContextLengthExceeded: it is longer than the encoder reads. Cutting it would leave words out in silence.
            InvalidRequest: half a surrogate pair, which no UTF-8 text holds.
        """
        if len(text) > _MAX_CHARS_PER_TOKEN * self._max_tokens:
            raise self._too_long(f"{len(text):,} characters", param)
        try:
            ids: list[int] = self._backend.encode(text).ids
        except (UnicodeEncodeError, TypeError):  # both are what the library says of it
            raise InvalidRequest(f"{param}: holds half a surrogate pair", param=param) from None
        if len(ids) > self._max_tokens:
            raise self._too_long(f"{len(ids)} tokens", param)
        return ids + [self._pad_token_id] * (self._max_tokens - len(ids)), len(ids)

    def _too_long(self, length: str, param: str) -> ContextLengthExceeded:
        return ContextLengthExceeded(f"{param}: has {length}; the model reads {self._max_tokens} tokens", param=param)
