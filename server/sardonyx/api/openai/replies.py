"""Answers of the text endpoints, as OpenAI defines them, with the fields that vLLM adds where they were asked for.

Floor 5. Fields of type ``| UnsetType`` appear only when set; all others always.
"""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from sardonyx.core import FinishReason
from sardonyx.serving.options import Usage

FinishWord = Literal["stop", "length"]


class PromptTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """How the prompt's tokens were come by."""

    cached_tokens: int
    """Not computed again."""


class UsageReply(msgspec.Struct, frozen=True, kw_only=True):
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's form of one alternative at one prompt position."""

    logprob: float
    rank: int | None
    """1 for the likeliest; null below the alternatives that were asked for."""
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""One for each prompt token, by token id; the first is null."""


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """The older form: four arrays of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """Null for the first prompt token with ``echo``."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters of the text before the token."""


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice of a completion, or of one of its chunks."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishWord | None
    stop_reason: int | str | None = None
    """vLLM: the stop string or token id that ended it."""
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType | None = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix time."""
    model: str
    system_fingerprint: str | None = None
    choices: list[CompletionChoice]
    usage: UsageReply


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """An alternative."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token of a chat's answer."""

    token: str
    logprob: float
    bytes: list[int]
    """Of the token alone, which may be part of a character."""
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """The newer form."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    annotations: list[None] = []


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice of a chat completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishWord
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChoice]
    usage: UsageReply
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType | None = UNSET


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice of a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishWord | None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


def usage_reply(usage: Usage) -> UsageReply:
    """Counts as they are now."""
    return UsageReply(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
    )


def finish_word(reason: FinishReason) -> FinishWord:
    """OpenAI's word. A generation that was stopped from outside ended, as far as its caller can tell, by ``stop``."""
    return "length" if reason is FinishReason.LENGTH else "stop"
