"""Runs `SpeechPolicy` step by step over a runner that only remembers, with a clock that only the test moves."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sardonyx.core import FinishReason, RunnerLimits
from sardonyx.core import Sequence as Tokens
from sardonyx.engine.speech import SpeechOptions, SpeechPolicy
from sardonyx.errors import EngineError
from sardonyx.runners.whisper_memory import WindowPlaces
from sardonyx.speech import Alignment, SpeechBatch, SpeechEvent, SpeechOutput, SpeechRequest, SpeechTask, Window

END_ID = 900
LIMITS = RunnerLimits(num_slots=4, max_model_len=200, max_chunk_tokens=200, vocab_size=1000)

Talk = Callable[[Window, Sequence[int]], int]


def make_window(number: int = 0) -> Window:
    """`number` tells it from others, and what is said in it from what is said in others."""
    return Window(np.zeros((1, 2), np.float32), num_frames=number)


def talk(window: Window, prefix: Sequence[int]) -> int:
    """Stands for a model: depends on the window and on every token before. Never an end token."""
    return hash((window.num_frames, *prefix)) % END_ID


def no_speech_prob(request: SpeechRequest) -> float:
    return 1 / (2 + request.window.num_frames + len(request.prompt_ids))


def language_probs(request: SpeechRequest) -> dict[int, float]:
    return {request.window.num_frames: 1.0}


def complete(request: SpeechRequest, limits: RunnerLimits = LIMITS) -> tuple[list[int], FinishReason]:
    """What a request for text gives alone."""
    tokens: list[int] = []
    while True:
        token_id = talk(request.window, request.prompt_ids + tokens)
        if token_id in request.stop_token_ids:
            return tokens, FinishReason.STOP
        tokens.append(token_id)
        if len(tokens) >= request.max_tokens or len(request.prompt_ids) + len(tokens) >= limits.max_model_len:
            return tokens, FinishReason.LENGTH


class FakeSpeechRunner:
    """Remembers of each slot whose window and which tokens it holds, and holds every batch against the contract.

    Args:
        on_step: called before each step; may raise, or name rows that fail.
        has_places: as on a card, it takes windows back when it has more than `limits.num_slots`.
    """

    def __init__(
        self,
        limits: RunnerLimits,
        talk: Talk = talk,
        on_step: Callable[[SpeechBatch], dict[int, str]] | None = None,
        *,
        has_places: bool = False,
    ) -> None:
        self.limits = limits
        self.talk = talk
        self.on_step = on_step
        self.slots: list[tuple[Window | None, list[int]]] = [(None, [])] * limits.num_slots
        self.places = WindowPlaces(range(limits.num_slots)) if has_places else None
        self.encoded: dict[int, Window] = {}
        """By place."""

    def execute(self, batch: SpeechBatch) -> SpeechOutput:
        kinds = [bool(batch.windows), batch.aligned is not None, bool(batch.rows)]
        assert kinds.count(True) == 1, "a step does one thing"
        assert batch.rows or not batch.placements
        failed = self.on_step(batch) if self.on_step else {}
        for window in batch.windows:
            assert window.cross is None, "no window is encoded twice"
            window.cross = [] if self.places is None else self._encode(window, self.places)
        assert all(window.cross is not None for window in batch.windows), "none takes another's place within a step"
        if batch.aligned is not None:
            return SpeechOutput(alignment=self._align(batch.aligned))
        for placement in batch.placements:
            tokens: list[int] = []
            if placement.source is None:
                self._find(placement.window)
            else:
                tokens = self.slots[placement.source][1][: placement.num_tokens]
                self.slots[placement.source] = (None, [])
            self.slots[placement.slot] = (placement.window, tokens)
        output = SpeechOutput(failed=failed)
        assert [row.sequence.slot for row in batch.rows] == list(range(len(batch.rows)))
        for row in batch.rows:
            self._compute(row.sequence, row.num_new_tokens, output)
        for index in failed:
            self.slots[index] = (None, [])
        return output

    def _align(self, sequence: Tokens) -> Alignment:
        request = sequence.request
        assert isinstance(request, SpeechRequest)
        self._find(request.window)
        attention = np.full((1, len(sequence.token_ids), 1), request.window.num_frames, np.float32)
        return Alignment(attention, np.array(sequence.token_ids[1:], np.float32))

    def _compute(self, sequence: Tokens, num_new_tokens: int, output: SpeechOutput) -> None:
        request = sequence.request
        assert isinstance(request, SpeechRequest)
        window, tokens = self.slots[sequence.slot]
        assert window is request.window, "the slot holds the row's window"
        assert tokens == sequence.token_ids[: sequence.num_computed_tokens], "and its tokens"
        assert num_new_tokens == sequence.num_pending_tokens
        begins = not tokens
        tokens += sequence.token_ids[len(tokens) :]
        is_text = request.task is SpeechTask.TEXT
        token_id = self.talk(window, tokens)
        output.token_ids.append(token_id if is_text else None)
        output.logprobs.append(-float(token_id))
        output.no_speech_probs.append(no_speech_prob(request) if is_text and begins else None)
        output.language_probs.append({} if is_text else language_probs(request))

    def _encode(self, window: Window, places: WindowPlaces) -> int:
        place = places.take(window)
        self.encoded[place] = window
        return place

    def _find(self, window: Window) -> None:
        assert window.cross is not None, "it was encoded, and not taken back since"
        if self.places is not None:
            assert self.encoded[self.places.use(window)] is window, "and nobody has its place"

    def close(self) -> None:
        self.slots.clear()


class SpeechDriver:
    """Holds what a test looks at: requests and their events by id, and the batches so far."""

    def __init__(
        self,
        limits: RunnerLimits = LIMITS,
        *,
        talk: Talk = talk,
        on_step: Callable[[SpeechBatch], dict[int, str]] | None = None,
        has_places: bool = False,
        **options: int,  # fields of SpeechOptions
    ) -> None:
        self.policy = SpeechPolicy(limits, SpeechOptions(**options), end_id=END_ID)
        self.runner = FakeSpeechRunner(limits, talk, on_step, has_places=has_places)
        self.now_s = 100.0
        self.requests: dict[str, SpeechRequest] = {}
        self.sequences: dict[str, Tokens] = {}
        self.events: dict[str, SpeechEvent] = {}
        self.batches: list[SpeechBatch] = []

    def submit(self, request_id: str, window: Window | None = None, **fields: Any) -> SpeechRequest:
        """`fields` are those of the request."""
        values: dict[str, Any] = {"prompt_ids": [1, 2]} | fields
        request = SpeechRequest(id=request_id, window=window or make_window(len(self.requests)), **values)
        self.policy.check(request)
        sequence = Tokens(request, 0, self.now_s, token_ids=list(request.prompt_ids))
        self.requests[request_id], self.sequences[request_id] = request, sequence
        self.events.pop(request_id, None)
        self.policy.add(sequence)
        return request

    def step(self) -> bool:
        """Run one step; false when there was nothing to run."""
        batch = self.policy.schedule(self.now_s)
        if batch is not None:
            self.batches.append(batch)
            try:
                self.policy.update(batch, self.runner.execute(batch), self.now_s)
            except EngineError as error:
                self.policy.fail(batch, error.message)
        for event in self.policy.take_events():
            assert isinstance(event, SpeechEvent)
            assert event.request_id not in self.events, "a request has one event"
            assert event.finish_reason is not None
            self.events[event.request_id] = event
        return batch is not None

    def run(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError(f"not done after {max_steps} steps")

    def rows(self, index: int = -1) -> list[str]:
        """Ids of the rows of a step, by slot."""
        return [row.sequence.request.id for row in self.batches[index].rows]

    def kinds(self) -> list[str]:
        """What each step so far did."""
        return ["encode" if batch.windows else "pass" if batch.aligned is None else "align" for batch in self.batches]

    def reason(self, request_id: str) -> FinishReason | None:
        event = self.events.get(request_id)
        return event and event.finish_reason
