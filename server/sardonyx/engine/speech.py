"""The *continuous* policy over windows of sound: sequences of all requests share the decoder's steps.

Floor 3. Three kinds of steps take turns: encode windows that are about to be needed, align words, and one packed pass
of every running sequence. Rows stay together: when a sequence ends, the last one moves into its slot, since the pass
pays for every slot of its window, busy or not. What a window was encoded to lies with the window, so a second try at
another temperature, or its words, cost no second encoding.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from sardonyx.core import BatchRow, FinishReason, Request, RunnerLimits, Sequence, SequenceEvent, SequenceState
from sardonyx.engine.deadlines import Deadlines
from sardonyx.engine.stats import PolicyStats
from sardonyx.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from sardonyx.processing.transcript import is_repeating
from sardonyx.speech import (
    Alignment,
    Placement,
    SpeechBatch,
    SpeechEvent,
    SpeechOutput,
    SpeechRequest,
    SpeechTask,
    Window,
)

_LOOP_CHECK_TOKENS = 16
"""A sequence is looked over for loops whenever it has grown by so many."""


class SpeechOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator decides about the policy."""

    max_num_seqs: int = 16
    """Sequences that run at once; more than the runner has slots means all of them."""
    max_batch_windows: int = 1
    """Windows of an encoder step at most. On two AVX2 cores a window takes as long alone as among others."""


@dataclass(slots=True, eq=False)
class _Entry:
    sequence: Sequence
    request: SpeechRequest
    logprobs: list[float] = field(default_factory=list)
    no_speech_prob: float = 0.0


