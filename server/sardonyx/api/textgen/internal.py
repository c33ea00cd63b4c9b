"""``/v1/internal/*``: what text-generation-webui's clients use besides the OpenAI endpoints.

Floor 5. Its words are kept (``"OK"``, ``"None"``), its silences are not: an argument without effect is refused, a model
that cannot be loaded is an error.
"""

from typing import Annotated, Any

import msgspec
from litestar import Controller, MediaType, Request, Response, get, post
from litestar.params import JSONBody

from sardonyx.api.auth import ADMIN, PUBLIC
from sardonyx.api.body import decode_json
from sardonyx.api.dependencies import Keeper, Models, ServerSettings
from sardonyx.api.openai.schemas import ModelName, TokenId
from sardonyx.api.openapi import answers, json_post
from sardonyx.errors import ModelNotFound, ModelNotReady, PermissionDenied, UnsupportedFeature
from sardonyx.serving.registry import TEXT_FAMILIES
from sardonyx.settings import Settings


class TextBody(msgspec.Struct, frozen=True, kw_only=True):
    """A text."""

    text: str


class TokensBody(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids."""

    tokens: list[TokenId]


class LoadBody(msgspec.Struct, frozen=True, kw_only=True):
    """Which model to load."""

    model_name: ModelName
    args: dict[str, Any] | None = None  # Any: refused unless empty
    """Not supported: how a model is loaded is its operator's affair (``config.pbtxt``)."""
    settings: dict[str, Any] | None = None  # Any: as args
    """Not supported."""


class UnloadBody(msgspec.Struct, frozen=True, kw_only=True):
    """Which model to unload."""

    model_name: ModelName | None = None
    """Absent: the default model."""


class StopBody(msgspec.Struct, frozen=True, kw_only=True):
    """What to stop."""

    id: Annotated[str, msgspec.Meta(max_length=128)] | None = None
    """The `id` of an answer under way, as its chunks carry it. Absent: everything, which needs an admin key."""


class Encoded(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``encode``."""

    tokens: list[int]
    length: int


class Decoded(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``decode``."""

    text: str


class TokenCount(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``token-count``."""

    length: int


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``model/info``: the default model and what it was loaded with."""

    model_name: str
    """``"None"`` while there is none."""
    lora_names: list[str] = []
    loader: str = "onnxruntime"
    version: int | None = None
    precision: str | None = None
    max_model_len: int | None = None


class ModelNames(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``model/list``."""

    model_names: list[str]


_STOP_DECODER = msgspec.json.Decoder(StopBody)
_UNLOAD_DECODER = msgspec.json.Decoder(UnloadBody)


class InternalController(Controller):
    """text-generation-webui's own endpoints."""

    path = "/v1/internal"
    tags = ("text-generation-webui",)

    @json_post("/encode", TextBody, Encoded)
    async def encode(self, data: JSONBody[TextBody], models: Models) -> Encoded:
        """Tokens of a text, with those that the tokenizer adds."""
        token_ids = await models.resolve(None).tokenize(data.text)
        return Encoded(tokens=token_ids, length=len(token_ids))

    @json_post("/decode", TokensBody, Decoded)
    async def decode(self, data: JSONBody[TokensBody], models: Models) -> Decoded:
        """The text of tokens, without special ones."""
        return Decoded(text=await models.resolve(None).detokenize(data.tokens, skip_special_tokens=True))

    @json_post("/token-count", TextBody, TokenCount)
    async def count_tokens(self, data: JSONBody[TextBody], models: Models) -> TokenCount:
        """How many tokens a text has."""
        return TokenCount(length=len(await models.resolve(None).tokenize(data.text)))

    @post("/stop-generation", status_code=200, responses=answers(str))
    async def stop_generation(self, request: Request[Any, Any, Any], models: Models, keeper: Keeper) -> Response[bytes]:
        """End one generation by its id, or all; their callers get what there is."""
        body = await request.body()
        wanted = decode_json(body, _STOP_DECODER).id if body else None
        if wanted is None:
            keeper.require_admin(request)
        models.stop_generation(wanted)
        return _ok()

    @get("/model/info", responses=answers(ModelInfo))
    async def model_info(self, models: Models) -> ModelInfo:
        """The default model."""
        try:
            model = models.resolve(None)
        except (ModelNotFound, ModelNotReady):
            return ModelInfo(model_name="None")
        return ModelInfo(
            model_name=model.name,
            version=model.version,
            precision=model.manifest.precision,
            max_model_len=model.max_model_len,
        )

    @get("/model/list", opt=ADMIN, responses=answers(ModelNames))
    async def list_models(self, models: Models) -> ModelNames:
        """Every language model of the repository, loaded or not."""
        return ModelNames(model_names=[status.name for status in models.list() if status.family in TEXT_FAMILIES])

    @json_post("/model/load", LoadBody, str, opt=ADMIN)
    async def load_model(self, data: JSONBody[LoadBody], models: Models, settings: ServerSettings) -> Response[bytes]:
        """Load or reload a model, and answer when it is ready; a version that serves goes on until then."""
        _check_control(settings)
        for name in ("args", "settings"):
            if getattr(data, name):
                raise UnsupportedFeature(f"{name}: not supported; edit the model's config.pbtxt instead", param=name)
        await models.load(data.model_name)
        return _ok()

    @post("/model/unload", status_code=200, opt=ADMIN, responses=answers(str))
    async def unload_model(
        self, request: Request[Any, Any, Any], models: Models, settings: ServerSettings
    ) -> Response[bytes]:
        """Unload a model when its requests are done."""
        _check_control(settings)
        body = await request.body()
        name = decode_json(body, _UNLOAD_DECODER).model_name if body else None
        await models.unload(name or models.resolve(None).name)
        return _ok()

    @get("/health", opt=PUBLIC, responses=answers(dict[str, str]))
    async def health(self) -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}


def _ok() -> Response[bytes]:
    # Litestar would send a str as it is, without the quotes that make it JSON.
    return Response(b'"OK"', media_type=MediaType.JSON, status_code=200)


def _check_control(settings: Settings) -> None:
    if settings.model_control_mode != "explicit":
        raise PermissionDenied("the operator has not set model_control_mode to explicit")
