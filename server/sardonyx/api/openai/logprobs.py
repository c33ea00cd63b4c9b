"""Log-probabilities in the forms that callers know: the older arrays, the newer objects, and vLLM's for prompts.

Floor 5. Harnesses compare these numbers with ``==`` (lm-evaluation-harness calls a token greedy where its value is the
largest among its alternatives), so a float passes through unchanged.
"""

import codecs
from collections.abc import Callable, Container, Sequence

from sardonyx.api.openai.replies import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.serving.options import PromptInfo, TokenInfo

TokenName = Callable[[int, str], str]
"""How a token is called, from its id and text."""


def text_name(token_id: int, text: str) -> str:
    """Its text: not unique, for parts of a character are all called U+FFFD."""
    return text


def id_name(token_id: int, text: str) -> str:
    """Its id, for ``return_tokens_as_token_ids``."""
    return f"token_id:{token_id}"


class CompletionLogprobsWriter:
    """Writes the arrays of one choice, in one piece or, where it is streamed, in many: text offsets go on.

    Args:
        silent_ids: tokens that add nothing to the text.
    """

    def __init__(self, name: TokenName, silent_ids: Container[int] = ()) -> None:
        self._name = name
        self._silent_ids = silent_ids
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, tokens: Sequence[TokenInfo]) -> CompletionLogprobs:
        """The arrays for so many more tokens."""
        return CompletionLogprobs(
            tokens=[self._name(token.token_id, token.text) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[self._top(token) for token in tokens],
            text_offset=[self._advance(token.token_id, token.bytes_) for token in tokens],
        )

    def write_prompt(self, prompt: PromptInfo, tokenizer: Tokenizer) -> CompletionLogprobs:
        """The arrays for an echoed prompt. Its first token has no predecessor to predict it: nulls stand there."""
        assert prompt.logprobs is not None, "asked for by every request with echo and logprobs"
        first = prompt.token_ids[0]
        offset = self._advance(first, tokenizer.token_bytes(first))
        rest = self.write([token for token in prompt.logprobs if token is not None])
        return CompletionLogprobs(
            tokens=[self._name(first, tokenizer.token_text(first)), *rest.tokens],
            token_logprobs=[None, *rest.token_logprobs],
            top_logprobs=[None, *rest.top_logprobs],
            text_offset=[offset, *rest.text_offset],
        )

    def _top(self, token: TokenInfo) -> dict[str, float]:
        """Alternatives by name, the token itself among them; of two with one name the likelier stays."""
        top: dict[str, float] = {}
        for token_id, text, _, logprob in token.top:  # best first
            top.setdefault(self._name(token_id, text), logprob)
        top.setdefault(self._name(token.token_id, token.text), token.logprob)
        return top

    def _advance(self, token_id: int, data: bytes) -> int:
        offset = self._offset
        if token_id not in self._silent_ids:
            self._offset += len(self._decoder.decode(data))
        return offset


def join_logprobs(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """The arrays of two pieces as one."""
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def chat_logprobs(tokens: Sequence[TokenInfo], name: TokenName) -> ChatLogprobs:
    """The newer form."""
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=name(token.token_id, token.text),
                logprob=token.logprob,
                bytes=list(token.bytes_),
                top_logprobs=[
                    TopLogprob(token=name(token_id, text), logprob=logprob, bytes=list(data))
                    for token_id, text, data, logprob in token.top
                ],
            )
            for token in tokens
        ]
    )


def prompt_logprobs(prompt: PromptInfo) -> PromptLogprobs | None:
    """As vLLM answers them."""
    if prompt.logprobs is None:
        return None
    return [None if token is None else _by_id(token) for token in prompt.logprobs]


def _by_id(token: TokenInfo) -> dict[str, PromptLogprob]:
    ranked = {
        str(token_id): PromptLogprob(logprob=logprob, rank=rank, decoded_token=text)
        for rank, (token_id, text, _, logprob) in enumerate(token.top, start=1)
    }
    own = PromptLogprob(logprob=token.logprob, rank=None, decoded_token=token.text)
    return {str(token.token_id): own} | ranked
