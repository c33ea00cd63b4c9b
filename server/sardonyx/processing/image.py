"""Pictures: from what a caller sent to the array that an image classifier's graph takes.

Floor 2. What comes here is nobody's friend: sizes are looked at before anything is decoded, and whatever Pillow says of
a broken file becomes an error in our own words. Everything here blocks.
"""

import binascii
import io
import re
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from sardonyx.errors import InvalidRequest
from sardonyx.repository.families import ImageInput

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_BYTES = 20 << 20
"""Of an encoded picture; as many as OpenAI takes."""
MAX_PIXELS = 40_000_000
"""Of a picture: 160 MB when it is decoded, for Pillow keeps four bytes of each."""
_MAX_SIDE = 65_500
"""Of what is resized: no JPEG is longer."""
_MAX_SCANS = 64
"""Of a JPEG, and of what is embedded in it. Encoders write about ten. Sixty bytes make a scan, and each goes over all
pixels (some 50 ms for 40 million), so a file of 20 MB could take hours."""
_START_OF_SCAN = b"\xff\xda"
# Source: RFC 2397. Parameters may stand before ``base64``; their values are of no use here.
_DATA_URI = re.compile(r"data:image/[a-z0-9.+-]+(?:;[a-z0-9-]+=[^;,]{1,64}){0,4};base64,", re.IGNORECASE | re.ASCII)
_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def decode_data_uri(url: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The encoded picture in a URL like ``data:image/png;base64,...``; nothing is looked up anywhere.

    Args:
        max_bytes: of the picture.

    Raises:
        InvalidRequest: another scheme, no picture by its media type, not base64, nothing in it, or too much.

    Source: RFC 2397; RFC 4648, section 4 (the alphabet with ``+`` and ``/``, padded, without line breaks).
    """
    if url[:5].lower() != "data:":
        raise InvalidRequest("the server fetches nothing; send the picture as a data: URI")
    match = _DATA_URI.match(url, 0, 512)
    if match is None:
        raise InvalidRequest("is no data: URI of a picture; it begins like data:image/png;base64,")
    # Four characters hold three bytes, the last four perhaps only one.
    if (len(url) - match.end()) // 4 * 3 > max_bytes + 2:
        raise _too_large(max_bytes)
    try:
        # Strict mode lets a padding pass that nothing needs.
        if (len(url) - match.end()) % 4:
            raise ValueError
        data = binascii.a2b_base64(url[match.end() :], strict_mode=True)
    except ValueError:
        raise InvalidRequest("is not in base64, with its padding and nothing between") from None
    if not data:
        raise InvalidRequest("is empty")
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    return data


def preprocess(data: bytes, spec: ImageInput, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.float32]:
    """What the graph takes of an encoded picture, in the order of `ImageInput`.

    Palettes, alpha, CMYK and 16 bits become RGB as Pillow's ``convert`` does it: alpha is dropped, 16-bit grey clipped
    to 8. An orientation that EXIF asks for is not applied, and of an animation the first frame is taken. Both are what
    classifiers were trained with.

    Args:
        data: PNG, JPEG, WebP, GIF or BMP, by its content.
        max_pixels: of the picture, and of what it is resized to.

    Returns:
        (y, x, 3) or (3, y, x) float32 by `ImageInput.layout`, y and x being the crop's; C-contiguous.

    Raises:
        InvalidRequest: another format, a damaged file, too many pixels, or too long and narrow to be resized.
    """
    picture = _resized(decode_image(data, max_pixels), spec, max_pixels)
    if spec.has_jpeg_round_trip:
        picture = _by_way_of_jpeg(picture)
    height, width = spec.crop
    top, left = (picture.height - height) // 2, (picture.width - width) // 2
    pixels = np.asarray(picture.crop((left, top, left + width, top + height)), np.float32)
    if spec.is_bgr:
        pixels = pixels[..., ::-1]
    values = (pixels * np.float32(spec.scale) - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1) if spec.layout == "NCHW" else values)


def decode_image(data: bytes, max_pixels: int, *, mode: Literal["RGB", "RGBA"] = "RGB") -> Image.Image:
    """An encoded picture, at least a pixel of it.

    Args:
        mode: without alpha, or with.

    Raises:
        InvalidRequest: another format, a damaged file, or too many pixels.
    """
    if data[:2] == b"\xff\xd8" and data.count(_START_OF_SCAN) > _MAX_SCANS:
        raise InvalidRequest(f"is a JPEG of more than {_MAX_SCANS} scans")
    try:
        # Opening reads the header; pixels are decoded when they are asked for.
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(max_pixels) from None
    except UnidentifiedImageError:
        raise InvalidRequest("is no picture that can be read; PNG, JPEG, WebP, GIF and BMP can") from None
    except Exception:  # Pillow's decoders share no exception
        raise _damaged() from None
    with picture:
        if not picture.width or not picture.height:
            raise InvalidRequest("has no pixels")
        if picture.width * picture.height > max_pixels:
            raise _too_many_pixels(max_pixels)
        if mode == "RGB":
            # It means nothing then, but that Pillow warns that it will be gone.
            picture.info.pop("transparency", None)
        try:
            picture.load()
            if mode == "RGB":
                picture.info.pop("transparency", None)
            return picture if picture.mode == mode else picture.convert(mode)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise _too_many_pixels(max_pixels) from None
        except Exception:  # Pillow's decoders share no exception
            raise _damaged() from None


def _resized(picture: Image.Image, spec: ImageInput, max_pixels: int) -> Image.Image:
    if len(spec.resize) == 2:
        height, width = spec.resize
    else:
        shorter = min(picture.width, picture.height)
        # In whole numbers, cut off as torchvision does.
        height, width = (spec.resize[0] * side // shorter for side in (picture.height, picture.width))
    if height * width > max_pixels or max(height, width) > _MAX_SIDE:
        raise InvalidRequest(
            f"is too long and narrow: resized, its {picture.width:,} x {picture.height:,} pixels would be "
            f"{width:,} x {height:,}"
        )
    return picture.resize((width, height), _RESAMPLE[spec.resample])


def _by_way_of_jpeg(picture: Image.Image) -> Image.Image:
    """What JPEG leaves of a picture, at the quality that Pillow has where nobody asks for another."""
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG")
    return Image.open(encoded, formats=("JPEG",)).convert("RGB")


def _damaged() -> InvalidRequest:
    return InvalidRequest("is a damaged or incomplete picture")


def _too_large(max_bytes: int) -> InvalidRequest:
    return InvalidRequest(f"is too large; a picture has at most {max_bytes:,} bytes")


def _too_many_pixels(max_pixels: int) -> InvalidRequest:
    return InvalidRequest(f"has too many pixels; at most {max_pixels:,} are decoded")
