"""Image models as tensors: a prompt in, an encoded picture out, as KServe-v2 has them. Floor 4."""

import asyncio
import uuid
from collections.abc import Mapping
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from sardonyx.errors import InvalidRequest
from sardonyx.processing.picture import encode_picture
from sardonyx.serving.call_parameters import convert_parameters
from sardonyx.serving.images import ImageModel
from sardonyx.serving.task_tensors import Face
from sardonyx.serving.tasks import ImageOptions
from sardonyx.serving.tensor_checks import BoundCall
from sardonyx.tensors import Parameter, Tensor, TensorMetadata

INPUTS = (
    TensorMetadata(name="prompt", datatype="BYTES", shape=(1,)),
    TensorMetadata(name="negative_prompt", datatype="BYTES", shape=(1,), is_optional=True),
)
OUTPUTS = (TensorMetadata(name="image", datatype="BYTES", shape=(1,)),)
"""A PNG."""


class ImageCallOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a call to an image model may set."""

    height: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    width: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Meta(ge=0, le=100)] | None = None
    sampler: str | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None


def painter_face(model: ImageModel) -> Face:
    """``prompt`` to ``image``."""

    async def answer(bound: BoundCall, parameters: Mapping[str, Parameter]) -> list[Tensor]:
        texts = {name: str(array.reshape(-1)[0]) for name, array in bound.inputs.items()}
        asked = convert_parameters(parameters, ImageCallOptions, "an image model")
        if (asked.height is None) != (asked.width is None):
            raise InvalidRequest("height and width come together", param="width")
        options = ImageOptions(
            prompt=texts["prompt"],
            negative_prompt=texts.get("negative_prompt", ""),
            size=None if asked.height is None or asked.width is None else (asked.height, asked.width),
            steps=asked.steps,
            guidance=asked.guidance_scale,
            sampler=asked.sampler,
            seed=asked.seed,
        )
        pictures = await model.start(options, request_id=f"v2-{uuid.uuid4().hex}")
        (picture,) = await pictures.collect()
        file = await asyncio.to_thread(encode_picture, picture.pixels, "png", 100)
        return [Tensor("image", "BYTES", np.array([file], dtype=np.object_))]

    return Face(inputs=INPUTS, outputs=OUTPUTS, answer=answer)
