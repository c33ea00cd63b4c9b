"""Puts words with their times into the segments of a window.

Floor 2. Computes for up to 0.2 s: not for the event loop.

Source: openai-whisper's ``timing.py``; what differs is said where it does.
"""

import itertools
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from sardonyx.processing.alignment import align
from sardonyx.processing.transcript import FRAMES_PER_S, Segment, Word
from sardonyx.processing.whisper_tokens import TIMESTAMPS_PER_S, Task, WhisperTokens

Floats = npt.NDArray[np.float32]

_OPENING = "\"'“¿([{-"
"""Punctuation that belongs to the word behind it."""
_CLOSING = "\"'.。,，!！?？:：”)]}、"
"""Punctuation that belongs to the word before it."""
_SENTENCE_ENDS = ".。!！?？"
_LONGEST_MEDIAN_S = 0.7
_TOLERANCE_S = 0.5
"""By how much a word may lie outside of its segment's timestamps before they are believed instead."""


class AlignedWindow(msgspec.Struct, frozen=True):
    """What the graph ``aligner`` says about the tokens of `aligner_ids`."""

    attention: Floats
    """(A, S, P): scaled products before the softmax."""
    logprobs: Floats
    """(S - 1): of each token given those before it, among text tokens."""
    num_positions: int
    """Of sound: half of the window's frames of it."""


class _Durations(msgspec.Struct, frozen=True):
    """What is usual in a window, in seconds; all zero where no word has a length."""

    median_s: float
    max_s: float


def aligner_ids(segments: Iterable[Segment], tokens: WhisperTokens, language: str | None, task: Task) -> list[int]:
    """The sequence to align: start sequence without timestamps, the text of all segments, end.

    Raises:
        InvalidRequest: the model does not know the language or the task.
    """
    start = tokens.start_sequence(language, task, has_timestamps=False)
    return [*start, *itertools.chain.from_iterable(_texts(segments, tokens)), tokens.end_id]


def words_of_segments(
    segments: Sequence[Segment],
    window: AlignedWindow,
    tokens: WhisperTokens,
    *,
    language: str | None,
    last_speech_s: float,
) -> None:
    """Give each segment its words, and times of start and end that fit them.

    Words are in order and do not overlap, in a segment and from one to the next; they lie in the window. The words of a
    segment, joined, are its text: unlike openai's, no word and no punctuation crosses from one segment to the next. A
    segment without text gets no words and keeps its times.

    Args:
        segments: all of one window.
        window: of the sequence that `aligner_ids` makes of these segments.
        tokens: the model's.
        language: that of the sequence.
        last_speech_s: when speech ended before this window, 0 where there was none.
    """
    texts = _texts(segments, tokens)
    num_texts = sum(map(len, texts))
    if not num_texts:
        for segment in segments:
            segment.words = []
        return
    # What is not text: the start sequence with its no_timestamps, and the end. The tokens that the path goes through
    # begin with no_timestamps: what a token attends to is the sound of the next one.
    num_start = window.attention.shape[1] - num_texts - 1
    assert num_start > 0, "the aligned sequence holds other segments"
    starts = align(window.attention, num_skipped=num_start - 1, num_positions=max(1, window.num_positions))
    times_s = starts / TIMESTAMPS_PER_S
    probabilities = np.exp(window.logprobs[num_start - 1 : num_start - 1 + num_texts])
    words_by_segment: list[list[Word]] = []
    begin = 0
    for text in texts:
        words_by_segment.append([])
        for word in tokens.words(text, language):
            end = begin + len(word.ids)
            probability = float(probabilities[begin:end].mean())
            words_by_segment[-1].append(Word(word.text, float(times_s[begin]), float(times_s[end]), probability))
            begin = end
    durations = _durations(words_by_segment)
    _shorten_at_sentence_ends(list(itertools.chain.from_iterable(words_by_segment)), durations)
    for segment, words in zip(segments, words_by_segment, strict=True):
        segment.words = _with_punctuation(words)
        for item in segment.words:
            item.start_s = round(item.start_s + segment.seek / FRAMES_PER_S, 2)
            item.end_s = round(item.end_s + segment.seek / FRAMES_PER_S, 2)
        if segment.words:
            last_speech_s = _fit(segment, segment.words, durations, last_speech_s)


def _texts(segments: Iterable[Segment], tokens: WhisperTokens) -> list[list[int]]:
    return [list(filter(tokens.is_text, segment.token_ids)) for segment in segments]


def _durations(words_by_segment: Iterable[Iterable[Word]]) -> _Durations:
    all_s = [word.end_s - word.start_s for words in words_by_segment for word in words]
    some_s = [duration_s for duration_s in all_s if duration_s > 0]
    median_s = min(_LONGEST_MEDIAN_S, float(np.median(some_s))) if some_s else 0.0
    return _Durations(median_s, 2 * median_s)


def _shorten_at_sentence_ends(words: Sequence[Word], durations: _Durations) -> None:
    """Around a full stop words get the pause as well: a stop ends early, and a word behind one begins late."""
    for previous, word in itertools.pairwise(words):
        if word.end_s - word.start_s <= durations.max_s:
            continue
        if word.text in _SENTENCE_ENDS:
            word.end_s = word.start_s + durations.max_s
        elif previous.text in _SENTENCE_ENDS:
            word.start_s = word.end_s - durations.max_s


def _with_punctuation(words: Sequence[Word]) -> list[Word]:
    """Join opening punctuation to the word behind it and closing punctuation to the one before it.

    A joined word keeps the times and the probability of its word.
    """
    opened: list[Word] = []
    for word in reversed(words):
        if opened and word.text.startswith(" ") and word.text.strip() in _OPENING:
            opened[-1].text = word.text + opened[-1].text
        else:
            opened.append(word)
    joined: list[Word] = []
    for word in reversed(opened):
        if joined and not joined[-1].text.endswith(" ") and word.text in _CLOSING:
            joined[-1].text += word.text
        else:
            joined.append(word)
    return joined


def _fit(segment: Segment, words: Sequence[Word], durations: _Durations, last_speech_s: float) -> float:
    """Shorten a segment's outer words where they hold a pause, and move the segment's times to them.

    No word ever gets longer at the cost of another, as in openai's it may.

    Returns:
        When the segment ends.
    """
    first, last = words[0], words[-1]
    if first.end_s - last_speech_s > 4 * durations.median_s:
        _shorten_after_pause(words, durations)
    if first.start_s + _TOLERANCE_S < segment.start_s < first.end_s:
        first.start_s = max(first.start_s, min(first.end_s - durations.median_s, segment.start_s))
    else:
        segment.start_s = first.start_s
    if last.start_s < segment.end_s < last.end_s - _TOLERANCE_S:
        last.end_s = min(last.end_s, max(last.start_s + durations.median_s, segment.end_s))
    else:
        segment.end_s = last.end_s
    timed: list[Segment | Word] = [segment, *words]
    for item in timed:
        item.start_s, item.end_s = round(item.start_s, 2), round(item.end_s, 2)
    return segment.end_s


def _shorten_after_pause(words: Sequence[Word], durations: _Durations) -> None:
    """The first word behind a pause may hold the pause; so may the second."""
    first, second = words[0], words[1] if len(words) > 1 else None
    is_pair_long = second is not None and second.end_s - first.start_s > 2 * durations.max_s
    if first.end_s - first.start_s <= durations.max_s and not is_pair_long:
        return
    if second is not None and second.end_s - second.start_s > durations.max_s:
        first.end_s = second.start_s = max(second.end_s / 2, second.end_s - durations.max_s)
    first.start_s = max(first.start_s, first.end_s - durations.max_s)
