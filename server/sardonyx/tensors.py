"""The nouns of tensor inference that every floor shares: what callers submit, what a step executes, what comes back.

Floor 0: no ONNX Runtime, no HTTP, no clock. A policy of `engine` and a runner never import each other; they meet here,
as token sequences meet in `core`.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy.typing as npt

from sardonyx.errors import ServeError

Parameter = bool | int | float | str
"""A value of a request's or an answer's ``parameters``."""


class TensorMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """What a model says about one of its inputs or outputs."""

    name: str
    datatype: str
    """KServe's: ``FP32``, ``BYTES``."""
    shape: tuple[int, ...]
    """-1 where any size goes. Where the model batches, the batch axis (-1) is in front."""
    is_optional: bool = False
    """An input that a request may leave out."""


class Tensor(msgspec.Struct, frozen=True):
    """A named array."""

    name: str
    datatype: str
    """KServe's."""
    array: npt.NDArray[Any]
    """C-contiguous, of the tensor's shape. BF16 travels as its bits in uint16, BYTES as objects: ``bytes`` each."""


class SequenceControl(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request stands in its sequence (Triton's stateful models)."""

    id: int | str
    """Never 0 or empty: those mean "no sequence" on the wire and are dropped there."""
    is_start: bool = False
    is_end: bool = False


class TensorRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One inference asked of an instance loop: what `serving` submits, already checked against the model."""

    id: int
    """Unique in the loop."""
    inputs: dict[str, npt.NDArray[Any]]
    """By the model's names; optional ones may be missing. With batch axis where the model batches."""
    outputs: tuple[str, ...]
    """Wanted outputs, at least one."""
    batch_size: int = 1
    """Size of axis 0; 1 where the model does not batch."""
    batch_key: Hashable = None
    """Requests share a batch only where their keys are equal: the names and the shapes behind the batch axis."""
    priority: int = 0
    """1 is the most urgent; 0 stands for the model's default level."""
    timeout_s: float = 0.0
    """How long the caller is willing to wait in the queue; 0: as the model's queue policy says."""
    sequence: SequenceControl | None = None
    arrival_s: float = 0.0
    """Monotonic."""
    num_tokens: int = 0
    """Of the one row of a request to a model that takes packed tokens; 0 elsewhere."""
    flow: int = 0
    """Requests with the same number are parts of one call; who shares a step's room fairly does so between flows."""


class InferenceTimes(msgspec.Struct, frozen=True):
    """What one execution took, in nanoseconds."""

    compute_input_ns: int = 0
    """Putting the batch together."""
    compute_infer_ns: int = 0
    compute_output_ns: int = 0
    """Taking it apart."""


class TensorEvent(msgspec.Struct, kw_only=True):
    """The one end of a submitted request: outputs or an error."""

    request_id: int
    outputs: dict[str, npt.NDArray[Any]] = {}
    """The wanted ones. May be views of a larger batch; never written again by the runner."""
    error: ServeError | None = None
    queue_ns: int = 0
    """From arrival to the step's begin (or to the refusal)."""
    times: InferenceTimes = InferenceTimes()
    executed_batch_size: int = 0
    """Rows of the whole batch it ran in; 0 if it never ran."""
    counts_execution: bool = False
    """The first of its batch's events: whoever counts executions counts these."""


@dataclass(slots=True, eq=False)
class TensorSequence:
    """A live sequence of a stateful model. The policy makes and drops it; the runner keeps its implicit state in it."""

    id: int | str
    state: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    """By state input: what the last step of the sequence left, shaped as the state's config says plus a batch axis of
    1 where the model batches. Empty before the first step."""


@dataclass(slots=True)
class TensorRow:
    """One request's part of a step, or an idle sequence slot between busy ones."""

    request: TensorRequest | None
    """``None``: an idle slot (direct strategy). It is computed over zeros with READY false, and dropped."""
    sequence: TensorSequence | None = None
    """Of stateful models."""


@dataclass(slots=True)
class TensorBatch:
    """What one step executes on one instance. All requests have the same `batch_key`."""

    rows: list[TensorRow]

    @property
    def requests(self) -> list[TensorRequest]:
        """Without idle slots."""
        return [row.request for row in self.rows if row.request is not None]

    @property
    def batch_size(self) -> int:
        """Rows of axis 0 that callers asked for."""
        return sum(request.batch_size for request in self.requests)


@dataclass(slots=True)
class TensorOutput:
    """What a runner made of a `TensorBatch`."""

    results: "list[dict[str, npt.NDArray[Any]] | ServeError]"
    """One for each of the batch's rows, in order; empty for idle ones. An error fails that row alone."""
    times: InferenceTimes


class TensorRunner(Protocol):
    """Executes batches of one model version. `execute` may be called by several threads, one for each instance."""

    def execute(self, batch: TensorBatch, instance: int) -> TensorOutput:
        """Run one step.

        Args:
            batch: what the policy chose.
            instance: number of the instance, from 0.

        Raises:
            EngineError: the step failed; no row of it has an answer.
        """
        ...

    def close(self) -> None:
        """Give back memory. Nothing may be executed afterwards."""
        ...
