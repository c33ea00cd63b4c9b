"""``POST /v1/images/generations``: a text becomes pictures; and where their URLs lead.

Floor 5. What begins with a picture is in `image_forms`, because its bodies may be larger.
"""

from typing import Any

from litestar import Controller, Request, Response, get
from litestar.params import FromPath, JSONBody

from sardonyx.api.auth import PUBLIC
from sardonyx.api.dependencies import ServerSettings, Store, Tasks
from sardonyx.api.openai.errors import encode_envelope
from sardonyx.api.openai.image_call import answer
from sardonyx.api.openai.image_replies import FILES_PATH
from sardonyx.api.openai.image_schemas import ImageRequest, ImagesReply
from sardonyx.api.openapi import answers, json_post

_FILE_HEADERS = {
    "Cache-Control": "private, max-age=3600, immutable",
    "X-Content-Type-Options": "nosniff",
}


class ImagesController(Controller):
    """Pictures by the diffusion models of the repository."""

    tags = ("Images",)

    @json_post("/v1/images/generations", ImageRequest, ImagesReply)
    async def generate_images(
        self,
        data: JSONBody[ImageRequest],
        request: Request[Any, Any, Any],
        tasks: Tasks,
        settings: ServerSettings,
        store: Store,
    ) -> Response[bytes]:
        """Pictures of what a prompt says; as a whole or as events."""
        return await answer(data, request, kind="image_generation", tasks=tasks, settings=settings, store=store)

    @get(f"{FILES_PATH}/{{name:str}}", opt=PUBLIC, responses=answers(bytes, media_type="image/*"))
    async def read_image(self, name: FromPath[str], store: Store) -> Response[bytes]:
        """A picture that an answer gave as a URL, for an hour. Whoever knows its name may have it."""
        picture = store.get(name)
        if picture is None:
            message = "no such picture; each is kept for an hour at most"
            content = encode_envelope(message, type="invalid_request_error", code="not_found")
            return Response(content, media_type="application/json", status_code=404)
        return Response(picture.data, media_type=picture.media_type, headers=_FILE_HEADERS)
