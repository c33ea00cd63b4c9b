"""What Whisper's tokens mean: the ones that steer it, times, text, and the words of a text.

Floor 2. Ids come from the manifest, names from nowhere: English-only models have no strings for their timestamps, and
other files spell special tokens in other ways.
"""

import string
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from sardonyx.errors import InvalidRequest, UnsupportedFeature
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.repository.families import Whisper

Task = Literal["transcribe", "translate"]

TIMESTAMPS_PER_S = 50
"""Positions of the encoder, too."""

_WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
"""Languages that are written without spaces between words."""


class TokenWord(msgspec.Struct, frozen=True):
    """A word as the tokens spell it."""

    text: str
    """With the space in front of it; words joined are the text."""
    ids: list[int]
    """At least one."""


class WhisperTokens:
    """Reads and writes one model's tokens. Immutable, shared by all threads."""

    languages: list[str]
    """Codes that the model knows; ``en`` alone in English-only models."""
    end_id: int
    """``<|endoftext|>``; every token below it is text."""

    def __init__(self, tokenizer: Tokenizer, facts: Whisper) -> None:
        self._tokenizer = tokenizer
        self._facts = facts
        self.end_id = facts.end_id
        self.languages = list(facts.language_ids) or ["en"]

    @property
    def previous_id(self) -> int:
        """In front of the text before the window."""
        return self._facts.previous_id

    @property
    def timestamp_begin_id(self) -> int:
        """The timestamp 0.00."""
        return self._facts.timestamp_begin_id

    def token_bytes(self, token_id: int) -> bytes:
        """What a text token spells, maybe half a character."""
        return self._tokenizer.token_bytes(token_id)

    def start_sequence(self, language: str | None, task: Task, *, has_timestamps: bool) -> list[int]:
        """What stands between the text before the window and the result.

        Args:
            language: a code of `languages`; English-only models need none, the others always one.
            task: English-only models can only transcribe.
            has_timestamps: let the result have timestamps.

        Raises:
            InvalidRequest: the model does not know the language.
            UnsupportedFeature: the model cannot translate.
        """
        facts = self._facts
        if language not in self.languages and (language is not None or facts.language_ids):
            known = ", ".join(sorted(self.languages))
            raise InvalidRequest(f"language: {language!r} is none of this model's: {known}", param="language")
        task_id = facts.transcribe_id if task == "transcribe" else facts.translate_id
        if task == "translate" and task_id is None:
            raise UnsupportedFeature("this model cannot translate; ask for a transcription, or another model")
        ids = [facts.start_id]
        if language is not None and facts.language_ids:
            ids.append(facts.language_ids[language])
        if task_id is not None:
            ids.append(task_id)
        return ids if has_timestamps else [*ids, facts.no_timestamps_id]

    def prompt(self, text: str) -> list[int]:
        """The tokens of a text before the window: as speech is spelled, with a space in front. Blank text has none.

        Special tokens spelled out in it are characters.

        Raises:
            InvalidRequest: half a surrogate pair, which no UTF-8 text holds.
        """
        stripped = text.strip()
        return self._tokenizer.encode_plain(" " + stripped) if stripped else []

    def text(self, token_ids: Iterable[int]) -> str:
        """What text tokens spell, all others left out; bytes that are no whole character are U+FFFD."""
        return self._tokenizer.decode(filter(self.is_text, token_ids), skip_special_tokens=False)

    def is_text(self, token_id: int) -> bool:
        """Whether it is neither a special token nor a timestamp."""
        return token_id < self.end_id

    def is_timestamp(self, token_id: int) -> bool:
        """Whether it says a time."""
        return token_id >= self._facts.timestamp_begin_id

    def timestamp_s(self, token_id: int) -> float:
        """Seconds since the window's begin, of a timestamp."""
        return (token_id - self._facts.timestamp_begin_id) / TIMESTAMPS_PER_S

    def words(self, token_ids: Sequence[int], language: str | None) -> list[TokenWord]:
        """Cut a sequence into words; each token is in exactly one, and their order stays.

        Where words have spaces between them, a word begins at each piece that begins with a space, is nothing but
        punctuation, or is a token other than text. In languages without spaces each piece is a word. A piece is as few
        tokens as make whole characters.

        Args:
            token_ids: text tokens; others stand for themselves.
            language: a code, or ``None`` for English-only models.

        Source: openai-whisper's ``tokenizer.py``, but for tokens that are no UTF-8: there, pieces of a broken character
        can get lost.
        """
        pieces = self._pieces(token_ids)
        if language in _WITHOUT_SPACES:
            return pieces
        groups: list[list[TokenWord]] = []
        for piece in pieces:
            is_punctuation = piece.text.strip() in string.punctuation
            if not groups or piece.text.startswith(" ") or is_punctuation or not self.is_text(piece.ids[0]):
                groups.append([])
            groups[-1].append(piece)
        return [TokenWord("".join(p.text for p in group), [i for p in group for i in p.ids]) for group in groups]

    def _pieces(self, token_ids: Sequence[int]) -> list[TokenWord]:
        """Cut wherever a token ends and no character is left half."""
        parts = [self._tokenizer.token_bytes(token_id) for token_id in token_ids]
        data = b"".join(parts)
        inside = _offsets_inside_characters(data)
        pieces: list[TokenWord] = []
        begin = end = 0
        ids: list[int] = []
        for token_id, part in zip(token_ids, parts, strict=True):
            ids.append(token_id)
            end += len(part)
            if end not in inside:
                pieces.append(TokenWord(data[begin:end].decode("utf-8", "replace"), ids))
                begin, ids = end, []
        return pieces


def _offsets_inside_characters(data: bytes) -> set[int]:
    """Where cutting would change the text: inside of characters, and of bytes that together are one U+FFFD."""
    inside: set[int] = set()
    begin = 0
    while begin < len(data):
        bad_begin = bad_end = len(data)
        try:
            data[begin:].decode()
        except UnicodeDecodeError as error:
            bad_begin, bad_end = begin + error.start, begin + error.end
        inside.update(i for i in range(begin, bad_begin) if data[i] & 0xC0 == 0x80)
        inside.update(range(bad_begin + 1, bad_end))
        begin = bad_end
    return inside
