"""A tensor runner that computes nothing but says who was where, and what a test wants of requests."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from sardonyx.errors import ServeError
from sardonyx.tensors import (
    InferenceTimes,
    SequenceControl,
    TensorBatch,
    TensorOutput,
    TensorRequest,
)

TIMES = InferenceTimes(compute_input_ns=1, compute_infer_ns=2, compute_output_ns=3)


def make_request(request_id: int, batch_size: int = 1, **fields: Any) -> TensorRequest:  # fields of TensorRequest
    return TensorRequest(id=request_id, inputs={}, outputs=("id",), batch_size=batch_size, **fields)


def make_step(
    request_id: int, sequence_id: int | str, flags: str = "", **fields: Any
) -> TensorRequest:  # fields of TensorRequest
    """A request of a sequence; `flags` has an S for START and an E for END."""
    control = SequenceControl(id=sequence_id, is_start="S" in flags, is_end="E" in flags)
    return make_request(request_id, sequence=control, **fields)


def ids(batch: TensorBatch | None) -> list[int | None]:
    """Request ids by row, ``None`` for idle slots; no rows where there is no batch."""
    return [row.request and row.request.id for row in batch.rows] if batch else []


class FakeTensorRunner:
    """Answers each request with its own id, and each step of a sequence with the ids of the sequence so far.

    Args:
        on_step: called before each step; may wait, raise, or give errors by request id.
    """

    def __init__(self, on_step: Callable[[TensorBatch, int], dict[int, ServeError] | None] | None = None) -> None:
        self.on_step = on_step
        self.batches: list[TensorBatch] = []
        self.num_closed = 0
        self._lock = threading.Lock()
        self._busy: set[int] = set()

    def execute(self, batch: TensorBatch, instance: int) -> TensorOutput:
        with self._lock:
            assert not self.num_closed
            assert instance not in self._busy, "an instance runs one step at a time"
            self._busy.add(instance)
            self.batches.append(batch)
        try:
            failed = (self.on_step(batch, instance) if self.on_step else None) or {}
        finally:
            with self._lock:
                self._busy.remove(instance)
        output = TensorOutput([], TIMES)
        for row in batch.rows:
            if row.request is None:
                output.results.append({})
                continue
            seen = np.array([row.request.id])
            if row.sequence is not None:
                seen = row.sequence.state["ids"] = np.append(row.sequence.state.get("ids", seen[:0]), seen)
            output.results.append(failed.get(row.request.id, {"id": seen}))
        return output

    def close(self) -> None:
        self.num_closed += 1
