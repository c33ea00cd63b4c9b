"""``/tokenize``, ``/detokenize``, ``/tokenizer_info``: vLLM's and llama.cpp's bodies, answered with both's fields.

Floor 5. lm-evaluation-harness uses these three to do without a tokenizer of its own.
"""

from typing import Any

import msgspec
from litestar import Controller, get
from litestar.params import JSONBody
from msgspec import UNSET, UnsetType

from sardonyx.api.dependencies import Models, ServerSettings
from sardonyx.api.openai.chat import template_messages
from sardonyx.api.openai.schemas import DetokenizeRequest, TokenizeRequest
from sardonyx.api.openapi import answers, json_post
from sardonyx.errors import InvalidRequest, PermissionDenied
from sardonyx.processing.tokenizer import Tokenizer


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """llama.cpp's form of a token."""

    id: int
    piece: str | list[int]
    """Its text, or its bytes where they are no text."""


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``/tokenize``."""

    tokens: list[int | Piece]
    count: int
    max_model_len: int
    token_strs: list[str] | UnsetType | None = UNSET


class Text(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``/detokenize``, under both servers' names."""

    prompt: str
    content: str


class TokensController(Controller):
    """Between text and tokens."""

    tags = ("Tokens",)

    @json_post("/tokenize", TokenizeRequest, Tokens)
    async def tokenize(self, data: JSONBody[TokenizeRequest], models: Models) -> Tokens:
        """Tokens of a text, or of a conversation as the model would see it."""
        model = models.resolve(data.model)
        if data.messages is not None:
            token_ids = await model.tokenize_chat(
                template_messages(data.messages),
                template_kwargs=data.chat_template_kwargs,
                continue_final_message=bool(data.continue_final_message),
                add_generation_prompt=data.add_generation_prompt is not False and not data.continue_final_message,
            )
        elif data.prompt is not None:
            token_ids = await model.tokenize(data.prompt, add_special_tokens=data.add_special_tokens is not False)
        elif data.content is not None:
            token_ids = await model.tokenize(data.content, add_special_tokens=bool(data.add_special))
        else:
            raise InvalidRequest("prompt: is required (or content, or messages)", param="prompt")
        tokenizer = model.tokenizer
        return Tokens(
            tokens=[_piece(token_id, tokenizer) if data.with_pieces else token_id for token_id in token_ids],
            count=len(token_ids),
            max_model_len=model.max_model_len,
            token_strs=[tokenizer.token_string(token_id) or "" for token_id in token_ids]
            if data.return_token_strs
            else None,
        )

    @json_post("/detokenize", DetokenizeRequest, Text)
    async def detokenize(self, data: JSONBody[DetokenizeRequest], models: Models) -> Text:
        """The text of tokens, special ones included."""
        text = await models.resolve(data.model).detokenize(data.tokens)
        return Text(prompt=text, content=text)

    @get("/tokenizer_info", responses=answers(dict[str, Any]))
    async def tokenizer_info(self, models: Models, settings: ServerSettings) -> dict[str, str | None]:
        """Special tokens and chat template of the default model, if the operator shows them."""
        if not settings.enable_tokenizer_info:
            raise PermissionDenied("the operator has not set enable_tokenizer_info")
        return models.resolve(None).tokenizer.info()


def _piece(token_id: int, tokenizer: Tokenizer) -> Piece:
    data = tokenizer.token_bytes(token_id)
    try:
        return Piece(id=token_id, piece=data.decode())
    except UnicodeDecodeError:
        return Piece(id=token_id, piece=list(data))
