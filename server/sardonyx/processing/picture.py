"""Pictures that image models make, as files; and those that callers bring for them to begin with.

Floor 2. Everything here blocks.
"""

import io
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from sardonyx.errors import InvalidRequest
from sardonyx.processing.image import MAX_PIXELS, decode_image

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Format = Literal["png", "jpeg", "webp"]

MEDIA_TYPES: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def encode_picture(pixels: Pixels, kind: Format, quality: int) -> bytes:
    """A file of a picture.

    Args:
        pixels: (Y, X, 3).
        kind: of the file.
        quality: of JPEG and WebP, 0 to 100; PNG loses nothing.
    """
    file = io.BytesIO()
    options: dict[str, int] = {} if kind == "png" else {"quality": quality}
    Image.fromarray(pixels, "RGB").save(file, kind.upper(), **options)
    return file.getvalue()


def enlarged(pixels: Pixels, height: int, width: int) -> Pixels:
    """A rough picture at the size of the picture that it stands for."""
    return np.asarray(Image.fromarray(pixels, "RGB").resize((width, height), Image.Resampling.BILINEAR))


def read_source(data: bytes, height: int, width: int) -> Floats:
    """A picture to begin with: (3, Y, X) between -1 and 1, scaled to cover the size and cut in the middle.

    It is turned as its EXIF asks for; what is transparent keeps the colour that it has underneath.

    Raises:
        InvalidRequest: as `image.decode_image`; or it is so long and narrow that it cannot be scaled.
    """
    picture = _fitted(_upright(decode_image(data, MAX_PIXELS)), height, width)
    values = np.asarray(picture, np.float32) / 127.5 - 1
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def size_of(data: bytes) -> tuple[int, int]:
    """Height and width of an encoded picture, turned as its EXIF asks for.

    Raises:
        InvalidRequest: as `image.decode_image`.
    """
    picture = _upright(decode_image(data, MAX_PIXELS))
    return picture.height, picture.width


def read_mask(data: bytes, height: int, width: int, pixels_per_latent: int) -> Floats:
    """Where a picture is to change: (y, x) of its latents, between 0 and 1.

    Where the file has transparency, what is transparent changes, as OpenAI has it; otherwise what is white, as
    diffusers has it. It is fitted as its picture is.

    Raises:
        InvalidRequest: as `image.decode_image`.
    """
    picture = _upright(decode_image(data, MAX_PIXELS, mode="RGBA"))
    alpha = picture.getchannel("A")
    has_transparency = alpha.getextrema()[0] < 255  # type: ignore[operator]  # one channel has two numbers
    mask = alpha.point(lambda value: 255 - value) if has_transparency else picture.convert("L")
    fitted = _fitted(mask, height, width)
    small = fitted.resize((width // pixels_per_latent, height // pixels_per_latent), Image.Resampling.BOX)
    return (np.asarray(small, np.float32) / 255 >= 0.5).astype(np.float32)


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # broken EXIF fails in many ways, and says nothing of how the picture stands
        return picture


def _fitted(picture: Image.Image, height: int, width: int) -> Image.Image:
    scale = max(height / picture.height, width / picture.width)
    size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    if size[0] * size[1] > MAX_PIXELS:
        raise InvalidRequest("is too long and narrow for this size")
    resized = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    return resized.crop((left, top, left + width, top + height))
