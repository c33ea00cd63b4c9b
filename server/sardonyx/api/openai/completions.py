"""``POST /v1/completions`` and its aliases.

Floor 5. Text, texts, token ids or lists of them in; a choice for each prompt and each of its `n`, prompt by prompt.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from litestar import Controller, Request, Response
from litestar.params import FromPath, JSONBody
from msgspec import UNSET, UnsetType

from sardonyx.api.dependencies import Models
from sardonyx.api.openai.call import TextCall, system_fingerprint
from sardonyx.api.openai.infill import infill_prompt
from sardonyx.api.openai.logprobs import CompletionLogprobsWriter, join_logprobs, prompt_logprobs
from sardonyx.api.openai.options import completion_options
from sardonyx.api.openai.replies import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    PromptLogprobs,
    finish_word,
    usage_reply,
)
from sardonyx.api.openai.schemas import MAX_PROMPTS, CompletionRequest, GenerateRequest, Prompt
from sardonyx.api.openai.sse import encode
from sardonyx.api.openapi import json_post
from sardonyx.errors import InvalidRequest
from sardonyx.serving.generation import Generation
from sardonyx.serving.options import Choice, PromptInfo, TextChunk, TokenInfo
from sardonyx.serving.text import TextModel

_BEFORE_TEXT = b',"text":'
_AFTER_TEXT = b',"logprobs":null,"finish_reason":null,"stop_reason":null}'


class CompletionsController(Controller):
    """Text goes on."""

    tags = ("Text",)

    @json_post("/v1/completions", CompletionRequest, Completion)
    async def create_completion(
        self, data: JSONBody[CompletionRequest], request: Request[Any, Any, Any], models: Models
    ) -> Response[bytes]:
        """Continue a prompt, fill a gap, or score a text (``echo`` with ``logprobs``)."""
        return await CompletionCall(data, models.resolve(data.model), request).answer()

    @json_post("/v1/engines/{engine:str}/completions", CompletionRequest, Completion)
    async def create_engine_completion(
        self, engine: FromPath[str], data: JSONBody[CompletionRequest], request: Request[Any, Any, Any], models: Models
    ) -> Response[bytes]:
        """As ``/v1/completions``, with the model in the path, which wins (OpenAI's first API, Azure)."""
        return await CompletionCall(data, models.resolve(engine), request).answer()

    @json_post("/v1/generate", GenerateRequest, Completion)
    async def generate(
        self, data: JSONBody[GenerateRequest], request: Request[Any, Any, Any], models: Models
    ) -> Response[bytes]:
        """As ``/v1/completions``, with text-generation-webui's meaning of ``suffix``: it is appended as it is."""
        body = msgspec.structs.replace(
            data,
            prompt=data.context if data.prompt is None else data.prompt,
            max_tokens=data.length if data.max_tokens is None else data.max_tokens,
            suffix=None,
        )
        return await CompletionCall(body, models.resolve(body.model), request, ending=data.suffix or "").answer()


class CompletionCall(TextCall[CompletionRequest]):
    """One completion.

    Args:
        ending: put after every choice's text.
    """

    id_prefix = "cmpl"
    chunk_object = "text_completion"

    def __init__(
        self, body: CompletionRequest, model: TextModel, request: Request[Any, Any, Any], *, ending: str = ""
    ) -> None:
        super().__init__(body, model, request)
        self._ending = ending
        self._writers: dict[int, CompletionLogprobsWriter] = {}
        self._begun: set[int] = set()
        # What nearly every stream asks for: text and nothing else.
        self._is_plain = body.logprobs is None and not body.return_token_ids

    async def start(self) -> Generation:
        """Begin generating."""
        body = self.body
        prompts = prompt_list(body.prompt)
        if body.suffix:
            if body.echo:
                raise InvalidRequest("echo: not with suffix, for there is text on both sides", param="echo")
            prompts = [infill_prompt(body.prompt, body.suffix, self.model.tokenizer)]
        return await self.model.start(prompts, completion_options(body, self.model, self.timeout_s), request_id=self.id)

    def reply(self, choices: Sequence[Choice]) -> Completion:
        """The whole answer."""
        return Completion(
            id=self.id,
            created=self.created,
            model=self.model.name,
            system_fingerprint=system_fingerprint(self.model),
            choices=[
                self._choice(choice.index, choice.text + self._ending, choice, choice.finish_reason, is_first=True)
                for choice in choices
            ],
            usage=usage_reply(self.generation.usage),
        )

    def frame(self, chunk: TextChunk) -> bytes:
        """One frame, or none while a character or a possible stop string is incomplete."""
        is_first = chunk.index not in self._begun
        if self._is_plain and chunk.finish_reason is None and not (is_first and self.body.echo):
            self._begun.add(chunk.index)
            return self.frames.text(chunk.index, _BEFORE_TEXT, chunk.text, _AFTER_TEXT) if chunk.text else b""
        if not (chunk.text or chunk.token_ids or chunk.finish_reason):
            return b""
        self._begun.add(chunk.index)
        text = chunk.text if chunk.finish_reason is None else chunk.text + self._ending
        return self.frames.choice(
            encode(self._choice(chunk.index, text, chunk, chunk.finish_reason, is_first=is_first))
        )

    def _choice(
        self, index: int, text: str, part: Choice | TextChunk, finish_reason: Any, *, is_first: bool
    ) -> CompletionChoice:
        """A whole choice or a chunk of one; the first of a choice also brings what is said about its prompt."""
        prompt = self.generation.prompts[index // (self.body.n or 1)]
        echoes = bool(self.body.echo) and is_first
        return CompletionChoice(
            index=index,
            text=prompt.text + text if echoes else text,
            logprobs=self._logprobs(index, part.tokens, prompt if echoes else None),
            finish_reason=None if finish_reason is None else finish_word(finish_reason),
            stop_reason=part.stop_reason,
            token_ids=part.token_ids if self.body.return_token_ids else UNSET,
            prompt_token_ids=prompt.token_ids if self.body.return_token_ids and is_first else UNSET,
            prompt_logprobs=self._prompt_logprobs(prompt),
        )

    def _logprobs(self, index: int, tokens: list[TokenInfo], echoed: PromptInfo | None) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        tokenizer = self.model.tokenizer
        writer = self._writers.get(index)
        if writer is None:
            silent_ids = tokenizer.special_ids if self.body.skip_special_tokens is not False else frozenset()
            writer = self._writers[index] = CompletionLogprobsWriter(self.name, silent_ids)
        if echoed is None:
            return writer.write(tokens)
        return join_logprobs(writer.write_prompt(echoed, tokenizer), writer.write(tokens))

    def _prompt_logprobs(self, prompt: PromptInfo) -> PromptLogprobs | UnsetType | None:
        return UNSET if self.body.prompt_logprobs is None else prompt_logprobs(prompt)


def prompt_list(prompt: Prompt | None) -> list[str | list[int]]:
    """Any of the four forms of ``prompt`` as a list of prompts.

    Raises:
        InvalidRequest: none, too many, or forms that cannot stand side by side.
    """
    if prompt is None:
        raise InvalidRequest("prompt: is required", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt: is an empty list", param="prompt")
    token_ids = [item for item in prompt if isinstance(item, int)]
    if len(token_ids) == len(prompt):
        return [token_ids]
    if token_ids:
        raise InvalidRequest("prompt: token ids and prompts are mixed in one list", param="prompt")
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt: {len(prompt):,} prompts; at most {MAX_PROMPTS:,} in a request", param="prompt")
    return [item for item in prompt if not isinstance(item, int)]
