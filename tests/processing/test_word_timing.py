"""Words put into segments, from attention that was drawn by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.processing.whisper_making import make_tokens

from sardonyx.processing.transcript import Segment, Word
from sardonyx.processing.whisper_tokens import WhisperTokens
from sardonyx.processing.word_timing import AlignedWindow, aligner_ids, words_of_segments

NUM_POSITIONS = 1500
NUM_START = 3


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> WhisperTokens:
    return make_tokens(tmp_path_factory.mktemp("whisper") / "model", is_multilingual=True)[0]


def make_segment(tokens: WhisperTokens, text: str, start_s: float, end_s: float, seek: int = 0) -> Segment:
    ids = tokens.prompt(text)
    return Segment(seek, start_s, end_s, tokens.text(ids), ids, 0.0, -0.1, 1.0, 0.1)


def draw(
    segments: list[Segment], tokens: WhisperTokens, starts_s: list[float], end_s: float, language: str = "en"
) -> AlignedWindow:
    """Attention in which each word is heard from its time on to the next one's, in equal parts for its tokens.

    The row of a token looks at what comes next: that of no_timestamps at the first text token.
    """
    num_tokens = len(aligner_ids(segments, tokens, language, "transcribe"))
    words = [word for s in segments for word in tokens.words(list(filter(tokens.is_text, s.token_ids)), language)]
    assert len(words) == len(starts_s)
    attention = np.zeros((2, num_tokens, NUM_POSITIONS), np.float32)
    row = NUM_START
    for word, begin_s, until_s in zip(words, starts_s, [*starts_s[1:], end_s], strict=True):
        edges = np.linspace(begin_s * 50, until_s * 50, len(word.ids) + 1).round().astype(int)
        for begin, end in itertools.pairwise(edges):
            attention[:, row, begin:end] = 8
            row += 1
    attention[:, row, round(end_s * 50) :] = 8
    logprobs = np.full(num_tokens - 1, -100, np.float32)
    logprobs[NUM_START:-1] = np.log(np.linspace(0.2, 0.8, num_tokens - 2 - NUM_START))
    return AlignedWindow(attention, logprobs, NUM_POSITIONS)


def place(segments: list[Segment], window: AlignedWindow, tokens: WhisperTokens, last_speech_s: float = 0.0) -> None:
    words_of_segments(segments, window, tokens, language="en", last_speech_s=last_speech_s)


def times(words: list[Word] | None) -> list[tuple[str, float, float]]:
    assert words is not None
    return [(word.text, word.start_s, word.end_s) for word in words]


def test_sequence_to_align_is_start_text_end(tokens: WhisperTokens) -> None:
    first, second = make_segment(tokens, "The fox", 0, 1), make_segment(tokens, "runs", 1, 2)
    start = tokens.start_sequence("de", "translate", has_timestamps=False)
    expected = [*start, *first.token_ids, *second.token_ids, tokens.end_id]
    first.token_ids = [tokens.end_id + 50, *first.token_ids]
    assert aligner_ids([first, second], tokens, "de", "translate") == expected


def test_words_are_where_the_attention_is(tokens: WhisperTokens) -> None:
    segments = [
        make_segment(tokens, "The quick fox.", 10.3, 11.6, 1000),
        make_segment(tokens, "He said", 11.6, 12.5, 1000),
    ]
    window = draw(segments, tokens, [0.3, 0.6, 1.0, 1.4, 1.6, 2.0], 2.5)
    place(segments, window, tokens, last_speech_s=10.0)
    # The path begins at 0; the segment's own start is too near to be preferred.
    assert times(segments[0].words) == [(" The", 10.0, 10.6), (" quick", 10.6, 11.0), (" fox.", 11.0, 11.4)]
    assert times(segments[1].words) == [(" He", 11.6, 12.0), (" said", 12.0, 12.5)]
    assert [(s.start_s, s.end_s) for s in segments] == [(10.0, 11.4), (11.6, 12.5)]


def test_probability_is_the_mean_of_a_words_tokens(tokens: WhisperTokens) -> None:
    segments = [make_segment(tokens, "naïve point. Ok", 0, 3)]
    window = draw(segments, tokens, [0.0, 0.5, 1.0, 1.5], 2.0)
    place(segments, window, tokens)
    probabilities = np.exp(window.logprobs[NUM_START:-1])
    split = tokens.words(segments[0].token_ids, "en")
    counts = np.cumsum([0, *[len(word.ids) for word in split]])
    means = [probabilities[a:b].mean() for a, b in itertools.pairwise(counts)]
    assert segments[0].words is not None
    # The full stop is joined to its word and does not count.
    actual = [word.probability for word in segments[0].words]
    np.testing.assert_allclose(actual, [means[0], means[1], means[3]], rtol=1e-6)


def test_punctuation_is_joined_to_its_word(tokens: WhisperTokens) -> None:
    (opening,) = (i for i in range(tokens.end_id) if tokens.text([i]) == " (")
    segment = make_segment(tokens, "He said", 0, 5)
    segment.token_ids += [opening, opening, *tokens.prompt("no),")]
    assert [word.text for word in tokens.words(segment.token_ids, "en")][2:] == [" (", " (", " no", ")", ","]
    place([segment], draw([segment], tokens, [0.0, 0.4, 0.8, 1.0, 1.2, 1.6, 1.8], 2.0), tokens)
    assert times(segment.words) == [(" He", 0.0, 0.4), (" said", 0.4, 0.8), (" ( ( no),", 1.2, 1.6)]


def test_pause_at_a_full_stop_belongs_to_no_word(tokens: WhisperTokens) -> None:
    segments = [make_segment(tokens, "He said it. The fox", 0, 9)]
    window = draw(segments, tokens, [0.0, 0.4, 0.8, 1.2, 1.4, 5.4], 5.8)
    place(segments, window, tokens)
    # The median is 0.4 s: " The" is heard from 1.4 to 5.4 and keeps its last 0.8 s.
    assert times(segments[0].words)[2:] == [(" it.", 0.8, 1.2), (" The", 4.6, 5.4), (" fox", 5.4, 5.8)]


def test_first_word_after_a_pause_is_shortened(tokens: WhisperTokens) -> None:
    segments = [make_segment(tokens, "He said it does", 5.0, 7.0)]
    place(segments, draw(segments, tokens, [0.0, 5.4, 5.8, 6.2], 6.6), tokens)
    assert times(segments[0].words)[0] == (" He", 4.6, 5.4)
    assert (segments[0].start_s, segments[0].end_s) == (4.6, 6.6)


def test_second_word_after_a_pause_is_shortened_too(tokens: WhisperTokens) -> None:
    segments = [make_segment(tokens, "He said it does not", 0.0, 7.0)]
    place(segments, draw(segments, tokens, [0.0, 2.0, 5.4, 5.8, 6.2], 6.6), tokens)
    assert times(segments[0].words)[:2] == [(" He", 3.8, 4.6), (" said", 4.6, 5.4)]


def test_segments_times_are_believed_when_outer_words_are_too_long(tokens: WhisperTokens) -> None:
    segments = [make_segment(tokens, "He said it does", 0.9, 2.5)]
    place(segments, draw(segments, tokens, [0.0, 1.3, 1.7, 2.1], 5.0), tokens, last_speech_s=0.5)
    words = times(segments[0].words)
    # Half of the words are 0.4 s long, but the median is 0.7 s at most.
    assert (words[0], words[-1]) == ((" He", 0.6, 1.3), (" does", 2.1, 2.8))
    assert (segments[0].start_s, segments[0].end_s) == (0.9, 2.5)


def test_languages_without_spaces_have_characters_for_words(tokens: WhisperTokens) -> None:
    segments = [make_segment(tokens, "雨が降る。", 0, 3)]
    num_words = len(tokens.words(segments[0].token_ids, "ja"))
    window = draw(segments, tokens, [0.4 * i for i in range(num_words)], 0.4 * num_words, "ja")
    words_of_segments(segments, window, tokens, language="ja", last_speech_s=0.0)
    words = [word for word, _, _ in times(segments[0].words)]
    assert "".join(words) == segments[0].text
    assert len(words) > 2
    assert words[-1].endswith("。")
    assert words[-1] != "。"


def test_segment_without_text_has_no_words_and_keeps_its_times(tokens: WhisperTokens) -> None:
    segments = [Segment(0, 3.0, 4.0, "", [], 0.0, 0.0, 0.0, 0.0), make_segment(tokens, "He", 4, 5)]
    place(segments, draw(segments, tokens, [4.0], 4.5), tokens)
    assert (segments[0].words, segments[0].start_s, segments[0].end_s) == ([], 3.0, 4.0)
    assert [word for word, _, _ in times(segments[1].words)] == [" He"]
    place(segments[:1], AlignedWindow(np.zeros((1, 4, 9), np.float32), np.zeros(3, np.float32), 9), tokens)
    assert segments[0].words == []
    place([], AlignedWindow(np.zeros((1, 4, 9), np.float32), np.zeros(3, np.float32), 9), tokens)


TEXTS = st.lists(
    st.sampled_from([" The", " fox", ".", ",", " (", ' "', "!", " it", "猫", " over", "'s", "-", " naïve", "?"]),
    max_size=6,
)


@given(data=st.data())
def test_words_are_in_order_and_in_the_window_whatever_the_attention(
    data: st.DataObject, tokens: WhisperTokens
) -> None:
    language = data.draw(st.sampled_from(["en", "ja"]))
    seek, num_positions = data.draw(st.integers(0, 9999)), data.draw(st.integers(0, 40))
    segments = []
    for text in data.draw(st.lists(TEXTS.map("".join), min_size=1, max_size=4)):
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, 2 * num_positions)] * 2)))
        segments.append(make_segment(tokens, text, (seek + start) / 100, (seek + end) / 100, seek))
    num_tokens = len(aligner_ids(segments, tokens, language, "transcribe"))
    noise = np.random.default_rng(data.draw(st.integers(0, 999)))
    attention = noise.normal(0, data.draw(st.sampled_from([0, 1, 30])), (1, num_tokens, 41)).astype(np.float32)
    window = AlignedWindow(attention, noise.uniform(-5, 0, num_tokens - 1).astype(np.float32), num_positions)
    last_speech_s = max(0.0, seek / 100 - data.draw(st.sampled_from([0.0, 0.2, 9.0])))
    words_of_segments(segments, window, tokens, language=language, last_speech_s=last_speech_s)
    times_s = [seek / 100]
    for segment in segments:
        assert segment.words is not None
        assert "".join(word.text for word in segment.words) == segment.text
        assert segment.start_s <= segment.end_s
        for word in segment.words:
            times_s += [word.start_s, word.end_s]
            assert 0 < word.probability <= 1
    times_s.append((seek + 2 * num_positions) / 100)
    assert times_s == sorted(times_s)
