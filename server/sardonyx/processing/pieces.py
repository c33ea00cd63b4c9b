"""What each token adds to the text, in bytes, for the decoders that published tokenizers use.

Floor 2. A tokenizer.json names its decoder; the ones understood here give every token a fixed piece of the text,
whatever stands around it, and treat at most the text's start in a way of its own. So a text is the pieces joined, and
can grow token by token at the cost of its new piece.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from sardonyx.errors import ConfigError


class _ByteLevel(msgspec.Struct, tag_field="type", tag="ByteLevel"):
    pass


class _Metaspace(msgspec.Struct, tag_field="type", tag="Metaspace"):
    replacement: str = "▁"
    prepend_scheme: Literal["always", "first", "never"] | None = None
    add_prefix_space: bool = True


class _WordPiece(msgspec.Struct, tag_field="type", tag="WordPiece"):
    prefix: str = "##"
    cleanup: bool = True


class _Pattern(msgspec.Struct, forbid_unknown_fields=True):
    String: str


class _Replace(msgspec.Struct, tag_field="type", tag="Replace"):
    pattern: _Pattern
    content: str


class _ByteFallback(msgspec.Struct, tag_field="type", tag="ByteFallback"):
    pass


class _Fuse(msgspec.Struct, tag_field="type", tag="Fuse"):
    pass


class _Strip(msgspec.Struct, tag_field="type", tag="Strip"):
    content: Literal[" "]
    start: int
    stop: Literal[0]


_Part = _ByteLevel | _Metaspace | _WordPiece | _Replace | _ByteFallback | _Fuse | _Strip


class _Sequence(msgspec.Struct, tag_field="type", tag="Sequence"):
    decoders: list[_Part]


class _TokenizerFile(msgspec.Struct):
    decoder: _Part | _Sequence | None = None


_Rule = Callable[[str], bytes]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CLEANUP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Every token's piece, by id. Immutable, shared by all requests of a model."""

    tokens: list[str | None]
    """As the vocabulary spells them; ``None`` where an id has no token."""
    inner: list[bytes]
    """What a token adds to a text that has begun."""
    first: _Rule
    """What a token, given as the vocabulary spells it, adds when it begins the text."""
    num_stripped: int
    """Spaces at most that are taken off the text's start."""

    def join(self, token_ids: Iterable[int], skipped: frozenset[int]) -> bytes:
        """The bytes of a whole text. Ids without a token add nothing, as those in `skipped`."""
        tokens = self.tokens
        kept = [i for i in token_ids if i not in skipped and 0 <= i < len(tokens) and tokens[i] is not None]
        if not kept:
            return b""
        begin = tokens[kept[0]]
        assert begin is not None
        text = self.first(begin) + b"".join([self.inner[i] for i in kept[1:]])
        return strip_spaces(text, self.num_stripped)[0] if self.num_stripped else text


def strip_spaces(text: bytes, num_spaces: int) -> tuple[bytes, int]:
    """Take at most `num_spaces` off the start; the second value is how many the text that follows may still lose."""
    num_found = len(text) - len(text.lstrip(b" "))
    num_taken = min(num_found, num_spaces)
    return text[num_taken:], num_spaces - num_taken if num_found == len(text) else 0


def read_pieces(tokenizer_json: bytes, tokens: Sequence[str | None], *, file: str) -> Pieces:
    """Work out the pieces of a vocabulary from its tokenizer.json. 49,152 tokens take 0.05 s.

    Args:
        tokenizer_json: the file's bytes.
        tokens: by id, added tokens among them.
        file: its name for errors.

    Raises:
        ConfigError: not JSON, or a decoder whose pieces depend on their neighbours (CTC, BPEDecoder, regular
            expressions).

    Source: huggingface/tokenizers, src/decoders and src/pre_tokenizers/{byte_level,metaspace}.rs (0.23).
    """
    try:
        decoder = msgspec.json.decode(tokenizer_json, type=_TokenizerFile).decoder
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason, _, path = str(error).partition(" - at `$")
        raise ConfigError(reason, file=file, field=path.strip("`.") or None) from error
    inner, first, num_stripped = _rules(decoder, file)
    return Pieces(list(tokens), [b"" if token is None else inner(token) for token in tokens], first, num_stripped)


def _rules(decoder: _Part | _Sequence | None, file: str) -> tuple[_Rule, _Rule, int]:
    """How a token becomes bytes inside a text and at its start, and how many leading spaces go."""
    match decoder:
        case None:
            return _spaced, _as_spelled, 0
        case _ByteLevel() | _Sequence(decoders=[_ByteLevel()]):
            return _from_byte_level, _from_byte_level, 0
        case _Metaspace():
            return *_metaspace(decoder), 0
        case _WordPiece():
            return *_word_piece(decoder), 0
        case _Sequence(decoders=parts):
            rule, num_stripped = _sentence_piece(parts, file)
            return rule, rule, num_stripped
        case _:
            rule, num_stripped = _sentence_piece([decoder], file)
            return rule, rule, num_stripped


def _as_spelled(token: str) -> bytes:
    return token.encode()


def _spaced(token: str) -> bytes:
    return b" " + token.encode()


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable character for each of the 256 bytes, the other way round."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # an added token with a character outside the map stands for itself
        return token.encode()


def _metaspace(decoder: _Metaspace) -> tuple[_Rule, _Rule]:
    mark = decoder.replacement
    scheme = decoder.prepend_scheme or ("always" if decoder.add_prefix_space else "never")

    def inner(token: str) -> bytes:
        return token.replace(mark, " ").encode()

    def first(token: str) -> bytes:
        return token.replace(mark, "").encode()

    return inner, inner if scheme == "never" else first


def _word_piece(decoder: _WordPiece) -> tuple[_Rule, _Rule]:
    def first(token: str) -> bytes:
        if decoder.cleanup:
            for wrong, right in _CLEANUP:
                token = token.replace(wrong, right)
        return token.encode()

    def inner(token: str) -> bytes:
        is_suffix = token.startswith(decoder.prefix)
        return first(token.removeprefix(decoder.prefix) if is_suffix else " " + token)

    return inner, first


def _sentence_piece(parts: Sequence[_Part], file: str) -> tuple[_Rule, int]:
    """Replace …, ByteFallback, Fuse, Strip, in this order and each optional: what SentencePiece models become."""
    rest = list(parts)
    replaced: list[_Replace] = []
    while rest and isinstance(rest[0], _Replace):
        replaced.append(rest.pop(0))  # type: ignore[arg-type]  # the loop's condition narrows the list's head only
    has_bytes = bool(rest) and isinstance(rest[0], _ByteFallback)
    rest = rest[1:] if has_bytes else rest
    num_stripped = 0
    match rest:
        case [_Fuse(), _Strip() as strip]:
            num_stripped = strip.start
        case [] | [_Fuse()]:
            pass
        case _:
            raise ConfigError(
                "has an order of parts that cannot be decoded token by token; Replace, ByteFallback, Fuse, Strip can",
                file=file,
                field="decoder",
            )

    def inner(token: str) -> bytes:
        for part in replaced:
            token = token.replace(part.pattern.String, part.content)
        byte = _BYTE_TOKEN.fullmatch(token) if has_bytes else None
        return bytes([int(byte[1], 16)]) if byte else token.encode()

    return inner, num_stripped
