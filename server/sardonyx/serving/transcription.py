"""One call on its way from sound to segments. Floor 4, on the event loop."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from sardonyx.core import FinishReason
from sardonyx.errors import EngineDead, EngineError, RequestAborted, ServeError
from sardonyx.metrics import ModelMetrics
from sardonyx.processing.log_mel import FRAMES_PER_S, SAMPLE_RATE, WINDOW_FRAMES, window_at
from sardonyx.processing.voice_activity import Span
from sardonyx.serving.admission import Reservation
from sardonyx.serving.engine_errors import deadline_exceeded
from sardonyx.serving.passage import Hearing, Passage, SpeechTools
from sardonyx.serving.tasks import HeardWindow, TranscriptionOptions
from sardonyx.speech import Floats, Window

logger = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class Sound:
    """A sound, ready to be heard."""

    spectrogram: Floats
    """(M, frames), thirty seconds of silence behind it among them."""
    num_frames: int
    """Of the sound itself."""
    duration_s: float
    spans: list[Span] | None
    """Frames to decode at once with each other; ``None``: all of it, from begin to end."""
    prompt_ids: list[int]
    """Of the text before it."""


@dataclass(slots=True, frozen=True)
class SpeechRuntime:
    """What the transcriptions of one loaded model share."""

    model_name: str
    tools: SpeechTools
    language_ids: dict[str, int]
    """By code; empty in English-only models."""
    max_passages: int
    """Of a call that are decoded at once."""
    metrics: ModelMetrics


class Transcription:
    """See `tasks.Transcript`. Made by `SpeechModel.start`.

    The work is a task of its own: it goes on while nobody reads, and its end ends everything that it asked for.

    Args:
        id: of the call.
        sound: what to hear.
        options: the caller's.
        runtime: the model's.
        reservation: released at the end.
        deadline_s: monotonic.
        on_end: called once, synchronously, at the end; with an error unless all went well.
    """

    def __init__(
        self,
        id: str,
        sound: Sound,
        options: TranscriptionOptions,
        runtime: SpeechRuntime,
        reservation: Reservation,
        *,
        flow: int,
        deadline_s: float,
        on_end: "Callable[[Transcription, ServeError | None], None]",
    ) -> None:
        self.id = id
        self.duration_s = sound.duration_s
        self.language = "en"
        self.num_tokens = 0
        self._sound = sound
        self._options = options
        self._runtime = runtime
        self._reservation = reservation
        self._flow = flow
        self._deadline_s = deadline_s
        self._on_end = on_end
        self._arrival_s = time.monotonic()
        self._first_s: float | None = None
        self._error: ServeError | None = None
        self._has_ended = False
        self._heard: asyncio.Queue[HeardWindow | None] = asyncio.Queue()
        self._work = asyncio.create_task(self._run())

    async def __aiter__(self) -> AsyncIterator[HeardWindow]:
        """See `tasks.Transcript`."""
        try:
            while (window := await self._heard.get()) is not None:
                yield window
            if self._error is not None:
                raise self._error
        finally:
            self.abort()

    async def collect(self) -> list[HeardWindow]:
        """See `tasks.Transcript`."""
        return [window async for window in self]

    def abort(self, error: ServeError | None = None) -> None:
        """See `tasks.Transcript`."""
        if not self._has_ended:
            self._end(error or RequestAborted("the transcription was stopped"))
            self._work.cancel()

    def _end(self, error: ServeError | None) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        self._error = error
        self._reservation.release(was_served=error is None)
        self._heard.put_nowait(None)
        self._observe(error)
        self._on_end(self, error)

    async def _run(self) -> None:
        error: ServeError | None = None
        try:
            async with asyncio.timeout(self._deadline_s - time.monotonic()):
                await self._transcribe()
        except TimeoutError:
            error = deadline_exceeded()
        except ServeError as caught:
            error = caught
        except asyncio.CancelledError:
            error = RequestAborted("the transcription was stopped")
        except Exception:
            logger.exception("%s failed", self.id)
            error = EngineError("internal error")
        self._end(error)

    async def _transcribe(self) -> None:
        sound = self._sound
        spans = [Span(0, sound.num_frames)] if sound.spans is None else sound.spans
        if not spans or not sound.num_frames:
            self.language = self._options.languages[0] if self._options.languages else "en"
            return
        language, first = await self._choose_language(spans[0])
        self.language = language or "en"
        hearing = Hearing(sound.spectrogram, language, sound.prompt_ids, self._options, self._flow)
        tools = self._runtime.tools
        passages = [Passage(tools, hearing, first, begins_call=first is None)]
        passages += [Passage(tools, hearing) for _ in spans[1:]]
        if len(spans) == 1:
            async for window in passages[0].windows(spans[0].start, spans[0].end):
                self._deliver(window)
            return
        await self._transcribe_at_once(passages, spans)

    async def _transcribe_at_once(self, passages: list[Passage], spans: list[Span]) -> None:
        """Passages beside each other, their windows in order."""
        places = asyncio.Semaphore(self._runtime.max_passages)
        lines: list[asyncio.Queue[HeardWindow | None]] = [asyncio.Queue() for _ in spans]

        async def decode(passage: Passage, span: Span, line: "asyncio.Queue[HeardWindow | None]") -> None:
            async with places:
                async for window in passage.windows(span.start, span.end):
                    line.put_nowait(window)
            line.put_nowait(None)

        try:
            async with asyncio.TaskGroup() as group:
                for passage, span, line in zip(passages, spans, lines, strict=True):
                    group.create_task(decode(passage, span, line))
                for line in lines:
                    while (window := await line.get()) is not None:
                        self._deliver(window)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _choose_language(self, span: Span) -> tuple[str | None, Window | None]:
        """The language, and the window that told it, where one had to be heard."""
        runtime, candidates = self._runtime, self._options.languages
        if not runtime.language_ids:
            return None, None
        if len(candidates) == 1:
            return candidates[0], None
        num_frames = min(WINDOW_FRAMES, span.end - span.start)
        window = Window(window_at(self._sound.spectrogram, span.start, num_frames), num_frames)
        probs = await runtime.tools.requests.languages(window, self._flow)
        among = candidates or tuple(runtime.language_ids)
        return max(among, key=lambda code: probs[runtime.language_ids[code]]), window

    def _deliver(self, window: HeardWindow) -> None:
        self.num_tokens += window.num_tokens
        if not window.segments:
            return
        if self._first_s is None:
            self._first_s = time.monotonic()
            self._runtime.metrics.observe_ttft(self._first_s - self._arrival_s)
        self._heard.put_nowait(window)

    def _observe(self, error: ServeError | None) -> None:
        """Metrics and the log's line."""
        reason = FinishReason.STOP
        if error is not None:
            reason = FinishReason.ERROR if isinstance(error, EngineError | EngineDead) else FinishReason.CANCELLED
        now_s = time.monotonic()
        ttft_s = None if self._first_s is None else self._first_s - self._arrival_s
        self._runtime.metrics.observe_request(
            reason,
            e2e_s=now_s - self._arrival_s,
            num_prompt_tokens=0,
            num_completion_tokens=self.num_tokens,
            ttft_s=ttft_s,
        )
        fields = {
            "request_id": self.id,
            "model": self._runtime.model_name,
            "audio_s": round(self.duration_s, 2),
            "language": self.language,
            "tokens": self.num_tokens,
            "ttft_s": None if ttft_s is None else round(ttft_s, 4),
            "e2e_s": round(now_s - self._arrival_s, 4),
            "finish": str(reason) if error is None else type(error).__name__,
        }
        logger.info("request ended: %s", " ".join(f"{name}={value}" for name, value in fields.items()), extra=fields)


def frames_of(span: Span, num_frames: int) -> Span:
    """A span of samples, thirty seconds at most, as one of frames, of which the sound has so many.

    No whole frame of it is left out, and it is one window: a last frame of its own would be a window of 10 ms. What
    that one held in part is in the next span, which begins with a whole frame.
    """
    hop = SAMPLE_RATE // FRAMES_PER_S
    start = span.start // hop
    return Span(start, min(-(-span.end // hop), start + WINDOW_FRAMES, num_frames))
