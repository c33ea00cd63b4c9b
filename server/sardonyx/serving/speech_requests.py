"""One answer for each request to a speech engine, awaited. Floor 4, on the event loop."""

import asyncio
import itertools
from collections.abc import Callable

from sardonyx.core import FinishReason, SamplingParams, SequenceEvent
from sardonyx.errors import EngineError
from sardonyx.repository.families import Whisper
from sardonyx.serving.dispatch import EventDispatch
from sardonyx.serving.engine_errors import error_of
from sardonyx.speech import Alignment, SpeechEvent, SpeechRequest, SpeechTask, Window


class SpeechRequests:
    """Submits the requests of one model, and waits for their answers.

    Cancelling a wait aborts the request at the next step. Every method raises:
        EngineError: the step that held the request failed.
        EngineDead: the engine stopped.
        DeadlineExceeded, Overloaded: the request's time was over, or no slot came free in time.

    Args:
        dispatch: connected to the model's step loop.
        model: the manifest's part.
        queue_timeout_s: how long a request may wait for a slot. What began goes on: only a call's first is limited.
        retry_after_s: when a request that waited too long should come back.
    """

    def __init__(
        self, dispatch: EventDispatch, model: Whisper, *, queue_timeout_s: float, retry_after_s: Callable[[], float]
    ) -> None:
        self._dispatch = dispatch
        self._model = model
        self._queue_timeout_s = queue_timeout_s
        self._retry_after_s = retry_after_s
        self._numbers = itertools.count(1)

    async def text(
        self,
        window: Window,
        prompt_ids: list[int],
        *,
        has_timestamps: bool,
        temperature: float,
        seed: int | None,
        flow: int,
        is_first: bool = False,
    ) -> SpeechEvent:
        """What is said in a window: as many tokens as half of what the decoder sees. `is_first` of its call."""
        model = self._model
        return await self._run(
            SpeechRequest(
                id=self._new_id(),
                prompt_ids=prompt_ids,
                sampling=SamplingParams(temperature=temperature, seed=seed),
                max_tokens=min(model.max_model_len // 2, model.max_model_len - len(prompt_ids)),
                stop_token_ids=frozenset({model.end_id}),
                window=window,
                has_timestamps=has_timestamps,
                flow=flow,
                start_by_s=self._start_by_s() if is_first else None,
            )
        )

    async def languages(self, window: Window, flow: int) -> dict[int, float]:
        """How likely each language is, by token id. A call's first request."""
        request = SpeechRequest(
            id=self._new_id(),
            prompt_ids=[self._model.start_id],
            window=window,
            task=SpeechTask.LANGUAGES,
            flow=flow,
            start_by_s=self._start_by_s(),
        )
        return (await self._run(request)).language_probs

    async def alignment(self, window: Window, token_ids: list[int], flow: int) -> Alignment:
        """Where each token is heard."""
        request = SpeechRequest(
            id=self._new_id(), prompt_ids=token_ids, window=window, task=SpeechTask.ALIGNMENT, flow=flow
        )
        found = (await self._run(request)).alignment
        assert found is not None, "an alignment that did not fail is there"
        return found

    def _start_by_s(self) -> float:
        return self._dispatch.clock() + self._queue_timeout_s

    def _new_id(self) -> str:
        return f"window-{next(self._numbers)}"

    async def _run(self, request: SpeechRequest) -> SpeechEvent:
        answer: asyncio.Future[SequenceEvent] = asyncio.get_running_loop().create_future()

        def take(_: str, event: SequenceEvent) -> None:
            if not answer.done():
                answer.set_result(event)

        self._dispatch.submit(request, take)
        try:
            event = await answer
        except asyncio.CancelledError:
            self._dispatch.abort(request.id)
            raise
        self._dispatch.forget(request.id)
        if event.finish_reason in {FinishReason.ERROR, FinishReason.CANCELLED}:
            raise error_of(event, is_alive=self._dispatch.is_alive, retry_after_s=self._retry_after_s)
        if not isinstance(event, SpeechEvent):
            raise EngineError("the engine answered with something else than speech")
        return event
