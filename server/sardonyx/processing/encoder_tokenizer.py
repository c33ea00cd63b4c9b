"""Texts and pairs of texts to the rows of token ids that encoder models read, from a version folder's tokenizer.json.

Floor 2. Needs the `tokenizers` library only. An `EncoderTokenizer` is immutable and shared by all threads: texts are
cut with the methods of one encoding, never by a state of the tokenizer, and encoding lets other Python threads run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
import tokenizers

from sardonyx.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from sardonyx.processing.tokenizer import TOKENIZER_FILE

Side = Literal["right", "left"]

MAX_CHARS_PER_TOKEN = 16
"""Of a text that is to be cut, no more is tokenised for each token that is kept: else 10 MB would cost seconds."""


class Row(msgspec.Struct, frozen=True, eq=False):
    """What a model reads as one."""

    token_ids: npt.NDArray[np.int64]
    token_type_ids: npt.NDArray[np.int64] | None = None
    """``None``: all 0."""

    def __len__(self) -> int:
        return len(self.token_ids)


class _Model(msgspec.Struct):
    unk_token: str | None = None
    unk_id: int | None = None


class _File(msgspec.Struct):
    model: _Model


class EncoderTokenizer:
    """One model's tokenizer. Made by `load`."""

    vocab_size: int
    """The highest id plus one. The model may know more."""
    num_special_tokens: int
    """That are put around a text."""

    def __init__(self, data: bytes, file: str) -> None:
        try:
            self._backend = tokenizers.Tokenizer.from_buffer(data)
            model = msgspec.json.decode(data, type=_File).model
        except Exception as error:  # the library raises plain Exception and ValueError for whatever is wrong
            raise ConfigError(f"is not a tokenizer: {error}", file=file) from error
        # Most files say how to cut and pad. That is the caller's and the runner's.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = max(self._backend.get_vocab().values(), default=-1) + 1
        self._unk_id = model.unk_id if model.unk_token is None else self._backend.token_to_id(model.unk_token)
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.num_special_tokens = self._backend.num_special_tokens_to_add(is_pair=False)
        self._num_special_of_pair = self._backend.num_special_tokens_to_add(is_pair=True)

    @classmethod
    def load(cls, folder: Path) -> "EncoderTokenizer":
        """Read a version folder's tokenizer.json; of its models each will do, WordPiece, Unigram, BPE or WordLevel.

        Raises:
            ConfigError: it is missing or wrong.
        """
        path = folder / TOKENIZER_FILE
        try:
            return cls(path.read_bytes(), str(path))
        except FileNotFoundError as error:
            raise ConfigError("is missing", file=str(path)) from error
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error

    def encode(
        self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None, side: Side = "right"
    ) -> Row:
        """The row of a text.

        Args:
            text: any length; limits are the caller's. An empty one is its special tokens, else the unknown token.
            add_special_tokens: put before and after it what the tokenizer does by itself (``[CLS]``, ``</s>``).
            max_tokens: of the row, special ones among them: what is more is cut off. Of a text far longer than that
                only `MAX_CHARS_PER_TOKEN` for each are looked at. ``None``: keep all.
            side: that is cut off.

        Raises:
            InvalidRequest: half a surrogate pair, `max_tokens` that leaves no room for a token of the text, or a text
                without any token.
        """
        if max_tokens is None:
            return self._row(self._encode(text, add_special_tokens), is_pair=False)
        room = self._room(max_tokens, add_special_tokens)
        text = _cut(text, room, side)
        encoding = self._encode(text, add_special_tokens)
        if len(encoding) > max_tokens:
            encoding = self._encode(text, add_special_tokens=False)
            encoding.truncate(room, direction=side)
            encoding = self._backend.post_process(encoding, None, add_special_tokens)
        return self._row(encoding, is_pair=False)

    def encode_pair(self, query: str, text: str, *, max_tokens: int | None = None, side: Side = "right") -> Row:
        """The row of two texts, with the special tokens and token types that the post-processor gives pairs.

        Args:
            query: is never cut.
            text: is cut where the two have more than `max_tokens` together, on the named side.

        Raises:
            InvalidRequest: half a surrogate pair.
            ContextLengthExceeded: the query alone leaves no room for the text.
        """
        if max_tokens is None:
            return self._row(self._encode((query, text)), is_pair=True)
        text = _cut(text, max_tokens, side)
        encoding = self._encode((query, text))
        if len(encoding) > max_tokens:
            first = self._encode(query, add_special_tokens=False)
            room = max_tokens - self._num_special_of_pair - len(first)
            if room < 1:
                raise ContextLengthExceeded(
                    f"the query has {len(first):,} tokens, which leaves no room for a text: query and text have "
                    f"{max_tokens:,} together, {self._num_special_of_pair} special ones among them; shorten the query",
                    param="input",
                )
            second = self._encode(text, add_special_tokens=False)
            second.truncate(room, direction=side)
            encoding = self._backend.post_process(first, second)
        return self._row(encoding, is_pair=True)

    def windows(self, text: str, max_tokens: int, *, stride: int = 64) -> list[Row]:
        """The rows that cover a text, each with special tokens, in its order; at least one.

        Args:
            text: any length; limits are the caller's.
            max_tokens: of a row.
            stride: tokens at the end of a row with which the next begins; less where rows are short.

        Raises:
            InvalidRequest: as `encode`.
        """
        encoding = self._encode(text)
        if len(encoding) <= max_tokens:
            return [self._row(encoding, is_pair=False)]
        room = self._room(max_tokens, add_special_tokens=True)
        encoding = self._encode(text, add_special_tokens=False)
        encoding.truncate(room, stride=min(stride, room // 2))
        encoding = self._backend.post_process(encoding)
        return [self._row(each, is_pair=False) for each in (encoding, *encoding.overflowing)]

    def count_prompt_tokens(self, prompt: str) -> int:
        """Tokens at the head of a row that are the prompt's, as sentence-transformers counts them.

        The beginning special token is one of them, the last one is not.
        """
        ids = self._encode(prompt).ids
        return len(ids) - 1 if ids and ids[-1] in self._special_ids else len(ids)

    def _encode(self, text: str | tuple[str, str], add_special_tokens: bool = True) -> tokenizers.Encoding:
        # encode_batch_fast and not encode, for other threads' sake: see `processing.tokenizer`.
        try:
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except TypeError:
            raise InvalidRequest(
                "the text holds half a surrogate pair, which is not valid Unicode", param="input"
            ) from None

    def _room(self, max_tokens: int, add_special_tokens: bool) -> int:
        num_special = self.num_special_tokens if add_special_tokens else 0
        if max_tokens <= num_special:
            raise InvalidRequest(
                f"texts cannot be cut to {max_tokens} tokens: {num_special} of them are special ones; ask for at least "
                f"{num_special + 1}",
                param="input",
            )
        return max_tokens - num_special

    def _row(self, encoding: tokenizers.Encoding, *, is_pair: bool) -> Row:
        ids: Sequence[int] = encoding.ids
        if not ids:
            if self._unk_id is None:
                raise InvalidRequest("the text has no tokens, and this model none for an empty text", param="input")
            return Row(np.array([self._unk_id], np.int64))
        types = np.array(encoding.type_ids, np.int64)
        return Row(np.array(ids, np.int64), types if types.any() else None)


def _cut(text: str, num_tokens: int, side: Side) -> str:
    """As much of a text as so many tokens are ever likely to need."""
    most = MAX_CHARS_PER_TOKEN * num_tokens
    if len(text) <= most:
        return text
    return text[:most] if side == "right" else text[-most:]
