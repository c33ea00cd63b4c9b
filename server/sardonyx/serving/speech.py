"""Speech models: sound becomes text. Floor 4. A `tasks.TranscriptionTask`."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sardonyx.engine.stats import LoopStats
from sardonyx.errors import DeadlineExceeded, InvalidRequest, ModelNotReady, ServeError, UnsupportedFeature
from sardonyx.processing.audio import AudioLimits, decode_audio
from sardonyx.processing.log_mel import FRAMES_PER_S, SAMPLE_RATE, log_mel
from sardonyx.processing.voice_activity import cut_windows
from sardonyx.processing.whisper_tokens import WhisperTokens
from sardonyx.repository.families import Whisper
from sardonyx.serving.admission import Admission, Reservation
from sardonyx.serving.open_calls import OpenCalls
from sardonyx.serving.tasks import TranscriptionOptions
from sardonyx.serving.transcription import Sound, SpeechRuntime, Transcription, frames_of
from sardonyx.statistics import InferenceStatistics, failure_reason
from sardonyx.tensors import InferenceTimes

_LIKELY_BYTES_PER_S = 16_000
"""Of a compressed sound; only good until it is decoded."""
_PROMPT_CHARS = 4096
"""Of a text before the sound, its end: the decoder takes 223 tokens of it."""


class SpeechLoop(Protocol):
    """What is asked of a step loop here; `engine.loop.StepLoop` is one."""

    @property
    def is_alive(self) -> bool: ...

    def stats(self) -> LoopStats: ...

    def close(self) -> None:
        """Blocks until the loop's thread has ended."""
        ...


@dataclass(slots=True, frozen=True)
class SpeechLimits:
    """Of every call."""

    max_audio_s: float
    timeout_s: float


