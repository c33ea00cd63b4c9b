"""One choice: the events of its sequence become text, stop strings applied.

Floor 4. Pure: no event loop, no clock, no engine.
"""

from sardonyx.core import FinishReason, SequenceEvent, TokenLogprobs
from sardonyx.processing.detokenizer import Detokenizer
from sardonyx.processing.stop_strings import StopStrings
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.serving.options import Choice, GenerationOptions, TextChunk, TokenInfo

_PROMPT_TAIL = 4


def token_info(tokenizer: Tokenizer, logprobs: TokenLogprobs) -> TokenInfo:
    """Log-probabilities with what their tokens are as text."""
    text, bytes_ = tokenizer.token_text, tokenizer.token_bytes
    return TokenInfo(
        token_id=logprobs.token_id,
        text=text(logprobs.token_id),
        bytes_=bytes_(logprobs.token_id),
        logprob=logprobs.logprob,
        top=[(token_id, text(token_id), bytes_(token_id), logprob) for token_id, logprob in logprobs.top],
    )


class Completion:
    """Text of one choice. After a chunk with a finish reason there is none.

    Args:
        index: of the choice.
        prompt_ids: the text goes on from there.
        eos_token_ids: the model's own end tokens.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        options: GenerationOptions,
        *,
        prompt_ids: list[int],
        eos_token_ids: frozenset[int],
    ) -> None:
        self.index = index
        self.num_tokens = 0
        """Completion tokens so far; those that come after a stop string are not counted."""
        self._tokenizer = tokenizer
        self._options = options
        self._eos_token_ids = frozenset[int]() if options.ignore_eos else eos_token_ids
        self._detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=options.skip_special_tokens, prompt_tail=prompt_ids[-_PROMPT_TAIL:]
        )
        self._stops = StopStrings(options.stop, include=options.include_stop_str_in_output)

    def push(self, event: SequenceEvent) -> TextChunk:
        """What the event adds. A stop string in it finishes the choice although the event does not."""
        chunk = TextChunk(index=self.index, text="", token_ids=[], tokens=[])
        num_tokens = len(event.token_ids)
        for position, token_id in enumerate(event.token_ids):
            self.num_tokens += 1
            chunk.token_ids.append(token_id)
            if event.logprobs:
                chunk.tokens.append(token_info(self._tokenizer, event.logprobs[position]))
            is_stop_token = event.finish_reason is FinishReason.STOP and position == num_tokens - 1
            if is_stop_token:
                chunk.stop_reason = None if token_id in self._eos_token_ids else token_id
            if not is_stop_token or self._options.include_stop_str_in_output:
                self._add(chunk, self._detokenizer.push(token_id))
            if chunk.finish_reason is not None:
                return chunk
        if event.finish_reason is not None:
            self._end(chunk, event.finish_reason)
        return chunk

    def cut(self) -> TextChunk:
        """The last chunk of a choice that was aborted: text that was held back."""
        chunk = TextChunk(index=self.index, text="", token_ids=[], tokens=[])
        self._end(chunk, FinishReason.CANCELLED)
        return chunk

    def _add(self, chunk: TextChunk, text: str) -> None:
        if self.num_tokens <= self._options.min_tokens:
            chunk.text += text
            return
        text, stop = self._stops.push(text)
        chunk.text += text
        if stop is not None:
            chunk.finish_reason, chunk.stop_reason = FinishReason.STOP, stop

    def _end(self, chunk: TextChunk, reason: FinishReason) -> None:
        """Let go what detokeniser and stop strings held back; the former may complete a stop string."""
        self._add(chunk, self._detokenizer.flush())
        if chunk.finish_reason is None:
            chunk.text += self._stops.flush()
            chunk.finish_reason = reason


def merge(chunk: TextChunk, later: TextChunk) -> None:
    """Append a later chunk of the same choice."""
    chunk.text += later.text
    chunk.token_ids += later.token_ids
    chunk.tokens += later.tokens
    chunk.finish_reason = later.finish_reason
    chunk.stop_reason = later.stop_reason


def best(choices: list[Choice], count: int) -> list[Choice]:
    """The `count` choices with the highest mean log-probability, best first; ties by index. They need `tokens`."""

    def mean_logprob(choice: Choice) -> float:
        return sum(token.logprob for token in choice.tokens) / max(1, len(choice.tokens))

    return sorted(choices, key=mean_logprob, reverse=True)[:count]
