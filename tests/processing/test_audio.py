"""Decoded sound against the tones that were written, sampled at 16 kHz in the first place."""

import struct
import sys
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.processing.sound_files import SAMPLE_RATE, ffmpeg_bytes, sndfile_bytes, tones

from sardonyx.errors import DeadlineExceeded, InvalidRequest, PayloadTooLarge, ServeError, UnsupportedFeature
from sardonyx.processing.audio import AudioLimits, decode_audio, sound_duration_s

LIMITS = AudioLimits(max_duration_s=60)
EDGE = 800
"""At both ends, 50 ms: resamplers and codecs ring there."""


def wav(rate: int = 16_000, duration_s: float = 1.0, subtype: str = "PCM_16", channels: int = 1) -> bytes:
    return sndfile_bytes(tones(rate, duration_s, channels), rate, "WAV", subtype)


def flac() -> bytes:
    return sndfile_bytes(tones(44_100, 2.0), 44_100, "FLAC", "PCM_16")


def mp3(duration_s: float = 3.0) -> bytes:
    # Varying frames: noise comes and goes.
    noise = np.random.default_rng(1).normal(0, 0.1, (round(44_100 * duration_s), 1))
    noise[: len(noise) // 2] = 0
    return sndfile_bytes((tones(44_100, duration_s) + noise).astype(np.float32), 44_100, "MP3")


def snr_db(samples: np.ndarray, *, max_lag: int = 0) -> float:
    """How far the difference to the tones lies below them, at the best lag."""
    expected = tones(SAMPLE_RATE, 3.0)[:, 0]
    best = -np.inf
    for lag in range(max_lag + 1):
        inner = samples[EDGE + lag : -EDGE]
        expected_inner = expected[EDGE : EDGE + len(inner)]
        error = np.square(inner - expected_inner).mean() + 1e-20
        best = max(best, 10 * np.log10(np.square(expected_inner).mean() / error))
    return float(best)


@pytest.mark.parametrize(
    ("container", "subtype", "least_db"),
    [
        ("WAV", "PCM_U8", 30),
        ("WAV", "PCM_16", 75),
        ("WAV", "PCM_24", 110),
        ("WAV", "PCM_32", 110),
        ("WAV", "FLOAT", 110),
        ("WAV", "DOUBLE", 110),
        ("WAV", "ALAW", 30),
        ("WAV", "ULAW", 30),
        ("WAVEX", "PCM_16", 75),
        ("RF64", "PCM_16", 75),
        ("FLAC", "PCM_16", 75),
        ("FLAC", "PCM_24", 110),
        ("OGG", "VORBIS", 25),
        ("OGG", "OPUS", 25),
        ("MP3", None, 25),
        ("AIFF", "PCM_16", 75),
        ("AU", "PCM_16", 75),
        ("CAF", "PCM_16", 75),
    ],
)
def test_a_file_that_libsndfile_reads_sounds_as_it_was_written(container, subtype, least_db):
    data = sndfile_bytes(tones(48_000, 2.0), 48_000, container, subtype)
    samples = decode_audio(data, LIMITS)
    assert samples.dtype == np.float32
    assert len(samples) == 2 * SAMPLE_RATE
    assert samples.flags.writeable
    assert snr_db(samples) > least_db


@pytest.mark.parametrize(
    ("container", "codec", "rate", "least_db", "options"),
    [
        ("ipod", "aac", 44_100, 25, {}),
        ("mp4", "aac", 44_100, 25, {"has_picture": True}),
        ("mp4", "aac", 32_000, 20, {"movflags": "frag_keyframe+empty_moov"}),
        ("mp4", "alac", 48_000, 75, {}),
        ("mov", "pcm_s24le", 48_000, 110, {}),
        ("webm", "libopus", 48_000, 25, {}),
        ("webm", "libopus", 48_000, 25, {"live": "1"}),
        ("matroska", "flac", 48_000, 75, {"has_picture": True}),
        ("matroska", "pcm_f32le", 48_000, 110, {}),
        ("adts", "aac", 32_000, 20, {}),
        ("amr", "libopencore_amrnb", 8_000, 10, {}),
    ],
)
def test_a_file_that_ffmpeg_reads_sounds_as_it_was_written(container, codec, rate, least_db, options):
    samples = decode_audio(ffmpeg_bytes(tones(rate, 2.0), rate, container, codec, **options), LIMITS)
    assert len(samples) == pytest.approx(2 * SAMPLE_RATE, abs=800)
    # Some formats do not tell by how much their encoder was late.
    assert snr_db(samples, max_lag=600) > least_db


@pytest.mark.parametrize("rate", [1000, 8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 384_000])
def test_any_sample_rate_becomes_sixteen_thousand(rate):
    samples = decode_audio(wav(rate, 1.5, "FLOAT"), LIMITS)
    assert sound_duration_s(samples) == pytest.approx(1.5, abs=1e-4)
    # A thousand samples a second have no room for the higher tone.
    assert rate == 1000 or snr_db(samples) > 90


@pytest.mark.parametrize("channels", [1, 2, 6, 64])
def test_channels_are_averaged(channels):
    assert snr_db(decode_audio(wav(16_000, 1.0, "FLOAT", channels), LIMITS)) > 90


@pytest.mark.parametrize(
    ("container", "codec", "channels"),
    [("mp4", "alac", 2), ("mov", "pcm_s16le", 2), ("matroska", "flac", 6), ("matroska", "flac", 8)],
)
def test_channels_are_averaged_when_ffmpeg_reads_them(container, codec, channels):
    data = ffmpeg_bytes(tones(48_000, 1.0, channels), 48_000, container, codec)
    assert snr_db(decode_audio(data, LIMITS)) > 75


def test_eight_planes_are_averaged():
    data = ffmpeg_bytes(tones(48_000, 1.0, 8), 48_000, "mp4", "libopus")
    assert snr_db(decode_audio(data, LIMITS)) > 20


def test_a_tag_in_front_is_passed_over():
    tag = b"ID3\x04\0\0\0\0\x0f\x7f" + bytes(2047)
    assert snr_db(decode_audio(tag + flac(), LIMITS)) > 75
    assert len(decode_audio(tag + mp3(), LIMITS)) == 3 * SAMPLE_RATE


def test_floating_point_beyond_one_is_made_quieter_as_a_whole():
    quiet = tones(16_000, 1.0) / 2
    samples = decode_audio(sndfile_bytes(quiet * 32_768, 16_000, "WAV", "FLOAT"), LIMITS)
    assert np.abs(samples).max() == 1
    np.testing.assert_allclose(samples, quiet[:, 0] / np.abs(quiet).max(), atol=1e-6)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "no numbers"), (np.inf, "no numbers"), (-np.inf, "no numbers"), (1e20, "beyond 1")]
)
def test_values_that_are_no_sound_are_refused(value, message):
    samples = tones(16_000, 1.0)
    samples[5000] = value
    with pytest.raises(InvalidRequest, match=message):
        decode_audio(sndfile_bytes(samples, 16_000, "WAV", "FLOAT"), LIMITS)


