"""What a caller asks of a text model, and what comes back: plain structs without behaviour.

Floor 4. Values were checked at the edge (`api`); only what needs the model (its length, its vocabulary) is checked
later.
"""

import msgspec

from sardonyx.core import FinishReason, SamplingParams


class GenerationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One API call's wishes, the same for each of its prompts and choices."""

    sampling: SamplingParams = SamplingParams()
    """Choice j of a prompt is drawn with ``seed + j`` where a seed is given."""
    max_tokens: int | None = None
    """Completion tokens of a choice at most; ``None``: to the end of the context. 0 scores the prompt only."""
    min_tokens: int = 0
    """Until so many completion tokens neither stop tokens nor stop strings end a choice."""
    stop: tuple[str, ...] = ()
    """Stop strings. The text ends before the first of them, see `include_stop_str_in_output`."""
    stop_token_ids: tuple[int, ...] = ()
    """End a choice as the model's own end tokens do; `TextChunk.stop_reason` then says which."""
    ignore_eos: bool = False
    """The model's own end tokens do not end a choice."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the stop token's text, at the end of the text."""
    skip_special_tokens: bool = True
    """Special tokens add no text."""
    add_special_tokens: bool = True
    """Encode string prompts as the tokenizer does by default, with a BOS where it has one. `start_chat` ignores it."""
    n: int = 1
    """Choices of each prompt."""
    best_of: int | None = None
    """Generate so many choices of each prompt and return the `n` with the highest mean log-probability."""
    num_prompt_logprobs: int | None = None
    """As `SamplingParams.num_logprobs`, for the prompt's tokens: fills `PromptInfo.logprobs`."""
    truncate_prompt_tokens: int | None = None
    """Keep the last so many prompt tokens; -1: as many as fit the model beside the completion."""
    timeout_s: float | None = None
    """The request's time, from arrival; ``None``: the server's own limit, which also bounds it."""


class TokenInfo(msgspec.Struct):
    """One token and its log-probability, from the raw logits."""

    token_id: int
    text: str
    """What the token is as text; the replacement character where its bytes are no whole characters."""
    bytes_: bytes
    logprob: float
    """At least -9999.0. The very float that `top` holds where the token is in it."""
    top: list[tuple[int, str, bytes, float]]
    """Token id, text, bytes and log-probability of the likeliest tokens, best first; as many as were asked for.

    Two ids may have the same text: a dict keyed by text keeps the larger one.
    """


class TextChunk(msgspec.Struct):
    """What one choice gained since its last chunk. A choice's last chunk, and only that, has a finish reason."""

    index: int
    """Choice: prompt * n + j."""
    text: str
    """May be empty, also while `token_ids` is not: half a character, or text that may become a stop string."""
    token_ids: list[int]
    """New completion tokens, a stop token among them."""
    tokens: list[TokenInfo]
    """One for each of `token_ids` where log-probabilities were asked for, else empty."""
    finish_reason: FinishReason | None = None
    """CANCELLED: `Generation.abort` was called. ERROR never: errors are raised."""
    stop_reason: int | str | None = None
    """With STOP: the stop string, or an id of `GenerationOptions.stop_token_ids`; ``None``: the model's own end."""


class Choice(msgspec.Struct):
    """A finished choice: all of its chunks as one."""

    index: int
    text: str
    token_ids: list[int]
    tokens: list[TokenInfo]
    finish_reason: FinishReason
    stop_reason: int | str | None = None


class PromptInfo(msgspec.Struct):
    """A prompt as the model sees it."""

    token_ids: list[int]
    """After truncation, with the special tokens that encoding added."""
    text: str
    """For echo: a string prompt as it came (unless truncated), else the tokens decoded."""
    logprobs: list[TokenInfo | None] | None = None
    """One for each token, the first ``None``, where asked for; known from this prompt's first chunk on."""


class Usage(msgspec.Struct):
    """Token counts of one API call. They grow while chunks arrive, and are final with the last one."""

    prompt_tokens: int = 0
    """Each prompt once, however many choices it has."""
    completion_tokens: int = 0
    """Of all choices, those that `best_of` drops included; stop tokens count, tokens after a stop string do not."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were still in the cache."""
