"""A passage of a sound, window by window: the long-form algorithm. Floor 4, on the event loop.

Each window is decoded after the one before it, whose text is its prompt, and begins where that one's last segment
ended. A window whose result repeats itself or is a guess is decoded again, at higher temperatures.

Source: openai-whisper's ``transcribe.py``.
"""

import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass

from sardonyx.processing.log_mel import WINDOW_FRAMES, window_at
from sardonyx.processing.transcript import (
    Segment,
    WindowSplit,
    clear_empty,
    compression_ratio,
    is_silence,
    needs_fallback,
    seek_after_words,
    speech_end_s,
    split_window,
)
from sardonyx.processing.whisper_tokens import WhisperTokens
from sardonyx.processing.word_timing import AlignedWindow, aligner_ids, words_of_segments
from sardonyx.serving.options import TokenInfo
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.speech_requests import SpeechRequests
from sardonyx.serving.tasks import HeardWindow, TranscriptionOptions
from sardonyx.speech import Alignment, Floats, Window

_FORGETFUL_TEMPERATURE = 0.5
"""A text that took a higher one is no prompt for what follows: it may be wrong, and would go on so."""


@dataclass(slots=True, frozen=True)
class SpeechTools:
    """What the passages of one loaded model share."""

    requests: SpeechRequests
    tokens: WhisperTokens
    pool: WorkerPool
    max_model_len: int


@dataclass(slots=True, frozen=True)
class Hearing:
    """What the passages of one call share."""

    spectrogram: Floats
    """(M, frames), of the whole sound and thirty seconds of silence."""
    language: str | None
    """``None`` of English-only models."""
    prompt_ids: list[int]
    """Of the text before the sound."""
    options: TranscriptionOptions
    flow: int


@dataclass(slots=True, frozen=True)
class WindowResult:
    """The best try at a window."""

    token_ids: list[int]
    token_logprobs: list[float]
    text: str
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    is_loop: bool
    """Decoding was ended, for it said the same again and again."""


