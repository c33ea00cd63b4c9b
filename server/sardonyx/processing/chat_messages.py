"""Brings a caller's messages into the form that chat templates read.

Floor 2. Everything a template gets to see is copied here into fresh plain JSON values, within limits; nothing of the
caller's is changed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from sardonyx.errors import InvalidRequest, UnsupportedFeature

Marks = Callable[[list[str]], list[str]]
"""Rewrites texts of the caller's before a template sees them. One call gets texts that follow each other directly."""

RESERVED = "\ufdd0\ufdd1\ufdd2"
"""Unicode noncharacters, which no text should hold: removed from the caller's, so that a mark is always ours."""

_REMOVED = dict.fromkeys(map(ord, RESERVED))
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much one request may ask of a template. A sandbox does not bound time, so the input is bounded."""

    max_messages: int = 2048
    max_tools: int = 128
    max_chars: int = 1 << 22
    """Of all strings together, and of the rendered text."""
    max_depth: int = 32
    """Of nested lists and objects in one message, tool or variable."""


class TemplateTraits(msgspec.Struct, frozen=True, kw_only=True):
    """What a template was found to do."""

    reads_strings: bool = True
    """It writes a content that is a string."""
    reads_parts: bool = False
    """It writes a content that is a list of parts."""
    reads_tool_calls: bool = False
    literals: frozenset[str] = frozenset()
    """The string constants in it, roles among them."""


class ChatInput(msgspec.Struct, kw_only=True):
    """Fresh copies, ready for a template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]


def prepare(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
    traits: TemplateTraits,
    limits: ChatLimits,
) -> ChatInput:
    """Copy, check and normalise what the caller sent.

    As transformers does: keys that are ``None`` are dropped, and reasoning is offered under each of its names. As vLLM
    does: text parts become one string, joined by line feeds, for a template that reads strings only, and a string one
    part for a template that reads parts only; tool call arguments sent as JSON text become objects. ``developer``
    becomes ``system`` where the template does not know it.

    Raises:
        InvalidRequest: over a limit, a wrong shape, or a role that is neither OpenAI's nor named by the template.
        UnsupportedFeature: a content part that is not text.
    """
    if not messages:
        raise InvalidRequest("messages: at least one is needed", param="messages")
    if len(messages) > limits.max_messages:
        raise InvalidRequest(f"messages: {len(messages):,} of them; at most {limits.max_messages:,}", param="messages")
    if tools is not None and len(tools) > limits.max_tools:
        raise InvalidRequest(f"tools: {len(tools):,} of them; at most {limits.max_tools:,}", param="tools")
    copy = _Copier(limits)
    return ChatInput(
        messages=[_message(copy, message, traits, f"messages.{n}") for n, message in enumerate(messages)],
        tools=None if tools is None else [_object(copy, tool, f"tools.{n}") for n, tool in enumerate(tools)],
        variables=_object(copy, variables, "chat_template_kwargs"),
    )


def mark(chat: ChatInput, marks: Marks) -> ChatInput:
    """The same with every string rewritten, keys too; the text parts of one content in one call."""
    return ChatInput(
        messages=[_marked(message, marks) for message in chat.messages],
        tools=None if chat.tools is None else _marked(chat.tools, marks),
        variables=_marked(chat.variables, marks),
    )


