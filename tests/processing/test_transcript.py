"""Results of windows. Golden cases were worked out by hand along openai-whisper's ``transcribe.py``."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.processing.transcript import (
    Part,
    Segment,
    Thresholds,
    WindowSplit,
    Word,
    clear_empty,
    compression_ratio,
    is_repeating,
    is_silence,
    needs_fallback,
    seek_after_words,
    speech_end_s,
    split_window,
)

END = 900
BEGIN = 1000
A, B, C = 1, 2, 3


def at(time_s: float) -> int:
    return BEGIN + round(time_s * 50)


def segment(start_s: float, end_s: float, text: str = " a", words: list[Word] | None = None) -> Segment:
    return Segment(0, start_s, end_s, text, [1], 0.0, -0.1, 1.0, 0.1, words)


def test_pairs_of_timestamps_cut_and_the_rest_is_left_to_the_next_window() -> None:
    ids = [at(0), A, at(2), at(2), B, C, at(4.5), at(5), A]
    split = split_window(ids, BEGIN, seek=1000, num_frames=3000)
    expected = [Part(10.0, 12.0, [at(0), A, at(2)]), Part(12.0, 14.5, [at(2), B, C, at(4.5)])]
    assert split == WindowSplit(expected, 1450, False)


def test_window_is_done_when_one_timestamp_ends_it() -> None:
    split = split_window([at(0.5), A, at(2), at(2.2), B, at(4)], BEGIN, seek=0, num_frames=2900)
    assert split == WindowSplit([Part(0.5, 2.0, [at(0.5), A, at(2)]), Part(2.2, 4.0, [at(2.2), B, at(4)])], 2900, True)


def test_pair_at_the_end_leads_to_its_time() -> None:
    split = split_window([at(0), A, at(2), at(2)], BEGIN, seek=300, num_frames=3000)
    assert split == WindowSplit([Part(3.0, 5.0, [at(0), A, at(2)])], 500, False)


def test_without_a_pair_the_window_is_one_segment_up_to_its_last_timestamp() -> None:
    split = split_window([at(1), A, at(7)], BEGIN, seek=100, num_frames=3000)
    assert split == WindowSplit([Part(1.0, 8.0, [at(1), A, at(7)])], 3100, True)


@pytest.mark.parametrize("ids", [[A, B], [at(0), A, B], []])
def test_without_a_time_the_segment_is_as_long_as_the_sound(ids: list[int]) -> None:
    split = split_window(ids, BEGIN, seek=100, num_frames=250)
    assert split == WindowSplit([Part(1.0, 3.5, ids)], 350, False)


def test_third_timestamp_in_a_row_is_a_segment_without_length() -> None:
    split = split_window([at(0), A, at(1), at(2), at(3), B], BEGIN, seek=0, num_frames=3000)
    assert split.parts == [Part(0.0, 1.0, [at(0), A, at(1)]), Part(2.0, 2.0, [at(2)])]
    assert split.next_seek == 200


def test_text_behind_the_sound_is_kept_at_its_end() -> None:
    split = split_window([at(0), A, at(2.4), at(2.6), B, at(4)], BEGIN, seek=100, num_frames=250)
    assert [(part.start_s, part.end_s) for part in split.parts] == [(1.0, 3.4), (3.48, 3.5)]
    assert split_window([at(0), A, at(4), at(4)], BEGIN, seek=100, num_frames=250).next_seek == 350


def test_pair_at_the_begin_does_not_hold_the_window() -> None:
    split = split_window([at(0), at(0), A], BEGIN, seek=100, num_frames=250)
    assert split == WindowSplit([Part(1.0, 1.0, [at(0)])], 350, False)


@st.composite
def legal_results(draw: st.DrawFn) -> list[int]:
    """By the rules of timestamps: one first, then text, then one or two, that never go back; texts between differ."""
    time = draw(st.integers(0, 50))
    ids = [BEGIN + time]
    for _ in range(draw(st.integers(0, 6))):
        ids += draw(st.lists(st.integers(0, END - 1), min_size=1, max_size=4))
        time = min(1500, time + draw(st.integers(1, 400)))
        ids += [BEGIN + time] * draw(st.integers(1, 2))
    return ids[: draw(st.integers(0, len(ids)))]


any_results = st.lists(st.integers(0, END - 1) | st.integers(BEGIN, BEGIN + 1600), max_size=20)


@given(ids=legal_results() | any_results, seek=st.integers(0, 10**6), num_frames=st.integers(1, 3000))
def test_every_window_ends_behind_its_begin_and_times_lie_in_it(ids: list[int], seek: int, num_frames: int) -> None:
    split = split_window(ids, BEGIN, seek=seek, num_frames=num_frames)
    assert seek < split.next_seek <= seek + num_frames
    for part in split.parts:
        assert seek / 100 <= part.start_s <= part.end_s <= (seek + num_frames) / 100
    taken = [token_id for part in split.parts for token_id in part.token_ids]
    assert taken == ids[: len(taken)]
    if split.is_single_ending:
        assert (taken, split.next_seek) == (ids, seek + num_frames)


@given(ids=legal_results())
def test_parts_follow_each_other_when_timestamps_keep_their_rules(ids: list[int]) -> None:
    split = split_window(ids, BEGIN, seek=0, num_frames=3000)
    times_s = [time_s for part in split.parts for time_s in (part.start_s, part.end_s)]
    assert times_s == sorted(times_s)
    assert split.next_seek >= times_s[-1] * 100 - 1e-6


def test_compression_ratio_is_of_utf_8() -> None:
    assert compression_ratio("") == 0.0
    assert compression_ratio("a") == 1 / 9
    assert compression_ratio("猫" * 100) > 10


@pytest.mark.parametrize(
    ("avg_logprob", "ratio", "no_speech_prob", "falls_back", "is_silent"),
    [
        (-0.5, 2.4, 0.6, False, False),
        (-0.5, 2.5, 0.6, True, False),
        (-1.1, 1.0, 0.6, True, False),
        (-1.1, 1.0, 0.7, False, True),
        (-1.1, 2.5, 0.7, False, True),
        (-1.0, 2.5, 0.7, True, True),
        (-0.9, 2.5, 0.7, True, False),
    ],
)
def test_guesses_and_repetitions_fall_back_unless_silent(
    avg_logprob: float, ratio: float, no_speech_prob: float, falls_back: bool, is_silent: bool
) -> None:
    thresholds = Thresholds()
    decided = needs_fallback(
        thresholds, avg_logprob=avg_logprob, compression_ratio=ratio, no_speech_prob=no_speech_prob
    )
    assert decided is falls_back
    assert is_silence(thresholds, avg_logprob=avg_logprob, no_speech_prob=no_speech_prob) is is_silent


def test_each_threshold_can_be_off() -> None:
    def falls_back(thresholds: Thresholds) -> bool:
        return needs_fallback(thresholds, avg_logprob=-5.0, compression_ratio=9.0, no_speech_prob=0.9)

    assert not falls_back(Thresholds())
    assert falls_back(Thresholds(no_speech=None))
    assert falls_back(Thresholds(logprob=None))
    assert falls_back(Thresholds(no_speech=None, logprob=None))
    assert not falls_back(Thresholds(logprob=None, compression_ratio=None))
    assert not is_silence(Thresholds(no_speech=None), avg_logprob=-5.0, no_speech_prob=0.9)
    assert is_silence(Thresholds(logprob=None), avg_logprob=-0.1, no_speech_prob=0.9)


def test_segments_without_length_or_text_are_emptied_and_stay() -> None:
    segments = [
        segment(0, 1, words=[Word(" a", 0, 1, 1.0)]),
        segment(1, 1, words=[]),
        segment(1, 2, "  "),
        segment(2, 3),
    ]
    clear_empty(segments)
    assert [(s.text, s.token_ids) for s in segments] == [(" a", [1]), ("", []), ("", []), (" a", [1])]
    assert [s.words for s in segments] == [[Word(" a", 0, 1, 1.0)], [], None, None]


def test_speech_ends_with_the_last_word() -> None:
    spoken = segment(0, 4, words=[Word(" a", 0, 1, 1.0), Word(" b", 1, 3, 1.0)])
    assert speech_end_s([spoken, segment(4, 5, words=[])]) == 3
    assert speech_end_s([segment(0, 1), segment(1, 5)]) == 5
    assert speech_end_s([]) is None


@pytest.mark.parametrize(
    ("end_s", "is_single_ending", "expected"),
    [(14.2, False, 1420), (14.2, True, 4000), (10.0, False, 4000), (10.001, False, 1001), (99.0, False, 4000)],
)
def test_next_window_begins_behind_the_last_word(end_s: float, is_single_ending: bool, expected: int) -> None:
    split = WindowSplit([], 4000, is_single_ending)
    segments = [segment(10, 20, words=[Word(" a", 10, end_s, 1.0)])]
    assert seek_after_words(segments, split, seek=1000, num_frames=3000) == expected


def test_loops_are_found_and_ordinary_speech_is_not() -> None:
    speech = list(range(100, 140))
    assert not is_repeating([*speech, *[A, B] * 12], END)  # no, no, no ...
    assert not is_repeating(speech * 3, END)
    assert not is_repeating([A] * 52, END)
    assert is_repeating([A] * 53, END)
    assert not is_repeating([*speech[:10], *[A, B, C] * 26], END)
    assert is_repeating([*speech[:10], *[A, B, C] * 27], END)
    assert not is_repeating([A] * 60 + speech, END)


def test_new_timestamps_do_not_hide_a_loop() -> None:
    ids = [token_id for i in range(20) for token_id in (BEGIN + 50 * i, A, B, C, BEGIN + 50 * i + 40)]
    assert is_repeating(ids, END)


def test_long_periods_have_to_come_more_often() -> None:
    assert not is_repeating(list(range(20)) * 5, END)
    assert is_repeating(list(range(20)) * 6, END)
    assert not is_repeating(list(range(33)) * 6, END)


words = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=9) | st.text(
    "天地玄黄宇宙洪荒日月", min_size=1, max_size=2
)


@given(
    vocabulary=st.lists(words, min_size=1, max_size=30, unique=True),
    before=st.lists(st.integers(0, 29), max_size=30),
    period=st.lists(st.integers(0, 29), min_size=1, max_size=30),
    num_tokens=st.integers(50, 224),
)
def test_a_loop_that_is_found_compresses_more_than_the_threshold(
    vocabulary: list[str], before: list[int], period: list[int], num_tokens: int
) -> None:
    ids = [i % len(vocabulary) for i in before + period * num_tokens][:num_tokens]
    first = next((n for n in range(num_tokens + 1) if is_repeating(ids[:n], END)), None)
    if first is not None:
        text = "".join(" " + vocabulary[token_id] for token_id in ids[:first])
        assert compression_ratio(text) > 2.4
