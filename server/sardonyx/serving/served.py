"""What every loaded model version offers, whatever its family: tensors over KServe-v2, a state, an end.

Floor 4. `tensors.TensorModel`, `ensemble.EnsembleModel`, `text_tensors.TextTensorModel` and
`task_tensors.TaskTensorModel` are such models.
"""

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.statistics import InferenceStatistics
from sardonyx.tensors import Parameter, SequenceControl, Tensor, TensorMetadata


class InferCall(msgspec.Struct, frozen=True, kw_only=True):
    """One inference that a caller asks of a model version; checked for form, not yet against the model."""

    inputs: list[Tensor]
    outputs: list[str] = []
    """Wanted ones; empty: all."""
    id: str = ""
    """The caller's own, for messages and logs; need not be unique."""
    priority: int = 0
    timeout_us: int = 0
    sequence: SequenceControl | None = None
    parameters: dict[str, Parameter] = {}
    """What the protocol does not define; the model may."""


class InferAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    outputs: list[Tensor]
    """In the order of the wanted ones. None: only says that it is the last."""
    parameters: dict[str, Parameter] = {}
    is_final: bool = True
    """No other answer to that call follows."""


class ModelOverride(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller who loads a model brings along."""

    config: str
    """A ModelConfig as JSON, in place of config.pbtxt."""
    files: dict[str, bytes] = {}
    """By path in the model's folder, ``1/model.onnx``. With any, the model consists of nothing else."""
    depends_on: tuple[str, ...] = ()
    """Models that the config's ensemble is made of."""


class LoadedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model as one load made it: all the versions that its policy chooses."""

    versions: "dict[int, ServedModel]"
    """At least one, ascending."""
    depends_on: tuple[str, ...] = ()
    """Models that it is made of, where it is an ensemble."""

    @property
    def newest(self) -> "ServedModel":
        """The version for requests that name none."""
        return self.versions[max(self.versions)]


class ServedModel(Protocol):
    """One loaded version of a model."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def config(self) -> ModelConfig:
        """Completed: what the config endpoint shows. Never changed."""
        ...

    @property
    def inputs(self) -> tuple[TensorMetadata, ...]: ...
    @property
    def outputs(self) -> tuple[TensorMetadata, ...]: ...
    @property
    def statistics(self) -> InferenceStatistics: ...
    @property
    def created(self) -> int:
        """Unix time of the export or of the newest file."""
        ...

    @property
    def size_bytes(self) -> int: ...
    @property
    def is_alive(self) -> bool:
        """It takes requests."""
        ...

    @property
    def task(self) -> object | None:
        """What the endpoints of the model's family use: a `serving.text.TextModel`, a
        `serving.embeddings.EmbeddingModel` ...; ``None``: tensors are all that it offers.
        """
        ...

    @property
    def stalled_s(self) -> float:
        """For how long it has had work and made no progress."""
        ...

    @property
    def is_decoupled(self) -> bool:
        """A call may get any number of answers."""
        ...

    def labels(self, output: str) -> list[str]:
        """Class names of an output by index; empty where it has none."""
        ...

    async def infer(self, call: InferCall) -> InferAnswer:
        """The one answer to a call. Cancelling drops a waiting inference, and the answer of one that runs.

        Raises:
            InvalidRequest: inputs, outputs or sequence do not suit the model.
            UnsupportedFeature: the model would give any number of answers.
            Overloaded: the queue is full, or its time limit is over.
            ModelNotReady: the model is being unloaded.
            EngineError: the inference failed.
        """
        ...

    def stream(self, call: InferCall) -> AsyncIterator[InferAnswer]:
        """All answers to a call; exactly one unless the model is decoupled. Closing the iterator aborts.

        Raises what `infer` raises, UnsupportedFeature only where the call asks for what the model cannot do.
        """
        ...

    def stop_generation(self, request_id: str | None = None) -> int:
        """End the calls that generate, one or all; how many were ended."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Take no more calls, and wait until the accepted ones have ended, so long at most."""
        ...

    async def close(self) -> None:
        """End what is left with ModelNotReady, and free everything. Idempotent."""
        ...
