"""Speech models: sound becomes text. Floor 4. A `tasks.TranscriptionTask`."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sardonyx.errors import DeadlineExceeded, InvalidRequest, UnsupportedFeature
from sardonyx.processing.audio import AudioLimits, decode_audio
from sardonyx.processing.log_mel import FRAMES_PER_S, SAMPLE_RATE, log_mel
from sardonyx.processing.voice_activity import cut_windows
from sardonyx.processing.whisper_tokens import WhisperTokens
from sardonyx.repository.families import Whisper
from sardonyx.serving.loop_calls import LoopCalls
from sardonyx.serving.tasks import TranscriptionOptions
from sardonyx.serving.transcription import Sound, SpeechRuntime, Transcription, frames_of

_LIKELY_BYTES_PER_S = 16_000
"""Of a compressed sound; only good until it is decoded."""
_PROMPT_CHARS = 4096
"""Of a text before the sound, its end: the decoder takes 223 tokens of it."""


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
        calls: belongs to the model from now on; its admission counts seconds of sound.
        limits: of a call.
    """

    def __init__(
        self, runtime: SpeechRuntime, model: Whisper, calls: LoopCalls[Transcription], limits: SpeechLimits
    ) -> None:
        self.name = runtime.model_name
        self.calls = calls
        self.languages: Sequence[str] = runtime.tools.tokens.languages
        self.is_multilingual = bool(model.language_ids)
        self.has_words = bool(model.alignment_heads)
        self._runtime = runtime
        self._model = model
        self._limits = limits
        self._flows = itertools.count(1)

    async def start(self, sound: bytes, options: TranscriptionOptions, *, request_id: str) -> Transcription:
        """See `tasks.TranscriptionTask.start`."""
        self._check(options)
        timeout_s = self._limits.timeout_s
        if options.timeout_s is not None:
            timeout_s = min(options.timeout_s, timeout_s)
        deadline_s = time.monotonic() + timeout_s
        # A file cannot be longer than the limit, whatever its bytes say.
        likely_s = min(len(sound) / _LIKELY_BYTES_PER_S, self._limits.max_audio_s)
        with self.calls.accept(1, max(1, int(likely_s))) as accepted:
            heard = await self._hear(sound, options, deadline_s)
            accepted.reservation.correct(max(1, int(heard.duration_s)))
        call = Transcription(
            request_id,
            heard,
            options,
            self._runtime,
            accepted.reservation,
            flow=next(self._flows),
            deadline_s=deadline_s,
            on_end=self.calls.end,
        )
        self.calls.begin(call, accepted)
        return call

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
