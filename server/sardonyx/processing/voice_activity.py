"""Where somebody speaks: found by energy, without a model, and windows for the encoder cut between the words.

Floor 2. Pure numpy; an hour takes about a second. A detector that errs loses words, so what it says only decides where
to cut and which long pauses to leave out, and a pause that is as loud as the speech stays.

In each of six bands the noise is what the quieter moments of the last and next ten seconds have in common; speech
stands out of it in two bands at least. Steady noise in one of them (a hum, a fan) thus hides nothing in the others.

Source: R. Martin, "Noise power spectral density estimation based on optimal smoothing and minimum statistics" (2001),
for the idea of the floor.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from sardonyx.processing.log_mel import SAMPLE_RATE, WINDOW_S

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

_HOP = SAMPLE_RATE // 50
_FRAME_SAMPLES = 2 * _HOP
"""Twice the hop, centred on it."""
_FRAMES_AT_ONCE = 3000
_BAND_EDGES_HZ = (100, 300, 600, 1000, 1600, 2500, 4000)
"""Below is rumble; above, consonants that have energy in here as well, and hiss."""
_SMOOTHED_FRAMES = 5
_BLOCK_FRAMES = 30
"""Of 0.6 s: between two syllables there is a moment of less."""
_FLOOR_BLOCKS = 16
"""Before and after."""
_FLOOR_QUANTILE = 0.2
_EMPTY = 1e-9
"""Mean square of a frame without sound, -90 dB: it says nothing about the noise."""
_SILENT_PEAK = 1e-4
"""Of a whole sound that is nothing but digital silence and its dither: three steps of 16 bits."""
_FRAMES_PER_S = SAMPLE_RATE // _HOP
_QUIET_RATIO = 0.25
"""Of the energy of what was found. A pause with a louder second than this is not left out."""


class Span(msgspec.Struct, frozen=True):
    """A part of a sound."""

    start: int
    end: int
    """Exclusive."""


class VoiceOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What counts as speech and as a pause. The first three are OpenAI's ``server_vad`` by other names."""

    threshold: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    """How much speech has to stand out: 4 dB at 0, 16 dB at 1."""
    min_silence_ms: Annotated[int, msgspec.Meta(ge=0)] = 500
    """Shorter pauses are part of the speech. OpenAI: ``silence_duration_ms``."""
    speech_pad_ms: Annotated[int, msgspec.Meta(ge=0)] = 300
    """Added before and after. OpenAI: ``prefix_padding_ms``."""
    min_speech_ms: Annotated[int, msgspec.Meta(ge=0)] = 60
    """What is shorter is a click."""
    max_pause_ms: Annotated[int, msgspec.Meta(ge=0)] = 3000
    """Longer pauses are no part of any window."""


def find_speech(samples: Floats, options: VoiceOptions) -> list[Span]:
    """The parts in which somebody seems to speak, in order, with a pause between any two.

    Args:
        samples: (n) at 16 kHz.

    Returns:
        None for an empty sound, silence, or sound that never changes.
    """
    return _speech(_band_energies(samples), len(samples), options)


def cut_windows(samples: Floats, options: VoiceOptions, *, max_samples: int = WINDOW_S * SAMPLE_RATE) -> list[Span]:
    """Windows for the encoder that together hold all speech, cut where it is quietest.

    A window holds as much as goes in, pauses up to `VoiceOptions.max_pause_ms` included; it ends within a pause, or at
    the quietest place of its last third where there is none. If nothing is found, everything is cut like that. Only
    digital silence has no windows.

    Args:
        samples: (n) at 16 kHz.
        max_samples: of a window, positive.

    Returns:
        In order, disjoint, none empty.
    """
    if not len(samples) or max(samples.max(), -samples.min()) < _SILENT_PEAK:
        return []
    bands = _band_energies(samples)
    energies = bands.sum(axis=1)
    spans = _speech(bands, len(samples), options) or [Span(0, len(samples))]
    spans = _with_loud_pauses(spans, energies, len(samples))
    max_pause = options.max_pause_ms * SAMPLE_RATE // 1000
    windows: list[Span] = []
    first = 0
    for index in range(1, len(spans) + 1):
        if index == len(spans) or spans[index].start - spans[index - 1].end > max_pause:
            windows += _cut(spans[first:index], energies, max_samples)
            first = index
    return windows


