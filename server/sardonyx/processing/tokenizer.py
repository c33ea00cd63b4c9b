"""Text to token ids and back, from the files of a version folder.

Floor 2. Needs the `tokenizers` library only. A `Tokenizer` is immutable and shared by all threads; encoding lets other
Python threads run.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import tokenizers
from tokenizers import models

from sardonyx.errors import ConfigError, InvalidRequest
from sardonyx.processing.pieces import Pieces, read_pieces

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What tokenizer_config.json may call a token, and a chat template may read."""

_T = TypeVar("_T", bound=msgspec.Struct)


class _AddedToken(msgspec.Struct):
    content: str


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    bos_token: str | _AddedToken | None = None
    eos_token: str | _AddedToken | None = None
    unk_token: str | _AddedToken | None = None
    sep_token: str | _AddedToken | None = None
    pad_token: str | _AddedToken | None = None
    cls_token: str | _AddedToken | None = None
    mask_token: str | _AddedToken | None = None
    tokenizer_class: str | None = None
    chat_template: str | list[_NamedTemplate] | None = None


class _GenerationConfig(msgspec.Struct):
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None


class Tokenizer:
    """One model's tokenizer. Made by `load`."""

    special_tokens: dict[str, str]
    """By the name that chat templates use (``bos_token``); only those that the model has."""
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Every token that ends a completion: the generation config's, else the tokenizer's own. Ascending."""
    special_ids: frozenset[int]
    """What `decode` skips."""
    vocab_size: int
    """The highest id plus one. The model's logits may be wider."""
    chat_template: str | None
    """The Jinja source: chat_template.jinja, else the tokenizer config's."""
    pieces: Pieces
    """What each token adds to a text."""

    def __init__(self, folder: Path) -> None:
        path = folder / TOKENIZER_FILE
        data = _read(path)
        if data is None:
            raise ConfigError("is missing", file=str(path))
        self._backend = _backend(data, path)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocab = self._backend.get_vocab()
        self.vocab_size = max(vocab.values(), default=-1) + 1
        tokens: list[str | None] = [None] * self.vocab_size
        for token, token_id in vocab.items():
            tokens[token_id] = token
        self.pieces = read_pieces(data, tokens, file=str(path))
        self._plain = _without_added_tokens(self._backend)
        special = [token for token in added.values() if token.special]
        self._finder = _finder(self._backend, special)
        self._beginnings = _beginnings(self._backend, special)
        self._read_names(folder, vocab)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read a version folder: tokenizer.json and, where they exist, the other three files.

        Takes 0.2 s and 40 MB for 49,152 tokens.

        Raises:
            ConfigError: a file is missing or wrong; it names the file and the field.
        """
        return cls(folder)

    def _read_names(self, folder: Path, vocab: dict[str, int]) -> None:
        """Special tokens and the chat template, from the optional files."""
        path = folder / TOKENIZER_CONFIG_FILE
        config = _parse(path, _TokenizerConfig)
        generation = _parse(folder / GENERATION_CONFIG_FILE, _GenerationConfig)
        self.special_tokens = {}
        for name in _NAMES:
            token = getattr(config, name)
            content = token.content if isinstance(token, _AddedToken) else token
            if content is None and (ids := _ids(getattr(generation, f"{name}_id", None))):
                content = self.token_string(ids[0])
            if content is None:
                continue
            if name in {"bos_token", "eos_token"} and content not in vocab:
                raise ConfigError(f"{content!r} is not in {TOKENIZER_FILE}", file=str(path), field=name)
            self.special_tokens[name] = content
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            vocab.get(self.special_tokens.get(name, "")) for name in ("bos_token", "eos_token", "pad_token")
        )
        own = [] if self.eos_token_id is None else [self.eos_token_id]
        self.eos_token_ids = tuple(sorted(set(_ids(generation.eos_token_id) or own)))
        self._tokenizer_class = config.tokenizer_class
        self.chat_template = _chat_template(folder, config)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens spelled out in it become what they spell; see `encode_plain`.

        Linear in the text, and without the interpreter lock: about 0.5 s for 1 MB.

        Args:
            text: any length; limits are the caller's.
            add_special_tokens: put before and after it what the tokenizer does by itself (a BOS, say).

        Raises:
            InvalidRequest: half a surrogate pair, which no UTF-8 text holds.
        """
        return _ids_of(self._backend, text, add_special_tokens=add_special_tokens)

    def encode_batch(self, texts: Iterable[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text.

        One after the other: the library's own batches take every core, and the step loop needs them.
        """
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text in which no added token is recognised: ``<|im_end|>`` is ten characters.

        Nothing is put before or after it. A vocabulary can still hold a way to spell a special token from ordinary
        pieces; no byte-level BPE does.
        """
        return _ids_of(self._plain, text, add_special_tokens=False)

    def find_special(self, text: str) -> list[tuple[int, int]]:
        """Where `encode` would read special tokens in a text: start and end, ascending, not overlapping.

        1 MB that holds none takes 0.03 s; a text without even a token's first character, next to nothing.
        """
        if self._beginnings is not None and self._beginnings.search(text) is None:
            return []
        if not _ids_of(self._finder, text, add_special_tokens=False):
            return []
        return self._finder.encode_batch([text], add_special_tokens=False)[0].offsets

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a token sequence. Ids without a token add nothing; bytes that are no UTF-8 become U+FFFD.

        Equal to the `tokenizers` library's text but for one case: in a run of ``<0x..>`` tokens with an invalid byte,
        that library gives up the whole run, and this only the bytes that are wrong. Only so a text can be
        streamed. Spaces before punctuation are never "cleaned up".
        """
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        return self.pieces.join(token_ids, skipped).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text that has begun; empty for an id without a token."""
        return self.pieces.inner[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD where it is not whole characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_string(self, token_id: int) -> str | None:
        """As the vocabulary spells it: ``Ġthe``. ``None`` for an id without a token."""
        return self.pieces.tokens[token_id] if 0 <= token_id < self.vocab_size else None

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        return self._backend.token_to_id(token)

    def info(self) -> dict[str, str | None]:
        """What ``/tokenizer_info`` answers: plain strings, ``None`` where the model has none.

        Source: lm-evaluation-harness, `RemoteTokenizer`, which requires the key ``eos_token``.
        """
        return {
            "tokenizer_class": self._tokenizer_class,
            **{name: self.special_tokens.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")},
            "chat_template": self.chat_template,
        }


def _backend(data: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception and ValueError for whatever is wrong with the file
        raise ConfigError(f"is not a tokenizer: {error}", file=str(path)) from error
    # A file saved by a training script may cut or pad every text; a server must not.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _without_added_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same model, shared and not copied, that recognises no added token."""
    plain = tokenizers.Tokenizer(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    return plain


def _finder(backend: tokenizers.Tokenizer, special: Sequence[tokenizers.AddedToken]) -> tokenizers.Tokenizer:
    """An empty model that gives a token for each special token of a text and nothing for the rest.

    It is the library's own matcher, so it finds what encoding finds, normalisation included.
    """
    finder = tokenizers.Tokenizer(models.BPE({}, []))
    if backend.normalizer is not None:
        finder.normalizer = backend.normalizer
    finder.add_special_tokens(list(special))
    return finder


def _beginnings(backend: tokenizers.Tokenizer, special: Sequence[tokenizers.AddedToken]) -> re.Pattern[str] | None:
    """The first characters of special tokens; ``None`` where normalisation may make them of others."""
    if not special or (backend.normalizer is not None and any(token.normalized for token in special)):
        return None
    return re.compile("|".join(re.escape(char) for char in sorted({token.content[:1] for token in special})))


def _ids_of(backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    # encode_batch_fast and not encode: only the batch calls release the interpreter lock (tokenizers 0.23.3: a counting
    # thread got 3 turns in 2.4 s of encode, 1,363 in 1.2 s of encode_batch_fast), and "fast" leaves out the offsets.
    try:
        return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    except TypeError:
        raise InvalidRequest("the text holds half a surrogate pair, which is not valid Unicode") from None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error


def _parse(path: Path, kind: type[_T]) -> _T:
    data = _read(path)
    if data is None:
        return kind()
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason, _, where = str(error).partition(" - at `$")
        raise ConfigError(reason, file=str(path), field=where.strip("`.") or None) from error


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _chat_template(folder: Path, config: _TokenizerConfig) -> str | None:
    path = folder / CHAT_TEMPLATE_FILE
    data = _read(path)
    if data is not None:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ConfigError("is not UTF-8", file=str(path)) from error
    if isinstance(config.chat_template, list):
        by_name = {entry.name: entry.template for entry in config.chat_template}
        return by_name.get("default")
    return config.chat_template
