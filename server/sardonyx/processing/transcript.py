"""What becomes of a window's result: whether it is good, its segments, and where the next window begins.

Floor 2. Pure arithmetic over tokens. A frame is 10 ms of sound, a timestamp's step 20 ms.

Source: openai-whisper's ``transcribe.py``; what differs is said where it does.
"""

import itertools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

FRAMES_PER_S = 100

_FRAMES_PER_TIMESTAMP = 2
_LEAST_LOOP_TOKENS = 50
_LONGEST_PERIOD = 32


@dataclass(slots=True)
class Word:
    """A word of a segment."""

    text: str
    """With its punctuation and the space in front of it; the words of a segment joined are its text."""
    start_s: float
    """Since the begin of the sound, as `end_s`."""
    end_s: float
    probability: float
    """Mean of its tokens'."""


@dataclass(slots=True)
class Segment:
    """What was said between two timestamps."""

    seek: int
    """Frame at which its window begins."""
    start_s: float
    """Since the begin of the sound, as `end_s`."""
    end_s: float
    text: str
    token_ids: list[int]
    """Timestamps among them."""
    temperature: float
    """This and the next three are its window's."""
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: list[Word] | None = None
    """``None`` unless asked for."""


class Thresholds(msgspec.Struct, frozen=True, kw_only=True):
    """When a result is not good enough; each may be off (``None``)."""

    compression_ratio: float | None = 2.4
    """A result above it repeats itself."""
    logprob: float | None = -1.0
    """A result whose mean is below it is a guess."""
    no_speech: float | None = 0.6
    """Above it a window may be silent."""


class Part(msgspec.Struct, frozen=True):
    """A segment to be."""

    start_s: float
    """Since the begin of the sound, as `end_s`."""
    end_s: float
    token_ids: list[int]


class WindowSplit(msgspec.Struct, frozen=True):
    """A window's result, cut at its timestamps."""

    parts: list[Part]
    """In the tokens' order."""
    next_seek: int
    """Frame at which the next window begins."""
    is_single_ending: bool
    """One timestamp, and not two, ends the tokens: nothing is said behind it."""


def compression_ratio(text: str) -> float:
    """How many times smaller zlib makes the text's UTF-8; 0 for no text."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def needs_fallback(
    thresholds: Thresholds, *, avg_logprob: float, compression_ratio: float, no_speech_prob: float
) -> bool:
    """Whether to decode the window again, at the next higher temperature.

    Yes for a result that repeats itself or is a guess. But a guess at a window that seems silent is `is_silence`.
    """
    is_guess = thresholds.logprob is not None and avg_logprob < thresholds.logprob
    if is_guess and thresholds.no_speech is not None and no_speech_prob > thresholds.no_speech:
        return False
    is_repetition = thresholds.compression_ratio is not None and compression_ratio > thresholds.compression_ratio
    return is_guess or is_repetition


def is_silence(thresholds: Thresholds, *, avg_logprob: float, no_speech_prob: float) -> bool:
    """Whether to drop a window's result: it seems silent, and the model is not sure of the text either."""
    if thresholds.no_speech is None or no_speech_prob <= thresholds.no_speech:
        return False
    return thresholds.logprob is None or avg_logprob <= thresholds.logprob


def is_repeating(token_ids: Sequence[int], end_id: int) -> bool:
    """Whether a result has become a loop that it will not leave, so that decoding can end early.

    True where text tokens at the end repeat with a period of at most 32, and that part has 50 tokens, two more for each
    text token before it and three more for each of the period. Then the text's compression ratio is above 2.4, or
    would be soon where single signs follow words of many bytes: its window needs the fallback anyway. A ``no no no no``
    is not long enough. Timestamps do not count: loops have new ones each time. A call costs some 20 µs.

    Args:
        token_ids: all of the result so far.
        end_id: every token below it is text.
    """
    if len(token_ids) < _LEAST_LOOP_TOKENS:
        return False
    texts = [token_id for token_id in token_ids if token_id < end_id]
    num_tokens = len(texts)
    for period in range(1, min(_LONGEST_PERIOD, num_tokens) + 1):
        num_covered = period
        while num_covered < num_tokens and texts[-num_covered - 1] == texts[period - num_covered - 1]:
            num_covered += 1
        if num_covered >= _LEAST_LOOP_TOKENS + 2 * (num_tokens - num_covered) + 3 * period:
            return True
    return False


