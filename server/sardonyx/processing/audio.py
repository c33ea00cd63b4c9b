"""Sound: from the file that a caller sent to the samples that Whisper's front end takes.

Floor 2. What comes here is nobody's friend: files are decoded in blocks, nothing is allocated because a header says so,
and whatever the decoders say of a broken file becomes an error in our own words. Everything here blocks.

libsndfile reads what it knows; the rest needs PyAV, which is an extra. FFmpeg would guess among some 300 formats, some
of which open other files, so it is told the one that we saw and is left no more than the decoders of sound named here.
"""

import io
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from sardonyx.errors import DeadlineExceeded, InvalidRequest, PayloadTooLarge, UnsupportedFeature
from sardonyx.processing.audio_container import Kind, is_cut_short, kind_of, mp3_without_short_index, with_known_size
from sardonyx.processing.log_mel import SAMPLE_RATE

if TYPE_CHECKING:  # imported where it is needed: an extra
    import av

Floats = npt.NDArray[np.float32]
Block = tuple[int, Floats]
"""Sample rate in Hz, and (n, channels)."""

MAX_CHANNELS = 64
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1_000, 768_000
MAX_VALUES_PER_S = MAX_CHANNELS * 48_000
"""Rate times channels. A few bytes of FLAC hold 65,535 equal samples of each channel, so the duration alone would
allow hours of work."""
MAX_VALUE = float(2**31)
"""Of samples in floating point: some programs store whole numbers of 16 or 32 bits in them as they are."""
READ = "WAV, FLAC, Ogg (Vorbis, Opus), MP3, AIFF, AU and CAF"
READ_WITH_AV = "MP4 and M4A, WebM and Matroska, AAC and AMR"

_BLOCK_VALUES = 1 << 17
_UNKNOWN_FRAMES = 1 << 62
_MP3_LOST_FRAMES = 2 * 1152
"""Damaged frames are left out by the decoder. More than this is a file that ends early."""
_FFMPEG_FORMATS: dict[Kind, str] = {
    "mp4": "mov",
    "matroska": "matroska",
    "aac": "aac",
    "amr": "amr",
    "chained ogg": "ogg",
}
_FFMPEG_CODECS = (
    *("aac", "alac", "amrnb", "amrwb", "flac", "mp3", "mp3float", "opus", "speex", "vorbis"),
    *("pcm_alaw", "pcm_f32be", "pcm_f32le", "pcm_mulaw", "pcm_s16be", "pcm_s16le", "pcm_s24be", "pcm_s24le"),
)
_ALAC_FRAME_SAMPLES = 1 << 16
"""Encoders write 4096; the format allows 4 billion, and the decoder takes memory for what is stated."""


class AudioLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much sound a request may bring."""

    max_duration_s: float
    """Decoded. The setting ``max_audio_s``."""


def decode_audio(data: bytes, limits: AudioLimits, *, is_over: Callable[[], bool] | None = None) -> Floats:
    """The mean of all channels, 16,000 samples a second.

    Files in floating point may go beyond 1, and so do lossy codecs and resampling, by a little. Such a sound is made
    quieter as a whole: clipping would distort it, and loudness means nothing to what comes behind.

    Args:
        data: a whole file, of a kind that its first bytes tell.
        is_over: whether the time is over; asked before every block, some 100,000 values.

    Returns:
        (n) between -1 and 1, n > 0, owned by the caller.

    Raises:
        InvalidRequest: no kind that is read, damaged, cut off (see `audio_container` for the rule), no sound in it,
            samples that are no numbers, too many channels, an impossible sample rate.
        UnsupportedFeature: a kind that needs PyAV, which is not installed.
        PayloadTooLarge: longer than the limit; decoding ends there.
        DeadlineExceeded: `is_over` said so.
    """
    if not data:
        raise _invalid("the file is empty")
    kind = kind_of(data)
    if kind is None:
        raise _invalid(f"the file is no sound that can be read: {READ} are, and with PyAV {READ_WITH_AV}")
    if is_cut_short(kind, data):
        raise _invalid("the file is incomplete: it announces more sound than there is")
    sound = _Sound(limits)
    blocks = _ffmpeg_blocks(kind, data) if kind in _FFMPEG_FORMATS else _sndfile_blocks(kind, data, limits)
    while is_over is None or not is_over():
        block = next(blocks, None)
        if block is None:
            return sound.finish()
        sound.add(*block)
    blocks.close()
    raise DeadlineExceeded("the request's time was over before its sound was decoded")


def sound_duration_s(samples: Floats) -> float:
    """Of what `decode_audio` returns."""
    return len(samples) / SAMPLE_RATE


class _Sound:
    """Collects blocks of any rate as one sound."""

    def __init__(self, limits: AudioLimits) -> None:
        self._limits = limits
        # Grows in place and by an eighth; a list of blocks would need everything twice at its end.
        self._samples = bytearray()
        self._resampler: soxr.ResampleStream | None = None
        self._rate = 0
        self._duration_s = 0.0

    def add(self, rate: int, block: Floats) -> None:
        _check_format(rate, block.shape[1])
        self._duration_s += len(block) / rate
        _check_duration(self._duration_s, self._limits)
        if rate != self._rate:
            self._flush()
            self._rate = rate
            self._resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, quality="HQ") if rate != SAMPLE_RATE else None
        with np.errstate(over="ignore", invalid="ignore"):
            mono = block.mean(axis=1, dtype=np.float32)
            peak = np.abs(mono).max(initial=0.0)
        if not np.isfinite(peak):
            raise _invalid("the file has samples that are no numbers or infinite")
        if peak > MAX_VALUE:
            raise _invalid("the file has samples in floating point that are far beyond 1")
        self._append(mono if self._resampler is None else self._resampler.resample_chunk(mono))

    def finish(self) -> Floats:
        self._flush()
        samples = np.frombuffer(self._samples, np.float32)
        if not len(samples):
            raise _invalid("the file has no sound in it")
        peak = max(samples.max(), -samples.min())
        if peak > 1:
            np.divide(samples, peak, out=samples)
        return samples

    def _flush(self) -> None:
        if self._resampler is not None:
            self._append(self._resampler.resample_chunk(np.zeros(0, np.float32), last=True))
            self._resampler = None

    def _append(self, mono: Floats) -> None:
        self._samples += np.ascontiguousarray(mono).view(np.uint8).data


class _Stream(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """Read from its beginning to its end. The class it extends seeks after every block, which MP3 does not survive
    unharmed.
    """

    def seekable(self) -> bool:
        return False


class _Bytes(io.BytesIO):
    """A file that takes any seek: an exception in a callback of libsndfile would be printed and not raised."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.num_bytes = len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_CUR:
            offset += self.tell()
        elif whence == io.SEEK_END:
            offset += self.num_bytes
        return super().seek(min(max(0, offset), 1 << 48))


