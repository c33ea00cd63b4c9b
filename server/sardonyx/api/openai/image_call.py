"""One call of an image endpoint, from its fields to a whole answer or a stream. Floor 5."""

import secrets
from typing import Any

from litestar import Request, Response

from sardonyx.api.disconnect import while_connected
from sardonyx.api.openai.image_options import Output, image_options, output_of
from sardonyx.api.openai.image_replies import Kind, PictureEvents, PictureLinks, base_url, images_reply
from sardonyx.api.openai.image_schemas import ImageFields, PromptFields
from sardonyx.api.openai.options import request_timeout_s
from sardonyx.api.openai.sse import EventStream, OpenStream
from sardonyx.serving.picture_store import PictureStore
from sardonyx.serving.task_finder import TaskFinder
from sardonyx.serving.tasks import ImageOptions, ImageTask
from sardonyx.settings import Settings


async def answer(
    body: ImageFields,
    request: "Request[Any, Any, Any]",
    *,
    kind: Kind,
    tasks: TaskFinder,
    settings: Settings,
    store: PictureStore,
) -> Response[bytes]:
    """Make the pictures that a body asks for.

    Raises:
        ServeError: nothing of an answer was sent, so the error can have its status.
    """
    output = output_of(body)
    task = tasks.painter(body.model)
    options = image_options(body, task, timeout_s=request_timeout_s(request))
    links = PictureLinks(store, base_url(request, settings))
    has_stream = isinstance(body, PromptFields) and bool(body.stream)
    work = _stream(task, options, output, kind) if has_stream else _whole(task, options, output, links)
    return await while_connected(request.receive, work)


async def _whole(task: ImageTask, options: ImageOptions, output: Output, links: PictureLinks) -> Response[bytes]:
    pictures = await task.start(options, request_id=_new_id())
    content = await images_reply(pictures, output, links)
    return Response(content, media_type="application/json", status_code=200)


async def _stream(task: ImageTask, options: ImageOptions, output: Output, kind: Kind) -> Response[bytes]:
    pictures = await task.start(options, request_id=_new_id())
    stream: OpenStream[bytes] = OpenStream(PictureEvents(pictures, output, kind, options.n))
    await stream.wait()
    return EventStream(stream, frame=lambda frame: frame)


def _new_id() -> str:
    return f"img-{secrets.token_hex(12)}"
