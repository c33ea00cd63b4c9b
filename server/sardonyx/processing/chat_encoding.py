"""Turns a conversation into token ids in which only the chat template writes special tokens.

Floor 2. A message that spells ``<|im_end|>`` must not end its turn: whoever can put text into a prompt could otherwise
speak as the system or the assistant, and reach tokens (image placeholders, say) that the runner does not expect.
"""

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from sardonyx.processing.chat_messages import RESERVED
from sardonyx.processing.chat_template import ChatTemplate
from sardonyx.processing.tokenizer import Tokenizer

_START, _END = RESERVED[0], RESERVED[1]
_SPLIT = re.compile(f"{_START}([^{_START}{_END}]*){_END}|[{_START}{_END}]")


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Render and encode, with special tokens that the caller spells out read as ordinary text.

    Where the caller spells none, the ids are those of the rendered text, as `transformers` gives them. Where it does,
    each is marked before rendering, and encoded without special tokens; the rest of the text stays as it was.

    Two limits: tokens that a tokenizer adds but does not call special (``<think>``, ``<tool_call>``) are read wherever
    they stand, since histories and prefilled answers need them; and a template that edits contents (replaces, slices)
    could build a special token from parts that were none.

    Takes and raises what `ChatTemplate.render` does.

    Source: `sanitize_control_tokens` of huggingface/transformers 5.23; CVE-2026-44222 is what happens without.
    """
    marker = _Marker(tokenizer)
    text = template.render(
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        tools=tools,
        variables=variables,
        marks=marker.mark,
    )
    if not marker.is_used:
        return tokenizer.encode(text, add_special_tokens=False)
    return _encode_marked(tokenizer, text)


class _Marker:
    """Wraps special tokens in a caller's strings."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.is_used = False

    def mark(self, texts: list[str]) -> list[str]:
        """Also keeps tokens from forming where the texts meet, trimmed or not."""
        marked = [self._mark(text) for text in texts]
        if len(texts) > 1 and any(map(self._joins, (texts, [text.strip() for text in texts]))):
            self.is_used = True
            return [text + _END for text in marked]
        return marked

    def _joins(self, texts: list[str]) -> bool:
        spans = self._tokenizer.find_special("".join(texts))
        borders = list(itertools.accumulate(map(len, texts)))
        return any(bisect_right(borders, start) != bisect_left(borders, end) for start, end in spans)

    def _mark(self, text: str) -> str:
        pieces: list[str] = []
        done = 0
        for start, end in self._tokenizer.find_special(text):
            pieces += [text[done:start], _START, text[start:end], _END]
            done = end
        if not pieces:
            return text
        self.is_used = True
        return "".join([*pieces, text[done:]])


def _encode_marked(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode piece by piece. A mark whose partner a template's ``split`` took away still keeps two pieces apart."""
    pieces = _SPLIT.split(text)
    ids = tokenizer.encode(pieces[0], add_special_tokens=False)
    for n, piece in enumerate(pieces[1:], start=1):
        if piece:
            ids += _encode_inner(tokenizer, piece, is_marked=n % 2 == 1)
    return ids


def _encode_inner(tokenizer: Tokenizer, piece: str, *, is_marked: bool) -> list[int]:
    """Encode a piece from inside a text.

    SentencePiece tokenizers put a space before a text's start, which this is not: so a line feed goes before the piece,
    and its ids are taken off again. Where they merged with the piece's, the piece is encoded as it is.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode_plain(text) if is_marked else tokenizer.encode(text, add_special_tokens=False)

    line_feed = encode("\n")
    ids = encode("\n" + piece)
    ids = ids[len(line_feed) :] if ids[: len(line_feed)] == line_feed else encode(piece)
    if is_marked and len(piece) > 1 and not tokenizer.special_ids.isdisjoint(ids):
        # A Unigram model holds its special tokens among the ordinary pieces; character by character it cannot use them.
        ids = [token_id for char in piece for token_id in _encode_inner(tokenizer, char, is_marked=True)]
    return ids
