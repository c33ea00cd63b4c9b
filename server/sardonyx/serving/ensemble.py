"""An ensemble: models of the repository wired into one, run as far at once as their tensors allow.

Floor 4. It holds no model: each step goes to the version that serves at that moment, so its parts can be reloaded
under it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError, EngineError, ModelNotReady, ServeError
from sardonyx.repository.tensor_config import EnsembleStep
from sardonyx.serving.open_calls import OpenCalls
from sardonyx.serving.served import InferAnswer, InferCall, ServedModel
from sardonyx.serving.tensor_checks import TensorSignature
from sardonyx.statistics import InferenceStatistics, failure_reason
from sardonyx.tensors import InferenceTimes, Tensor, TensorMetadata

Resolve = Callable[[str, int | None], ServedModel]
"""The version of a model that serves now; ``None``: the highest."""


class EnsembleVersion(msgspec.Struct, frozen=True, kw_only=True):
    """What a version folder and the config say about an ensemble."""

    name: str
    version: int
    config: ModelConfig
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    steps: tuple[EnsembleStep, ...]
    labels: dict[str, list[str]] = {}
    created: int = 0
    size_bytes: int = 0


class EnsembleModel:
    """A `served.ServedModel`.

    Args:
        version: checked by itself; `check_parts` checks it against its models.
        resolve: finds them.
    """

    is_decoupled = False
    stalled_s = 0.0

    task = None

    def __init__(self, version: EnsembleVersion, resolve: Resolve, statistics: InferenceStatistics) -> None:
        self.name = version.name
        self.version = version.version
        self.config = version.config
        self.inputs = version.inputs
        self.outputs = version.outputs
        self.created = version.created
        self.size_bytes = version.size_bytes
        self.statistics = statistics
        self._version = version
        self._resolve = resolve
        self._signature = TensorSignature(version.name, version.inputs, version.outputs, version.config.max_batch_size)
        self._datatypes = {each.name: each.datatype for each in version.outputs}
        self._calls: set[asyncio.Task[InferAnswer]] = set()
        self._open = OpenCalls()

    @property
    def is_alive(self) -> bool:
        """Its parts have their own engines."""
        return True

    def labels(self, output: str) -> list[str]:
        """Class names of an output."""
        return self._version.labels.get(output, [])

    async def infer(self, call: InferCall) -> InferAnswer:
        """See `served.ServedModel.infer`. An error of a step is the call's."""
        if self._open.is_draining:
            raise ModelNotReady(
                f"Server is stopping, scheduler for model '{self.name}' has stopped accepting new inference requests"
            )
        task = asyncio.create_task(self._infer(call))
        self._calls.add(task)
        self._open.begin()
        self.statistics.num_pending += 1
        try:
            return await task
        except asyncio.CancelledError:
            if self._open.is_draining and task.cancelled() and not _is_cancelling():
                raise ModelNotReady(f"model '{self.name}' was unloaded before the request was finished") from None
            raise
        finally:
            task.cancel()
            self.statistics.num_pending -= 1
            self._calls.discard(task)
            self._open.end()

    async def stream(self, call: InferCall) -> AsyncIterator[InferAnswer]:
        """See `served.ServedModel.stream`."""
        yield await self.infer(call)

    def stop_generation(self, request_id: str | None = None) -> int:
        """Ensembles generate nothing."""
        return 0

    async def drain(self, timeout_s: float) -> None:
        """Take no more calls, and wait until the accepted ones have ended, so long at most."""
        await self._open.drain(timeout_s)

    async def close(self) -> None:
        """End what is left with ModelNotReady. Idempotent."""
        self._open.is_draining = True
        calls = list(self._calls)
        for task in calls:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    def discard(self) -> None:
        """There is nothing to free."""

    async def _infer(self, call: InferCall) -> InferAnswer:
        started_ns = time.perf_counter_ns()
        bound = self._signature.bind(call, as_text=False)
        tensors = {tensor.name: tensor for tensor in call.inputs}
        try:
            await self._run(call, tensors, set(bound.outputs))
            missing = [name for name in bound.outputs if name not in tensors]
            if missing:
                raise EngineError(f"ensemble '{self.name}' made no output '{missing[0]}'")
        except ServeError as error:
            self.statistics.observe_failure(failure_reason(error), time.perf_counter_ns() - started_ns)
            raise
        except asyncio.CancelledError:
            self.statistics.observe_failure("CANCELED", time.perf_counter_ns() - started_ns)
            raise
        times = InferenceTimes(compute_infer_ns=time.perf_counter_ns() - started_ns)
        self.statistics.observe_success(
            total_ns=times.compute_infer_ns, queue_ns=0, times=times, batch_size=bound.batch_size
        )
        self.statistics.observe_execution(bound.batch_size, times)
        return InferAnswer(outputs=[_named(tensors[name], name) for name in bound.outputs])

    async def _run(self, call: InferCall, tensors: dict[str, Tensor], wanted: set[str]) -> None:
        """Run every step that the wanted tensors need, each as soon as its inputs are there."""
        waiting = _needed(self._version.steps, wanted)
        left_out = {each.name for each in self.inputs if each.is_optional} - tensors.keys()
        running: set[asyncio.Task[list[Tensor]]] = set()
        tasks: list[asyncio.Task[list[Tensor]]] = []
        try:
            while waiting or running:
                there = tensors.keys() | left_out
                for step in [step for step in waiting if there.issuperset(step.input_map.values())]:
                    waiting.remove(step)
                    tasks.append(asyncio.create_task(self._step(step, call, tensors)))
                    running.add(tasks[-1])
                if not running:
                    raise EngineError(f"ensemble '{self.name}' waits for tensors that no step makes")
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    tensors.update((tensor.name, tensor) for tensor in task.result())
        finally:
            for task in running:
                task.cancel()
            # Ended ones among them: of several errors at once only the first was read.
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _step(self, step: EnsembleStep, call: InferCall, tensors: dict[str, Tensor]) -> list[Tensor]:
        model = self._resolve(step.model_name, step.model_version)
        answer = await model.infer(
            InferCall(
                inputs=[_named(tensors[outer], inner) for inner, outer in step.input_map.items() if outer in tensors],
                outputs=list(step.output_map),
                id=call.id,
                priority=call.priority,
                timeout_us=call.timeout_us,
                sequence=call.sequence,
                parameters=call.parameters,
            )
        )
        return [_named(tensor, step.output_map[tensor.name]) for tensor in answer.outputs]


