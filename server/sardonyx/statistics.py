"""What inference on one model version has cost so far: the numbers behind Triton's statistics endpoints and ``nv_*``.

Floor 0. Written on the event loop only; read there for the statistics endpoints and from any thread by Prometheus,
which sees each number whole. They outlive a reload: a counter never goes back.

Source: Triton, docs/protocol/extension_statistics.md; core/src/infer_stats.cc.
"""

import time
from dataclasses import dataclass, field
from typing import Literal

from sardonyx.errors import (
    DeadlineExceeded,
    EngineDead,
    EngineError,
    ModelNotReady,
    Overloaded,
    RequestAborted,
    ServeError,
)
from sardonyx.tensors import InferenceTimes

FailureReason = Literal["REJECTED", "CANCELED", "BACKEND", "OTHER"]


def failure_reason(error: ServeError) -> FailureReason:
    """Triton's word for why a request failed."""
    if isinstance(error, Overloaded | ModelNotReady):
        return "REJECTED"
    if isinstance(error, RequestAborted | DeadlineExceeded):
        return "CANCELED"
    if isinstance(error, EngineError | EngineDead):
        return "BACKEND"
    return "OTHER"


@dataclass(slots=True)
class Duration:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


@dataclass(slots=True)
class BatchStatistics:
    """Executions of one batch size."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class ResponseStatistics:
    """Answers of a model that gives several to a request, by their position."""

    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    empty_response: Duration = field(default_factory=Duration)
    cancel: Duration = field(default_factory=Duration)


@dataclass(slots=True, eq=False)
class InferenceStatistics:
    """Of one version of a model."""

    name: str
    version: int
    last_inference_ms: int = 0
    """Unix time of the last request, in milliseconds; 0 before the first."""
    inference_count: int = 0
    """Batch elements."""
    execution_count: int = 0
    """Runs of the model."""
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)
    batches: dict[int, BatchStatistics] = field(default_factory=dict)
    """By batch size."""
    responses: dict[int, ResponseStatistics] = field(default_factory=dict)
    """By position; of decoupled models only."""
    failures: dict[FailureReason, int] = field(default_factory=dict)
    num_pending: int = 0
    """Requests that were accepted and have no answer."""
    load_s: float = 0.0
    """How long the last load took."""

    def observe_success(self, *, total_ns: int, queue_ns: int, times: InferenceTimes, batch_size: int) -> None:
        """A request was computed. `batch_size` is its own; `total_ns` counts from its arrival."""
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.inference_count += batch_size
        self.success.add(total_ns)
        self.queue.add(queue_ns)
        self.compute_input.add(times.compute_input_ns)
        self.compute_infer.add(times.compute_infer_ns)
        self.compute_output.add(times.compute_output_ns)

    def observe_cache_hit(self, *, total_ns: int, lookup_ns: int) -> None:
        """A request was answered from the response cache: not computed, and queued for no time."""
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.success.add(total_ns)
        self.queue.add(0)  # whose count is that of the successes
        self.cache_hit.add(lookup_ns)

    def observe_execution(self, batch_size: int, times: InferenceTimes) -> None:
        """The model ran once, over so many batch elements."""
        self.execution_count += 1
        batch = self.batches.setdefault(batch_size, BatchStatistics())
        batch.compute_input.add(times.compute_input_ns)
        batch.compute_infer.add(times.compute_infer_ns)
        batch.compute_output.add(times.compute_output_ns)

    def observe_response(self, position: int, infer_ns: int) -> None:
        """A decoupled model gave one more answer to a request, so long after the one before."""
        response = self.responses.setdefault(position, ResponseStatistics())
        response.compute_infer.add(infer_ns)
        response.success.add(infer_ns)

    def observe_failure(self, reason: FailureReason, total_ns: int) -> None:
        """A request that was accepted, or refused by the queue, got an error."""
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.fail.add(total_ns)
        self.failures[reason] = self.failures.get(reason, 0) + 1