def test_doubles_that_no_float_holds_are_refused():
    samples = np.full((100, 1), 1e300)
    with pytest.raises(InvalidRequest, match="no numbers or infinite"):
        decode_audio(sndfile_bytes(samples, 16_000, "WAV", "DOUBLE"), LIMITS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "file is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "no sound that can be read: WAV, FLAC"),
        (b"What is said here is only written.", "MP4 and M4A"),
        (b"RIFF\x24\0\0\0WAVE", "damaged or incomplete"),
        (b"fLaC" + bytes(1000), "damaged or incomplete"),
        (wav(duration_s=0), "has no sound in it"),
        (b"\0\0\0\x18ftypmp42" + b"isom" * 3, "damaged or incomplete"),
    ],
)
def test_what_is_no_sound_is_refused_in_words_of_ours(data, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        decode_audio(data, LIMITS)
    assert caught.value.param == "file"


WHOLE: dict[str, Callable[[], bytes]] = {
    "wav": wav,
    "rf64": lambda: sndfile_bytes(tones(16_000, 1.0), 16_000, "RF64"),
    "aiff": lambda: sndfile_bytes(tones(16_000, 1.0), 16_000, "AIFF"),
    "au": lambda: sndfile_bytes(tones(16_000, 1.0), 16_000, "AU"),
    "caf": lambda: sndfile_bytes(tones(16_000, 1.0), 16_000, "CAF"),
    "flac": flac,
    "vorbis": lambda: sndfile_bytes(tones(16_000, 1.0), 16_000, "OGG"),
    "mp3": mp3,
    "m4a": lambda: ffmpeg_bytes(tones(44_100, 1.0), 44_100, "ipod", "aac"),
    "fragments": lambda: ffmpeg_bytes(tones(44_100, 1.0), 44_100, "mp4", "aac", movflags="frag_keyframe+empty_moov"),
    "webm": lambda: ffmpeg_bytes(tones(48_000, 1.0), 48_000, "webm", "libopus"),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("part", [0.05, 0.6, 0.9])
def test_a_file_that_states_more_than_it_has_is_refused(kind, part):
    data = WHOLE[kind]()
    assert len(decode_audio(data, LIMITS)) > 0.9 * SAMPLE_RATE
    with pytest.raises(InvalidRequest, match="incomplete"):
        decode_audio(data[: int(part * len(data))], LIMITS)


@pytest.mark.parametrize(
    ("container", "codec", "rate", "options"),
    [
        ("adts", "aac", 44_100, {}),
        ("amr", "libopencore_amrnb", 8_000, {}),
        ("webm", "libopus", 48_000, {"live": "1"}),
    ],
)
def test_a_stream_without_a_length_may_end_anywhere(container, codec, rate, options):
    data = ffmpeg_bytes(tones(rate, 2.0), rate, container, codec, **options)
    samples = decode_audio(data[: len(data) * 6 // 10], LIMITS)
    assert 0.9 < sound_duration_s(samples) < 1.5


@pytest.mark.parametrize("size", [0, 0x7FFF_F000, 0xFFFF_FFFF])
@pytest.mark.parametrize("is_riff_known", [False, True])
def test_a_wav_file_from_a_pipe_is_read_to_its_end(size, is_riff_known):
    data = wav()
    at = data.index(b"data") + 4
    unknown = struct.pack("<I", size)
    riff = struct.pack("<I", 36) if is_riff_known else unknown
    streamed = data[:4] + riff + data[8:at] + unknown + data[at + 4 :]
    np.testing.assert_array_equal(decode_audio(streamed, LIMITS), decode_audio(data, LIMITS))


def without_index(data: bytes) -> bytes:
    """An MP3 file without its first frame."""
    return data[data.index(data[:2], 4) :]


def test_an_mp3_file_without_an_index_is_read_to_its_end():
    # By the size of the first frame it would seem to be shorter.
    data = without_index(mp3())
    assert b"Xing" not in data
    assert sound_duration_s(decode_audio(data, LIMITS)) == pytest.approx(3, abs=0.1)
    assert sound_duration_s(decode_audio(data + b"TAG" + bytes(125), LIMITS)) == pytest.approx(3, abs=0.1)


def test_mp3_files_put_together_are_read_to_the_last_one():
    data = mp3(8.0)
    assert sound_duration_s(decode_audio(data + data, LIMITS)) == pytest.approx(16, abs=0.2)


def test_ogg_files_put_together_are_read_to_the_last_one():
    data = sndfile_bytes(tones(48_000, 2.0), 48_000, "OGG", "VORBIS")
    other = sndfile_bytes(tones(48_000, 1.0), 48_000, "OGG", "VORBIS")
    assert sound_duration_s(decode_audio(data + other, LIMITS)) == pytest.approx(3, abs=0.1)
    other = sndfile_bytes(tones(24_000, 1.0), 24_000, "OGG", "VORBIS")
    with pytest.raises(InvalidRequest, match="damaged"):
        decode_audio(data + other, LIMITS)


@pytest.mark.parametrize("kind", ["flac", "vorbis"])
def test_damage_within_a_file_is_refused(kind):
    data = bytearray(WHOLE[kind]())
    middle = len(data) // 2
    data[middle : middle + 200] = b"\xaa" * 200
    with pytest.raises(InvalidRequest, match="damaged"):
        decode_audio(bytes(data), LIMITS)


def with_flac_length(data: bytes, num_samples: int) -> bytes:
    """Source: RFC 9639, section 8.2: the last 36 bits of the eight bytes at 18."""
    field = int.from_bytes(data[18:26], "big") >> 36 << 36 | num_samples
    return data[:18] + field.to_bytes(8, "big") + data[26:]


def test_a_header_that_promises_too_much_costs_nothing():
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge, match=r"longer than 60 seconds.*max_audio_s") as caught:
            decode_audio(with_flac_length(flac(), 2**36 - 1), LIMITS)
        with pytest.raises(InvalidRequest, match="incomplete"):
            decode_audio(with_flac_length(flac(), 44_100 * 50), LIMITS)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.param == "file"
    assert peak_bytes < 4 << 20


def test_a_flac_file_without_a_length_is_read_to_its_end():
    np.testing.assert_array_equal(decode_audio(with_flac_length(flac(), 0), LIMITS), decode_audio(flac(), LIMITS))


def test_decoding_ends_at_the_limit_when_nothing_states_a_length():
    silence = with_flac_length(sndfile_bytes(np.zeros((48_000 * 300, 1), np.int16), 48_000, "FLAC"), 0)
    assert len(silence) < 60_000
    asked = []
    with pytest.raises(PayloadTooLarge):
        decode_audio(silence, AudioLimits(max_duration_s=10), is_over=lambda: bool(asked.append(1)))
    # Five minutes would be 110 blocks.
    assert len(asked) < 6
    opus = ffmpeg_bytes(tones(48_000, 12.0), 48_000, "webm", "libopus", live="1")
    with pytest.raises(PayloadTooLarge):
        decode_audio(opus, AudioLimits(max_duration_s=10))


def test_the_limit_itself_is_allowed():
    assert len(decode_audio(wav(duration_s=2.0), AudioLimits(max_duration_s=2))) == 32_000
    with pytest.raises(PayloadTooLarge, match=r"than 1\.5 seconds"):
        decode_audio(wav(duration_s=2.0), AudioLimits(max_duration_s=1.5))


@pytest.mark.parametrize("data", [wav(duration_s=30), WHOLE["m4a"]()])
def test_decoding_ends_when_the_time_is_over(data):
    asked = []
    with pytest.raises(DeadlineExceeded):
        decode_audio(data, LIMITS, is_over=lambda: len(asked) == 2 or bool(asked.append(1)))
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("rate", "channels", "message"),
    [
        (16_000, 65, "65 channels"),
        (999, 1, "999 Hz"),
        (800_000, 1, "800,000 Hz"),
        (768_000, 8, "8 channels at 768,000"),
    ],
)
def test_formats_out_of_reason_are_refused(rate, channels, message):
    data = sndfile_bytes(np.zeros((100, channels), np.float32), rate, "WAV", "FLOAT")
    with pytest.raises(InvalidRequest, match=message):
        decode_audio(data, LIMITS)


def test_a_frame_of_millions_of_samples_is_refused():
    data = WHOLE_ALAC.replace(struct.pack(">I", 4096) + b"\0\x18", struct.pack(">I", 1 << 24) + b"\0\x18")
    assert data != WHOLE_ALAC
    with pytest.raises(InvalidRequest, match="damaged"):
        decode_audio(data, LIMITS)


WHOLE_ALAC = ffmpeg_bytes(tones(48_000, 1.0), 48_000, "mp4", "alac")


def test_a_codec_that_is_not_named_or_not_known_is_refused():
    with pytest.raises(InvalidRequest, match="coded in a way"):
        decode_audio(ffmpeg_bytes(tones(48_000, 1.0), 48_000, "matroska", "ac3"), LIMITS)
    with pytest.raises(InvalidRequest, match="coded in a way"):
        decode_audio(WHOLE["webm"]().replace(b"A_OPUS", b"A_OPAL"), LIMITS)


def test_a_film_without_sound_is_refused():
    with pytest.raises(InvalidRequest, match="no sound in it"):
        decode_audio(ffmpeg_bytes(None, 0, "mp4", "", has_picture=True), LIMITS)


def test_other_formats_are_refused_with_a_way_out_when_pyav_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UnsupportedFeature, match=r"convert the file.*install sardonyx\[av\]") as caught:
        decode_audio(WHOLE["m4a"](), LIMITS)
    assert caught.value.param == "file"
    assert len(decode_audio(wav(), LIMITS)) == SAMPLE_RATE


HEADS = [
    b"RIFF\x40\0\0\0WAVEfmt ",
    b"FORM\0\0\0\x40AIFFCOMM",
    b".snd",
    b"caff\0\x01\0\0",
    b"fLaC\0\0\0\x22",
    b"OggS\0\x02",
]
HEADS += [
    b"ID3\x04\0\0\0\0\0\0",
    b"\xff\xfb\x90\x64",
    b"\0\0\0\x18ftyp",
    b"\x1a\x45\xdf\xa3",
    b"\xff\xf1\x50\x80",
    b"#!AMR\n",
]
FILES = [make() for make in WHOLE.values()]


def assert_is_sound_or_refused(data: bytes) -> None:
    refusal: ServeError | None = None
    try:
        samples = decode_audio(data, LIMITS)
    except ServeError as error:
        refusal = error
    if refusal is None:
        assert len(samples)
        assert np.abs(samples).max() <= 1
    else:
        assert refusal.param == "file"
        assert "BytesIO" not in refusal.message


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([b"", *HEADS]), st.binary(max_size=300))
def test_random_bytes_raise_only_our_errors(head, tail):
    assert_is_sound_or_refused(head + tail)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FILES), st.data())
def test_damaged_files_raise_only_our_errors(file, data):
    damaged = bytearray(file)
    for _ in range(data.draw(st.integers(1, 6))):
        # Most damage goes where it hurts.
        at = data.draw(st.integers(0, 200) | st.integers(0, len(file) - 1))
        damaged[at % len(file)] = data.draw(st.integers(0, 255))
    length = data.draw(st.just(len(file)) | st.integers(1, len(file)))
    assert_is_sound_or_refused(bytes(damaged[:length]))
