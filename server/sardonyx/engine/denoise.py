"""The *denoise* policy: pictures join and leave at every step, each with its own timestep, sampler and noise.

Floor 3. A step encodes prompts, or a picture to begin with, or brings some pictures of one size a round further, or
decodes those that are done. It knows neither tensors nor threads nor what time it is.
"""

import itertools
import math
from dataclasses import dataclass

import msgspec

from sardonyx.core import FinishReason, Request, Sequence, SequenceEvent, SequenceState
from sardonyx.diffusion import (
    DenoiseBatch,
    DenoiseOutput,
    DenoiseRow,
    ImageEvent,
    ImageRequest,
    Picture,
    Pixels,
    Prompt,
)
from sardonyx.engine.deadlines import Deadlines
from sardonyx.engine.stats import PolicyStats
from sardonyx.errors import ConfigError


class DenoiseOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator decides about the policy."""

    max_num_seqs: int = 32
    """Pictures under way at once; others wait."""
    max_batch_rows: int = 4
    """Rows of a unet call at most; a picture with guidance takes two. One picture alone may take more.

    On two AVX2 cores a row of 4 takes 0.94 of the time of a row of 2 at a quarter of Stable Diffusion's width and
    32 x 32 latents, 0.78 in the demo model; a row of 8 takes 1.06 and 0.69.
    """
    max_batch_prompts: int = 8
    """Prompts encoded at once."""
    short_runs_alone: bool = True
    """A call that the shortest picture begins takes none along with more than four times as much left: on a CPU its
    rows would have to be waited for."""


_MAX_PASSED_OVER = 3
"""Rounds in a row that leave out the picture that has waited longest; the next one begins with it."""


_MUCH_LONGER = 4
"""See `DenoiseOptions.short_runs_alone`."""


@dataclass(slots=True, eq=False)
class _Entry:
    sequence: Sequence
    picture: Picture
    turn: int = 0
    """Number of the step that had it last."""


class DenoisePolicy:
    """A `sardonyx.engine.policy.Policy` over `ImageRequest`s.

    A round begins with the picture that has least left to do, or, after three that left it out, with the one that has
    waited longest. So a short request among long ones gets three rounds of four, and a long one is never forgotten.
    Others of the same size fill the call up, those that waited longest first. What opens or ends a request goes before
    rounds: decoding, then prompts, then pictures to begin with.

    Args:
        options: the operator's.

    Raises:
        ConfigError: `options` ask for nothing at all.
    """

    def __init__(self, options: DenoiseOptions | None = None) -> None:
        self._options = options or DenoiseOptions()
        for name in ("max_num_seqs", "max_batch_rows", "max_batch_prompts"):
            if getattr(self._options, name) < 1:
                raise ConfigError("must be at least 1", field=name)
        self._waiting: dict[str, _Entry] = {}
        """In the order of submission."""
        self._running: dict[str, _Entry] = {}
        """In the order in which they started."""
        self._deadlines = Deadlines(self._find)
        self._events: list[SequenceEvent] = []
        self._num_passed_over = 0
        """Rounds in a row that left out whoever had waited longest."""
        self._turns = itertools.count(1)
        self._num_rounds = 0

    def check(self, request: Request) -> None:
        """Every picture can be made."""
        assert isinstance(request, ImageRequest)

    def add(self, sequence: Sequence) -> None:
        """Take over a new picture."""
        request = sequence.request
        assert isinstance(request, ImageRequest)
        self._waiting[request.id] = _Entry(sequence, request.picture)
        self._deadlines.add(request)

    def abort(self, request_id: str) -> None:
        """End a picture as CANCELLED. Unknown and ended ones are ignored."""
        entry = self._entry(request_id)
        if entry is not None:
            self._end(entry, FinishReason.CANCELLED)

    def schedule(self, now_s: float) -> DenoiseBatch | None:
        """Choose what the next step does, or ``None`` when there is nothing left."""
        for sequence, what in self._deadlines.late(now_s):
            entry = self._entry(sequence.request.id)
            assert entry is not None
            self._end(entry, FinishReason.CANCELLED, what)
        self._start(now_s)
        return self._decode() or self._encode_prompts() or self._encode_source() or self._round()

    def _start(self, now_s: float) -> None:
        for entry in list(self._waiting.values())[: self._options.max_num_seqs - len(self._running)]:
            request_id = entry.sequence.request.id
            self._running[request_id] = self._waiting.pop(request_id)
            entry.sequence.state, entry.sequence.started_s = SequenceState.RUNNING, now_s
            entry.turn = next(self._turns)

    def _decode(self) -> DenoiseBatch | None:
        """One picture: decoding takes the memory of many steps, and others of its size end at other times."""
        for entry in self._running.values():
            if entry.picture.sampler.is_done and entry.picture.latents is not None:
                return DenoiseBatch(finished=[_row(entry)])
        return None

    def _encode_prompts(self) -> DenoiseBatch | None:
        prompts: dict[Prompt, None] = {}
        for entry in self._running.values():
            for prompt in (entry.picture.prompt, entry.picture.negative):
                if prompt is not None and prompt.encoded is None:
                    prompts[prompt] = None
        if not prompts:
            return None
        return DenoiseBatch(prompts=list(prompts)[: self._options.max_batch_prompts])

    def _encode_source(self) -> DenoiseBatch | None:
        for entry in self._running.values():
            source = entry.picture.source
            if source is not None and source.latents is None:
                return DenoiseBatch(source=source)
        return None

    def _round(self) -> DenoiseBatch | None:
        if not self._running:
            return None
        by_turn = sorted(self._running.values(), key=lambda entry: entry.turn)
        first, most_left = by_turn[0], math.inf
        if self._num_passed_over < _MAX_PASSED_OVER:
            first = min(by_turn, key=lambda entry: entry.picture.num_rows_left)
            if self._options.short_runs_alone:
                most_left = _MUCH_LONGER * first.picture.num_rows_left
        chosen, num_rows = [first], first.picture.num_rows
        for entry in by_turn:
            if entry is first or entry.picture.size != first.picture.size or entry.picture.num_rows_left > most_left:
                continue
            if num_rows + entry.picture.num_rows <= self._options.max_batch_rows:
                chosen.append(entry)
                num_rows += entry.picture.num_rows
        self._num_passed_over = 0 if by_turn[0] in chosen else self._num_passed_over + 1
        for entry in chosen:
            entry.turn = next(self._turns)
        return DenoiseBatch(rows=[_row(entry) for entry in chosen])

    def update(self, batch: DenoiseBatch, output: DenoiseOutput, now_s: float) -> None:
        """Take in what the runner made of the last batch."""
        self._num_rounds += batch.num_tokens
        for index, row in enumerate(batch.rows):
            entry = self._running[row.sequence.request.id]
            if index in output.failed:
                self._end(entry, FinishReason.ERROR, output.failed[index])
            elif index in output.previews:
                event = self._event(entry)
                event.preview = output.previews[index]
                self._events.append(event)
        for index, row in enumerate(batch.finished):
            entry = self._running[row.sequence.request.id]
            if index in output.failed:
                self._end(entry, FinishReason.ERROR, output.failed[index])
            else:
                self._end(entry, FinishReason.STOP, image=output.images[index])

    def fail(self, batch: DenoiseBatch, error: str) -> None:
        """The step failed as a whole: everybody who had a part in it ends with ERROR."""
        parts = {row.sequence.request.id for row in (*batch.rows, *batch.finished)}
        for request_id, entry in self._running.items():
            picture = entry.picture
            has_prompt = picture.prompt in batch.prompts or picture.negative in batch.prompts
            if has_prompt or (batch.source is not None and picture.source is batch.source):
                parts.add(request_id)
        for request_id in parts:
            self._end(self._running[request_id], FinishReason.ERROR, error)

    def _end(
        self, entry: _Entry, reason: FinishReason, error: str | None = None, *, image: Pixels | None = None
    ) -> None:
        request_id = entry.sequence.request.id
        if self._running.pop(request_id, None) is None:
            del self._waiting[request_id]
        entry.sequence.state = SequenceState.FINISHED
        event = self._event(entry)
        event.finish_reason, event.error, event.image = reason, error, image
        self._events.append(event)

    def _event(self, entry: _Entry) -> ImageEvent:
        return ImageEvent(
            request_id=entry.sequence.request.id,
            started_s=entry.sequence.started_s,
            num_steps_done=entry.picture.sampler.step_index,
        )

    def _entry(self, request_id: str) -> _Entry | None:
        return self._running.get(request_id) or self._waiting.get(request_id)

    def _find(self, request_id: str) -> Sequence | None:
        entry = self._entry(request_id)
        return entry.sequence if entry else None

    def take_events(self) -> list[SequenceEvent]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def stats(self) -> PolicyStats:
        return PolicyStats(
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            kv_usage=len(self._running) / self._options.max_num_seqs,
            generated_tokens=self._num_rounds,
        )


def _row(entry: _Entry) -> DenoiseRow:
    return DenoiseRow(entry.sequence, entry.picture)
