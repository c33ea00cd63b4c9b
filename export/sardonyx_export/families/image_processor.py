"""What Hugging Face's ``preprocessor_config.json`` says of pictures, as `families.ImageInput`.

Source: transformers 5.24, the image processors named here and the backend they share, with Pillow.
"""

from dataclasses import dataclass
from typing import Any, Literal

from sardonyx.repository.families import ImageInput
from sardonyx_export.errors import ExportError

FILE = "preprocessor_config.json"

_RESAMPLES: dict[Any, Literal["nearest", "bilinear", "bicubic", "lanczos"]] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}
"""By Pillow's numbers."""
_SCALE = 1 / 255
_MAX_SIDE = 4096
_REFUSED = (
    "do_pad",
    "do_flip_channel_order",
    "do_reduce_labels",
    "rescale_offset",
    "do_thumbnail",
    "do_align_long_axis",
)
"""Steps that some processors have and the server has not."""


@dataclass(frozen=True, slots=True)
class _Processor:
    """What one means where its file does not say."""

    crops: bool
    resample: int
    is_square: bool
    """A single number for ``size`` is of both sides, else of the shorter one."""


_PROCESSORS = {
    "ViT": _Processor(crops=False, resample=2, is_square=True),
    "DeiT": _Processor(crops=True, resample=3, is_square=True),
    "Siglip": _Processor(crops=False, resample=3, is_square=True),
    "CLIP": _Processor(crops=True, resample=3, is_square=False),
    "Bit": _Processor(crops=True, resample=3, is_square=False),
}
"""By the beginning of their names; ``ImageProcessor``, ``ImageProcessorFast`` or ``FeatureExtractor`` follows."""
_ENDINGS = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")


def read_image_input(config: dict[str, Any], *, name: str, output: str) -> ImageInput:
    """How a picture becomes the graph's input (B, 3, y, x).

    Args:
        config: the parsed file.
        name: of the graph's input.
        output: of its output.

    Raises:
        ExportError: a processor or a step that is not implemented; it names the field.
    """
    processor = _processor(config)
    for field in _REFUSED:
        if config.get(field):
            raise _refusal(field, f"is {config[field]!r:.100}, which is not implemented")
    if not _flag(config, "do_resize", True):
        raise _refusal("do_resize", "is false; pictures of any size have to become one size")
    resize = _size(config, "size", is_square=processor.is_square)
    crop = _size(config, "crop_size", is_square=True) if _flag(config, "do_center_crop", processor.crops) else resize
    if len(crop) != 2:
        raise _refusal("do_center_crop", "is false although size keeps a picture's shape; the graph takes one size")
    least = resize if len(resize) == 2 else resize * 2
    if crop[0] > least[0] or crop[1] > least[1]:
        raise _refusal("crop_size", f"is {crop}, more than the {least} of size; padding is not implemented")
    resample = config.get("resample", processor.resample)
    if type(resample) is not int or resample not in _RESAMPLES:
        raise _refusal("resample", f"is {resample!r:.100}; 0 to 3 are implemented: nearest, lanczos, bilinear, bicubic")
    normalises = _flag(config, "do_normalize", True)
    scale = _number(config, "rescale_factor", _SCALE) if _flag(config, "do_rescale", True) else 1.0
    return ImageInput(
        name=name,
        output=output,
        layout="NCHW",
        resize=resize,
        crop=crop,
        resample=_RESAMPLES[resample],
        scale=scale,
        mean=_channels(config, "image_mean") if normalises else [0.0] * 3,
        std=_std(config) if normalises else [1.0] * 3,
    )


def _processor(config: dict[str, Any]) -> _Processor:
    field = "image_processor_type" if "image_processor_type" in config else "feature_extractor_type"
    name = config.get(field)
    for beginning, processor in _PROCESSORS.items():
        if name in [beginning + ending for ending in _ENDINGS]:
            return processor
    raise _refusal(field, f"is {name!r:.100}; known are the processors of {', '.join(_PROCESSORS)}")


def _flag(config: dict[str, Any], field: str, default: bool) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise _refusal(field, f"is {value!r:.100}; true or false is needed")
    return default if value is None else value


def _size(config: dict[str, Any], field: str, *, is_square: bool) -> list[int]:
    """Height and width, or the shorter side alone."""
    value: Any = config.get(field)
    match value:
        case {"height": height, "width": width} if len(value) == 2:
            sides = [height, width]
        case {"shortest_edge": side} if len(value) == 1:
            sides = [side]
        case int():
            sides = [value] * (2 if is_square else 1)
        case _:
            raise _refusal(field, f"is {value!r:.100}; height and width, or shortest_edge alone, are implemented")
    if not all(type(side) is int and 1 <= side <= _MAX_SIDE for side in sides):
        raise _refusal(field, f"is {value!r:.100}; 1 to {_MAX_SIDE:,} pixels are possible")
    return sides


def _number(config: dict[str, Any], field: str, default: float) -> float:
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise _refusal(field, f"is {value!r:.100}; a positive number is needed")
    return float(value)


def _channels(config: dict[str, Any], field: str) -> list[float]:
    values = config.get(field)
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    ):
        raise _refusal(field, f"is {values!r:.100}; three numbers are needed")
    return [float(value) for value in values]


def _std(config: dict[str, Any]) -> list[float]:
    values = _channels(config, "image_std")
    if 0 in values:
        raise _refusal("image_std", "has a 0, by which numbers would be divided")
    return values


def _refusal(field: str, reason: str) -> ExportError:
    return ExportError(reason, file=FILE, field=field)
