"""Speech and windows on sound whose parts are known, and what holds for any sound."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.processing import speech_clips
from tests.processing.speech_clips import SAMPLE_RATE, babble

from sardonyx.processing.voice_activity import Span, VoiceOptions, cut_windows, find_speech

OPTIONS = VoiceOptions()
THIRTY_S = 30 * SAMPLE_RATE


def seconds(duration_s: float) -> int:
    return round(duration_s * SAMPLE_RATE)


def noise(num_samples: int, rms: float, seed: int = 0, *, colour: float = 0.0) -> np.ndarray:
    """White at 0, pink at 0.5, brown at 1."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).normal(0, 1, num_samples))
    spectrum /= np.maximum(np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE), 20) ** colour
    sound = np.fft.irfft(spectrum, num_samples)
    return (rms * sound / np.sqrt(np.square(sound).mean())).astype(np.float32)


def voiced_rms(samples: np.ndarray) -> float:
    """Of the frames in which something is said."""
    energies = np.square(samples[: len(samples) // 320 * 320].reshape(-1, 320)).mean(axis=1)
    return float(np.sqrt(energies[energies > energies.max() / 1000].mean()))


def with_gaps(parts: list[np.ndarray], gap_s: float, snr_db: float, colour: float) -> tuple[np.ndarray, list[Span]]:
    """Parts as loud as each other, gaps around them, noise over everything; and where each part is."""
    gap = np.zeros(seconds(gap_s), np.float32)
    sound, spans = [gap], []
    at = len(gap)
    for part in parts:
        spans.append(Span(at, at + len(part)))
        sound += [0.1 * part / voiced_rms(part), gap]
        at += len(part) + len(gap)
    whole = np.concatenate(sound)
    return whole + noise(len(whole), 0.1 * 10 ** (-snr_db / 20), colour=colour), spans


def held(spans: list[Span], num_samples: int) -> np.ndarray:
    flags = np.zeros(num_samples, bool)
    for span in spans:
        flags[span.start : span.end] = True
    return flags


def check_found(parts: list[np.ndarray], snr_db: float, colour: float) -> None:
    """Each part is found, each gap too, and hardly anything of what is said is outside."""
    samples, truth = with_gaps(parts, 2.0, snr_db, colour)
    found = find_speech(samples, OPTIONS)
    flags = held(found, len(samples))
    assert len(found) == len(parts)
    for span, part in zip(truth, parts, strict=True):
        inside = np.square(part)[flags[span.start : span.end]].sum()
        assert inside > 0.995 * np.square(part).sum()
        # The half second behind a part is padding and echo.
        assert not flags[span.end + seconds(0.5) : span.end + seconds(1.5)].any()


@pytest.mark.parametrize("snr_db", [40, 20, 10])
@pytest.mark.parametrize("colour", [0.0, 0.5, 1.0])
def test_noise_with_the_rhythm_of_speech_is_found_in_steady_noise(snr_db, colour):
    check_found([babble(duration_s, seed) for seed, duration_s in enumerate([3.0, 0.6, 7.0, 1.2])], snr_db, colour)


@pytest.mark.slow
@pytest.mark.parametrize("snr_db", [40, 20, 10])
@pytest.mark.parametrize("colour", [0.0, 0.5, 1.0])
def test_what_people_say_is_found_in_steady_noise(snr_db, colour):
    clips = speech_clips.clips()
    assert len(clips) == 27
    check_found(clips, snr_db, colour)


@pytest.mark.slow
def test_what_people_say_one_after_the_other_is_in_windows_without_a_gap():
    samples = np.concatenate(speech_clips.clips() * 3)
    windows = cut_windows(samples, OPTIONS)
    assert [window.end for window in windows[:-1]] == [window.start for window in windows[1:]]
    assert held(windows, len(samples)).mean() > 0.999
    assert all(window.end - window.start > 20 * SAMPLE_RATE for window in windows[:-1])


def test_a_hum_hides_nothing():
    samples, truth = with_gaps([babble(3.0, 1), babble(2.0, 2)], 2.0, 30, 0.0)
    hum = 0.3 * np.sin(2 * np.pi * 200 * np.arange(len(samples)) / SAMPLE_RATE)
    found = find_speech(samples + hum.astype(np.float32), OPTIONS)
    assert len(found) == 2
    for span, true in zip(found, truth, strict=True):
        assert abs(span.start - true.start) < seconds(0.5)
        assert abs(span.end - true.end) < seconds(0.5)


def test_noise_that_grows_slowly_is_no_speech():
    samples = noise(seconds(60), 0.01) * np.linspace(1, 5, seconds(60), dtype=np.float32)
    assert find_speech(samples, OPTIONS) == []


def test_a_higher_threshold_finds_less():
    faint, _ = with_gaps([babble(2.0, 1) * 10], 3.0, -4, 0.0)
    assert find_speech(faint, VoiceOptions(threshold=0.0)) != []
    assert find_speech(faint, VoiceOptions(threshold=1.0)) == []


def test_short_pauses_are_part_of_the_speech_and_clicks_are_not():
    pause = np.zeros(seconds(0.8), np.float32)
    samples = np.concatenate([pause, babble(1.0, 1), pause, babble(1.0, 2), pause])
    samples += noise(len(samples), 0.001)
    assert len(find_speech(samples, VoiceOptions(min_silence_ms=500, speech_pad_ms=0))) == 2
    assert len(find_speech(samples, VoiceOptions(min_silence_ms=1000, speech_pad_ms=0))) == 1
    assert len(find_speech(samples, VoiceOptions(speech_pad_ms=500))) == 1
    assert find_speech(samples, VoiceOptions(min_speech_ms=3000)) == []


def test_padding_is_added_on_both_sides():
    samples, _ = with_gaps([babble(2.0, 1)], 2.0, 30, 0.0)
    (bare,) = find_speech(samples, VoiceOptions(speech_pad_ms=0))
    (padded,) = find_speech(samples, VoiceOptions(speech_pad_ms=400))
    assert (padded.start, padded.end) == (bare.start - seconds(0.4), bare.end + seconds(0.4))


@pytest.mark.parametrize("num_samples", [0, 1, 319, 320, 16_000])
def test_silence_has_neither_speech_nor_windows(num_samples):
    assert find_speech(np.zeros(num_samples, np.float32), OPTIONS) == []
    assert cut_windows(np.zeros(num_samples, np.float32), OPTIONS) == []
    dither = np.random.default_rng(0).integers(-1, 2, num_samples).astype(np.float32) / 32_768
    assert cut_windows(dither, OPTIONS) == []


def test_everything_is_cut_into_windows_when_nothing_is_found():
    samples = noise(seconds(95), 0.05)
    samples[seconds(25.0) : seconds(25.2)] *= 0.5
    assert find_speech(samples, OPTIONS) == []
    windows = cut_windows(samples, OPTIONS)
    assert windows[0].start == 0
    assert windows[-1].end == len(samples)
    assert [window.end for window in windows[:-1]] == [window.start for window in windows[1:]]
    assert seconds(25.0) <= windows[0].end <= seconds(25.2)


def test_a_vowel_without_an_end_is_kept():
    times_s = np.arange(seconds(5)) / SAMPLE_RATE
    vowel = sum(np.sin(2 * np.pi * 120 * n * times_s) / n for n in range(1, 20)).astype(np.float32)
    assert cut_windows(0.1 * vowel, OPTIONS) == [Span(0, seconds(5))]


def test_windows_end_in_pauses_and_long_pauses_are_left_out():
    parts = [babble(12.0, 1), babble(12.0, 2), babble(12.0, 3), babble(4.0, 4)]
    pauses = [np.zeros(seconds(pause_s), np.float32) for pause_s in (1, 1, 20, 1)]
    samples = np.concatenate([each for pair in zip(parts, pauses, strict=True) for each in pair])
    samples += noise(len(samples), 0.001)
    first, second, third = cut_windows(samples, OPTIONS)
    # Two parts go into thirty seconds.
    assert first.start == 0
    assert seconds(25) < first.end == second.start < seconds(26)
    assert seconds(38) < second.end < seconds(39)
    assert seconds(57) < third.start < seconds(58)
    assert seconds(62) < third.end < seconds(63)


def test_speech_without_a_pause_is_cut_at_its_quietest_place():
    samples = babble(50.0, 1, has_pauses=False)
    samples[seconds(24.0) : seconds(24.3)] *= 0.1
    first, second = cut_windows(samples, OPTIONS)
    assert (first.start, second.end) == (0, len(samples))
    assert seconds(24.0) <= first.end == second.start <= seconds(24.3)


def test_a_pause_as_loud_as_the_speech_stays():
    # The detector takes the engine for noise, and somebody may be talking over it.
    loud = noise(seconds(40), 0.1)
    samples = np.concatenate([babble(5.0, 1), loud, babble(5.0, 2)])
    spans = find_speech(samples, OPTIONS)
    assert not held(spans, len(samples))[seconds(17) : seconds(33)].any()
    assert held(cut_windows(samples, OPTIONS), len(samples)).all()


# Kinds of sound, their length in seconds and their loudness.
PARTS = st.lists(
    st.tuples(st.sampled_from(["babble", "noise", "silence", "tone"]), st.floats(0.01, 5), st.floats(0.001, 0.3)),
    min_size=1,
    max_size=6,
)


def make(parts: list[tuple[str, float, float]]) -> np.ndarray:
    sounds = []
    for seed, (kind, duration_s, rms) in enumerate(parts):
        num_samples = seconds(duration_s)
        if kind == "babble":
            sounds.append(10 * rms * babble(duration_s, seed))
        elif kind == "noise":
            sounds.append(noise(num_samples, rms, seed))
        elif kind == "tone":
            sounds.append(1.4 * rms * np.sin(0.4 * np.arange(num_samples)))
        else:
            sounds.append(np.zeros(num_samples))
    return np.concatenate(sounds).astype(np.float32)


def band_energy(samples: np.ndarray) -> np.ndarray:
    """What of each sample's square lies between 100 Hz and 4 kHz."""
    spectrum = np.fft.rfft(samples, len(samples) + SAMPLE_RATE)
    frequencies = np.fft.rfftfreq(len(samples) + SAMPLE_RATE, 1 / SAMPLE_RATE)
    spectrum[(frequencies < 100) | (frequencies > 4000)] = 0
    return np.square(np.fft.irfft(spectrum)[: len(samples)])


@settings(max_examples=40, deadline=None)
@given(
    PARTS,
    st.sampled_from(
        [VoiceOptions(), VoiceOptions(threshold=0.9, speech_pad_ms=0, max_pause_ms=0), VoiceOptions(max_pause_ms=1000)]
    ),
)
def test_windows_hold_all_speech_and_what_is_left_out_is_quiet(parts, options):
    samples = make(parts)
    spans = find_speech(samples, options)
    windows = cut_windows(samples, options, max_samples=4 * SAMPLE_RATE)
    for each in (spans, windows):
        ends = [0, *(span.end for span in each)]
        starts = [*(span.start for span in each), len(samples)]
        assert all(end <= start for end, start in zip(ends, starts, strict=True))
        assert all(span.start < span.end for span in each)
    assert all(window.end - window.start <= 4 * SAMPLE_RATE for window in windows)
    inside = held(windows, len(samples))
    assert (held(spans, len(samples)) <= inside).all()
    if spans and not inside.all():
        energy = band_energy(samples)
        assert energy[~inside].mean() < 0.3 * energy[held(spans, len(samples))].mean()
    if not spans and np.abs(samples).max() > 1e-4:
        assert inside.all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 5000), st.integers(0, 9))
def test_windows_of_any_length_cover_what_they_should(num_samples, max_samples, seed):
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, num_samples).astype(np.float32)
    samples[0] = 0.5
    windows = cut_windows(samples, OPTIONS, max_samples=max_samples)
    assert [window.start for window in windows] == [0, *(window.end for window in windows[:-1])]
    assert windows[-1].end == num_samples
    assert all(0 < window.end - window.start <= max_samples for window in windows)
