"""A transcript in the formats of OpenAI's answers. Floor 5."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from sardonyx.api.openai.audio_schemas import (
    AudioUsage,
    SegmentReply,
    TextDelta,
    TextDone,
    TokenLogprob,
    TranscriptionReply,
    VerboseReply,
    WordReply,
)
from sardonyx.processing.languages import LANGUAGE_NAMES
from sardonyx.processing.subtitles import srt, vtt
from sardonyx.serving.options import TokenInfo
from sardonyx.serving.tasks import HeardWindow, Transcript, TranscriptionOptions


class Reply:
    """A finished transcript.

    Args:
        transcript: read to its end.
        windows: all of it.
        options: that were asked for.
    """

    def __init__(self, transcript: Transcript, windows: Sequence[HeardWindow], options: TranscriptionOptions) -> None:
        self.segments = [segment for window in windows for segment in window.segments]
        self.text = "".join(segment.text for segment in self.segments).strip()
        self._transcript = transcript
        self._windows = windows
        self._options = options

    def short(self, *, has_usage: bool) -> TranscriptionReply:
        """For ``json``; OpenAI's translations have no usage."""
        tokens = [token for window in self._windows for token in window.tokens]
        return TranscriptionReply(
            text=self.text,
            logprobs=_logprobs(tokens) if self._options.has_logprobs else UNSET,
            usage=_usage(self._transcript) if has_usage else UNSET,
        )

    def verbose(self, *, has_segments: bool) -> VerboseReply:
        """For ``verbose_json``."""
        options, transcript = self._options, self._transcript
        code = "en" if options.task == "translate" else transcript.language
        return VerboseReply(
            task=options.task,
            language=LANGUAGE_NAMES.get(code, code),
            duration=round(transcript.duration_s, 3),
            text=self.text,
            segments=self._segment_replies() if has_segments else UNSET,
            words=self._word_replies() if options.has_words else UNSET,
            usage=_usage(transcript),
        )

    def srt(self) -> str:
        """SubRip subtitles."""
        return srt(self.segments)

    def vtt(self) -> str:
        """WebVTT subtitles."""
        return vtt(self.segments)

    def _segment_replies(self) -> list[SegmentReply]:
        return [
            SegmentReply(
                id=index,
                seek=each.seek,
                start=each.start_s,
                end=each.end_s,
                text=each.text,
                tokens=each.token_ids,
                temperature=each.temperature,
                avg_logprob=each.avg_logprob,
                compression_ratio=each.compression_ratio,
                no_speech_prob=each.no_speech_prob,
            )
            for index, each in enumerate(self.segments)
        ]

    def _word_replies(self) -> list[WordReply]:
        words = [word for segment in self.segments for word in segment.words or []]
        return [WordReply(word=word.text.strip(), start=word.start_s, end=word.end_s) for word in words]


class TranscriptFrames:
    """The events of a stream. Its deltas, joined, are the text of its end.

    Args:
        transcript: that is streamed.
        has_logprobs: they were asked for.
    """

    def __init__(self, transcript: Transcript, *, has_logprobs: bool) -> None:
        self._transcript = transcript
        self._has_logprobs = has_logprobs
        self._text = ""
        self._space = ""
        """White space at the end of what came: only text behind it makes it a part of the text."""
        self._tokens: list[TokenInfo] = []

    def delta(self, window: HeardWindow) -> bytes:
        """The event of a window; none where it adds no text."""
        text = self._space + "".join(segment.text for segment in window.segments)
        if not self._text:
            text = text.lstrip()
        delta = text.rstrip()
        self._space = text[len(delta) :]
        self._tokens += window.tokens
        if not delta:
            return b""
        self._text += delta
        return _frame(TextDelta(delta=delta, logprobs=_logprobs(window.tokens) if self._has_logprobs else UNSET))

    def done(self) -> bytes:
        """The last event."""
        logprobs = _logprobs(self._tokens) if self._has_logprobs else UNSET
        return _frame(TextDone(text=self._text, logprobs=logprobs, usage=_usage(self._transcript)))


def _frame(event: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


def _usage(transcript: Transcript) -> AudioUsage:
    return AudioUsage(seconds=round(transcript.duration_s, 3))


def _logprobs(tokens: Sequence[TokenInfo]) -> list[TokenLogprob]:
    return [TokenLogprob(token=each.text, logprob=each.logprob, bytes=list(each.bytes_)) for each in tokens]
