"""Image models on an engine that a test answers for: calls, admission and events are real."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tests.serving.speech_serving import ScriptedEngine
from tests.tiny_diffusion import make_diffusion_model, make_facts

from sardonyx.core import FinishReason, Request, SequenceEvent
from sardonyx.diffusion import ImageEvent, ImageRequest
from sardonyx.errors import EngineDead
from sardonyx.metrics import ModelMetrics
from sardonyx.processing.prompt_tokens import PromptTokenizer
from sardonyx.repository.scheduler_config import read_scheduler_config
from sardonyx.serving.admission import Admission
from sardonyx.serving.dispatch import EventDispatch
from sardonyx.serving.image_generation import ImageGeneration
from sardonyx.serving.images import ImageLimits, ImageModel, ImageVersion
from sardonyx.serving.loop_calls import LoopCalls
from sardonyx.serving.picture_moderation import PictureModerator
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.task_finder import Judge
from sardonyx.statistics import InferenceStatistics


class HeldEngine:
    """A `dispatch.Engine` and a `loop_calls.Loop` that holds every request until the test answers."""

    stats = ScriptedEngine.stats

    def __init__(self, dispatch: EventDispatch) -> None:
        self.held: dict[str, ImageRequest] = {}
        self.requests: list[ImageRequest] = []
        self.aborted: list[str] = []
        self.is_alive = True
        self.is_closed = False
        self.refuses_after: int | None = None
        """Requests that are taken before the engine is dead."""
        self._dispatch = dispatch
        dispatch.connect(self)

    def submit(self, request: Request) -> None:
        assert isinstance(request, ImageRequest)
        if self.refuses_after is not None and len(self.requests) >= self.refuses_after:
            raise EngineDead("the engine has stopped")
        self.requests.append(request)
        self.held[request.id] = request

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.held.pop(request_id, None)

    def close(self) -> None:
        self.is_closed = True
        self.is_alive = False

    def preview(self, request_id: str, value: int = 1) -> None:
        pixels = np.full((8, 8, 3), value, np.uint8)
        self._dispatch.deliver([ImageEvent(request_id=request_id, preview=pixels, num_steps_done=1)])

    def finish(self, request_id: str, value: int = 2) -> None:
        del self.held[request_id]
        pixels = np.full((32, 32, 3), value, np.uint8)
        self._dispatch.deliver([ImageEvent(request_id=request_id, image=pixels, finish_reason=FinishReason.STOP)])

    def end(self, request_id: str, reason: FinishReason, error: str | None, *, is_bare: bool = False) -> None:
        """Before it is done; bare as a loop that was closed says it."""
        del self.held[request_id]
        kind = SequenceEvent if is_bare else ImageEvent
        self._dispatch.deliver([kind(request_id=request_id, finish_reason=reason, error=error)])


class ServedImages:
    """An `ImageModel`, with all parts in reach."""

    def __init__(
        self,
        folder: Path,
        *,
        layout: Any = "sd",
        admission: Admission | None = None,
        limits: ImageLimits | None = None,
        has_vae_encoder: bool = True,
        judge: Callable[[str], Judge] | None = None,
        **facts: Any,
    ) -> None:
        if not (folder / "tiny").exists():
            make_diffusion_model(folder, layout=layout)
        version = folder / "tiny" / "1"
        self.facts = make_facts(layout, **facts)
        self.later_s = 0.0
        """How far the engine's clock is ahead."""
        self.dispatch = EventDispatch(lambda: time.monotonic() + self.later_s)
        self.engine = HeldEngine(self.dispatch)
        self.pool = WorkerPool()
        self.admission = admission or Admission(64, 10_000)
        self.statistics = InferenceStatistics("tiny", 1)
        self.calls = LoopCalls[ImageGeneration](
            "tiny",
            self.engine,
            admission=self.admission,
            metrics=ModelMetrics("tiny"),
            statistics=self.statistics,
        )
        self.model = ImageModel(
            ImageVersion(
                "tiny",
                self.facts,
                read_scheduler_config((version / "scheduler_config.json").read_bytes()),
                [
                    PromptTokenizer(version / each.tokenizer, each.max_tokens, each.pad_token_id)
                    for each in self.facts.encoders
                ],
                has_vae_encoder,
            ),
            self.calls,
            self.dispatch,
            pool=self.pool,
            limits=limits or ImageLimits(max_pixels=4 * 32 * 32, max_steps=50, timeout_s=60, queue_timeout_s=60),
            moderator=None if judge is None else PictureModerator("tiny", "judge", judge, self.pool),
        )

    def assert_idle(self) -> None:
        """Nothing is reserved, pending or asked of the engine."""
        assert (self.admission.num_sequences, self.admission.num_tokens) == (0, 0)
        assert (self.calls.num_active, self.statistics.num_pending) == (0, 0)
        assert not self.engine.held


@asynccontextmanager
async def serving(folder: Path, **options: Any) -> AsyncIterator[ServedImages]:
    """An image model. Afterwards nothing may be admitted or in flight."""
    served = ServedImages(folder, **options)
    try:
        yield served
        await asyncio.sleep(0)
        served.assert_idle()
    finally:
        await served.calls.close()
        served.pool.close()
