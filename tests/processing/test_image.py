import base64
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sardonyx.errors import InvalidRequest
from sardonyx.processing.image import FORMATS, decode_data_uri, preprocess
from sardonyx.repository.families import ImageInput

PLAIN = ImageInput(name="x", output="y", layout="NHWC", resize=[4, 4], crop=[4, 4], mean=[0.0] * 3)


def spec(**fields):
    return ImageInput(**({name: getattr(PLAIN, name) for name in PLAIN.__struct_fields__} | fields))


def encoded(picture, kind="PNG", **options):
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def gradient(width=12, height=8):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 5], axis=-1).astype(np.uint8)


def png_header(width, height, body=b""):
    """A PNG that says how large it is, and holds hardly anything."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def refusal(data, given=PLAIN, **options):
    with pytest.raises(InvalidRequest) as caught:
        preprocess(data, given, **options)
    return caught.value.message


class TestDataUri:
    @pytest.mark.parametrize(
        "head",
        [
            "data:image/png;base64,",
            "DATA:Image/JPEG;BASE64,",
            "data:image/svg+xml;base64,",
            "data:image/x-icon;charset=utf-8;name=a.png;base64,",
        ],
    )
    def test_pictures_of_any_media_type_are_taken(self, head):
        assert decode_data_uri(head + "AP/+") == b"\x00\xff\xfe"

    @given(st.binary(min_size=1, max_size=200))
    def test_bytes_come_back(self, data):
        assert decode_data_uri(f"data:image/png;base64,{base64.b64encode(data).decode()}") == data

    @pytest.mark.parametrize(
        "url", ["https://example.org/a.png", "file:///etc/passwd", "ftp://a/b", "//a/b", "", "AAAA", " data:image/png"]
    )
    def test_nothing_is_fetched(self, url):
        with pytest.raises(InvalidRequest) as caught:
            decode_data_uri(url)
        assert caught.value.message == "the server fetches nothing; send the picture as a data: URI"

    @pytest.mark.parametrize(
        "url",
        [
            "data:",
            "data:,",
            "data:;base64,AAAA",
            "data:image/png,AAAA",
            "data:image/png;base64",
            "data:text/html;base64,AAAA",
            "data:image/;base64,AAAA",
            "data:image/png;a=b;a=b;a=b;a=b;a=b;base64,AAAA",
            f"data:image/{'x' * 600};base64,AAAA",
            "data:image/ſ;base64,AAAA",
        ],
    )
    def test_other_data_is_refused(self, url):
        with pytest.raises(InvalidRequest, match="is no data: URI of a picture"):
            decode_data_uri(url)

    @pytest.mark.parametrize(
        "text", ["A", "AAA", "AA=", "=AAA", "AAAA=", "AA==AA==", "A A A A", "AAAA\n", "AA-_", "AAA%3D", "ÄAAA", "AAAA#"]
    )
    def test_base64_is_strict(self, text):
        with pytest.raises(InvalidRequest, match="base64"):
            decode_data_uri(f"data:image/png;base64,{text}")

    def test_nothing_is_no_picture(self):
        with pytest.raises(InvalidRequest, match="is empty"):
            decode_data_uri("data:image/png;base64,")

    @pytest.mark.parametrize("max_bytes", range(1, 8))
    def test_size_is_bounded_to_the_byte(self, max_bytes):
        head = "data:image/png;base64,"
        fits = bytes(max_bytes)
        assert decode_data_uri(head + base64.b64encode(fits).decode(), max_bytes=max_bytes) == fits
        for more in (1, 2, 100):
            text = base64.b64encode(bytes(max_bytes + more)).decode()
            with pytest.raises(InvalidRequest, match=f"at most {max_bytes} bytes"):
                decode_data_uri(head + text, max_bytes=max_bytes)


class TestSteps:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_every_format_is_read(self, kind):
        picture = Image.new("RGB", (4, 4), (200, 100, 50))
        values = preprocess(encoded(picture, kind), PLAIN)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, np.broadcast_to([200, 100, 50], (4, 4, 3)), atol=6)

    def test_lossless_picture_of_the_right_size_stays(self):
        pixels = gradient(4, 4)
        np.testing.assert_array_equal(preprocess(encoded(Image.fromarray(pixels)), PLAIN), pixels)

    @pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic", "lanczos"])
    def test_two_numbers_are_height_and_width(self, resample):
        picture = Image.fromarray(gradient())
        values = preprocess(encoded(picture), spec(resize=[6, 5], crop=[6, 5], resample=resample))
        expected = np.asarray(picture.resize((5, 6), getattr(Image.Resampling, resample.upper())))
        np.testing.assert_array_equal(values, expected)

    @pytest.mark.parametrize(
        ("size", "resized"), [((12, 8), (6, 4)), ((8, 12), (4, 6)), ((7, 3), (9, 4)), ((5, 5), (4, 4))]
    )
    def test_one_number_is_the_shorter_side(self, size, resized):
        picture = Image.fromarray(gradient(*size))
        values = preprocess(encoded(picture), spec(resize=[4], crop=[resized[1], resized[0]]))
        np.testing.assert_array_equal(values, np.asarray(picture.resize(resized, Image.Resampling.BILINEAR)))

    @pytest.mark.parametrize("crop", [[2, 4], [3, 3], [6, 1]])
    def test_the_middle_is_kept(self, crop):
        pixels = gradient(8, 6)
        top, left = (6 - crop[0]) // 2, (8 - crop[1]) // 2
        values = preprocess(encoded(Image.fromarray(pixels)), spec(resize=[6, 8], crop=crop))
        np.testing.assert_array_equal(values, pixels[top : top + crop[0], left : left + crop[1]])

    def test_jpeg_comes_between_resizing_and_cropping(self):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))
        values = preprocess(encoded(picture), spec(resize=[16, 16], crop=[8, 8], has_jpeg_round_trip=True))
        again = Image.open(io.BytesIO(encoded(picture.resize((16, 16), Image.Resampling.BILINEAR), "JPEG", quality=75)))
        np.testing.assert_array_equal(values, np.asarray(again)[4:12, 4:12])

    def test_channels_are_swapped_before_mean_and_std(self):
        data = encoded(Image.new("RGB", (4, 4), (10, 20, 30)))
        values = preprocess(data, spec(is_bgr=True, scale=0.5, mean=[1.0, 2.0, 3.0], std=[1.0, 2.0, 4.0]))
        np.testing.assert_allclose(values[0, 0], [(15 - 1) / 1, (10 - 2) / 2, (5 - 3) / 4])

    @pytest.mark.parametrize("is_bgr", [False, True])
    def test_channels_may_lie_in_front(self, is_bgr):
        data = encoded(Image.fromarray(gradient(4, 4)))
        last = preprocess(data, spec(is_bgr=is_bgr))
        first = preprocess(data, spec(is_bgr=is_bgr, layout="NCHW"))
        np.testing.assert_array_equal(first, last.transpose(2, 0, 1))
        assert first.flags.c_contiguous
        assert last.flags.c_contiguous


def palette(transparency):
    picture = Image.fromarray(gradient(4, 4)).quantize(4)
    picture.info["transparency"] = transparency
    return encoded(picture)


MODES = {
    "bits": encoded(Image.new("1", (4, 4), 1)),
    "grey": encoded(Image.new("L", (4, 4), 90)),
    "grey with a transparent shade": encoded(Image.new("L", (4, 4), 90), transparency=90),
    "grey and alpha": encoded(Image.new("LA", (4, 4), (90, 0))),
    "16 bits": encoded(Image.fromarray(np.full((4, 4), 300, np.uint16))),
    "palette": encoded(Image.fromarray(gradient(4, 4)).quantize(4)),
    "palette with a transparent colour": palette(1),
    "palette with alpha": palette(b"\x00\x80"),
    "colour with a transparent one": encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)),
    "alpha": encoded(Image.new("RGBA", (4, 4), (200, 100, 50, 0))),
    "webp with alpha": encoded(Image.new("RGBA", (4, 4), (200, 100, 50, 255)), "WEBP", lossless=True),
    "cmyk": encoded(Image.new("CMYK", (4, 4), (10, 20, 30, 40)), "JPEG"),
    "grey jpeg": encoded(Image.new("L", (4, 4), 90), "JPEG"),
    "transparent gif": encoded(Image.new("P", (4, 4), 1), "GIF", transparency=1),
}


@pytest.mark.parametrize("data", MODES.values(), ids=MODES)
def test_every_mode_becomes_rgb_as_pillow_does_it(data):
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        picture.info.pop("transparency", None)
        expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(preprocess(data, PLAIN), expected)


def test_alpha_is_dropped_and_16_bits_are_clipped():
    assert preprocess(MODES["alpha"], PLAIN)[0, 0].tolist() == [200, 100, 50]
    assert preprocess(MODES["16 bits"], PLAIN)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "white")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(preprocess(data, PLAIN)[2, 2], [255, 0, 0], atol=6)


def test_orientation_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = gradient(4, 4)
    np.testing.assert_array_equal(preprocess(encoded(Image.fromarray(pixels), exif=exif), PLAIN), pixels)


class TestBombs:
    @pytest.mark.parametrize(
        ("width", "height"), [(6_325, 6_325), (40_000_001, 1), (10_000, 10_000), (2**31 - 1, 2**31 - 1)]
    )
    def test_too_many_pixels_are_refused_by_the_header(self, width, height):
        assert refusal(png_header(width, height)) == "has too many pixels; at most 40,000,000 are decoded"

    @pytest.mark.parametrize("kind", FORMATS)
    def test_every_format_is_counted(self, kind):
        data = encoded(Image.new("RGB", (11, 10)), kind)
        assert "at most 109 are" in refusal(data, max_pixels=109)
        assert preprocess(data, PLAIN, max_pixels=110).shape == (4, 4, 3)

    def test_a_gif_frame_beyond_the_screen_is_counted(self):
        data = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
        at = data.index(b"\x2c")
        data[at + 5 : at + 9] = struct.pack("<HH", 60_000, 60_000)
        assert "too many pixels" in refusal(bytes(data))

    def test_pictures_that_resizing_would_blow_up_are_refused(self):
        data = encoded(Image.new("RGB", (30_000, 1)))
        assert "30,000 x 1 pixels would be 6,720,000 x 224" in refusal(data, spec(resize=[224], crop=[224, 224]))
        long = encoded(Image.new("RGB", (20_000, 1)))
        assert "is too long and narrow" in refusal(long, spec(resize=[4], crop=[4, 4], has_jpeg_round_trip=True))
        assert preprocess(long, spec(resize=[3], crop=[3, 3], has_jpeg_round_trip=True)).shape == (3, 3, 3)

    def test_jpegs_of_endless_scans_are_refused(self):
        data = encoded(Image.fromarray(gradient()), "JPEG", progressive=True)
        last = data[data.rindex(b"\xff\xda") : -2]
        assert preprocess(data[:-2] + last * 50 + data[-2:], PLAIN).shape == (4, 4, 3)
        assert refusal(data[:-2] + last * 64 + data[-2:]) == "is a JPEG of more than 64 scans"


class TestDamage:
    @pytest.mark.parametrize("data", [b"", b"x", b"<svg></svg>", b"%PDF-1.7", b"\x00" * 100])
    def test_what_is_no_picture_is_refused(self, data):
        assert refusal(data) == "is no picture that can be read; PNG, JPEG, WebP, GIF and BMP can"

    @pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "TGA", "PCX", "EPS", "PDF"])
    def test_other_formats_are_refused(self, kind):
        assert refusal(encoded(Image.new("RGB", (16, 16)), kind)).startswith("is no picture that can be read")

    @pytest.mark.parametrize("kind", FORMATS)
    def test_truncated_files_are_refused(self, kind):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
        data = encoded(picture, kind)
        assert "picture" in refusal(data[: len(data) // 2])

    @pytest.mark.parametrize(("width", "height"), [(0, 4), (4, 0), (0, 0)])
    def test_pictures_without_pixels_are_refused(self, width, height):
        assert refusal(png_header(width, height))

    def test_a_png_without_its_pixels_is_refused(self):
        assert refusal(png_header(100, 100)) == "is a damaged or incomplete picture"

    @given(kind=st.sampled_from(FORMATS), data=st.data())
    @settings(max_examples=300, deadline=None)
    def test_broken_files_give_a_picture_or_our_own_words(self, kind, data):
        file = bytearray(ORIGINALS[kind])
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(file) - 1))
            file[at] = data.draw(st.integers(0, 255))
        file = file[: data.draw(st.integers(1, len(file)) | st.just(len(file)))]
        try:
            values = preprocess(bytes(file), PLAIN, max_pixels=1_000_000)
        except InvalidRequest as error:
            assert error.message.startswith(("is ", "has "))  # noqa: PT017 - either is fine
        else:
            assert values.shape == (4, 4, 3)
            assert np.isfinite(values).all()


ORIGINALS = {kind: encoded(Image.fromarray(gradient()), kind) for kind in FORMATS}
