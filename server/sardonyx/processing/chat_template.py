"""Renders a model's chat template.

Floor 2. Trust: a template is a program that comes with the model files, so whoever may put a model into the repository
may choose it; callers never send one. It runs in Jinja's immutable sandbox, which keeps it from Python's internals but
does not bound its time, so the input is bounded (`ChatLimits`) and rendering belongs into a worker thread. 2,048 short
messages take a ChatML template 15 ms; one that looks at all messages for each of them, 2 s.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from sardonyx.errors import ConfigError, InvalidRequest
from sardonyx.processing.chat_messages import RESERVED, ChatInput, ChatLimits, Marks, TemplateTraits, mark, prepare

_log = logging.getLogger(__name__)

_TAG = RESERVED[2] + " "
"""Put behind the message to continue. The space shows whether the template trims contents."""

_GIVEN = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"})
_MAX_REFUSAL_CHARS = 500


class ChatTemplate:
    """One model's chat template, compiled. Immutable, shared by all threads.

    Args:
        source: Jinja, as Hugging Face's tokenizers write it.
        special_tokens: what the template may read as ``bos_token``, ``eos_token`` ...
        limits: on messages and rendered text.
        now: the clock of ``strftime_now``.
        file: the template's name for errors.

    Raises:
        ConfigError: the source is no Jinja; the message names the line.

    Source: huggingface/transformers 5.23, utils/chat_template_utils.py, whose text this renders.
    """

    source: str
    variables: frozenset[str]
    """Names beyond messages and tools that the template reads and a caller may set: ``enable_thinking`` ..."""
    traits: TemplateTraits

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        limits: ChatLimits | None = None,
        now: Callable[[], datetime] = datetime.now,
        file: str = "chat_template.jinja",
    ) -> None:
        self.source = source
        self._limits = limits or ChatLimits()
        self._special_tokens = dict(special_tokens or {})
        environment = _environment(now)
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"line {error.lineno}: {error.message}", file=file) from error
        self.variables = _inputs(tree) - _GIVEN - environment.globals.keys() - self._special_tokens.keys()
        constants = (node.value for node in tree.find_all(jinja2.nodes.Const))
        self.traits = self._probe(frozenset(value for value in constants if isinstance(value, str)))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        marks: Marks | None = None,
    ) -> str:
        """Write a conversation as one prompt.

        Args:
            messages: OpenAI's chat messages as plain JSON values; see `chat_messages.prepare` for what becomes of them.
            add_generation_prompt: end with the head of an assistant message.
            continue_final_message: leave the last message open, so that the completion goes on inside it. No head
                follows it then.
            tools: OpenAI's tool objects.
            variables: more names for the template (a request's ``chat_template_kwargs``). Those that it does not read
                have no effect; those that are not the caller's to set are refused.
            marks: rewrites every string of the caller's first; for `chat_encoding`.

        Raises:
            InvalidRequest: over a limit, a shape or role that templates do not take, or the template's own refusal
                (``raise_exception``), in its words.
            UnsupportedFeature: a content part that is not text.
        """
        wanted = variables or {}
        for name in wanted:
            if name in _GIVEN or name in self._special_tokens or name in self._template.environment.globals:
                raise InvalidRequest(
                    f"chat_template_kwargs: {name!r} is not a variable to set", param="chat_template_kwargs"
                )
        read = {name: value for name, value in wanted.items() if name in self.variables}
        chat = prepare(messages, tools, read, self.traits, self._limits)
        if marks is not None:
            chat = mark(chat, marks)
        if not continue_final_message:
            return self._run(chat, add_generation_prompt=add_generation_prompt)
        final = _tag_final_message(chat.messages[-1])
        return _cut_at_tag(self._run(chat, add_generation_prompt=False), final)

    def _run(self, chat: ChatInput, *, add_generation_prompt: bool) -> str:
        context = {
            "documents": None,
            **self._special_tokens,
            **chat.variables,
            "messages": chat.messages,
            "tools": chat.tools,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(context):
                num_chars += len(piece)
                if num_chars > self._limits.max_chars:
                    break
                pieces.append(piece)
        except _Refusal as refusal:
            raise InvalidRequest(str(refusal)[:_MAX_REFUSAL_CHARS], param="messages") from None
        except Exception as error:  # a template is a program: it can raise whatever Python can
            _log.debug("the chat template failed with %s", type(error).__name__)
            raise InvalidRequest("messages: this model's chat template cannot write them", param="messages") from None
        if num_chars > self._limits.max_chars:
            raise InvalidRequest(
                f"messages: a prompt of more than {self._limits.max_chars:,} characters, more than this model takes",
                param="messages",
            )
        return "".join(pieces)

    def _probe(self, literals: frozenset[str]) -> TemplateTraits:
        """Render a content of each form and see which of them arrives. 0.1 ms."""
        needle = "probe4711"
        arrived = []
        for content in (needle, [{"type": "text", "text": needle}]):
            chat = ChatInput(messages=[{"role": "user", "content": content}], tools=None, variables={})
            try:
                text = self._run(chat, add_generation_prompt=False)
            except InvalidRequest:
                text = ""
            # A list that was joined or concatenated arrives, too, but as Python writes it.
            arrived.append(needle in text and "'text'" not in text and '"text"' not in text)
        reads_strings, reads_parts = arrived
        return TemplateTraits(
            reads_strings=reads_strings or not reads_parts,
            reads_parts=reads_parts,
            reads_tool_calls="tool_calls" in self.source,
            literals=literals,
        )


class _Refusal(jinja2.TemplateError):
    """`raise_exception` was called."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what an assistant wrote, for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration has no ClassVar

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, but names that start with an underscore are refused: they could shadow Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's own, so that ``namespace(self=...)`` works
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError("a name that starts with an underscore")


def _environment(now: Callable[[], datetime]) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: object) -> None:
        raise _Refusal(str(message))

    def strftime_now(form: str) -> str:
        return now().strftime(form)

    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": _Namespace,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    }
    del environment.globals["lipsum"]
    return environment


def _inputs(tree: jinja2.nodes.Template) -> frozenset[str]:
    """Names that the template reads from outside: not its own variables, unless it asks whether they are set."""
    names = {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx == "store"}
    for node in tree.find_all((jinja2.nodes.Test, jinja2.nodes.Filter)):
        if node.name in {"defined", "undefined", "default", "d"} and isinstance(node.node, jinja2.nodes.Name):
            names.discard(node.node.name)
    return frozenset(jinja2.meta.find_undeclared_variables(tree) - names)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes HTML, which a model would read as text.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _tag_final_message(message: dict[str, Any]) -> str:
    """Mark the end of its text in place, and return the text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _TAG
        return content
    if isinstance(content, list) and content:
        text: str = content[-1]["text"]
        content[-1]["text"] = text + _TAG
        return text
    raise InvalidRequest("messages: the final one has no text to continue", param="messages")


def _cut_at_tag(text: str, final: str) -> str:
    at = text.rfind(_TAG.strip())
    if at < 0 or final.strip() not in text:
        raise InvalidRequest(
            "messages: this model's chat template does not write the final one as it is, so it cannot be continued",
            param="messages",
        )
    return text[:at] if text.startswith(_TAG, at) else text[:at].rstrip()
