import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sardonyx.errors import InvalidRequest
from sardonyx.processing.picture import (
    MEDIA_TYPES,
    encode_picture,
    enlarged,
    read_mask,
    read_source,
    size_of,
)

GREY = np.full((16, 24, 3), 100, np.uint8)


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def gradient(height=16, width=24):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)


def halves(height=16, width=32, mode="L"):
    """White on the left, black on the right."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, : width // 2] = 255
    return Image.fromarray(pixels).convert(mode)


def see_through(height=16, width=32):
    """Transparent on the left, and white, so that colours alone would say the opposite."""
    pixels = np.full((height, width, 4), 255, np.uint8)
    pixels[:, : width // 2] = 0
    return Image.fromarray(pixels)


class TestEncode:
    @pytest.mark.parametrize("quality", [0, 50, 100])
    def test_png_loses_nothing(self, quality):
        data = encode_picture(gradient(), "png", quality)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), gradient())

    @pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
    def test_file_is_what_its_media_type_says(self, kind):
        picture = Image.open(io.BytesIO(encode_picture(GREY, kind, 90)))
        assert picture.get_format_mimetype() == MEDIA_TYPES[kind]
        assert picture.size == (24, 16)
        assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - 100).max() <= 3

    @pytest.mark.parametrize("kind", ["jpeg", "webp"])
    def test_quality_costs_bytes(self, kind):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        sizes = [len(encode_picture(noise, kind, quality)) for quality in (0, 50, 100)]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[2]


def test_preview_is_brought_to_its_pictures_size():
    small = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    large = enlarged(small, 8, 16)
    assert large.shape == (8, 16, 3)
    assert large[0, 0].tolist() == [0, 0, 0]
    assert large[-1, -1].tolist() == [255, 255, 255]


class TestSource:
    def test_picture_of_the_size_is_taken_as_it_is(self):
        values = read_source(encoded(Image.fromarray(gradient())), 16, 24)
        assert values.shape == (3, 16, 24)
        assert values.dtype == np.float32
        assert values.flags.c_contiguous
        np.testing.assert_allclose(values, gradient().transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)

    @pytest.mark.parametrize(("height", "width"), [(8, 12), (32, 48), (16, 16), (24, 8), (64, 256)])
    def test_picture_covers_the_size(self, height, width):
        values = read_source(encoded(Image.fromarray(gradient())), height, width)
        assert values.shape == (3, height, width)
        assert -1 <= values.min() < values.max() <= 1

    def test_middle_of_a_picture_of_another_shape_is_taken(self):
        # Black, white, black: of the square in the middle, all is white.
        pixels = np.zeros((16, 48, 3), np.uint8)
        pixels[:, 16:32] = 255
        values = read_source(encoded(Image.fromarray(pixels)), 16, 16)
        assert values[:, :, 4:12].min() == 1

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
    def test_pictures_of_every_mode_become_rgb(self, mode):
        picture = Image.new(mode, (8, 8)) if mode == "I;16" else halves(8, 8).convert(mode)
        kind = "JPEG" if mode == "CMYK" else "PNG"
        assert read_source(encoded(picture, kind), 8, 8).shape == (3, 8, 8)

    def test_picture_is_turned_as_its_exif_asks(self):
        exif = Image.Exif()
        exif[0x0112] = 6  # what is up lies on the right
        data = encoded(halves(16, 32, "RGB"), "JPEG", exif=exif, quality=100)
        assert size_of(data) == (32, 16)
        values = read_source(data, 32, 16)
        assert values[:, :12].min() > 0.9  # what was left is up
        assert values[:, 20:].max() < -0.9

    def test_broken_exif_changes_nothing(self):
        data = encoded(halves(16, 32, "RGB"), "JPEG", exif=b"Exif\0\0" + b"\xff" * 40)
        assert size_of(data) == (16, 32)

    @pytest.mark.parametrize("data", [b"", b"no picture", encoded(Image.fromarray(GREY))[:60], b"<svg/>"])
    def test_what_is_no_picture_is_refused(self, data):
        for read in (lambda: read_source(data, 8, 8), lambda: read_mask(data, 8, 8, 4), lambda: size_of(data)):
            with pytest.raises(InvalidRequest):
                read()

    def test_bomb_is_refused_before_it_is_decoded(self):
        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
        data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        for read in (lambda: read_source(data, 8, 8), lambda: read_mask(data, 8, 8, 4), lambda: size_of(data)):
            with pytest.raises(InvalidRequest, match="too many pixels"):
                read()

    @pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1)])
    def test_picture_that_is_too_long_and_narrow_is_refused(self, size):
        data = encoded(Image.new("RGB", size))
        for read in (lambda: read_source(data, 512, 512), lambda: read_mask(data, 512, 512, 8)):
            with pytest.raises(InvalidRequest, match="too long and narrow"):
                read()

    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(1, 40),
        st.integers(1, 40),
        st.integers(1, 6).map(lambda n: 8 * n),
        st.integers(1, 6).map(lambda n: 8 * n),
    )
    def test_any_shape_is_fitted_to_any_size(self, height, width, wanted_height, wanted_width):
        data = encoded(Image.new("RGB", (width, height), (255, 255, 255)))
        values = read_source(data, wanted_height, wanted_width)
        assert values.shape == (3, wanted_height, wanted_width)
        assert values.min() == 1  # no edge of another colour
        assert read_mask(data, wanted_height, wanted_width, 8).min() == 1


class TestMask:
    def test_transparent_is_where_it_changes(self):
        mask = read_mask(encoded(see_through()), 16, 32, 4)
        assert mask.shape == (4, 8)
        assert mask.dtype == np.float32
        np.testing.assert_array_equal(mask, np.repeat([[1, 1, 1, 1, 0, 0, 0, 0]], 4, axis=0))

    @pytest.mark.parametrize("mode", ["L", "RGB", "1", "P", "LA", "RGBA"])
    def test_without_transparency_white_is_where_it_changes(self, mode):
        mask = read_mask(encoded(halves(mode="L").convert(mode)), 16, 32, 4)
        np.testing.assert_array_equal(mask, np.repeat([[1, 1, 1, 1, 0, 0, 0, 0]], 4, axis=0))

    def test_mask_holds_nothing_but_zero_and_one(self):
        mask = read_mask(encoded(Image.fromarray(gradient())), 48, 72, 8)
        assert set(np.unique(mask)) <= {0, 1}

    def test_mask_is_fitted_as_its_picture(self):
        # As the source: what is white in the middle third fills the square.
        pixels = np.zeros((16, 48), np.uint8)
        pixels[:, 16:32] = 255
        assert read_mask(encoded(Image.fromarray(pixels)), 16, 16, 4).min() == 1
