"""Pictures as OpenAI answers them: files in base64 or behind URLs, and events.

Floor 5. Pictures are encoded in threads: a megapixel of PNG takes 100 ms and more.
"""

import asyncio
import base64
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec
from litestar import Request
from msgspec import UNSET

from sardonyx.api.openai.image_options import Output
from sardonyx.api.openai.image_schemas import (
    CompletedImage,
    ImageEvent,
    ImageReply,
    ImagesReply,
    ImageUsageReply,
    InputTokens,
    PartialImage,
)
from sardonyx.diffusion import Pixels
from sardonyx.processing.picture import MEDIA_TYPES, encode_picture, enlarged
from sardonyx.serving.picture_store import PictureStore, StoredPicture
from sardonyx.serving.tasks import ImageUsage, Pictures, PictureUpdate
from sardonyx.settings import Settings

Kind = Literal["image_generation", "image_edit"]

FILES_PATH = "/v1/images/files"


class PictureLinks:
    """Makes URLs of pictures that this server gives out itself.

    Args:
        store: keeps them.
        base_url: in front of the path.
    """

    def __init__(self, store: PictureStore, base_url: str) -> None:
        self._store = store
        self._base_url = base_url

    def url(self, data: bytes, output: Output) -> str:
        """Of an encoded picture; one that the store cannot hold is in its URL."""
        media_type = MEDIA_TYPES[output.format]
        name = self._store.add(StoredPicture(data, media_type), suffix=f".{output.format}")
        if name is None:
            return f"data:{media_type};base64,{_base64(data)}"
        return f"{self._base_url}{FILES_PATH}/{name}"


def base_url(request: "Request[Any, Any, Any]", settings: Settings) -> str:
    """Where the caller reaches us: the operator's word, else the address that it called."""
    if settings.public_url is not None:
        return settings.public_url.rstrip("/")
    host = request.headers.get("host") or f"{settings.host}:{settings.port}"
    return f"{request.scope['scheme']}://{host}"


async def images_reply(pictures: Pictures, output: Output, links: PictureLinks) -> bytes:
    """The whole answer, as JSON.

    Raises:
        ServeError: as `Pictures.collect`.
    """
    updates = await pictures.collect()
    files = await asyncio.gather(*(asyncio.to_thread(_encoded, update.pixels, output) for update in updates))
    if output.has_urls:
        data = [ImageReply(url=links.url(file, output)) for file in files]
    else:
        data = [ImageReply(b64_json=text) for text in await asyncio.to_thread(lambda: [*map(_base64, files)])]
    reply = ImagesReply(
        created=int(time.time()),
        data=data,
        output_format=output.format,
        size=_size(pictures),
        quality=output.quality,
        usage=_usage(pictures.usage, len(updates)),
    )
    return await asyncio.to_thread(msgspec.json.encode, reply)


class PictureEvents:
    """The events of a stream, each a frame; a `sse.Streamable`.

    Args:
        pictures: that are streamed.
        num_pictures: that were asked for.
    """

    def __init__(self, pictures: Pictures, output: Output, kind: Kind, num_pictures: int) -> None:
        self.id = pictures.id
        self._pictures = pictures
        self._output = output
        self._kind = kind
        self._has_index = num_pictures > 1
        self._created = int(time.time())
        self._num_previews: Counter[int] = Counter()
        """By index of the picture."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Raises what `Pictures` raises."""
        async for update in self._pictures:
            number = self._num_previews[update.index]
            self._num_previews[update.index] += 1
            yield await asyncio.to_thread(self._frame, update, number)

    def abort(self) -> None:
        """End them."""
        self._pictures.abort()

    def _frame(self, update: PictureUpdate, number: int) -> bytes:
        output = self._output
        pixels = update.pixels if update.is_final else enlarged(update.pixels, *self._pictures.size)
        fields: dict[str, Any] = {
            "type": f"{self._kind}.{'completed' if update.is_final else 'partial_image'}",
            "b64_json": _base64(_encoded(pixels, output)),
            "created_at": self._created,
            "size": _size(self._pictures),
            "quality": output.quality,
            "output_format": output.format,
            "index": update.index if self._has_index else UNSET,
        }
        if update.is_final:
            event: ImageEvent = CompletedImage(usage=_usage(self._pictures.usage, 1), **fields)
        else:
            event = PartialImage(partial_image_index=number, **fields)
        return b"data: " + msgspec.json.encode(event) + b"\n\n"


def _encoded(pixels: Pixels, output: Output) -> bytes:
    return encode_picture(pixels, output.format, output.compression)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _size(pictures: Pictures) -> str:
    height, width = pictures.size
    return f"{width}x{height}"


def _usage(usage: ImageUsage, num_pictures: int) -> ImageUsageReply:
    num_input = usage.num_text_tokens + usage.num_source_tokens
    num_output = num_pictures * usage.num_picture_tokens
    return ImageUsageReply(
        input_tokens=num_input,
        input_tokens_details=InputTokens(text_tokens=usage.num_text_tokens, image_tokens=usage.num_source_tokens),
        output_tokens=num_output,
        total_tokens=num_input + num_output,
    )
