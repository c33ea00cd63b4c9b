"""The policy of stateful models: requests of a sequence run one after the other, with the sequence's state.

Floor 3. Decides what belongs to which sequence, when sequences begin and end, and who waits for a place; which of
those with a place share a step is the business of `sardonyx.engine.sequence_slots`. It makes and drops every
`TensorSequence`; what a runner keeps in it is none of its business.

Source: Triton, ModelSequenceBatching in model_config.proto.
"""

import math
from collections import OrderedDict, deque
from typing import Literal

import msgspec

from sardonyx.engine.dynamic import DynamicOptions
from sardonyx.engine.request_queue import RETRY_AFTER_S
from sardonyx.engine.sequence_slots import DirectSlots, OldestCandidates, SequenceLine, SequenceSlots, SequenceStep
from sardonyx.errors import InvalidRequest, Overloaded, RequestAborted, ServeError
from sardonyx.tensors import TensorBatch, TensorRequest, TensorRow, TensorSequence


class SequenceOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator decides about the sequence policy; Triton's ``sequence_batching``."""

    strategy: Literal["direct", "oldest"] = "direct"
    max_batch_size: int = 0
    """Sequences of a step at most, and slots of an instance; 0: the model has no batch axis, and there is one."""
    max_idle_s: float = 1.0
    """A sequence without a request for so long is dropped."""
    max_candidate_sequences: int = 0
    """Oldest: sequences with a place, for each instance; 0: `max_batch_size`."""
    preferred_batch_sizes: tuple[int, ...] = ()
    """Oldest: as in `DynamicOptions`."""
    max_queue_delay_s: float = 0.0
    """Oldest: as in `DynamicOptions`. Direct: how long a step waits for `minimum_slot_utilization`."""
    minimum_slot_utilization: float = 0.0
    """Direct: share of an instance's slots with a request that is worth a step, in [0, 1]."""
    preserve_ordering: bool = False
    """Oldest: answers of different sequences, too, come in the order of the requests."""
    max_waiting_sequences: int = 0
    """Sequences without a place; 0: any number."""
    max_queue_size: int = 0
    """Waiting requests of all sequences; 0: any number."""
    num_instances: int = 1