class SpeechModel:
    """See `tasks.TranscriptionTask`.

    Args:
        runtime: what its transcriptions share.
        model: the manifest's part.
        loop: started; closed with the model.
        admission: counts calls and seconds of sound; shared by models.
        limits: of a call.
        statistics: of this version; they outlive it.
        on_close: called once, when the model is closed or discarded.
    """

    def __init__(
        self,
        runtime: SpeechRuntime,
        model: Whisper,
        loop: SpeechLoop,
        *,
        admission: Admission,
        limits: SpeechLimits,
        statistics: InferenceStatistics,
        on_close: Callable[[], None],
    ) -> None:
        self.name = runtime.model_name
        self.languages: Sequence[str] = runtime.tools.tokens.languages
        self.is_multilingual = bool(model.language_ids)
        self.has_words = bool(model.alignment_heads)
        self.statistics = statistics
        self._runtime = runtime
        self._model = model
        self._loop = loop
        self._admission = admission
        self._limits = limits
        self._flows = itertools.count(1)
        self._open = OpenCalls()
        self._calls: set[Transcription] = set()
        self._started_ns: dict[Transcription, int] = {}
        self._is_closed = False
        self._on_close = on_close
        self._stats = loop.stats
        runtime.metrics.attach(self._stats)

    @property
    def is_alive(self) -> bool:
        """The loop takes requests."""
        return self._loop.is_alive

    @property
    def num_active(self) -> int:
        """Calls that were accepted and have not ended."""
        return self._open.num_calls

    def stats(self) -> LoopStats:
        """Of the loop."""
        return self._loop.stats()

    async def start(self, sound: bytes, options: TranscriptionOptions, *, request_id: str) -> Transcription:
        """See `tasks.TranscriptionTask.start`."""
        if self._open.is_draining:
            raise self._unloaded()
        self._check(options)
        started_ns, started_s = time.perf_counter_ns(), time.monotonic()
        timeout_s = self._limits.timeout_s
        if options.timeout_s is not None:
            timeout_s = min(options.timeout_s, timeout_s)
        # A file cannot be longer than the limit, whatever its bytes say.
        likely_s = min(len(sound) / _LIKELY_BYTES_PER_S, self._limits.max_audio_s)
        self._open.begin()
        self.statistics.num_pending += 1
        reservation: Reservation | None = None
        try:
            reservation = self._admission.reserve(1, max(1, int(likely_s)))
            heard = await self._hear(sound, options, started_s + timeout_s)
            reservation.correct(max(1, int(heard.duration_s)))
            if self._is_closed:
                raise self._unloaded()
            call = Transcription(
                request_id,
                heard,
                options,
                self._runtime,
                reservation,
                flow=next(self._flows),
                deadline_s=started_s + timeout_s,
                on_end=self._forget,
            )
        except BaseException as error:
            if reservation is not None:
                reservation.release()
            self._end(error, started_ns)
            raise
        self._calls.add(call)
        self._started_ns[call] = started_ns
        return call

    def stop(self, request_id: str | None = None) -> int:
        """End one call, or all of them. How many were ended."""
        chosen = [call for call in self._calls if request_id in {None, call.id}]
        for call in chosen:
            call.abort()
        return len(chosen)

    async def drain(self, timeout_s: float) -> None:
        """Take no more calls, and wait until the accepted ones have ended, so long at most."""
        await self._open.drain(timeout_s)

    async def close(self) -> None:
        """End what is left with ModelNotReady, and free the engine. Idempotent."""
        self._open.is_draining = True
        if self._is_closed:
            return
        self._is_closed = True
        for call in list(self._calls):
            call.abort(self._unloaded())
        try:
            await asyncio.to_thread(self._loop.close)
        finally:
            self._let_go()

    def discard(self) -> None:
        """Free what was never put in place. Blocks."""
        self._loop.close()
        self._let_go()

    def _let_go(self) -> None:
        self._runtime.metrics.detach(self._stats)
        self._on_close()

    def _check(self, options: TranscriptionOptions) -> None:
        """Refuse what this model cannot do."""
        for code in options.languages:
            if code not in self.languages:
                known = ", ".join(sorted(self.languages))
                raise InvalidRequest(
                    f"language: {code!r} is none of the languages of {self.name}: {known}", param="language"
                )
        if options.task == "translate" and not self.is_multilingual:
            raise UnsupportedFeature(f"model {self.name} knows English only, so it cannot translate", param="model")
        if options.has_words and not self.has_words:
            raise UnsupportedFeature(
                f"model {self.name} was exported without word timestamps", param="timestamp_granularities"
            )

    async def _hear(self, sound: bytes, options: TranscriptionOptions, deadline_s: float) -> Sound:
        """Decode a sound, and everything else that takes a thread's time."""
        limits = AudioLimits(max_duration_s=self._limits.max_audio_s)
        is_left = threading.Event()
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                pool, tokens = self._runtime.tools.pool, self._runtime.tools.tokens
                return await pool.run(_hear, sound, limits, options, tokens, self._model.num_mels, is_left.is_set)
        except TimeoutError:
            raise DeadlineExceeded("the request's time was over before its sound was decoded") from None
        finally:
            is_left.set()  # a thread that still decodes need not go on

    def _forget(self, call: Transcription, error: ServeError | None) -> None:
        self._calls.discard(call)
        self._end(error, self._started_ns.pop(call))

    def _end(self, error: BaseException | None, started_ns: int) -> None:
        """A call that was accepted is over."""
        self.statistics.num_pending -= 1
        self._open.end()
        total_ns = time.perf_counter_ns() - started_ns
        if error is None:
            times = InferenceTimes(compute_infer_ns=total_ns)
            self.statistics.observe_success(total_ns=total_ns, queue_ns=0, times=times, batch_size=1)
            self.statistics.observe_execution(1, times)
        elif isinstance(error, asyncio.CancelledError):
            self.statistics.observe_failure("CANCELED", total_ns)
        # Triton counts no request that it refused for what it says.
        elif isinstance(error, ServeError) and not isinstance(error, InvalidRequest):
            self.statistics.observe_failure(failure_reason(error), total_ns)

    def _unloaded(self) -> ModelNotReady:
        return ModelNotReady(f"model {self.name} is being unloaded")


def _hear(
    data: bytes,
    limits: AudioLimits,
    options: TranscriptionOptions,
    tokens: WhisperTokens,
    num_mels: int,
    is_over: Callable[[], bool],
) -> Sound:
    prompt_ids = tokens.prompt(options.prompt[-_PROMPT_CHARS:])
    samples = decode_audio(data, limits, is_over=is_over)
    num_frames = len(samples) * FRAMES_PER_S // SAMPLE_RATE
    spans = None
    if options.chunking is not None:
        spans = [frames_of(span, num_frames) for span in cut_windows(samples, options.chunking)]
    return Sound(log_mel(samples, num_mels), num_frames, len(samples) / SAMPLE_RATE, spans, prompt_ids)
