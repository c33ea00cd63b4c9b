"""Bodies of the text endpoints: OpenAI's fields, those that vLLM and text-generation-webui add, and what is refused.

Floor 5. Types and ranges that stand alone are checked here, by msgspec while it decodes; what needs a second field or
the model is checked in `options`. An explicit null counts as absent everywhere, and unknown fields are ignored: clients
of OpenAI-compatible servers send more than any of these servers knows.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

Penalty = Annotated[float, Meta(ge=-2, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenCount = Annotated[int, Meta(ge=0, le=2**31 - 1)]
NumLogprobs = Annotated[int, Meta(ge=0, le=20)]
ModelName = Annotated[str, Meta(max_length=512)]
StopString = Annotated[str, Meta(min_length=1, max_length=4096)]
Prompt = str | list[TokenId | str | list[TokenId]]

MAX_STOPS = 16
MAX_PROMPTS = 2048

REFUSED_SAMPLING: dict[str, tuple[object, ...]] = {
    # constrained output
    "grammar": (),
    "grammar_string": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "json_schema": (),
    "structured_outputs": (),
    # token choice that our sampler does not have
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (0, -1),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "negative_prompt": (),
    "dynamic_temperature": (False,),
    "dynatemp_range": (0,),
    "smoothing_factor": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "adaptive_target": (0,),
    "temperature_last": (False,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "use_beam_search": (False,),
    "allowed_token_ids": (),
    "bad_words": (),
    "logits_processors": (),
    "logprob_token_ids": (),
    # what the server would have to read from somewhere
    "preset": ("None",),
    "prompt_embeds": (),
    "truncation_side": ("left",),
    "min_length": (0,),
}
"""Known fields that would change the answer and are not supported → values with which they change nothing."""

REFUSED_CHAT: dict[str, tuple[object, ...]] = REFUSED_SAMPLING | {
    "add_special_tokens": (False,),  # the template writes them
    "functions": (),
    "function_call": ("none", "auto"),
    # a template is code, and this one comes from the caller
    "chat_template": (),
    "chat_template_str": (),
    "documents": (),
    # text-generation-webui's own prompt building
    "mode": ("instruct",),
    "instruction_template": (),
    "instruction_template_str": (),
    "turn_template": (),
    "system_message": (),
    "name1_instruct": (),
    "name2_instruct": (),
    "context_instruct": (),
    "character": ("None",),
    "context": (),
    "greeting": (),
    "bot_name": (),
    "name2": (),
    "chat_instruct_command": (),
}


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    """One more chunk before the end, with usage and no choices."""
    continuous_usage_stats: bool | None = None
    """vLLM: usage so far in every chunk."""


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Only ``{"type": "text"}`` is served."""

    type: str


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What both text endpoints take."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = REFUSED_SAMPLING

    model: ModelName | None = None
    """A model or an alias; absent or empty: the server's default."""
    max_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """Completion tokens of a choice at most; -1: to the end of the context."""
    max_new_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """Another name for `max_tokens`, which wins."""
    auto_max_new_tokens: bool | None = None
    """text-generation-webui: to the end of the context."""
    min_tokens: TokenCount | None = None
    """vLLM: no end before so many tokens."""
    n: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Choices of each prompt; the server's `max_choices` bounds prompts times choices."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    """The text ends before the first of these."""
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    """vLLM: tokens that end a choice."""
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    """vLLM: the model's own end tokens end nothing."""
    ban_eos_token: bool | None = None
    """text-generation-webui: the model's own end tokens are never drawn."""
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    """Same seed, same request: same text. -1 draws one."""

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    """0 takes the likeliest token."""
    do_sample: bool | None = None
    """text-generation-webui: false is `temperature` 0."""
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """0 and -1 keep all tokens."""
    min_p: Share | None = None
    typical_p: Share | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    """Token id → what is added to its logit."""
    custom_token_bans: Annotated[str, Meta(max_length=16_384)] | None = None
    """text-generation-webui: token ids that are never drawn, separated by commas."""

    prompt_logprobs: NumLogprobs | None = None
    """vLLM: log-probabilities of the prompt's tokens, with so many alternatives."""
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    """Put the tokenizer's special tokens around a text prompt; a chat's template writes its own."""
    add_bos_token: bool | None = None
    """text-generation-webui's name for `add_special_tokens`."""
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """Keep the last so many prompt tokens; -1: as many as fit."""
    truncation_length: TokenCount | None = None
    """text-generation-webui: cut the prompt on the left until it and the completion fit so many tokens; 0: no cut."""
    return_tokens_as_token_ids: bool | None = None
    """Tokens of log-probabilities as ``token_id:7``."""
    return_token_ids: bool | None = None
    """Also answer with the token ids of prompt and completion."""
    response_format: ResponseFormat | None = None


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """Body of ``POST /v1/completions``."""

    prompt: Prompt | None = None
    """A text, texts, token ids, or lists of token ids. Required."""
    suffix: str | None = None
    """Text after the gap, for models that were trained to fill one."""
    echo: bool | None = None
    """Begin each text with its prompt; with `logprobs` also their log-probabilities."""
    best_of: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Generate so many choices, return the likeliest `n`."""
    logprobs: NumLogprobs | None = None
    """Log-probabilities of the tokens, with so many alternatives."""


class GenerateRequest(CompletionRequest, frozen=True, kw_only=True):
    """Body of ``POST /v1/generate``: a completion, with text-generation-webui's older names."""

    context: Prompt | None = None
    """Another name for `prompt`, which wins."""
    length: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """Another name for `max_tokens`, which wins."""


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a message's content."""

    type: str
    """``text`` or ``refusal``; parts of other types are refused."""
    text: str | None = None
    refusal: str | None = None