class SequencePolicy:
    """Sequence batching; a `sardonyx.engine.instances.TensorPolicy`.

    Args:
        name: of the model, for messages.
        options: the operator's, already checked.
    """

    def __init__(self, name: str, options: SequenceOptions) -> None:
        self._name = name
        self._options = options
        self._slots = _make_slots(name, options)
        self._lines: dict[int | str, SequenceLine] = {}
        # Without a place, in order of arrival. Whenever one is free, this is empty.
        self._backlog: OrderedDict[int | str, SequenceLine] = OrderedDict()
        # Without a request, and since when; the first has been so for the longest.
        self._idle: OrderedDict[int | str, float] = OrderedDict()
        self._waiting: dict[int, SequenceLine] = {}
        self._running: dict[int, SequenceLine] = {}
        self._refused: list[tuple[TensorRequest, ServeError]] = []

    @property
    def preserves_ordering(self) -> bool:
        return self._options.preserve_ordering

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_sequences(self) -> int:
        """Live ones, those without a place among them."""
        return len(self._lines)

    def check(self, request: TensorRequest) -> None:
        """Refuse what belongs to no sequence.

        Raises:
            InvalidRequest: no sequence id, or more than one row.
        """
        if request.sequence is None:
            message = f"inference request to model '{self._name}' must specify a non-zero or non-empty correlation ID"
            raise InvalidRequest(message)
        if request.batch_size > 1:
            raise InvalidRequest(
                f"inference request to model '{self._name}' must specify batch-size 1 due to requirements of sequence "
                "batcher"
            )

    def add(self, request: TensorRequest, now_s: float) -> None:
        """Put a request that passed `check` behind the others of its sequence.

        START begins a sequence: on a live id the one before gets no more requests, and its waiting ones run first.

        Raises:
            InvalidRequest: not START, and no live sequence has this id.
            Overloaded: too many wait already.
        """
        control = request.sequence
        assert control is not None, "check has seen it"
        self.expire(now_s)
        line = self._lines.get(control.id)
        if not control.is_start and (line is None or line.sequence is None):
            raise InvalidRequest(
                f"inference request for sequence {control.id} to model '{self._name}' must specify the START flag on "
                "the first request of the sequence"
            )
        if 0 < self._options.max_queue_size <= len(self._waiting):
            raise Overloaded("Exceeds maximum queue size", retry_after_s=RETRY_AFTER_S)
        if line is None:
            line = self._open_line(control.id)
        if control.is_start:
            line.sequence = TensorSequence(control.id)
        assert line.sequence is not None, "START makes one, others were refused"
        line.steps.append(SequenceStep(request, line.sequence, now_s))
        self._waiting[request.id] = line
        self._idle.pop(line.id, None)
        if control.is_end:
            line.sequence = None
        if line.is_seated and not line.is_running and len(line.steps) == 1:
            self._slots.offer(line, now_s)

    def _open_line(self, sequence_id: int | str) -> SequenceLine:
        line = SequenceLine(sequence_id)
        if not self._slots.seat(line):
            if 0 < self._options.max_waiting_sequences <= len(self._backlog):
                raise Overloaded("Exceeds maximum queue size", retry_after_s=RETRY_AFTER_S)
            self._backlog[sequence_id] = line
        self._lines[sequence_id] = line
        return line

    def abort(self, request_id: int, now_s: float) -> TensorRequest | None:
        """Forget a waiting request; ``None`` where it does not wait.

        Its sequence is broken: requests behind it would run on a state that misses a step. Those that wait are refused
        and those to come need START; what is ahead of it still runs.
        """
        line = self._waiting.get(request_id)
        if line is None:
            return None
        index = next(i for i, step in enumerate(line.steps) if step.request.id == request_id)
        is_offered = index == 0 and line.is_seated and not line.is_running
        if is_offered:
            self._slots.withdraw(line, now_s)
        request = line.steps[index].request
        self._break(line, index)
        if not line.steps and not line.is_running:
            self._close_line(line)
            self._fill(now_s)
        elif is_offered:
            self._slots.offer(line, now_s)
        return request

    def _break(self, line: SequenceLine, index: int) -> None:
        """Take a step out of a line, and those of its sequence behind it."""
        steps, line.steps = line.steps, deque()
        broken = steps[index].sequence
        for i, step in enumerate(steps):
            if i < index or step.sequence is not broken:
                line.steps.append(step)
                continue
            del self._waiting[step.request.id]
            if i > index:
                error = RequestAborted("an earlier request of the sequence was cancelled")
                self._refused.append((step.request, error))
        if line.sequence is broken:
            line.sequence = None

    def is_ready(self, instance: int, now_s: float) -> bool:
        """`schedule` may have a batch. Sometimes wrong when true, never when false."""
        return self._slots.is_ready(instance, now_s)

    def wake_at_s(self, now_s: float) -> float | None:
        """When `is_ready` turns true, or `expire` has something to do, with nothing else happening."""
        at_s = self._slots.wake_at_s(now_s)
        if self._idle:
            at_s = min(at_s, self._first_idle_s + self._options.max_idle_s)
        return at_s if at_s < math.inf else None

    @property
    def _first_idle_s(self) -> float:
        return next(iter(self._idle.values()))

    def expire(self, now_s: float) -> None:
        """Drop the sequences that have been without a request for too long; their places go to those that wait."""
        while self._idle and self._first_idle_s + self._options.max_idle_s <= now_s:
            sequence_id, _ = self._idle.popitem(last=False)
            self._close_line(self._lines[sequence_id])
            self._fill(now_s)

    def take_refused(self) -> list[tuple[TensorRequest, ServeError]]:
        """Requests that were added and will not run, since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def schedule(self, instance: int, now_s: float) -> TensorBatch | None:
        """Choose what a free instance runs next, or ``None`` to wait."""
        self.expire(now_s)
        lines = self._slots.schedule(instance, now_s)
        return TensorBatch([self._start(line) for line in lines]) if lines else None

    def _start(self, line: SequenceLine | None) -> TensorRow:
        if line is None:
            return TensorRow(None)
        step = line.steps.popleft()
        line.is_running = True
        del self._waiting[step.request.id]
        self._running[step.request.id] = line
        return TensorRow(step.request, step.sequence)

    def update(self, batch: TensorBatch, now_s: float) -> None:
        """The step is over, well or badly: its sequences go on, or end where the request said END."""
        for request in batch.requests:
            line = self._running.pop(request.id)
            line.is_running = False
            is_end = request.sequence is not None and request.sequence.is_end
            if not line.steps:
                if line.sequence is None:
                    self._close_line(line)
                else:
                    self._idle[line.id] = now_s
            elif is_end and self._backlog:
                # Another sequence of this id waits: it queues up for a place like any other.
                self._slots.unseat(line)
                self._backlog[line.id] = line
            else:
                self._slots.offer(line, now_s)
        self._fill(now_s)

    def _close_line(self, line: SequenceLine) -> None:
        del self._lines[line.id]
        if line.is_seated:
            self._slots.unseat(line)
        else:
            del self._backlog[line.id]

    def _fill(self, now_s: float) -> None:
        """Seat those that wait, the first first."""
        while self._backlog:
            line = next(iter(self._backlog.values()))
            if not self._slots.seat(line):
                return
            del self._backlog[line.id]
            self._slots.offer(line, now_s)


def _make_slots(name: str, options: SequenceOptions) -> SequenceSlots:
    max_rows = max(1, options.max_batch_size)
    if options.strategy == "direct":
        return DirectSlots(options.num_instances, max_rows, options.minimum_slot_utilization, options.max_queue_delay_s)
    batching = DynamicOptions(
        max_batch_size=max_rows,
        is_batching=True,
        preferred_batch_sizes=options.preferred_batch_sizes,
        max_queue_delay_s=options.max_queue_delay_s,
    )
    return OldestCandidates(name, options.num_instances * (options.max_candidate_sequences or max_rows), batching)
