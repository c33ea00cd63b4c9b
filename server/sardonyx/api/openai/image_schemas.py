"""Bodies, forms and answers of the image endpoints: OpenAI's fields, and what users of diffusers and A1111 send.

Floor 5. As `schemas`: ranges that stand alone are checked by msgspec, null counts as absent, unknown fields are
ignored.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sardonyx.api.openai.schemas import ModelName
from sardonyx.processing.image import MAX_BYTES
from sardonyx.processing.picture import Format

MAX_FORM_BYTES = 2 * MAX_BYTES + (2 << 20)
"""A picture, a mask, and two megabytes for everything else."""

Quality = Literal["low", "medium", "high", "xhigh", "max"]
Size = Annotated[str, Meta(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")]
Steps = Annotated[int, Meta(ge=1, le=1000)]
Guidance = Annotated[float, Meta(ge=0, le=100)]
Strength = Annotated[float, Meta(gt=0, le=1)]
SamplerText = Annotated[str, Meta(max_length=64)]
PromptText = Annotated[str, Meta(max_length=32_000)]


class ImageFields(msgspec.Struct, frozen=True, kw_only=True):
    """What all of them take."""

    model: ModelName | None = None
    """A model or an alias; OpenAI's names (`gpt-image-1`, `dall-e-3`), or none: the first image model by name."""
    n: Annotated[int, Meta(ge=1, le=10)] | None = None
    """Pictures; 1 if absent."""
    size: Size | None = None
    """`WIDTHxHEIGHT`; `auto`: what the model was trained for, with a picture to begin with in that picture's shape."""
    response_format: Literal["url", "b64_json"] | None = None
    """How pictures are answered; if absent `url`, and base64 for the names `gpt-image-...`. Streams hold base64."""
    output_format: Format | None = None
    """Of the files; `png` if absent."""
    output_compression: Annotated[int, Meta(ge=0, le=100)] | None = None
    """Quality of JPEG and WebP; 100 if absent."""
    quality: Quality | Literal["standard", "hd", "auto"] | None = None
    """How many steps are taken, from what the model's own number is."""
    background: Literal["auto", "opaque", "transparent"] | None = None
    """`transparent` is not supported."""
    moderation: Literal["auto", "low"] | None = None
    """Changes nothing: the operator decides."""
    style: Literal["vivid", "natural"] | None = None
    """Changes nothing."""
    user: str | None = None
    """Changes nothing."""
    seed: Annotated[int, Meta(ge=-1, le=2**63 - 1)] | None = None
    """Same seed, same wishes: same picture. -1 or absent: one is drawn. Further pictures have the seeds that follow."""
    steps: Steps | None = None
    """Rounds of denoising; goes before `quality`."""
    num_inference_steps: Steps | None = None
    """diffusers' name for `steps`."""
    guidance_scale: Guidance | None = None
    """How strictly the prompt is followed; up to 1: it is not enforced, and a step takes half the time."""
    cfg_scale: Guidance | None = None
    """A1111's name for `guidance_scale`."""
    sampler: SamplerText | None = None
    """`ddim`, `euler`, `euler_karras`, `euler_a`, `dpmpp_2m`, `dpmpp_2m_karras`, `lcm`, or A1111's name for one."""
    scheduler: SamplerText | None = None
    """As `sampler`, or the name of diffusers' class."""


class PromptFields(ImageFields, frozen=True, kw_only=True):
    """What those with a prompt take."""

    prompt: PromptText
    """What the picture shows."""
    negative_prompt: PromptText | None = None
    """What it is not to be like."""
    stream: bool | None = None
    """Events as pictures come."""
    partial_images: Annotated[int, Meta(ge=0, le=3)] | None = None
    """With `stream`: rough pictures on the way."""


class ImageRequest(PromptFields, frozen=True, kw_only=True):
    """Body of ``POST /v1/images/generations``."""


class EditForm(PromptFields, frozen=True, kw_only=True):
    """Body of ``POST /v1/images/edits``."""

    image: bytes
    """The picture to begin with; PNG, JPEG, WebP, GIF or BMP. One."""
    mask: bytes = b""
    """Where it is to change: what is transparent; without transparency, what is white. Else all of it changes."""
    strength: Strength | None = None
    """How much of the picture is given up; 0.8 if absent, with a mask 1."""
    denoising_strength: Strength | None = None
    """A1111's name for `strength`."""
    input_fidelity: Literal["high", "low"] | None = None
    """Changes nothing: see `strength`."""


class VariationForm(ImageFields, frozen=True, kw_only=True):
    """Body of ``POST /v1/images/variations``."""

    image: bytes
    """The picture to vary; PNG, JPEG, WebP, GIF or BMP."""
    strength: Strength | None = None
    """How much of it is given up; 0.8 if absent."""
    denoising_strength: Strength | None = None
    """A1111's name for `strength`."""


class InputTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Of a usage."""

    text_tokens: int
    """Of the prompt."""
    image_tokens: int
    """Of the picture to begin with."""


class ImageUsageReply(msgspec.Struct, frozen=True, kw_only=True):
    """What a request cost; pictures have a token for each place of their latents."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int


class ImageReply(msgspec.Struct, frozen=True, kw_only=True):
    """One picture."""

    url: str | UnsetType = UNSET
    """Good for an hour."""
    b64_json: str | UnsetType = UNSET
    """The file, in base64."""


class ImagesReply(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of all of them."""

    created: int
    """Unix time."""
    data: list[ImageReply]
    background: Literal["opaque"] = "opaque"
    output_format: Format
    size: str
    quality: Quality
    usage: ImageUsageReply


class ImageEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What all events of a stream hold."""

    type: str
    b64_json: str
    created_at: int
    size: str
    quality: Quality
    background: Literal["opaque"] = "opaque"
    output_format: Format
    index: int | UnsetType = UNSET
    """Of the picture, where there are several."""


class PartialImage(ImageEvent, frozen=True, kw_only=True):
    """An event: a rough picture."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int
    """Of the same picture, from 0."""


class CompletedImage(ImageEvent, frozen=True, kw_only=True):
    """An event: a finished picture."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    usage: ImageUsageReply