class _EndlessBytes(_Bytes):
    """An MP3 file without an index, whose end seems to be far away.

    From its size and the bit rate of its first frame the decoder estimates a length, where it stops. Frames differ in
    size by at most 10 times, or 20 with low rates. Who looks for a tag at the end still finds it.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_END and offset == 0:
            return super().seek(64 * self.num_bytes)
        return super().seek(offset, whence)


def _sndfile_blocks(kind: Kind, data: bytes, limits: AudioLimits) -> Generator[Block]:
    """What libsndfile reads.

    Raises:
        InvalidRequest: as `decode_audio`.
        PayloadTooLarge: by the number of samples that the header states.
    """
    states_length = True
    if kind == "mp3":
        data, states_length = mp3_without_short_index(data)
    file = _Bytes(with_known_size(data)) if states_length else _EndlessBytes(data)
    try:
        with _Stream(file) as sound:
            rate, channels = sound.samplerate, sound.channels
            _check_format(rate, channels)
            stated = sound.frames if states_length and sound.frames < _UNKNOWN_FRAMES else 0
            _check_duration(stated / rate, limits)
            num_frames = 0
            while len(block := sound.read(_BLOCK_VALUES // channels, dtype="float32", always_2d=True)):
                num_frames += len(block)
                yield rate, block
    except (soundfile.SoundFileError, ValueError, TypeError, RuntimeError):
        raise _damaged() from None
    if num_frames + (_MP3_LOST_FRAMES if kind == "mp3" else 0) < stated:
        raise _damaged()


def _ffmpeg_blocks(kind: Kind, data: bytes) -> Generator[Block]:
    """What FFmpeg reads: the first stream of sound.

    Raises:
        InvalidRequest, UnsupportedFeature: as `decode_audio`.
    """
    try:
        import av
    except ImportError:
        raise UnsupportedFeature(
            f"{READ_WITH_AV} are not read by this server: convert the file to one of {READ}, or install sardonyx[av]",
            param="file",
        ) from None
    # Streams without a length end anywhere, in the middle of a frame, too.
    may_end_anywhere = kind in ("aac", "amr")
    is_broken = False
    options = {"codec_whitelist": ",".join(_FFMPEG_CODECS)}
    try:
        with av.open(
            io.BytesIO(data), "r", format=_FFMPEG_FORMATS[kind], container_options=options, metadata_errors="ignore"
        ) as container:
            stream = _first_sound(container)
            for packet in container.demux(stream):
                if is_broken and packet.size:
                    raise _damaged()
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:
                    if not may_end_anywhere:
                        raise
                    is_broken, frames = True, []
                for frame in frames:
                    for plain in [frame] if _has_countable_planes(frame) else _interleaved(frame):
                        yield plain.sample_rate, _values(plain)
    except (av.error.FFmpegError, ValueError, TypeError, RuntimeError, OSError):
        raise _damaged() from None


def _first_sound(container: "av.container.InputContainer") -> "av.AudioStream":
    if not container.streams.audio:
        raise _invalid("the file has no sound in it")
    stream = container.streams.audio[0]
    context = stream.codec_context
    # PyAV's types do not say so: there is none for a code that FFmpeg knows no decoder of.
    if context is None or context.name not in _FFMPEG_CODECS:
        raise _invalid("the file's sound is coded in a way that is not read")
    if context.name == "alac" and int.from_bytes((context.extradata or b"")[12:16], "big") > _ALAC_FRAME_SAMPLES:
        raise _damaged()
    if context.sample_rate:
        _check_format(context.sample_rate, context.layout.nb_channels)
    context.thread_count = 1
    return stream


def _has_countable_planes(frame: "av.AudioFrame") -> bool:
    """PyAV counts planes until a pointer is null; from eight on there is none, and it reads beyond them."""
    return not frame.format.is_planar or frame.layout.nb_channels < 8


def _interleaved(frame: "av.AudioFrame") -> "list[av.AudioFrame]":
    import av

    return av.AudioResampler("flt", frame.layout, frame.sample_rate).resample(frame)


def _values(frame: "av.AudioFrame") -> Floats:
    """(n, channels), between -1 and 1 where they are whole numbers."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return values.astype(np.float32)
    zero = 128 if values.dtype.kind == "u" else 0
    return (values.astype(np.float32) - zero) / np.float32(2 ** (8 * values.dtype.itemsize - 1))


def _check_format(rate: int, channels: int) -> None:
    if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
        raise _invalid(
            f"the file has a sample rate of {rate:,} Hz; {MIN_SAMPLE_RATE:,} to {MAX_SAMPLE_RATE:,} are read"
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise _invalid(f"the file has {channels:,} channels; at most {MAX_CHANNELS} are read")
    if rate * channels > MAX_VALUES_PER_S:
        raise _invalid(f"the file has {channels} channels at {rate:,} Hz; the product may be {MAX_VALUES_PER_S:,}")


def _check_duration(duration_s: float, limits: AudioLimits) -> None:
    if duration_s > limits.max_duration_s:
        limit_s = limits.max_duration_s
        raise PayloadTooLarge(
            f"the sound is longer than {limit_s:,g} seconds, this server's limit (max_audio_s)", param="file"
        )


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="file")


def _damaged() -> InvalidRequest:
    return _invalid("the file is damaged or incomplete")
