"""Batches of tensor requests as runs of one session: rows joined along axis 0, and taken apart again.

Floor 3. Instances of one device share a session: ONNX Runtime runs it from several threads at once. Sequence controls
and implicit state, which no caller sends, are added here.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sardonyx.errors import EngineError, ServeError
from sardonyx.runners.lone import LoneRuns
from sardonyx.runtime.dtypes import DATATYPES
from sardonyx.runtime.session import Session
from sardonyx.tensors import InferenceTimes, TensorBatch, TensorOutput, TensorRequest, TensorRow, TensorSequence

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Reshape:
    """One tensor as callers see it and as the graph does, both without batch axis; -1 where any size goes."""

    outside: tuple[int, ...]
    inside: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Control:
    """An input by which a stateful model learns where each row stands in its sequence."""

    name: str
    kind: Literal["start", "end", "ready", "corrid"]
    datatype: str
    false_value: float = 0
    true_value: float = 1


@dataclass(frozen=True, slots=True)
class State:
    """Implicit state: an output of a row's step that is an input of its next one."""

    input_name: str
    output_name: str
    initial: Array
    """For the first step of a sequence, without batch axis."""


@dataclass(frozen=True, slots=True)
class TensorGraph:
    """What the runner must know of a model's config."""

    is_batching: bool
    """Tensors have a batch axis in front."""
    reshapes: dict[str, Reshape] = field(default_factory=dict)
    controls: tuple[Control, ...] = ()
    states: tuple[State, ...] = ()


class TensorModelRunner:
    """Runs one version of a tensor model. Strings are objects of `str` on both sides.

    Args:
        sessions: of each instance; the same one for those that share it. Closed by `close`.
        graph: from the model's config.
    """

    def __init__(self, sessions: Sequence[Session], graph: TensorGraph) -> None:
        self._sessions = list(sessions)
        self._graph = graph
        self._wide: Session | None = None
        self._lone = LoneRuns()

    def use_alone(self, session: Session) -> None:
        """Run on this session, on any instance, while steps follow each other one by one. Before the first step."""
        self._wide = session

    def execute(self, batch: TensorBatch, instance: int) -> TensorOutput:
        """Run one step.

        A request that is alone is run on its own arrays; several are copied into one array an input. Answers of a
        batch are views of its arrays. Rows whose states have grown to different sizes do not fit one array: they run
        one group after the other, and an error is then its group's alone. Where a batch without sequences fails, each
        of its requests is run again alone, for the values of one may be what fails.

        Raises:
            EngineError: the session failed for all of them, or an output has not the shape that the config says.
        """
        if self._wide is None:
            return self._execute(batch, self._sessions[instance])
        with self._lone.run() as is_alone:
            return self._execute(batch, self._wide if is_alone else self._sessions[instance])

    def _execute(self, batch: TensorBatch, session: Session) -> TensorOutput:
        groups = self._groups(batch.rows)
        if len(groups) > 1:
            return self._run_groups(batch, groups, session)
        try:
            return self._run(batch.rows, session)
        except EngineError:
            if len(batch.rows) == 1 or any(row.sequence is not None for row in batch.rows):
                raise
            output = self._run_groups(batch, [[index] for index in range(len(batch.rows))], session)
            if all(isinstance(result, ServeError) for result in output.results):
                raise
            return output

    def _run_groups(self, batch: TensorBatch, groups: list[list[int]], session: Session) -> TensorOutput:
        """Run groups of rows, by index, one after the other; an error is its group's."""
        results: list[dict[str, Array] | ServeError] = [{} for _ in batch.rows]
        times = InferenceTimes()
        for indexes in groups:
            rows = [batch.rows[index] for index in indexes]
            if all(row.request is None for row in rows):
                continue
            try:
                output = self._run(rows, session)
            except EngineError as error:
                output = TensorOutput([error for _ in rows], InferenceTimes())
            times = _sum(times, output.times)
            for index, result in zip(indexes, output.results, strict=True):
                results[index] = result
        return TensorOutput(results, times)

    def close(self) -> None:
        """Free the sessions."""
        for session in {*self._sessions, self._wide}:
            if session is not None:
                session.close()

    def _groups(self, rows: list[TensorRow]) -> list[list[int]]:
        """Indexes of rows that can share a run: their states have the same shapes."""
        groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for index, row in enumerate(rows):
            shapes = tuple(self._state_of(state, row).shape for state in self._graph.states)
            groups.setdefault(shapes, []).append(index)
        return list(groups.values())

    def _run(self, rows: list[TensorRow], session: Session) -> TensorOutput:
        started_ns = time.perf_counter_ns()
        requests = [row.request for row in rows if row.request is not None]
        wanted = _wanted(requests)
        inputs = self._inputs(rows)
        states = [state.output_name for state in self._graph.states if state.output_name not in wanted]
        joined_ns = time.perf_counter_ns()
        outputs = session.run(inputs, [*wanted, *states])
        ran_ns = time.perf_counter_ns()
        self._check_batch(outputs, sum(row.request.batch_size if row.request else 1 for row in rows))
        self._keep_states(rows, outputs)
        results = self._split(rows, {name: self._outside(name, outputs[name]) for name in wanted})
        times = InferenceTimes(joined_ns - started_ns, ran_ns - joined_ns, time.perf_counter_ns() - ran_ns)
        return TensorOutput(results, times)

    def _inputs(self, rows: list[TensorRow]) -> dict[str, Array]:
        graph = self._graph
        alone = rows[0].request if len(rows) == 1 else None
        inputs = _join(rows) if alone is None else {name: _aligned(each) for name, each in alone.inputs.items()}
        for name, reshape in graph.reshapes.items():
            if name in inputs:
                inputs[name] = _reshape(inputs[name], reshape.outside, reshape.inside, graph.is_batching)
        for control in graph.controls:
            inputs[control.name] = self._control(control, rows)
        for state in graph.states:
            values = [self._state_of(state, row) for row in rows]
            inputs[state.input_name] = values[0] if len(values) == 1 else np.concatenate(values)
        return inputs

    def _control(self, control: Control, rows: list[TensorRow]) -> Array:
        """One value a row, ``(B, 1)``, or ``(1,)`` where the model does not batch."""
        if control.kind == "corrid":
            values: list[Any] = [_id_of(row, control.datatype) for row in rows]
        else:
            values = [control.true_value if _is_set(control.kind, row.request) else control.false_value for row in rows]
        array = np.array(values, DATATYPES[control.datatype].array)
        return array.reshape(-1, 1) if self._graph.is_batching else array

    def _state_of(self, state: State, row: TensorRow) -> Array:
        """What the row's last step left, or the initial value."""
        sequence, request = row.sequence, row.request
        is_first = request is None or request.sequence is None or request.sequence.is_start
        kept = None if is_first or sequence is None else sequence.state.get(state.input_name)
        if kept is None:
            return state.initial[np.newaxis] if self._graph.is_batching else state.initial
        return kept

    def _keep_states(self, rows: list[TensorRow], outputs: dict[str, Array]) -> None:
        for state in self._graph.states:
            array = outputs[state.output_name]
            for index, row in enumerate(rows):
                if row.request is not None and isinstance(row.sequence, TensorSequence):
                    # Copied: a view would keep the whole batch's output in memory.
                    part = array[index : index + 1] if self._graph.is_batching else array
                    row.sequence.state[state.input_name] = part.copy()

    def _split(self, rows: list[TensorRow], outputs: dict[str, Array]) -> list[dict[str, Array] | ServeError]:
        if len(rows) == 1:
            return [outputs]
        results: list[dict[str, Array] | ServeError] = []
        start = 0
        for row in rows:
            if row.request is None:
                results.append({})
                start += 1
                continue
            stop = start + row.request.batch_size
            results.append({name: outputs[name][start:stop] for name in row.request.outputs})
            start = stop
        return results

    def _outside(self, name: str, array: Array) -> Array:
        """An output as callers see it."""
        reshape = self._graph.reshapes.get(name)
        if reshape is None:
            return array
        try:
            return _reshape(array, reshape.inside, reshape.outside, self._graph.is_batching)
        except ValueError:
            raise EngineError(
                f"output '{name}' of model '{self._sessions[0].model_name}' has the shape {list(array.shape)}, which "
                "the reshape of its config does not fit"
            ) from None

    def _check_batch(self, outputs: dict[str, Array], batch_size: int) -> None:
        if not self._graph.is_batching:
            return
        for name, array in outputs.items():
            if not array.ndim or array.shape[0] != batch_size:
                raise EngineError(
                    f"output '{name}' of model '{self._sessions[0].model_name}' has no batch axis of {batch_size}: "
                    "the model does not batch, its max_batch_size should be 0"
                )


