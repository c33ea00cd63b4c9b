"""Speech models on an engine that answers from a script: passages, transcriptions and their models are real."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
from tests.processing.whisper_making import make_tokens

from sardonyx.core import FinishReason, Request
from sardonyx.engine.stats import STEP_S_BOUNDS, LoopStats
from sardonyx.errors import EngineDead
from sardonyx.metrics import ModelMetrics
from sardonyx.processing.whisper_tokens import WhisperTokens
from sardonyx.repository.families import Whisper
from sardonyx.serving.admission import Admission
from sardonyx.serving.dispatch import EventDispatch
from sardonyx.serving.loop_calls import LoopCalls
from sardonyx.serving.passage import SpeechTools
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.speech import SpeechLimits, SpeechModel
from sardonyx.serving.speech_requests import SpeechRequests
from sardonyx.serving.transcription import SpeechRuntime, Transcription
from sardonyx.speech import Alignment, SpeechEvent, SpeechRequest, SpeechTask
from sardonyx.statistics import InferenceStatistics

Answer = SpeechEvent | None
Script = Callable[[SpeechRequest], Answer]
"""The event that ends a request, its id yet to be put in; ``None`` holds the request."""


class ScriptedEngine:
    """A `dispatch.Engine` and a `loop_calls.Loop` that answers at once what its script says."""

    def __init__(self, dispatch: EventDispatch, script: Script) -> None:
        self.script = script
        self.requests: list[SpeechRequest] = []
        """In the order of submission."""
        self.held: dict[str, SpeechRequest] = {}
        """By id, in that order."""
        self.aborted: list[str] = []
        self.is_alive = True
        self.is_closed = False
        self._dispatch = dispatch
        dispatch.connect(self)

    def submit(self, request: Request) -> None:
        assert isinstance(request, SpeechRequest)
        if not self.is_alive:
            raise EngineDead("the engine has stopped")
        self.requests.append(request)
        event = self.script(request)
        if event is None:
            self.held[request.id] = request
        else:
            self._deliver(request, event)

    def answer(self, request: SpeechRequest, event: SpeechEvent) -> None:
        """End a held request."""
        del self.held[request.id]
        self._deliver(request, event)

    def _deliver(self, request: SpeechRequest, event: SpeechEvent) -> None:
        self._dispatch.deliver([msgspec.structs.replace(event, request_id=request.id)])

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.held.pop(request_id, None)

    def stats(self) -> LoopStats:
        return LoopStats(
            num_waiting=0,
            num_running=len(self.held),
            kv_usage=0.0,
            prompt_tokens=0,
            generated_tokens=0,
            is_alive=self.is_alive,
            has_work=bool(self.held),
            stalled_s=0.0,
            num_steps=0,
            num_failed_steps=0,
            last_step_s=0.0,
            last_step_tokens=0,
            last_step_rows=0,
            step_tokens=0,
            step_s_sum=0.0,
            step_s_counts=(0,) * (len(STEP_S_BOUNDS) + 1),
        )

    def close(self) -> None:
        self.is_closed = True
        self.is_alive = False

    def texts(self) -> list[SpeechRequest]:
        """The requests for a text."""
        return [request for request in self.requests if request.task is SpeechTask.TEXT]


class Speech:
    """A model's tokens and tools on a `ScriptedEngine`, with all parts in reach."""

    def __init__(
        self,
        folder: Path,
        script: Script,
        *,
        is_multilingual: bool = True,
        max_model_len: int = 448,
        queue_timeout_s: float = 60.0,
    ) -> None:
        self.tokens: WhisperTokens
        self.facts: Whisper
        self.tokens, self.facts = make_tokens(folder / "tokens", is_multilingual=is_multilingual)
        self.facts = msgspec.structs.replace(self.facts, alignment_heads=[[0, 0]], max_model_len=max_model_len)
        self.later_s = 0.0
        """How far the model's clock is ahead."""
        self.dispatch = EventDispatch(lambda: time.monotonic() + self.later_s)
        self.engine = ScriptedEngine(self.dispatch, script)
        self.pool = WorkerPool()
        self.requests = SpeechRequests(
            self.dispatch, self.facts, queue_timeout_s=queue_timeout_s, retry_after_s=lambda: 7.0
        )
        self.tools = SpeechTools(self.requests, self.tokens, self.pool, self.facts.max_model_len)

    def timestamp(self, at_s: float) -> int:
        return self.tokens.timestamp_begin_id + round(at_s * 50)

    def ids(self, *parts: float | str) -> list[int]:
        """Timestamps for numbers, text tokens for words, in one list."""
        ids: list[int] = []
        for part in parts:
            ids += self.tokens.prompt(part) if isinstance(part, str) else [self.timestamp(part)]
        return ids

    def says(
        self, *parts: float | str, logprob: float = -0.1, no_speech_prob: float = 0.0, has_ended: bool = True
    ) -> SpeechEvent:
        """An answer; each token, the end's among them, has the same log-probability."""
        ids = self.ids(*parts)
        return SpeechEvent(
            request_id="",
            token_ids=ids,
            token_logprobs=[logprob] * (len(ids) + has_ended),
            no_speech_prob=no_speech_prob,
            finish_reason=FinishReason.STOP if has_ended else FinishReason.LENGTH,
        )

    def languages(self, **probs: float) -> SpeechEvent:
        """An answer: how likely each language is; 0 for those that are not named."""
        found = {token_id: probs.get(code, 0.0) for code, token_id in self.facts.language_ids.items()}
        return SpeechEvent(request_id="", language_probs=found, finish_reason=FinishReason.STOP)

    def hears(self, ends_s: Sequence[float]) -> Callable[[SpeechRequest], SpeechEvent]:
        """A script for alignments: the n-th text token is heard until then."""

        def answer(request: SpeechRequest) -> SpeechEvent:
            num_tokens = len(request.prompt_ids)
            num_start = num_tokens - len(ends_s) - 1
            attention = np.full((1, num_tokens, 1500), -10, np.float32)
            bounds = [0, *(round(end_s * 50) for end_s in ends_s), 1500]
            # What a token attends to is the sound of the next one.
            for row, (begin, end) in enumerate(itertools.pairwise(bounds), start=num_start - 1):
                attention[0, row, begin:end] = 10
            logprobs = np.full(num_tokens - 1, np.log(0.5), np.float32)
            return SpeechEvent(request_id="", alignment=Alignment(attention, logprobs), finish_reason=FinishReason.STOP)

        return answer


