"""From a checked body to `GenerationOptions`: defaults, other servers' names for the same thing, cross-field rules.

Floor 5. Each rule is here once; the controllers only pass bodies through.
"""

from collections.abc import Mapping
from typing import Any

from litestar import Request

from sardonyx.api.openai.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from sardonyx.core import SamplingParams
from sardonyx.errors import InvalidRequest, UnsupportedFeature
from sardonyx.serving.options import GenerationOptions
from sardonyx.serving.text import TextModel

DEFAULT_MAX_TOKENS = 16
"""Of ``/v1/completions``, as OpenAI's. A chat's answer may go on to the end of the context."""
TIMEOUT_HEADER = "x-request-timeout-ms"

# Keeps one token, as 0 should; the sampler's range is (0, 1].
_SMALLEST_SHARE = 1e-9
# Finite, so that a temperature near 0 cannot make it NaN; no logit comes near.
_BANNED = -1e9
_MAX_BANS = 1024


def completion_options(body: CompletionRequest, model: TextModel, timeout_s: float | None) -> GenerationOptions:
    """What a completion's body asks for.

    Raises:
        InvalidRequest: fields that contradict each other.
        UnsupportedFeature: a field that this model or server cannot honour.
    """
    max_tokens = _first(body.max_tokens, getattr(body, "length", None), body.max_new_tokens, DEFAULT_MAX_TOKENS)
    n = body.n or 1
    if body.best_of is not None:
        if body.best_of < n:
            raise InvalidRequest(f"best_of: must be at least n, which is {n}", param="best_of")
        if body.stream and body.best_of > n:
            raise InvalidRequest(
                "best_of: the best choice is known only at the end; leave out stream or best_of", param="best_of"
            )
    num_prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        num_prompt_logprobs = max(body.logprobs, num_prompt_logprobs or 0)
    if max_tokens == 0 and num_prompt_logprobs is None:
        num_prompt_logprobs = 0  # the engine generates nothing only where it scores
    return _options(
        body,
        model,
        max_tokens=max_tokens,
        num_logprobs=body.logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        best_of=body.best_of,
        timeout_s=timeout_s,
    )


def chat_options(body: ChatCompletionRequest, model: TextModel, timeout_s: float | None) -> GenerationOptions:
    """What a chat's body asks for. Raises as `completion_options`."""
    max_tokens = _first(body.max_completion_tokens, body.max_tokens, body.max_new_tokens)
    if max_tokens == 0:
        param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        raise InvalidRequest(f"{param}: must be at least 1, or -1 for no limit", param=param)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
    _refuse_unsupported_chat(body)
    return _options(
        body,
        model,
        max_tokens=max_tokens,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        num_prompt_logprobs=body.prompt_logprobs,
        best_of=None,
        timeout_s=timeout_s,
    )


def chat_template_kwargs(body: ChatCompletionRequest) -> Mapping[str, Any]:
    """The template's variables; `ChatTemplate.render` refuses those that it does not know."""
    kwargs = dict(body.chat_template_kwargs or {})
    if body.enable_thinking is not None:
        kwargs.setdefault("enable_thinking", body.enable_thinking)
    return kwargs


def request_timeout_s(request: "Request[Any, Any, Any]") -> float | None:
    """The caller's own time limit from ``X-Request-Timeout-Ms``, in seconds.

    Raises:
        InvalidRequest: not a positive number.
    """
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and int(text[:12]) > 0):
        raise InvalidRequest(f"{TIMEOUT_HEADER}: must be a whole number of milliseconds above 0", param=TIMEOUT_HEADER)
    return int(text[:12]) / 1000