class SpeechPolicy:
    """A `sardonyx.engine.policy.Policy` over `SpeechRequest`s.

    Who starts next: of the calls (`SpeechRequest.flow`) that have the fewest sequences running, the one whose last turn
    was first, with its oldest request. Encoding and aligning go before a pass, but never twice in a row while sequences
    run.

    Args:
        limits: the runner's.
        options: the operator's.
        end_id: every token below it is text.

    Raises:
        ConfigError: `options` ask for nothing at all.
    """

    def __init__(self, limits: RunnerLimits, options: SpeechOptions | None = None, *, end_id: int) -> None:
        options = options or SpeechOptions()
        for name in ("max_num_seqs", "max_batch_windows"):
            if getattr(options, name) < 1:
                raise ConfigError("must be at least 1", field=name)
        self._limits = limits
        self._end_id = end_id
        self._num_places = min(options.max_num_seqs, limits.num_slots)
        self._max_batch_windows = options.max_batch_windows
        self._entries: dict[str, _Entry] = {}
        self._waiting: dict[int, dict[str, _Entry]] = {}
        """By flow, next turn first; the requests of each by id, oldest first."""
        self._unaligned: deque[_Entry] = deque()
        self._slots: list[_Entry | None] = []
        """Who runs where; ends with one that runs."""
        self._deadlines = Deadlines(self._find)
        self._events: list[SequenceEvent] = []
        self._is_pass_due = False
        """The last step was no pass: those that run have the next one."""
        self._is_encoding_due = False
        """The last step that was no pass aligned words."""
        self._prompt_tokens = 0
        self._generated_tokens = 0

    def check(self, request: Request) -> None:
        """Refuse what could never run.

        Raises:
            ContextLengthExceeded: the prompt leaves no room for a token.
            InvalidRequest: no prompt token, or one outside the vocabulary.
        """
        assert isinstance(request, SpeechRequest)
        ids, limits = request.prompt_ids, self._limits
        if not ids:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        room = limits.max_model_len if request.task is SpeechTask.ALIGNMENT else limits.max_model_len - 1
        if len(ids) > room:
            raise ContextLengthExceeded(f"the prompt has {len(ids)} tokens; the model accepts {room}", param="prompt")
        if min(ids) < 0 or max(ids) >= limits.vocab_size:
            raise InvalidRequest(f"token ids must lie between 0 and {limits.vocab_size - 1}", param="prompt")

    def add(self, sequence: Sequence) -> None:
        """Take over a new sequence whose request passed `check`."""
        request = sequence.request
        assert isinstance(request, SpeechRequest)
        entry = self._entries[request.id] = _Entry(sequence, request)
        if request.task is SpeechTask.ALIGNMENT:
            self._unaligned.append(entry)
        else:
            self._waiting.setdefault(request.flow, {})[request.id] = entry
        self._deadlines.add(request)

    def abort(self, request_id: str) -> None:
        """End a sequence as CANCELLED and free its slot. Unknown and ended ones are ignored."""
        entry = self._entries.get(request_id)
        if entry is not None:
            self._end(entry, FinishReason.CANCELLED)

    def schedule(self, now_s: float) -> SpeechBatch | None:
        """Choose what the next step does, or ``None`` when no sequence is left."""
        for sequence, what in self._deadlines.late(now_s):
            self._end(self._entries[sequence.request.id], FinishReason.CANCELLED, what)
        batch = None if self._is_pass_due else self._prepare(now_s)
        if batch is None:
            placements = self._place(now_s)
            if self._slots:
                self._is_pass_due = False
                rows = [BatchRow(entry.sequence, entry.sequence.num_pending_tokens) for entry in self._running]
                return SpeechBatch(placements=placements, rows=rows)
            batch = self._prepare(now_s)
        self._is_pass_due = batch is not None
        return batch

    def _prepare(self, now_s: float) -> SpeechBatch | None:
        """A step that is no pass: words and windows in turn, where there are both."""
        batch = (self._encode() if self._is_encoding_due else None) or self._align(now_s) or self._encode()
        self._is_encoding_due = batch is not None and batch.aligned is not None
        return batch

    def _align(self, now_s: float) -> SpeechBatch | None:
        if not self._unaligned:
            return None
        entry = self._unaligned[0]
        _start(entry.sequence, now_s)
        if entry.request.window.cross is None:
            return SpeechBatch(windows=[entry.request.window])
        return SpeechBatch(aligned=self._unaligned.popleft().sequence)

    def _encode(self) -> SpeechBatch | None:
        """The windows of those that are to start next."""
        windows: dict[Window, None] = {}
        for entry in self._next(self._num_places - len(self._running)):
            if entry.request.window.cross is None:
                windows[entry.request.window] = None
                if len(windows) == self._max_batch_windows:
                    break
        return SpeechBatch(windows=list(windows)) if windows else None

    def _next(self, num_places: int) -> Iterator[_Entry]:
        """Those that start next, as many as there are places."""
        lines = {flow: deque(islice(line.values(), max(0, num_places))) for flow, line in self._waiting.items()}
        num_running = Counter(entry.request.flow for entry in self._running)
        while num_places > 0 and lines:
            flow = min(lines, key=num_running.__getitem__)  # of equals the first
            line = lines.pop(flow)
            yield line.popleft()
            num_places -= 1
            num_running[flow] += 1
            if line:
                lines[flow] = line

    def _leave(self, entry: _Entry) -> bool:
        """Take a sequence out of its line, if it is in one."""
        line = self._waiting.get(entry.request.flow, {})
        if line.pop(entry.request.id, None) is None:
            return False
        if not line:
            del self._waiting[entry.request.flow]
        return True

    def _place(self, now_s: float) -> list[Placement]:
        """Start who can, in the gaps first, and close the gaps that are left."""
        placements = []
        gaps = deque(index for index, entry in enumerate(self._slots) if entry is None)
        for entry in list(self._next(self._num_places - len(self._running))):
            if entry.request.window.cross is None:
                continue
            if gaps:
                slot = gaps.popleft()
                self._slots[slot] = entry
            else:
                slot = len(self._slots)
                self._slots.append(entry)
            self._leave(entry)
            if (line := self._waiting.pop(entry.request.flow, None)) is not None:
                self._waiting[entry.request.flow] = line  # its turn is over
            _start(entry.sequence, now_s)
            entry.sequence.slot, entry.sequence.state = slot, SequenceState.RUNNING
            self._prompt_tokens += entry.sequence.num_prompt_tokens
            placements.append(Placement(slot, entry.request.window))
        for gap in gaps:
            self._trim()
            if gap >= len(self._slots):
                break
            mover = self._slots.pop()
            assert mover is not None
            self._slots[gap] = mover
            sequence = mover.sequence
            placements.append(Placement(gap, mover.request.window, sequence.slot, sequence.num_computed_tokens))
            sequence.slot = gap
        return placements

    def _trim(self) -> None:
        while self._slots and self._slots[-1] is None:
            self._slots.pop()

    @property
    def _running(self) -> list[_Entry]:
        return [entry for entry in self._slots if entry is not None]

    def _find(self, request_id: str) -> Sequence | None:
        entry = self._entries.get(request_id)
        return entry.sequence if entry else None

    def update(self, batch: SpeechBatch, output: SpeechOutput, now_s: float) -> None:
        """Take in what the runner made of the last batch."""
        if batch.aligned is not None:
            entry = self._entries[batch.aligned.request.id]
            self._end(entry, FinishReason.STOP, alignment=output.alignment)
        for index, row in enumerate(batch.rows):
            entry = self._entries[row.sequence.request.id]
            if index in output.failed:
                self._end(entry, FinishReason.ERROR, output.failed[index])
                continue
            row.sequence.num_computed_tokens += row.num_new_tokens
            if entry.request.task is SpeechTask.LANGUAGES:
                self._end(entry, FinishReason.STOP, language_probs=output.language_probs[index])
                continue
            no_speech_prob, token_id = output.no_speech_probs[index], output.token_ids[index]
            assert token_id is not None, "a row that asks for text has a token"
            if no_speech_prob is not None:
                entry.no_speech_prob = no_speech_prob
            entry.logprobs.append(output.logprobs[index])
            self._extend(entry, token_id)

    def _extend(self, entry: _Entry, token_id: int) -> None:
        """A sequence has its next token: end it where it ends."""
        sequence, request = entry.sequence, entry.request
        self._generated_tokens += 1
        if token_id in request.stop_token_ids:
            self._end(entry, FinishReason.STOP)
            return
        sequence.token_ids.append(token_id)
        num_tokens = sequence.num_completion_tokens
        if num_tokens >= request.max_tokens or len(sequence.token_ids) >= self._limits.max_model_len:
            self._end(entry, FinishReason.LENGTH)
        elif num_tokens % _LOOP_CHECK_TOKENS == 0 and self._is_loop(sequence):
            self._end(entry, FinishReason.LENGTH, is_loop=True)

    def _is_loop(self, sequence: Sequence) -> bool:
        return is_repeating(sequence.token_ids[sequence.num_prompt_tokens :], self._end_id)

    def fail(self, batch: SpeechBatch, error: str) -> None:
        """The step failed as a whole: everybody who had a part in it ends with ERROR."""
        parts = [row.sequence for row in batch.rows] + ([batch.aligned] if batch.aligned is not None else [])
        parts += [entry.sequence for entry in self._entries.values() if entry.request.window in batch.windows]
        for sequence in parts:
            self._end(self._entries[sequence.request.id], FinishReason.ERROR, error)

    def _end(
        self,
        entry: _Entry,
        reason: FinishReason,
        error: str | None = None,
        *,
        is_loop: bool = False,
        language_probs: dict[int, float] | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        sequence, request = entry.sequence, entry.request
        del self._entries[request.id]
        if sequence.state is SequenceState.RUNNING:
            self._slots[sequence.slot] = None
            sequence.slot = -1
            self._trim()
        elif not self._leave(entry) and entry in self._unaligned:
            self._unaligned.remove(entry)
        sequence.state = SequenceState.FINISHED
        event = SpeechEvent(
            request_id=request.id,
            token_ids=sequence.token_ids[sequence.num_prompt_tokens :],
            token_logprobs=entry.logprobs,
            no_speech_prob=entry.no_speech_prob,
            language_probs=language_probs or {},
            alignment=alignment,
            is_loop=is_loop,
            started_s=sequence.started_s,
            finish_reason=reason,
            error=error,
        )
        self._events.append(event)

    def take_events(self) -> list[SequenceEvent]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def stats(self) -> PolicyStats:
        num_running = len(self._running)
        return PolicyStats(
            num_waiting=len(self._entries) - num_running,
            num_running=num_running,
            kv_usage=num_running / self._limits.num_slots,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
        )


def _start(sequence: Sequence, now_s: float) -> None:
    if sequence.started_s is None:
        sequence.started_s = now_s
