"""The spectrogram against transformers' feature extractor, which pads each sound by itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from sardonyx.processing.log_mel import SAMPLE_RATE, WINDOW_FRAMES, log_mel, mel_filters, window_at

SILENCE = (np.log10(1e-10) + 4) / 4


def tone_and_noise(num_samples: int) -> np.ndarray:
    times_s = np.arange(num_samples) / SAMPLE_RATE
    noise = np.random.default_rng(1).normal(0, 0.02, num_samples)
    return (0.4 * np.sin(2 * np.pi * 440 * times_s * (1 + times_s / 20)) + noise).astype(np.float32)


@pytest.mark.parametrize("num_mels", [80, 128])
def test_the_bands_are_slaneys(num_mels: int) -> None:
    expected = mel_filter_bank(201, num_mels, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney").T
    np.testing.assert_allclose(mel_filters(num_mels), expected, atol=1e-7)


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("num_samples", [1, 399, 16_001, 479_999])
def test_a_short_sound_is_what_transformers_makes_of_it(num_mels: int, num_samples: int) -> None:
    samples = tone_and_noise(num_samples)
    extract = WhisperFeatureExtractor(feature_size=num_mels)
    # Padded with 30 s of silence, as we do, and cut to the frames that are ours.
    padded = np.concatenate([samples, np.zeros(30 * SAMPLE_RATE, np.float32)])
    expected = extract(padded, sampling_rate=SAMPLE_RATE, truncation=False, return_tensors="np").input_features[0]
    actual = log_mel(samples, num_mels)
    assert actual.shape == (num_mels, num_samples // 160 + WINDOW_FRAMES)
    np.testing.assert_allclose(actual, expected[:, : actual.shape[1]], atol=1e-4)


def test_no_sound_is_silence() -> None:
    # How the logarithm is rounded depends on the processor.
    np.testing.assert_allclose(log_mel(np.zeros(0, np.float32), 80), SILENCE, rtol=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 200_000), st.integers(1, WINDOW_FRAMES))
def test_a_window_holds_its_part_and_zeros(num_samples: int, num_frames: int) -> None:
    spectrogram = np.ones((2, num_samples // 160 + WINDOW_FRAMES), np.float32)
    start = num_samples // 320
    window = window_at(spectrogram, start, num_frames)
    assert window.shape == (2, WINDOW_FRAMES)
    assert window.sum() == 2 * num_frames
    assert (window[:, :num_frames] == 1).all()
