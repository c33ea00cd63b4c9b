"""Sound as Whisper sees it: the logarithm of the energy in mel bands, 100 frames a second.

Floor 1. Pure numpy; everything blocks for some 10 ms a window of 30 seconds.

Source: openai-whisper's ``audio.py`` for the steps and their constants; M. Slaney, "Auditory Toolbox" (1998), for the
bands.
"""

import functools

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

SAMPLE_RATE = 16_000
WINDOW_S = 30
FRAMES_PER_S = 100
WINDOW_FRAMES = WINDOW_S * FRAMES_PER_S
"""Frames that the encoder takes at once."""

_FFT_SAMPLES = 400
_HOP_SAMPLES = SAMPLE_RATE // FRAMES_PER_S
_FRAMES_AT_ONCE = 1500
"""Frames overlap, so that many at once would need 2.5 times the sound's memory."""
_LEAST_ENERGY = 1e-10
_DYNAMIC_RANGE = 8.0
"""In powers of ten, below the loudest band of the whole sound."""

_LINEAR_HZ = 1000.0
"""Bands are as wide as each other up to here, then each is wider than the last by the same factor."""
_HZ_PER_MEL = 200 / 3
_LOG_PER_MEL = np.log(6.4) / 27


def log_mel(samples: Floats, num_mels: int) -> Floats:
    """The spectrogram of a whole sound, followed by 30 seconds of silence.

    The silence is part of Whisper's input: long sounds are cut into windows behind this step, and the last window takes
    what it lacks from there.

    Args:
        samples: (n) at 16 kHz, mono, between -1 and 1; any number, none too.
        num_mels: bands: 80, or 128 for large-v3 and its kin.

    Returns:
        (num_mels, n // 160 + 3000)
    """
    num_samples = len(samples) + WINDOW_S * SAMPLE_RATE
    num_frames = num_samples // _HOP_SAMPLES
    # Frames are centred; at the begin the sound is mirrored. At the end it would be silence that is.
    edge = _FFT_SAMPLES // 2
    padded = np.zeros(num_samples + 2 * edge, np.float32)
    padded[edge : edge + len(samples)] = samples
    padded[:edge] = padded[2 * edge : edge : -1]
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT_SAMPLES)[::_HOP_SAMPLES][:num_frames]
    energies = np.empty((num_mels, num_frames), np.float32)
    filters, window = mel_filters(num_mels), _hann_window()
    for start in range(0, num_frames, _FRAMES_AT_ONCE):
        spectrum = np.fft.rfft(frames[start : start + _FRAMES_AT_ONCE] * window)
        power = spectrum.real**2 + spectrum.imag**2
        np.matmul(filters, power.T, out=energies[:, start : start + _FRAMES_AT_ONCE])
    np.log10(np.maximum(energies, _LEAST_ENERGY, out=energies), out=energies)
    np.maximum(energies, energies.max() - _DYNAMIC_RANGE, out=energies)
    energies += 4.0
    energies /= 4.0
    return energies


def window_at(spectrogram: Floats, start: int, num_frames: int) -> Floats:
    """What the encoder takes of a part: (num_mels, 3000), zeros behind `num_frames` of it.

    Args:
        spectrogram: from `log_mel`.
        start: frame.
        num_frames: of the part, at most 3000.
    """
    window = np.zeros((len(spectrogram), WINDOW_FRAMES), np.float32)
    part = spectrogram[:, start : start + num_frames]
    window[:, : part.shape[1]] = part
    return window


@functools.cache
def mel_filters(num_mels: int) -> Floats:
    """(num_mels, 201): triangles from 0 to 8 kHz, each of the area 1, over the bins of the Fourier transform."""
    bins_hz = np.linspace(0, SAMPLE_RATE / 2, _FFT_SAMPLES // 2 + 1)
    corners_hz = _mel_to_hz(np.linspace(0, _hz_to_mel(SAMPLE_RATE / 2), num_mels + 2))
    low, middle, high = corners_hz[:-2, None], corners_hz[1:-1, None], corners_hz[2:, None]
    rising = (bins_hz - low) / (middle - low)
    falling = (high - bins_hz) / (high - middle)
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * 2 / (high - low)).astype(np.float32)


def _hz_to_mel(hz: float) -> float:
    return float(_LINEAR_HZ / _HZ_PER_MEL + np.log(hz / _LINEAR_HZ) / _LOG_PER_MEL)


def _mel_to_hz(mels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    corner = _LINEAR_HZ / _HZ_PER_MEL
    bent = _LINEAR_HZ * np.exp(_LOG_PER_MEL * (mels - corner))
    return np.where(mels < corner, mels * _HZ_PER_MEL, bent)


@functools.cache
def _hann_window() -> Floats:
    """The periodic one."""
    angles = 2 * np.pi * np.arange(_FFT_SAMPLES) / _FFT_SAMPLES
    return (0.5 - 0.5 * np.cos(angles)).astype(np.float32)