def failure(error: str | None, *, reason: FinishReason = FinishReason.ERROR) -> SpeechEvent:
    """An answer that is none."""
    return SpeechEvent(request_id="", finish_reason=reason, error=error)


def in_turn(*answers: Answer) -> Script:
    """Answers for the requests in the order of submission."""
    left = list(answers)
    return lambda _: left.pop(0)


class ServedSpeech(Speech):
    """A whole `SpeechModel`."""

    def __init__(
        self,
        folder: Path,
        script: Script,
        *,
        is_multilingual: bool = True,
        has_words: bool = True,
        admission: Admission | None = None,
        limits: SpeechLimits | None = None,
        max_passages: int = 4,
        queue_timeout_s: float = 60.0,
    ) -> None:
        super().__init__(folder, script, is_multilingual=is_multilingual, queue_timeout_s=queue_timeout_s)
        if not has_words:
            self.facts = msgspec.structs.replace(self.facts, alignment_heads=[])
        self.admission = admission or Admission(64, 10_000)
        self.statistics = InferenceStatistics("tiny", 1)
        self.metrics = ModelMetrics("tiny")
        runtime = SpeechRuntime(
            model_name="tiny",
            tools=self.tools,
            language_ids=self.facts.language_ids,
            max_passages=max_passages,
            metrics=self.metrics,
        )
        self.calls = LoopCalls[Transcription](
            "tiny", self.engine, admission=self.admission, metrics=self.metrics, statistics=self.statistics
        )
        limits = limits or SpeechLimits(max_audio_s=7200, timeout_s=60)
        self.model = SpeechModel(runtime, self.facts, self.calls, limits)

    def assert_idle(self) -> None:
        """Nothing is reserved, pending or asked of the engine."""
        assert (self.admission.num_sequences, self.admission.num_tokens) == (0, 0)
        assert (self.calls.num_active, self.statistics.num_pending) == (0, 0)
        assert not self.engine.held


@asynccontextmanager
async def serving(folder: Path, script: Script, **options: object) -> AsyncIterator[ServedSpeech]:
    """A speech model. Afterwards nothing may be admitted or in flight."""
    served = ServedSpeech(folder, script, **options)  # type: ignore[arg-type]  # passed on
    try:
        yield served
        await asyncio.sleep(0)
        served.assert_idle()
    finally:
        await served.calls.close()
        served.pool.close()
