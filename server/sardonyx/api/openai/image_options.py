"""From a body or a form to what an image model is asked for. Floor 5."""

import math
import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from sardonyx.api.openai.image_schemas import EditForm, ImageFields, PromptFields, Quality, VariationForm
from sardonyx.errors import InvalidRequest, PayloadTooLarge, UnsupportedFeature
from sardonyx.processing.image import MAX_BYTES
from sardonyx.processing.picture import Format
from sardonyx.repository.scheduler_config import SAMPLER_NAMES
from sardonyx.serving.tasks import ImageOptions, ImageTask

STRENGTH = 0.8
"""diffusers' default."""

_QUALITIES: dict[str, Quality] = {"standard": "medium", "auto": "medium", "hd": "high"}
"""Older names → what is answered."""
_STEPS: dict[Quality, float] = {"low": 0.5, "medium": 1.0, "high": 1.5, "xhigh": 2.0, "max": 3.0}
_SAMPLERS: Mapping[str, str] = {name.replace("_", ""): name for name in SAMPLER_NAMES} | {
    "eulerancestral": "euler_a",
    "dpm++2m": "dpmpp_2m",
    "dpm++2mkarras": "dpmpp_2m_karras",
    "ddimscheduler": "ddim",
    "eulerdiscretescheduler": "euler",
    "eulerancestraldiscretescheduler": "euler_a",
    "dpmsolvermultistepscheduler": "dpmpp_2m",
    "lcmscheduler": "lcm",
}
"""Names without case, spaces and the like: ours, A1111's, and diffusers' classes."""
_ALWAYS_BASE64 = re.compile(r"gpt-image-.*|chatgpt-image-latest")
_BETWEEN_WORDS = re.compile(r"[\s_-]+")

V = TypeVar("V")


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """How pictures are answered."""

    format: Format
    compression: int
    """Quality of JPEG and WebP."""
    quality: Quality
    """That answers name."""
    has_urls: bool


def output_of(body: ImageFields) -> Output:
    """How a request wants its pictures.

    Raises:
        InvalidRequest: PNG cannot be compressed with loss.
        UnsupportedFeature: a transparent background.
    """
    if body.background == "transparent":
        raise UnsupportedFeature("background: pictures are opaque; leave it out", param="background")
    kind = body.output_format or "png"
    compression = 100 if body.output_compression is None else body.output_compression
    if kind == "png" and compression < 100:
        raise InvalidRequest("output_compression: needs output_format jpeg or webp", param="output_compression")
    # Clients of these models look for nothing else, and OpenAI refuses the field for them.
    default = "b64_json" if body.model is not None and _ALWAYS_BASE64.fullmatch(body.model) else "url"
    has_urls = (body.response_format or default) == "url"
    return Output(format=kind, compression=compression, quality=_quality(body), has_urls=has_urls)


def image_options(body: ImageFields, task: ImageTask, *, timeout_s: float | None) -> ImageOptions:
    """What a request asks of a model.

    Raises:
        InvalidRequest: a field and its other name differ.
        PayloadTooLarge: a picture of too many bytes.
    """
    steps = _one(body, "steps", body.steps, "num_inference_steps", body.num_inference_steps)
    sampler = _one(body, "sampler", body.sampler, "scheduler", body.scheduler)
    options = ImageOptions(
        prompt="",
        n=body.n or 1,
        size=_size(body.size),
        steps=steps_of(_quality(body), task) if steps is None else steps,
        guidance=_one(body, "guidance_scale", body.guidance_scale, "cfg_scale", body.cfg_scale),
        sampler=None if not sampler else sampler_name(sampler),
        seed=None if body.seed == -1 else body.seed,
        timeout_s=timeout_s,
    )
    changes: dict[str, object] = {}
    if isinstance(body, PromptFields):
        changes |= {"prompt": body.prompt, "negative_prompt": body.negative_prompt or ""}
        changes["num_previews"] = (body.partial_images or 0) if body.stream else 0
    if isinstance(body, EditForm | VariationForm):
        mask = _file(body.mask, "mask") if isinstance(body, EditForm) and body.mask else None
        strength = _one(body, "strength", body.strength, "denoising_strength", body.denoising_strength)
        default = STRENGTH if mask is None else 1.0
        changes |= {"source": _file(body.image, "image"), "mask": mask}
        changes["strength"] = default if strength is None else strength
    return msgspec.structs.replace(options, **changes)


def steps_of(quality: Quality, task: ImageTask) -> int:
    """Steps of a quality, never more than the model may take.

    ======== ===============================
    quality  times the model's own number
    ======== ===============================
    low      0.5
    medium   1; also `standard` and `auto`
    high     1.5; also `hd`
    xhigh    2
    max      3
    ======== ===============================
    """
    return min(task.max_steps, math.ceil(task.default_steps * _STEPS[quality]))


def sampler_name(text: str) -> str:
    """One of `SAMPLER_NAMES` in any spelling; what is none stays as it is, for the model to refuse."""
    return _SAMPLERS.get(_BETWEEN_WORDS.sub("", text.lower()), text)


def _quality(body: ImageFields) -> Quality:
    if body.quality is None or body.quality in _QUALITIES:
        return _QUALITIES[body.quality or "auto"]
    return body.quality  # type: ignore[return-value]  # the others are in the table


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None or text == "auto":
        return None
    width, _, height = text.partition("x")
    return int(height), int(width)


def _one(body: ImageFields, name: str, value: V | None, other_name: str, other: V | None) -> V | None:
    """A field that goes by two names."""
    if value is not None and other is not None and value != other:
        raise InvalidRequest(f"{other_name}: differs from {name}, which means the same; send one", param=other_name)
    return other if value is None else value


def _file(data: bytes, field: str) -> bytes:
    if len(data) > MAX_BYTES:
        raise PayloadTooLarge(f"{field}: is larger than {MAX_BYTES:,} bytes", param=field)
    return data