def _band_energies(samples: Floats) -> Floats:
    """(frames, 6): the mean square that each band contributes; the last frame may be partly beyond the end."""
    num_frames = -(-len(samples) // _HOP)
    window, edges = _window_and_edges()
    energies = np.empty((num_frames, len(edges)), np.float32)
    for first in range(0, num_frames, _FRAMES_AT_ONCE):
        count = min(_FRAMES_AT_ONCE, num_frames - first)
        # The first frame begins half a hop before its hop.
        start = first * _HOP - _HOP // 2
        part = np.zeros((count + 1) * _HOP, np.float32)
        known = samples[max(0, start) : start + len(part)]
        skipped = max(0, -start)
        part[skipped : skipped + len(known)] = known
        frames = np.lib.stride_tricks.sliding_window_view(part, _FRAME_SAMPLES)[::_HOP]
        spectrum = np.fft.rfft(frames * window)
        power = spectrum.real**2 + spectrum.imag**2
        energies[first : first + count] = np.add.reduceat(power, [*edges, _last_bin()], axis=1)[:, :-1]
    if num_frames > 3:
        # Where a sound begins and ends at once there is a click in all bands that nobody made.
        energies[0] = np.minimum(energies[0], energies[1])
        energies[-2:] = np.minimum(energies[-2:], energies[-3])
    return energies * np.float32(2 / (_FRAME_SAMPLES * np.square(window).sum()))


@functools.cache
def _window_and_edges() -> tuple[Floats, tuple[int, ...]]:
    """Hann's window, and the first bin of each band."""
    angles = 2 * np.pi * np.arange(_FRAME_SAMPLES) / _FRAME_SAMPLES
    edges = tuple(edge * _FRAME_SAMPLES // SAMPLE_RATE for edge in _BAND_EDGES_HZ[:-1])
    return (0.5 - 0.5 * np.cos(angles)).astype(np.float32), edges


def _last_bin() -> int:
    return _BAND_EDGES_HZ[-1] * _FRAME_SAMPLES // SAMPLE_RATE


def _speech(bands: Floats, num_samples: int, options: VoiceOptions) -> list[Span]:
    if not num_samples:
        return []
    smooth = _smoothed(bands)
    total = smooth.sum(axis=1)
    is_empty = total < _EMPTY
    if is_empty.all():
        return []
    levels = 10 * np.log10(smooth + 1e-12)
    above = levels - _noise_floor(levels, is_empty)
    above[is_empty] = 0
    # The mean of the two bands that stand out most.
    score = np.partition(above, -2, axis=1)[:, -2:].mean(axis=1)
    # Far below the loudest speech there are breaths and rooms.
    loud_db = 10 * np.log10(np.quantile(total, 0.99)) - (70 - 30 * options.threshold)
    score[10 * np.log10(total + 1e-12) < loud_db] = 0
    begins = 4 + 12 * options.threshold
    return _spans(score > begins, score > max(3.0, begins - 4), num_samples, options)


def _smoothed(bands: Floats) -> Floats:
    """The mean over 0.1 s."""
    edge = _SMOOTHED_FRAMES // 2
    padded = np.pad(bands, ((edge, edge), (0, 0)), mode="edge")
    frames = np.lib.stride_tricks.sliding_window_view(padded, _SMOOTHED_FRAMES, axis=0)
    mean: Floats = frames.mean(axis=-1, dtype=np.float32)
    return mean


def _noise_floor(levels: Floats, is_empty: Flags) -> Floats:
    """(frames, bands): a low quantile of the quietest moments around each frame, in dB; infinite where all is empty."""
    num_frames, num_bands = levels.shape
    num_blocks = -(-num_frames // _BLOCK_FRAMES)
    padded = np.full((num_blocks * _BLOCK_FRAMES, num_bands), np.inf, np.float32)
    padded[:num_frames] = np.where(is_empty[:, None], np.inf, levels)
    quietest = padded.reshape(num_blocks, _BLOCK_FRAMES, num_bands).min(axis=1)
    around = np.pad(quietest, ((_FLOOR_BLOCKS, _FLOOR_BLOCKS), (0, 0)), constant_values=np.inf)
    ordered = np.sort(np.lib.stride_tricks.sliding_window_view(around, 2 * _FLOOR_BLOCKS + 1, axis=0), axis=-1)
    num_known = np.isfinite(ordered).sum(axis=-1, keepdims=True)
    index = (np.maximum(num_known - 1, 0) * _FLOOR_QUANTILE).astype(np.intp)
    floor = np.take_along_axis(ordered, index, axis=-1)[..., 0]
    return np.repeat(floor, _BLOCK_FRAMES, axis=0)[:num_frames]


def _spans(begins: Flags, goes_on: Flags, num_samples: int, options: VoiceOptions) -> list[Span]:
    """Runs of `goes_on` with a frame of `begins` in them; joined, without clicks, padded."""
    bounds = np.flatnonzero(np.diff(np.concatenate([[False], goes_on, [False]]).astype(np.int8)))
    num_begun = np.concatenate([[0], np.cumsum(begins)])
    runs = [Span(a * _HOP, b * _HOP) for a, b in bounds.reshape(-1, 2).tolist() if num_begun[b] > num_begun[a]]
    per_ms = SAMPLE_RATE // 1000
    runs = [
        run for run in _joined(runs, options.min_silence_ms * per_ms) if _length(run) >= options.min_speech_ms * per_ms
    ]
    pad = options.speech_pad_ms * per_ms
    # One sample of a pause is left, so that spans that touch become one.
    return _joined([Span(max(0, run.start - pad), min(num_samples, run.end + pad)) for run in runs], 1)


def _joined(spans: Sequence[Span], min_pause: int) -> list[Span]:
    """Spans with at least so much between them."""
    joined: list[Span] = []
    for span in spans:
        if joined and span.start - joined[-1].end < min_pause:
            span = Span(joined.pop().start, span.end)
        joined.append(span)
    return joined


def _length(span: Span) -> int:
    return span.end - span.start


def _with_loud_pauses(spans: list[Span], energies: Floats, num_samples: int) -> list[Span]:
    """Pauses with a second that is nearly as loud as what was found become a part of it."""
    sums = np.concatenate([[0.0], np.cumsum(energies, dtype=np.float64)])

    def frames(span: Span) -> tuple[int, int]:
        return span.start // _HOP, -(-span.end // _HOP)

    found = [frames(span) for span in spans]
    mean = sum(sums[b] - sums[a] for a, b in found) / sum(b - a for a, b in found)
    ends = [0, *(span.end for span in spans)]
    starts = [*(span.start for span in spans), num_samples]
    loud: list[Span] = []
    for start, end in zip(ends, starts, strict=True):
        if start == end:
            continue
        a, b = frames(Span(start, end))
        length = min(_FRAMES_PER_S, b - a)
        loudest = (sums[a + length : b + 1] - sums[a : b + 1 - length]).max() / length
        if loudest >= _QUIET_RATIO * mean:
            loud.append(Span(start, end))
    return _joined(sorted([*spans, *loud], key=lambda span: span.start), 1)


def _cut(spans: Sequence[Span], energies: Floats, max_samples: int) -> list[Span]:
    """Windows without anything between them, from the begin of the first span to the end of the last."""
    smooth = _smoothed(energies[:, None])[:, 0]
    start, end = spans[0].start, spans[-1].end
    pauses = [Span(left.end, right.start) for left, right in itertools.pairwise(spans)]
    windows: list[Span] = []
    while end - start > max_samples:
        latest = start + max_samples
        fitting = [pause for pause in pauses if start < pause.start <= latest]
        if fitting:
            cut = _quietest(smooth, fitting[-1].start, min(fitting[-1].end, latest))
        else:
            cut = _quietest(smooth, latest - max_samples // 3, latest)
        windows.append(Span(start, cut))
        start = cut
    return [*windows, Span(start, end)]


def _quietest(energies: Floats, earliest: int, latest: int) -> int:
    """The border of two frames with the least around it, the later of equals; `latest` if there is none.

    Args:
        earliest: sample, inclusive, as `latest` is.
    """
    first, last = max(1, -(-earliest // _HOP)), min(latest // _HOP, len(energies) - 1)
    if first > last:
        return latest
    around = energies[first - 1 : last] + energies[first : last + 1]
    return (last - int(np.argmin(around[::-1]))) * _HOP
