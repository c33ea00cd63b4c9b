"""Which live sequences may run, and which of them share a step: the two strategies of sequence batching.

Floor 3. `sardonyx.engine.sequences` decides what a sequence is and when it ends; here sequences have a place or have
none. A place holds a `SequenceLine`: the waiting requests of one id, in order.

Source: Triton, ModelSequenceBatching in model_config.proto; core/src/sequence_batch_scheduler.cc for what counts as
used slots.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from sardonyx.engine.dynamic import DynamicOptions, DynamicPolicy
from sardonyx.tensors import TensorRequest, TensorSequence


@dataclass(slots=True, eq=False)
class SequenceStep:
    """A waiting request and the sequence that it belongs to."""

    request: TensorRequest
    sequence: TensorSequence
    added_s: float


@dataclass(slots=True, eq=False)
class SequenceLine:
    """Everything of one sequence id: at most one request runs, the others wait behind each other."""

    id: int | str
    steps: deque[SequenceStep] = field(default_factory=deque)
    sequence: TensorSequence | None = None
    """The newest one; requests to come belong to it. ``None``: it has its END or was broken, only START goes on."""
    is_running: bool = False
    is_seated: bool = False
    place: tuple[int, int] = (0, 0)
    """Slot and instance, of the direct strategy."""


class SequenceSlots(Protocol):
    """Places for sequences, and the choice among those whose next request may run."""

    def seat(self, line: SequenceLine) -> bool:
        """Give it a place; false when there is none."""
        ...

    def unseat(self, line: SequenceLine) -> None:
        """Free its place. It is neither running nor offered."""
        ...

    def offer(self, line: SequenceLine, now_s: float) -> None:
        """The first request of a seated line may run."""
        ...

    def withdraw(self, line: SequenceLine, now_s: float) -> None:
        """It may not any more. The request is still the first."""
        ...

    def is_ready(self, instance: int, now_s: float) -> bool:
        """`schedule` may give something. Sometimes wrong when true, never when false."""
        ...

    def schedule(self, instance: int, now_s: float) -> list[SequenceLine | None]:
        """The rows of a step, no longer offered; ``None`` is an idle slot. Empty: wait."""
        ...

    def wake_at_s(self, now_s: float) -> float:
        """When `is_ready` turns true with nothing else happening; infinite: never."""
        ...


class DirectSlots:
    """A sequence keeps one slot of one instance; the slot is its row in every step of that instance.

    Args:
        num_instances: of the model.
        num_slots: of each instance.
        min_utilization: share of slots with a request from which on a step does not wait; 0: none waits.
        max_delay_s: how long it waits at most.
    """

    def __init__(self, num_instances: int, num_slots: int, min_utilization: float, max_delay_s: float) -> None:
        # Lowest slots first, so that instances fill evenly and their steps stay short.
        self._free = [(slot, instance) for slot in range(num_slots) for instance in range(num_instances)]
        self._offered: list[dict[int, SequenceLine]] = [{} for _ in range(num_instances)]
        self._min_offered = min_utilization * num_slots if max_delay_s > 0.0 else 0.0
        self._delay_s = max_delay_s

    def seat(self, line: SequenceLine) -> bool:
        if not self._free:
            return False
        line.place = heapq.heappop(self._free)
        line.is_seated = True
        return True

    def unseat(self, line: SequenceLine) -> None:
        line.is_seated = False
        heapq.heappush(self._free, line.place)

    def offer(self, line: SequenceLine, now_s: float) -> None:
        slot, instance = line.place
        self._offered[instance][slot] = line

    def withdraw(self, line: SequenceLine, now_s: float) -> None:
        slot, instance = line.place
        del self._offered[instance][slot]

    def _send_at_s(self, instance: int) -> float:
        offered = self._offered[instance]
        if not offered:
            return math.inf
        if len(offered) >= self._min_offered:
            return -math.inf
        return min(line.steps[0].added_s for line in offered.values()) + self._delay_s

    def is_ready(self, instance: int, now_s: float) -> bool:
        return self._send_at_s(instance) <= now_s

    def schedule(self, instance: int, now_s: float) -> list[SequenceLine | None]:
        if self._send_at_s(instance) > now_s:
            return []
        offered = self._offered[instance]
        # The oldest decides on the shape, so that none waits for ever for its own.
        oldest = min(offered.values(), key=lambda line: line.steps[0].added_s)
        key = oldest.steps[0].request.batch_key
        chosen = {slot: line for slot, line in offered.items() if line.steps[0].request.batch_key == key}
        for slot in chosen:
            del offered[slot]
        return [chosen.get(slot) for slot in range(max(chosen) + 1)]

    def wake_at_s(self, now_s: float) -> float:
        times_s = (self._send_at_s(instance) for instance in range(len(self._offered)))
        return min((at_s for at_s in times_s if at_s > now_s), default=math.inf)


class OldestCandidates:
    """The first requests of all candidates go through dynamic batching, in the order in which they became first.

    A sequence has at most one request there, so its requests never share a step and never overtake each other,
    whichever instance takes them.

    Args:
        name: of the model.
        max_candidates: sequences with a place.
        batching: how their requests share steps.
    """

    def __init__(self, name: str, max_candidates: int, batching: DynamicOptions) -> None:
        self._num_free = max_candidates
        self._dynamic = DynamicPolicy(name, batching)
        self._offered: dict[int, SequenceLine] = {}

    def seat(self, line: SequenceLine) -> bool:
        if not self._num_free:
            return False
        self._num_free -= 1
        line.is_seated = True
        return True

    def unseat(self, line: SequenceLine) -> None:
        line.is_seated = False
        self._num_free += 1

    def offer(self, line: SequenceLine, now_s: float) -> None:
        request = line.steps[0].request
        self._offered[request.id] = line
        self._dynamic.add(request, now_s)

    def withdraw(self, line: SequenceLine, now_s: float) -> None:
        request = line.steps[0].request
        del self._offered[request.id]
        self._dynamic.abort(request.id, now_s)

    def is_ready(self, instance: int, now_s: float) -> bool:
        return self._dynamic.is_ready(instance, now_s)

    def schedule(self, instance: int, now_s: float) -> list[SequenceLine | None]:
        batch = self._dynamic.schedule(instance, now_s)
        return [self._offered.pop(request.id) for request in batch.requests] if batch else []

    def wake_at_s(self, now_s: float) -> float:
        at_s = self._dynamic.wake_at_s(now_s)
        return math.inf if at_s is None else at_s