def _wanted(requests: list[TensorRequest]) -> list[str]:
    first = requests[0].outputs
    if all(request.outputs == first for request in requests):
        return list(first)
    return list(dict.fromkeys(name for request in requests for name in request.outputs))


def _sum(one: InferenceTimes, other: InferenceTimes) -> InferenceTimes:
    return InferenceTimes(
        one.compute_input_ns + other.compute_input_ns,
        one.compute_infer_ns + other.compute_infer_ns,
        one.compute_output_ns + other.compute_output_ns,
    )


def _join(rows: list[TensorRow]) -> dict[str, Array]:
    """Each input of all rows along axis 0; zeros for idle slots."""
    first = next(row.request for row in rows if row.request is not None)
    joined = {}
    for name, array in first.inputs.items():
        parts = [row.request.inputs[name] if row.request is not None else _idle(array) for row in rows]
        joined[name] = np.concatenate(parts)
    return joined


def _aligned(array: Array) -> Array:
    """Arrays over received bytes may lie at odd addresses, which compiled kernels need not cope with."""
    return array if array.flags.aligned else array.copy()


def _idle(like: Array) -> Array:
    shape = (1, *like.shape[1:])
    return np.full(shape, "", object) if like.dtype == object else np.zeros(shape, like.dtype)


def _is_set(kind: str, request: TensorRequest | None) -> bool:
    if request is None:
        return False
    if kind == "ready":
        return True
    sequence = request.sequence
    return sequence is not None and (sequence.is_start if kind == "start" else sequence.is_end)


def _id_of(row: TensorRow, datatype: str) -> Any:
    """The correlation id as the model wants it; `serving` has checked that it can be had so."""
    is_text = datatype == "BYTES"
    if row.request is None or row.request.sequence is None:
        return "" if is_text else 0
    return str(row.request.sequence.id) if is_text else row.request.sequence.id


def _reshape(array: Array, source: tuple[int, ...], target: tuple[int, ...], is_batching: bool) -> Array:
    """`array` of shape `source` (behind the batch axis) as `target`; sizes left open are the source's, in order."""
    first = int(is_batching)
    sizes = iter([size for size, dim in zip(array.shape[first:], source, strict=True) if dim == -1])
    return array.reshape(*array.shape[:first], *(next(sizes) if dim == -1 else dim for dim in target))