def check_parts(version: EnsembleVersion, resolve: Resolve) -> None:
    """Compare an ensemble with the models that it is made of.

    Raises:
        ConfigError: a part is not ready, has no such input or output, lacks an input, or two ends of a tensor differ in
            datatype.
    """
    datatypes = {each.name: (each.datatype, "the ensemble") for each in (*version.inputs, *version.outputs)}
    for number, step in enumerate(version.steps):
        field = f"ensemble_scheduling.step[{number}]"
        try:
            model = resolve(step.model_name, step.model_version)
        except ServeError as error:
            raise ConfigError(
                f"ensemble '{version.name}' depends on '{step.model_name}' which has no loaded version: "
                f"{error.message}",
                field=field,
            ) from error
        _check_part(step, model, datatypes, field)


def _check_part(step: EnsembleStep, model: ServedModel, datatypes: dict[str, tuple[str, str]], field: str) -> None:
    for mapping, part, word in ((step.input_map, model.inputs, "input"), (step.output_map, model.outputs, "output")):
        tensors = {each.name: each for each in part}
        for inner, outer in mapping.items():
            if inner not in tensors:
                raise ConfigError(f"model '{step.model_name}' has no {word} '{inner}'", field=f"{field}.{word}_map")
            datatype, owner = datatypes.setdefault(outer, (tensors[inner].datatype, step.model_name))
            if datatype != tensors[inner].datatype:
                raise ConfigError(
                    f"tensor '{outer}' is {datatype} in {owner} and {tensors[inner].datatype} in '{step.model_name}'",
                    field=f"{field}.{word}_map",
                )
    missing = [each.name for each in model.inputs if not each.is_optional and each.name not in step.input_map]
    if missing:
        raise ConfigError(f"maps nothing to input '{missing[0]}' of '{step.model_name}'", field=f"{field}.input_map")


def _needed(steps: tuple[EnsembleStep, ...], wanted: set[str]) -> list[EnsembleStep]:
    """The steps that make the wanted tensors, or what these are made of."""
    needed: list[EnsembleStep] = []
    open_tensors = set(wanted)
    while open_tensors:
        tensor = open_tensors.pop()
        for step in steps:
            if tensor in step.output_map.values() and step not in needed:
                needed.append(step)
                open_tensors.update(step.input_map.values())
    return needed


def _named(tensor: Tensor, name: str) -> Tensor:
    return tensor if tensor.name == name else Tensor(name, tensor.datatype, tensor.array)


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
