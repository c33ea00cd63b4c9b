"""Files of sound in many formats: written by soundfile, and by PyAV where that does not know the format."""

import io
from fractions import Fraction

import av
import numpy as np
import soundfile

SAMPLE_RATE = 16_000
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}


def tones(rate: int, duration_s: float, channels: int = 1) -> np.ndarray:
    """(n, channels) float32 whose mean over the channels is the same sound at any rate."""
    times_s = np.arange(round(rate * duration_s)) / rate
    sound = 0.3 * np.sin(2 * np.pi * 440 * times_s) + 0.2 * np.sin(2 * np.pi * 1300 * times_s + 1)
    weights = np.linspace(0.5, 1.5, channels) if channels > 1 else np.ones(1)
    return (sound[:, None] * weights).astype(np.float32)


def sndfile_bytes(samples: np.ndarray, rate: int, container: str, subtype: str | None = None) -> bytes:
    """Written by libsndfile."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def ffmpeg_bytes(
    samples: np.ndarray | None, rate: int, container: str, codec: str, *, has_picture: bool = False, **options: str
) -> bytes:
    """Written by FFmpeg, with 1, 2, 6 or 8 channels; with or without sound and a black picture."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options) as output:
        # All streams are there before the first packet.
        picture = output.add_stream("mpeg4", rate=5) if has_picture else None
        stream = None
        if samples is not None:
            stream = output.add_stream(codec, rate=rate, layout=LAYOUTS[samples.shape[1]])
        if picture is not None:
            picture.width = picture.height = 64
            picture.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            output.mux([*picture.encode(frame), *picture.encode(None)])
        if stream is not None:
            output.mux(_packets(samples, stream))
    return file.getvalue()


def _packets(samples: np.ndarray, stream: av.AudioStream) -> list[av.Packet]:
    context = stream.codec_context
    layout, rate = context.layout.name, context.sample_rate
    whole = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="flt", layout=layout)
    whole.sample_rate, whole.pts, whole.time_base = rate, 0, Fraction(1, rate)
    resampler = av.AudioResampler(context.format, layout, rate, context.frame_size or 1024)
    frames = [*resampler.resample(whole), *resampler.resample(None)]
    return [packet for frame in [*frames, None] for packet in stream.encode(frame)]