class _Copier:
    """Copies JSON values and counts their characters."""

    def __init__(self, limits: ChatLimits) -> None:
        self._limits = limits
        self._num_chars = 0

    def __call__(self, value: Any, param: str, depth: int = 0) -> Any:
        if isinstance(value, str):
            self._count(value, param)
            return value.translate(_REMOVED) if any(char in value for char in RESERVED) else value
        if value is None or isinstance(value, bool | int | float):
            return value
        if depth >= self._limits.max_depth:
            raise InvalidRequest(f"{param}: nested more than {self._limits.max_depth} deep", param=param)
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise InvalidRequest(f"{param}: a key is not a string", param=param)
                self._count(key, param)
            return {key: self(item, param, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            self._count(value, param)  # an empty list costs a template a turn, too
            return [self(item, param, depth + 1) for item in value]
        raise InvalidRequest(f"{param}: not a JSON value", param=param)

    def _count(self, value: Sequence[Any], param: str) -> None:
        self._num_chars += len(value)
        if self._num_chars > self._limits.max_chars:
            raise InvalidRequest(
                f"{param}: more than {self._limits.max_chars:,} characters in all, which is more than this model takes",
                param=param,
            )


def _object(copy: _Copier, value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{param}: not an object", param=param)
    copied: dict[str, Any] = copy(value, param)
    return copied


def _message(copy: _Copier, message: Any, traits: TemplateTraits, param: str) -> dict[str, Any]:
    copied = {key: value for key, value in _object(copy, message, param).items() if value is not None}
    copied["role"] = _role(copied.get("role"), traits, f"{param}.role")
    content = copied.get("content")
    if isinstance(content, list):
        texts = [_part_text(part, f"{param}.content.{n}") for n, part in enumerate(content)]
        copied["content"] = "\n".join(texts) if not traits.reads_parts else [_text_part(text) for text in texts]
    elif isinstance(content, str):
        copied["content"] = content if traits.reads_strings else [_text_part(content)]
    elif content is not None:
        raise InvalidRequest(f"{param}.content: neither a string nor a list of parts", param=f"{param}.content")
    elif not traits.reads_tool_calls:
        copied["content"] = ""  # a template that knows no tool calls takes it for granted
    for n, call in enumerate(_calls(copied, f"{param}.tool_calls")):
        _parse_arguments(copy, call, f"{param}.tool_calls.{n}.function")
    reasoning = next((copied[name] for name in _REASONING if name in copied), None)
    if reasoning is not None:
        copied = {"thinking": reasoning, **copied, "reasoning_content": reasoning}
    return copied


def _role(role: Any, traits: TemplateTraits, param: str) -> str:
    # Phi-3's template writes '<|' + role + '|>': a free role could spell any special token.
    if not isinstance(role, str) or not (role in _ROLES or role in traits.literals):
        raise InvalidRequest(f"{param}: no role that this model's chat template knows", param=param)
    return "system" if role == "developer" and role not in traits.literals else role


def _part_text(part: Any, param: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise InvalidRequest(f"{param}: not a content part", param=param)
    kind = part.get("type", "text")
    if kind not in {"text", "refusal"}:
        raise UnsupportedFeature(f"{param}.type: this model takes text only", param=f"{param}.type")
    text = part.get(kind)
    if not isinstance(text, str):
        raise InvalidRequest(f"{param}.{kind}: not a string", param=f"{param}.{kind}")
    return text


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _calls(message: dict[str, Any], param: str) -> Iterator[dict[str, Any]]:
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InvalidRequest(f"{param}: not a list of objects", param=param)
    yield from calls


def _parse_arguments(copy: _Copier, call: dict[str, Any], param: str) -> None:
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise InvalidRequest(f"{param}: not an object", param=param)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = msgspec.json.decode(arguments) if arguments.strip() else {}
        except (msgspec.DecodeError, RecursionError):
            raise InvalidRequest(f"{param}.arguments: not JSON", param=f"{param}.arguments") from None
        function["arguments"] = copy(parsed, f"{param}.arguments")


def _marked(value: Any, marks: Marks) -> Any:
    if isinstance(value, str):
        return marks([value])[0]
    if isinstance(value, dict):
        # Templates look up keys without special tokens, which stay as they are; others are written by tojson only.
        return {marks([key])[0]: _marked(item, marks) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    if value and all(isinstance(item, dict) and item.keys() == {"type", "text"} for item in value):
        texts = marks([item["text"] for item in value])
        return [item | {"text": text} for item, text in zip(value, texts, strict=True)]
    return [_marked(item, marks) for item in value]