class Passage:
    """Decodes one range of a sound.

    Args:
        tools: the model's.
        hearing: the call's.
        first: a window that was encoded already, if the passage begins with it.
        begins_call: the call has asked the engine for nothing yet.
    """

    def __init__(
        self, tools: SpeechTools, hearing: Hearing, first: Window | None = None, *, begins_call: bool = False
    ) -> None:
        self._tools = tools
        self._hearing = hearing
        self._first = first
        self._begins_call = begins_call
        self._last_speech_s = 0.0
        options = hearing.options
        self._start_ids = tools.tokens.start_sequence(
            hearing.language, options.task, has_timestamps=options.has_timestamps
        )

    async def windows(self, start: int, end: int) -> AsyncIterator[HeardWindow]:
        """What is said between two frames of the sound. Raises as `SpeechRequests`."""
        tokens, options = self._tools.tokens, self._hearing.options
        context = self._hearing.prompt_ids
        seek = start
        while seek < end:
            num_frames = min(WINDOW_FRAMES, end - seek)
            window = self._window(seek, num_frames)
            result = await self._decode(window, context)
            next_seek = seek + num_frames
            segments: list[Segment] = []
            if not is_silence(options.thresholds, avg_logprob=result.avg_logprob, no_speech_prob=result.no_speech_prob):
                split = split_window(result.token_ids, tokens.timestamp_begin_id, seek=seek, num_frames=num_frames)
                segments, next_seek = self._segments(split, result, seek), split.next_seek
                if options.has_words and segments:
                    await self._add_words(window, segments)
                    next_seek = seek_after_words(segments, split, seek=seek, num_frames=num_frames)
                clear_empty(segments)
                context = context + list(itertools.chain.from_iterable(each.token_ids for each in segments))
                if result.temperature > _FORGETFUL_TEMPERATURE or not options.conditions_on_previous_text:
                    context = []
            kept = [segment for segment in segments if segment.text]
            infos = self._token_infos(result, kept) if options.has_logprobs else []
            yield HeardWindow(kept, infos, len(result.token_ids))
            seek = next_seek

    def _window(self, seek: int, num_frames: int) -> Window:
        first, self._first = self._first, None
        if first is not None and first.num_frames == num_frames:
            return first
        return Window(window_at(self._hearing.spectrogram, seek, num_frames), num_frames)

    async def _decode(self, window: Window, context: list[int]) -> WindowResult:
        """The first try that is good enough, or the last."""
        options = self._hearing.options
        result = None
        for temperature in options.temperatures:
            result = await self._try(window, context, temperature)
            if not result.is_loop and not needs_fallback(
                options.thresholds,
                avg_logprob=result.avg_logprob,
                compression_ratio=result.compression_ratio,
                no_speech_prob=result.no_speech_prob,
            ):
                break
        assert result is not None, "there is at least one temperature"
        return result

    async def _try(self, window: Window, context: list[int], temperature: float) -> WindowResult:
        tools, options = self._tools, self._hearing.options
        # One half of what the decoder sees is for the text before, with its mark; the other one for the result.
        room = tools.max_model_len // 2 - 1
        prompt_ids = [tools.tokens.previous_id, *context[-room:], *self._start_ids] if context else self._start_ids
        event = await tools.requests.text(
            window,
            prompt_ids,
            has_timestamps=options.has_timestamps,
            temperature=temperature,
            seed=options.seed,
            flow=self._hearing.flow,
            is_first=self._begins_call,
        )
        self._begins_call = False
        text = tools.tokens.text(event.token_ids).strip()
        return WindowResult(
            token_ids=event.token_ids,
            token_logprobs=event.token_logprobs[: len(event.token_ids)],
            text=text,
            temperature=temperature,
            avg_logprob=sum(event.token_logprobs) / (len(event.token_ids) + 1),
            compression_ratio=compression_ratio(text),
            no_speech_prob=event.no_speech_prob,
            is_loop=event.is_loop,
        )

    def _segments(self, split: WindowSplit, result: WindowResult, seek: int) -> list[Segment]:
        return [
            Segment(
                seek=seek,
                start_s=part.start_s,
                end_s=part.end_s,
                text=self._tools.tokens.text(part.token_ids),
                token_ids=part.token_ids,
                temperature=result.temperature,
                avg_logprob=result.avg_logprob,
                compression_ratio=result.compression_ratio,
                no_speech_prob=result.no_speech_prob,
            )
            for part in split.parts
        ]

    def _token_infos(self, result: WindowResult, segments: list[Segment]) -> list[TokenInfo]:
        """The text tokens of segments: these are slices of the result, from its begin on, some left out."""
        tokens, infos, place = self._tools.tokens, [], 0
        for segment in segments:
            while result.token_ids[place : place + len(segment.token_ids)] != segment.token_ids:
                place += 1
            for token_id, logprob in zip(segment.token_ids, result.token_logprobs[place:], strict=False):
                if tokens.is_text(token_id):
                    infos.append(
                        TokenInfo(token_id, tokens.text([token_id]), tokens.token_bytes(token_id), logprob, [])
                    )
            place += len(segment.token_ids)
        return infos

    async def _add_words(self, window: Window, segments: list[Segment]) -> None:
        tools, hearing = self._tools, self._hearing
        ids = aligner_ids(segments, tools.tokens, hearing.language, hearing.options.task)
        alignment = await tools.requests.alignment(window, ids, hearing.flow)
        self._last_speech_s = await tools.pool.run(
            _put_words, segments, alignment, window.num_frames, tools.tokens, hearing.language, self._last_speech_s
        )


def _put_words(
    segments: list[Segment],
    alignment: Alignment,
    num_frames: int,
    tokens: WhisperTokens,
    language: str | None,
    last_speech_s: float,
) -> float:
    """Put words into the segments; when the last of them ends."""
    aligned = AlignedWindow(alignment.attention, alignment.logprobs, num_frames // 2)
    words_of_segments(segments, aligned, tokens, language=language, last_speech_s=last_speech_s)
    end_s = speech_end_s(segments)
    return last_speech_s if end_s is None else end_s
