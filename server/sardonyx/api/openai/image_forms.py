"""``POST /v1/images/edits`` and ``/v1/images/variations``: pictures that begin with a picture, sent as multipart forms.

Floor 5.
"""

from typing import Any

from litestar import Controller, Request, Response

from sardonyx.api.dependencies import ServerSettings, Store, Tasks
from sardonyx.api.form import read_form
from sardonyx.api.openai.image_call import answer
from sardonyx.api.openai.image_schemas import EditForm, ImagesReply, VariationForm
from sardonyx.api.openapi import form_post


class ImageFormsController(Controller):
    """Pictures from pictures, by the diffusion models of the repository."""

    tags = ("Images",)

    @form_post("/v1/images/edits", EditForm, ImagesReply)
    async def edit_image(
        self, request: Request[Any, Any, Any], tasks: Tasks, settings: ServerSettings, store: Store
    ) -> Response[bytes]:
        """A picture changed as a prompt says, everywhere or where a mask has it; as a whole or as events."""
        form = await read_form(request, EditForm)
        return await answer(form, request, kind="image_edit", tasks=tasks, settings=settings, store=store)

    @form_post("/v1/images/variations", VariationForm, ImagesReply)
    async def vary_image(
        self, request: Request[Any, Any, Any], tasks: Tasks, settings: ServerSettings, store: Store
    ) -> Response[bytes]:
        """A picture once more, a little different, without a prompt."""
        form = await read_form(request, VariationForm)
        return await answer(form, request, kind="image_edit", tasks=tasks, settings=settings, store=store)
