"""``GET /v1/models``: what can be used now, or in a moment.

Floor 5.
"""

from typing import Literal

import msgspec
from litestar import Controller, get
from litestar.params import FromPath

from sardonyx.api.dependencies import Models, ServerSettings
from sardonyx.api.openapi import answers
from sardonyx.errors import ModelNotFound
from sardonyx.serving.registry import OPENAI_FAMILIES, ModelState, ModelStatus


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model, or an alias of one."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sardonyx"
    root: str
    """The model that an alias stands for."""
    parent: None = None
    max_model_len: int | None
    permission: list[str] = []


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ModelsController(Controller):
    """The models of the repository."""

    tags = ("Models",)

    @get("/v1/models", responses=answers(ModelList))
    async def list_models(self, models: Models, settings: ServerSettings) -> ModelList:
        """Loaded or loading models that this API can use, with their aliases. Instant whatever the server does."""
        return ModelList(data=list(_cards(models, settings.aliases)))

    @get("/v1/models/{model_id:path}", responses=answers(ModelCard))
    async def get_model(self, model_id: FromPath[str], models: Models, settings: ServerSettings) -> ModelCard:
        """One of them; names may hold slashes."""
        wanted = model_id.removeprefix("/")
        for card in _cards(models, settings.aliases):
            if card.id == wanted:
                return card
        raise ModelNotFound(f"the model {wanted[:128]!r} does not exist", param="model", code="model_not_found")


def _cards(models: Models, aliases: dict[str, str]) -> list[ModelCard]:
    usable = {
        status.name: status
        for status in models.list()
        if status.state in {ModelState.READY, ModelState.LOADING} and status.family in OPENAI_FAMILIES
    }
    names = list(usable.items())
    names += [(alias, usable[name]) for alias, name in aliases.items() if name in usable and alias not in usable]
    return [_card(name, status) for name, status in names]


def _card(name: str, status: ModelStatus) -> ModelCard:
    return ModelCard(id=name, created=status.created, root=status.name, max_model_len=status.max_model_len)
