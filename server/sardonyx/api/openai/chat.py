"""``POST /v1/chat/completions``.

Floor 5. Messages in, an assistant's message out; the model's own chat template makes the prompt of them.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from litestar import Controller, Request, Response
from litestar.params import JSONBody
from msgspec import UNSET, UnsetType

from sardonyx.api.dependencies import Models
from sardonyx.api.openai.call import TextCall, system_fingerprint
from sardonyx.api.openai.logprobs import chat_logprobs, prompt_logprobs
from sardonyx.api.openai.options import chat_options, chat_template_kwargs
from sardonyx.api.openai.replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    finish_word,
    usage_reply,
)
from sardonyx.api.openai.schemas import ChatCompletionRequest, ChatMessage
from sardonyx.api.openai.sse import encode
from sardonyx.api.openapi import json_post
from sardonyx.errors import InvalidRequest
from sardonyx.serving.generation import Generation
from sardonyx.serving.options import Choice, TextChunk, TokenInfo
from sardonyx.serving.text import TextModel

_BEFORE_CONTENT = b',"delta":{"content":'
_AFTER_CONTENT = b'},"logprobs":null,"finish_reason":null}'


class ChatController(Controller):
    """Conversations."""

    tags = ("Text",)

    @json_post("/v1/chat/completions", ChatCompletionRequest, ChatCompletion)
    async def create_chat_completion(
        self, data: JSONBody[ChatCompletionRequest], request: Request[Any, Any, Any], models: Models
    ) -> Response[bytes]:
        """Answer a conversation, or go on with its last message."""
        return await ChatCall(data, models.resolve(data.model), request).answer()


class ChatCall(TextCall[ChatCompletionRequest]):
    """One chat completion."""

    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"

    def __init__(self, body: ChatCompletionRequest, model: TextModel, request: Request[Any, Any, Any]) -> None:
        super().__init__(body, model, request)
        self._continues = bool(body.continue_final_message or body.continue_)
        self._echoed = ""
        self._begun: set[int] = set()
        self._is_plain = not body.logprobs and not body.return_token_ids

    async def start(self) -> Generation:
        """Begin generating."""
        body = self.body
        options = chat_options(body, self.model, self.timeout_s)
        messages = template_messages(body.messages)
        if body.add_generation_prompt and self._continues:
            raise InvalidRequest(
                "add_generation_prompt: a message that is continued cannot be answered; leave out one",
                param="add_generation_prompt",
            )
        if body.continue_ and body.messages[-1].role != "assistant":
            raise InvalidRequest("continue_: the last message is not the assistant's", param="continue_")
        if self._continues and (body.echo or body.continue_):
            self._echoed = text_of(body.messages[-1])
        return await self.model.start_chat(
            messages,
            options,
            request_id=self.id,
            template_kwargs=chat_template_kwargs(body),
            continue_final_message=self._continues,
            add_generation_prompt=body.add_generation_prompt is not False and not self._continues,
        )

    def reply(self, choices: Sequence[Choice]) -> ChatCompletion:
        """The whole answer."""
        prompt = self.generation.prompts[0]
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model.name,
            system_fingerprint=system_fingerprint(self.model),
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=AssistantMessage(content=self._echoed + choice.text),
                    logprobs=self._logprobs(choice.tokens),
                    finish_reason=finish_word(choice.finish_reason),
                    stop_reason=choice.stop_reason,
                    token_ids=choice.token_ids if self.body.return_token_ids else UNSET,
                )
                for choice in choices
            ],
            usage=usage_reply(self.generation.usage),
            prompt_token_ids=prompt.token_ids if self.body.return_token_ids else UNSET,
            prompt_logprobs=UNSET if self.body.prompt_logprobs is None else prompt_logprobs(prompt),
        )

    def frame(self, chunk: TextChunk) -> bytes:
        """Role first, then content, then an empty delta with the finish reason: what OpenAI's clients expect."""
        head = b"" if chunk.index in self._begun else self._first_frame(chunk.index)
        if self._is_plain:
            if chunk.text:
                head += self.frames.text(chunk.index, _BEFORE_CONTENT, chunk.text, _AFTER_CONTENT)
        elif chunk.text or chunk.token_ids:
            head += self._frame(
                ChatChunkChoice(
                    index=chunk.index,
                    delta=Delta(content=chunk.text),
                    logprobs=self._logprobs(chunk.tokens),
                    finish_reason=None,
                    token_ids=chunk.token_ids if self.body.return_token_ids else UNSET,
                )
            )
        if chunk.finish_reason is None:
            return head
        return head + self._frame(
            ChatChunkChoice(
                index=chunk.index,
                delta=Delta(),
                finish_reason=finish_word(chunk.finish_reason),
                stop_reason=chunk.stop_reason,
            )
        )

    def _first_frame(self, index: int) -> bytes:
        self._begun.add(index)
        prompt_ids: list[int] | UnsetType = (
            self.generation.prompts[0].token_ids if self.body.return_token_ids else UNSET
        )
        delta = Delta(role="assistant", content=self._echoed, refusal=None)
        return self._frame(ChatChunkChoice(index=index, delta=delta, finish_reason=None, prompt_token_ids=prompt_ids))

    def _frame(self, choice: ChatChunkChoice) -> bytes:
        return self.frames.choice(encode(choice))

    def _logprobs(self, tokens: Sequence[TokenInfo]) -> ChatLogprobs | None:
        return chat_logprobs(tokens, self.name) if self.body.logprobs else None


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as plain values; `processing.chat_messages` checks what they say.

    Raises:
        InvalidRequest: a message without content that is no tool call.
    """
    for index, message in enumerate(messages):
        if message.content is None and not message.tool_calls and message.refusal is None:
            raise InvalidRequest(f"messages.{index}.content: is required", param=f"messages.{index}.content")
    plain = []
    for message in messages:
        fields = {name: value for name, value in msgspec.to_builtins(message).items() if value is not None}
        refusal = fields.pop("refusal", None)
        fields.setdefault("content", refusal)
        plain.append(fields)
    return plain


def text_of(message: ChatMessage) -> str:
    """A message's text, its parts one after the other."""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text or "" for part in message.content or ())
