"""Models with a task of their own as tensors: what their faces have in common over KServe-v2.

Floor 4. A face says what goes in and out, and answers a call that suits it.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInput, ModelOutput

from sardonyx.repository.config import BACKEND, PLATFORM
from sardonyx.serving.served import InferAnswer, InferCall
from sardonyx.serving.strings import has_many
from sardonyx.serving.tensor_checks import BoundCall, TensorSignature
from sardonyx.serving.version_files import VersionFiles
from sardonyx.statistics import InferenceStatistics
from sardonyx.tensors import Parameter, Tensor, TensorMetadata


class Face(msgspec.Struct, frozen=True, kw_only=True):
    """How a task looks as tensors."""

    inputs: tuple[TensorMetadata, ...]
    """With batch axis where it batches."""
    outputs: tuple[TensorMetadata, ...]
    are_texts: bool = True
    """BYTES that go in have to be UTF-8, and come as `str`."""
    max_batch_size: int = 0
    """Where the operator's config does not say; 0: it does not batch."""
    labels: Sequence[str] = ()
    """Of its one output, by index."""
    answer: Callable[[BoundCall, Mapping[str, Parameter]], Awaitable[list[Tensor]]]
    """From the inputs and the call's parameters to the wanted outputs."""


class Calls(Protocol):
    """What a task's calls have in common: `item_calls.ItemCalls` and `loop_calls.LoopCalls`."""

    name: str
    statistics: InferenceStatistics

    @property
    def is_alive(self) -> bool: ...
    @property
    def stalled_s(self) -> float: ...
    def stop(self, request_id: str | None = None) -> int: ...
    async def drain(self, timeout_s: float) -> None: ...
    async def close(self) -> None: ...
    def discard(self) -> None: ...


class TaskTensorModel:
    """A `served.ServedModel`: what a task does, as tensors.

    Args:
        task: what the endpoints of the model's family use.
        face: of the task.
        calls: the task's.
        config: what the operator wrote, completed here.
        files: of the version.
    """

    is_decoupled = False

    def __init__(self, task: object, face: Face, calls: Calls, config: ModelConfig, files: VersionFiles) -> None:
        self.task = task
        self.calls = calls
        self.name = calls.name
        self.version = files.version
        self.created = files.created
        self.size_bytes = files.size_bytes
        self.inputs = face.inputs
        self.outputs = face.outputs
        self.config = completed(config, face.inputs, face.outputs, max_batch_size=face.max_batch_size)
        self._face = face
        self._signature = TensorSignature(self.name, face.inputs, face.outputs, self.config.max_batch_size)

    @property
    def statistics(self) -> InferenceStatistics:
        """Of this version; they outlive it."""
        return self.calls.statistics

    @property
    def is_alive(self) -> bool:
        """It takes requests."""
        return self.calls.is_alive

    @property
    def stalled_s(self) -> float:
        """For how long its engine has had work and made no progress."""
        return self.calls.stalled_s

    def labels(self, output: str) -> list[str]:
        """Class names of an output."""
        return list(self._face.labels) if output == self.outputs[0].name else []

    async def infer(self, call: InferCall) -> InferAnswer:
        """See `served.ServedModel.infer`."""
        bind = functools.partial(self._signature.bind, call, as_text=self._face.are_texts)
        bound = await asyncio.to_thread(bind) if has_many(call.inputs) else bind()
        return InferAnswer(outputs=await self._face.answer(bound, call.parameters))

    async def stream(self, call: InferCall) -> AsyncIterator[InferAnswer]:
        """See `served.ServedModel.stream`."""
        yield await self.infer(call)

    def stop_generation(self, request_id: str | None = None) -> int:
        """End one call, or all of them, where the task generates."""
        return self.calls.stop(request_id)

    async def drain(self, timeout_s: float) -> None:
        """Take no more calls, and wait until the accepted ones have ended, so long at most."""
        await self.calls.drain(timeout_s)

    async def close(self) -> None:
        """End what is left with ModelNotReady, and free the engine. Idempotent."""
        await self.calls.close()

    def discard(self) -> None:
        """Free what was never put in place. Blocks."""
        self.calls.discard()


def completed(
    config: ModelConfig,
    inputs: Sequence[TensorMetadata],
    outputs: Sequence[TensorMetadata],
    *,
    max_batch_size: int = 0,
) -> ModelConfig:
    """What the config endpoint shows of a model whose config names no tensors.

    Args:
        config: the operator's; never changed.
        inputs: with batch axis where it batches.
        outputs: likewise.
        max_batch_size: where the config does not say.
    """
    result = ModelConfig()
    result.CopyFrom(config)
    result.platform, result.backend = PLATFORM, BACKEND
    if not result.HasField("version_policy"):
        result.version_policy.latest.num_versions = 1
    result.max_batch_size = result.max_batch_size or max_batch_size
    first = int(result.max_batch_size > 0)
    for each in inputs:
        data_type, dims = _data_type(each), each.shape[first:]
        result.input.append(ModelInput(name=each.name, data_type=data_type, dims=dims, optional=each.is_optional))
    for each in outputs:
        result.output.append(ModelOutput(name=each.name, data_type=_data_type(each), dims=each.shape[first:]))
    return result


def _data_type(tensor: TensorMetadata) -> str:
    return "TYPE_STRING" if tensor.datatype == "BYTES" else f"TYPE_{tensor.datatype}"