def _options(
    body: GenerationRequest,
    model: TextModel,
    *,
    max_tokens: int | None,
    num_logprobs: int | None,
    num_prompt_logprobs: int | None,
    best_of: int | None,
    timeout_s: float | None,
) -> GenerationOptions:
    if max_tokens == -1 or body.auto_max_new_tokens:
        max_tokens = None
    if max_tokens is not None and (body.min_tokens or 0) > max_tokens:
        raise InvalidRequest(f"min_tokens: is over max_tokens, which is {max_tokens}", param="min_tokens")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options: needs stream to be true", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("prompt_logprobs: not available in a stream; leave out one", param="prompt_logprobs")
    if body.response_format is not None and body.response_format.type != "text":
        raise UnsupportedFeature(
            f"response_format: only type text is supported, not {body.response_format.type[:32]}",
            param="response_format",
        )
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return GenerationOptions(
        sampling=_sampling(body, model, num_logprobs),
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        stop=stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        add_special_tokens=_first(body.add_special_tokens, body.add_bos_token, True) is True,
        n=body.n or 1,
        best_of=best_of,
        num_prompt_logprobs=num_prompt_logprobs,
        truncate_prompt_tokens=_truncation(body, model, max_tokens),
        timeout_s=timeout_s,
    )


def _sampling(body: GenerationRequest, model: TextModel, num_logprobs: int | None) -> SamplingParams:
    temperature = 0.0 if body.do_sample is False else _first(body.temperature, 1.0)
    return SamplingParams(
        temperature=temperature,
        top_k=max(0, body.top_k or 0),
        top_p=max(_SMALLEST_SHARE, _first(body.top_p, 1.0)),
        min_p=body.min_p or 0.0,
        typical_p=max(_SMALLEST_SHARE, _first(body.typical_p, 1.0)),
        repetition_penalty=_first(body.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_logit_bias(body, model),
        seed=None if body.seed in (None, -1) else body.seed % 2**63,
        num_logprobs=num_logprobs,
    )


def _logit_bias(body: GenerationRequest, model: TextModel) -> dict[int, float]:
    language = model.manifest.llm
    assert language is not None, "a TextModel's manifest has the llm part"
    bias = dict(body.logit_bias or {})
    for param, token_ids in (("logit_bias", list(bias)), ("custom_token_bans", _banned_ids(body))):
        for token_id in token_ids:
            if token_id >= language.vocab_size:
                raise InvalidRequest(
                    f"{param}: token {token_id} is not in the vocabulary of {language.vocab_size:,}", param=param
                )
    bias |= dict.fromkeys(_banned_ids(body), _BANNED)
    if body.ban_eos_token:
        bias |= dict.fromkeys(language.eos_token_ids or model.tokenizer.eos_token_ids, _BANNED)
    return bias


def _banned_ids(body: GenerationRequest) -> list[int]:
    words = [word.strip() for word in (body.custom_token_bans or "").split(",") if word.strip()]
    if len(words) > _MAX_BANS or not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise InvalidRequest(
            f"custom_token_bans: must be at most {_MAX_BANS:,} token ids separated by commas", param="custom_token_bans"
        )
    return [int(word) for word in words]


def _truncation(body: GenerationRequest, model: TextModel, max_tokens: int | None) -> int | None:
    if body.truncate_prompt_tokens == 0:
        raise InvalidRequest("truncate_prompt_tokens: must be at least 1, or -1", param="truncate_prompt_tokens")
    if body.truncate_prompt_tokens is not None or not body.truncation_length:
        return body.truncate_prompt_tokens
    left: int = min(body.truncation_length, model.max_model_len) - _first(max_tokens, 1)
    if left < 1:
        raise InvalidRequest(
            "truncation_length: leaves no room for a prompt beside max_tokens", param="truncation_length"
        )
    return left


def _refuse_unsupported_chat(body: ChatCompletionRequest) -> None:
    if body.tools and body.tool_choice != "none":
        raise UnsupportedFeature(
            'tools: this server does not call tools; leave them out, or set tool_choice to "none"', param="tools"
        )
    if body.tool_choice not in (None, "", "none", "auto"):
        raise UnsupportedFeature("tool_choice: this server does not call tools", param="tool_choice")
    if body.modalities and body.modalities != ["text"]:
        raise UnsupportedFeature("modalities: this model answers with text only", param="modalities")


def _first(*values: Any) -> Any:  # Any: whatever the first present value is
    """The first value that is not ``None``, or ``None``."""
    return next((value for value in values if value is not None), None)