class ToolCallFunction(msgspec.Struct, frozen=True, kw_only=True):
    """What the assistant called."""

    name: str
    arguments: str = "{}"
    """A JSON object as text."""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that an assistant's message made."""

    function: ToolCallFunction
    id: str | None = None
    type: str = "function"


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: str
    """``system``, ``developer``, ``user``, ``assistant`` or ``tool``."""
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    """What the model thought, for templates that show it again."""


class ChatCompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """Body of ``POST /v1/chat/completions``."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = REFUSED_CHAT

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """OpenAI's newer name for `max_tokens`; it wins."""
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    """Alternatives of each token; needs `logprobs`."""
    tools: list[Any] | None = None  # Any: refused unless tool_choice is "none", never looked into
    tool_choice: Any = None  # Any: a word or an object
    modalities: list[str] | None = None
    add_generation_prompt: bool | None = None
    """Open the assistant's turn after the last message; the default unless it is continued."""
    continue_final_message: bool | None = None
    """vLLM: go on with the last message instead of answering it."""
    continue_: bool | None = None
    """text-generation-webui: as `continue_final_message`, and the answer begins with that message's text."""
    echo: bool | None = None
    """vLLM: a continued message's text begins the answer."""
    chat_template_kwargs: dict[str, Any] | None = None  # Any: checked against the template's list of variables
    """Variables for the chat template; only those that templates are known to use."""
    enable_thinking: bool | None = None
    """text-generation-webui's shorthand for the template variable."""


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of ``POST /tokenize``: vLLM's ``prompt`` or ``messages``, or llama.cpp's ``content``."""

    model: ModelName | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=2048)] | None = None
    add_special_tokens: bool | None = None
    """With `prompt`; by default yes."""
    add_special: bool | None = None
    """With `content`; by default no."""
    return_token_strs: bool | None = None
    with_pieces: bool | None = None
    """llama.cpp: answer with objects of id and piece."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # Any: as in ChatCompletionRequest


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of ``POST /detokenize``."""

    tokens: list[TokenId]
    model: ModelName | None = None
