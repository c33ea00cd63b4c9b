"""``POST /v1/moderations``: what texts and pictures hold that somebody may not want.

Floor 5. A result for a text, for each of several texts, or for all parts of one message together.
"""

import asyncio
import re
import secrets
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from litestar import Controller, Request, Response
from litestar.params import JSONBody

from sardonyx.api.dependencies import Tasks
from sardonyx.api.disconnect import while_connected
from sardonyx.api.openai.encoder_schemas import MAX_IMAGES, ModerationPart, ModerationRequest
from sardonyx.api.openai.options import request_timeout_s
from sardonyx.api.openapi import json_post
from sardonyx.errors import InvalidRequest, ModelNotFound
from sardonyx.processing.image import decode_data_uri
from sardonyx.serving.moderation import ModerationItem, Moderator, Verdict
from sardonyx.serving.task_finder import TaskFinder

_OPENAI_NAMES = re.compile(r"(omni|text)-moderation-.*")
# Writing so many results takes about a millisecond; beyond that a thread does it.
_MAX_RESULTS_ON_LOOP = 64


class ModerationResult(msgspec.Struct, frozen=True, kw_only=True):
    """On one text, or on one message."""

    flagged: bool
    """Some category is."""
    categories: dict[str, bool]
    """OpenAI's thirteen: whether the score reaches the operator's threshold."""
    category_scores: dict[str, float]
    """In [0, 1]; 0 where no model judges that category."""
    category_applied_input_types: dict[str, list[Literal["text", "image"]]]
    """What was judged for it; empty where no model judges that category."""


class Moderation(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``/v1/moderations``."""

    id: str
    model: str
    """The models that judged, separated by commas."""
    results: list[ModerationResult]


class ModerationsController(Controller):
    """Moderation by the classifiers of the repository."""

    tags = ("Moderation",)

    @json_post("/v1/moderations", ModerationRequest, Moderation)
    async def create_moderation(
        self, data: JSONBody[ModerationRequest], request: Request[Any, Any, Any], tasks: Tasks
    ) -> Response[bytes]:
        """Scores by category of a text, of several texts one by one, or of a message's texts and pictures together."""
        timeout_s = request_timeout_s(request)
        return await while_connected(request.receive, _answer(data, moderator(tasks, data.model), timeout_s))


def moderator(tasks: TaskFinder, name: str | None) -> Moderator:
    """Who judges a request: the model that it names, else everybody. OpenAI's names mean everybody, too.

    Raises:
        ModelNotFound: no such model, or no moderator at all.
        ServeError: as `TaskFinder.judge` and `TaskFinder.judges`.
    """
    if name:
        try:
            return Moderator([tasks.judge(name)])
        except ModelNotFound:
            if not _OPENAI_NAMES.fullmatch(name):
                raise
    judges = tasks.judges()
    if not judges:
        raise ModelNotFound(
            "there is no moderation model in the repository; export a classifier, and map its labels to categories "
            "with parameters moderation.<label> in its config.pbtxt",
            param="model",
            code="model_not_found",
        )
    return Moderator(judges)


async def _answer(body: ModerationRequest, moderator: Moderator, timeout_s: float | None) -> Response[bytes]:
    items, places = await _items(body.input)
    try:
        verdicts = await moderator.judge(items, timeout_s=timeout_s)
    except InvalidRequest as error:
        raise _placed(error, places) from None

    def write() -> bytes:
        reply = Moderation(
            id=f"modr-{secrets.token_hex(12)}",
            model=",".join(moderator.names(items)),
            results=[_result(verdict) for verdict in verdicts],
        )
        return msgspec.json.encode(reply)

    content = await asyncio.to_thread(write) if len(verdicts) > _MAX_RESULTS_ON_LOOP else write()
    return Response(content, media_type="application/json", status_code=200)


async def _items(value: "str | Sequence[str | ModerationPart] | None") -> tuple[list[ModerationItem], list[int]]:
    """What to judge, and the indices of the parts that hold its pictures.

    Raises:
        InvalidRequest: none, strings beside parts, too many pictures, a part without what its type says, or a picture
            that does not come as a ``data:`` URI.
    """
    if value is None:
        raise InvalidRequest("input: is required", param="input")
    if isinstance(value, str):
        return [ModerationItem(texts=[value])], []
    texts = [part for part in value if isinstance(part, str)]
    if len(texts) == len(value):
        if not texts:
            raise InvalidRequest("input: is an empty list", param="input")
        return [ModerationItem(texts=[text]) for text in texts], []
    if texts:
        raise InvalidRequest("input: mixes texts and parts; send texts as parts, too, or by themselves", param="input")
    parts = [part for part in value if not isinstance(part, str)]
    words, urls = _contents(parts)
    if len(urls) > MAX_IMAGES:
        raise InvalidRequest(f"input: has {len(urls)} pictures; at most {MAX_IMAGES} in a request", param="input")
    # Megabytes of base64 take milliseconds.
    images = await asyncio.to_thread(lambda: [_image(index, url) for index, url in urls])
    return [ModerationItem(texts=words, images=images)], [index for index, _ in urls]


def _contents(parts: Sequence[ModerationPart]) -> tuple[list[str], list[tuple[int, str]]]:
    """Texts, and URLs of pictures with the indices of their parts."""
    texts, urls = [], []
    for index, part in enumerate(parts):
        if part.type == "text":
            if part.text is None:
                raise InvalidRequest(f"input.{index}.text: is required", param=f"input.{index}.text")
            texts.append(part.text)
        else:
            if part.image_url is None:
                raise InvalidRequest(f"input.{index}.image_url: is required", param=f"input.{index}.image_url")
            urls.append((index, part.image_url.url))
    return texts, urls


def _image(index: int, url: str) -> bytes:
    try:
        return decode_data_uri(url)
    except InvalidRequest as error:
        raise _at(error, index) from None


def _placed(error: InvalidRequest, places: Sequence[int]) -> InvalidRequest:
    """An error about a picture by its own index, ``images.1``, as one about the part that held it."""
    name, _, number = (error.param or "").partition(".")
    if name != "images" or not number.isdecimal():
        return error
    return _at(error, places[int(number)])


def _at(error: InvalidRequest, index: int) -> InvalidRequest:
    param = f"input.{index}.image_url"
    message = error.message.removeprefix(error.param or "").removeprefix(": ")
    return type(error)(f"{param}: {message}", param=param)


def _result(verdict: Verdict) -> ModerationResult:
    return ModerationResult(
        flagged=verdict.is_flagged,
        categories=verdict.flags,
        category_scores=verdict.scores,
        category_applied_input_types=verdict.kinds,
    )