def split_window(token_ids: Sequence[int], timestamp_begin_id: int, *, seek: int, num_frames: int) -> WindowSplit:
    """Cut a window's result into segments, and say where to go on.

    Between two timestamps that stand side by side a segment ends. What follows the last of such pairs is unfinished: it
    is dropped, and the next window begins there; but where the result ends with one timestamp behind text, that closes
    the last segment, and the window is done. A result without a pair is one segment from the window's begin to the last
    timestamp (to the window's end where there is none, or only 0.00), and the window is done.

    Whatever the tokens: times lie in the sound of the window, no part ends before it starts, and `next_seek` is behind
    `seek`. A part that has a length keeps one: when it is said to begin behind the sound, it gets the last 20 ms.

    Args:
        token_ids: the result, without its end token.
        timestamp_begin_id: ``<|0.00|>``.
        seek: frame at which the window begins.
        num_frames: of sound in the window, at least 1.
    """
    is_timestamp = [token_id >= timestamp_begin_id for token_id in token_ids]
    is_single_ending = is_timestamp[-2:] == [False, True]
    cuts = [i for i in range(1, len(token_ids)) if is_timestamp[i - 1] and is_timestamp[i]]

    def frame_of(token_id: int) -> int:
        return (token_id - timestamp_begin_id) * _FRAMES_PER_TIMESTAMP

    def part_of(start: int, end: int, ids: Sequence[int]) -> Part:
        if start < end:
            start = min(start, max(0, num_frames - _FRAMES_PER_TIMESTAMP))
        return Part(
            (seek + min(start, num_frames)) / FRAMES_PER_S,
            (seek + min(max(start, end), num_frames)) / FRAMES_PER_S,
            list(ids),
        )

    if not cuts:
        last = max((i for i in range(len(token_ids)) if is_timestamp[i]), default=None)
        end = frame_of(token_ids[last]) if last is not None else 0
        return WindowSplit([part_of(0, end or num_frames, token_ids)], seek + num_frames, is_single_ending)
    parts = []
    end = 0
    for first, last in itertools.pairwise([0, *cuts, *([len(token_ids)] if is_single_ending else [])]):
        # By the rules of timestamps each part begins with one; without, it begins where the last one ended.
        start = frame_of(token_ids[first]) if is_timestamp[first] else end
        end = frame_of(token_ids[last - 1])
        parts.append(part_of(start, end, token_ids[first:last]))
    # A pair at 0.00 would lead nowhere; it takes broken rules to get there.
    num_done = num_frames if is_single_ending or end == 0 else min(end, num_frames)
    return WindowSplit(parts, seek + num_done, is_single_ending)


def clear_empty(segments: Iterable[Segment]) -> None:
    """Take text, tokens and words from segments without length or with blank text; the segments themselves stay.

    For the time when times are final: behind word timestamps, if there are any.
    """
    for segment in segments:
        if segment.start_s == segment.end_s or not segment.text.strip():
            segment.text = ""
            segment.token_ids = []
            segment.words = None if segment.words is None else []


def speech_end_s(segments: Sequence[Segment]) -> float | None:
    """When the last word of a window's segments ends; without words, the last segment; ``None`` without segments."""
    words = (word.end_s for segment in reversed(segments) for word in reversed(segment.words or []))
    return next(words, segments[-1].end_s if segments else None)


def seek_after_words(segments: Sequence[Segment], split: WindowSplit, *, seek: int, num_frames: int) -> int:
    """`WindowSplit.next_seek`, once words are known: behind the last word, unless the window is done.

    Args:
        segments: of the window, with words.
        split: of the window.
        seek: frame at which the window begins.
        num_frames: of sound in the window.
    """
    end_s = speech_end_s(segments)
    if split.is_single_ending or end_s is None or end_s * FRAMES_PER_S <= seek:
        return split.next_seek
    return min(max(round(end_s * FRAMES_PER_S), seek + 1), seek + num_frames)
