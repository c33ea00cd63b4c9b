"""Whether a completed config suits the graph that it describes.

Floor 1. Graphs are told as `GraphTensor`; the texts of refusals are Triton's. Where it refuses a config that says less
than the graph (-1 against a fixed size), this one is content and notes it: ONNX Runtime checks what is sent.

Source: onnxruntime_backend, validation at instance creation.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.config import FILE_NAME
from sardonyx.repository.sequence_batching import read_sequence_batching


class GraphTensor(msgspec.Struct, frozen=True):
    """One input or output of a graph."""

    name: str
    data_type: int
    """Number of ModelConfig's enum; 0 where it has none for the graph's type."""
    dims: tuple[int, ...]
    """With batch axis, -1 where symbolic; empty: a scalar."""
    is_optional: bool = False
    """An initializer that a request may override."""


def check_graph(
    config: ModelConfig, inputs: Sequence[GraphTensor], outputs: Sequence[GraphTensor], *, file: str = FILE_NAME
) -> list[str]:
    """Compare a completed config with its graph.

    Args:
        config: one that `read_tensor_config` accepts, of a model with a graph.
        inputs: the graph's, optional ones among them.
        outputs: the graph's. The config may leave some out.
        file: how errors call the config.

    Returns:
        Notes on where the config says less or more than the graph.

    Raises:
        ConfigError: numbers, names, data types or shapes differ; a control or a state is not the graph's.
    """
    check = _Check(config, file)
    check.count_inputs(inputs)
    known = {tensor.name: tensor for tensor in inputs}
    for item in config.input:
        if item.optional and config.max_batch_size:
            reason = f"optional input '{item.name}' is not supported for models that support batching"
            raise check.error(reason, "input")
        check.tensor("input", item, known)
    produced = {tensor.name: tensor for tensor in outputs}
    for item in config.output:
        check.tensor("output", item, produced)
    check.sequences(known, produced)
    return check.notes


class _Check:
    """One comparison."""

    def __init__(self, config: ModelConfig, file: str) -> None:
        self._config = config
        self._file = file
        self._batching = read_sequence_batching(config, file=file)
        self.notes: list[str] = []

    def error(self, reason: str, field: str) -> ConfigError:
        return ConfigError(f"unable to load model '{self._config.name}', {reason}", file=self._file, field=field)

    def count_inputs(self, inputs: Iterable[GraphTensor]) -> None:
        expected = sum(not item.optional for item in self._config.input)
        if self._batching is not None:
            expected += len(self._batching.controls) + len(self._batching.states)
        provided = sum(not tensor.is_optional for tensor in inputs)
        if expected != provided:
            raise self.error(f"configuration expects {expected} inputs, model provides {provided}", "input")

    def tensor(self, side: str, item: Any, graph: dict[str, GraphTensor]) -> None:
        """Compare one entry of `side`, a ModelInput or ModelOutput (untyped), with the graph's tensor of that name."""
        tensor = graph.get(item.name)
        if tensor is None:
            allowed = ", ".join(sorted(graph))
            reason = f"unexpected inference {side} '{item.name}', allowed {side}s are: {allowed}"
            raise ConfigError(reason, file=self._file, field=side)
        if item.data_type != tensor.data_type:
            wanted, given = DataType.Name(item.data_type), DataType.Name(tensor.data_type)
            reason = f"configuration expects datatype {wanted} for {side} '{item.name}', model provides {given}"
            raise self.error(reason, side)
        dims = tuple(item.reshape.shape if item.HasField("reshape") else item.dims)
        if tensor.dims or self._config.max_batch_size:
            self._shape(side, tensor, dims)
        elif any(dim != 1 for dim in dims):
            raise self.error(
                f"scalar tensor '{item.name}', should only provide 1 in the model configuration when the model doesn't "
                f"support batching. Model configuration provided: {_shown(dims)}.",
                side,
            )

    def _shape(self, side: str, tensor: GraphTensor, dims: tuple[int, ...]) -> None:
        subject = f"model '{self._config.name}', tensor '{tensor.name}': "
        complete = dims
        if self._config.max_batch_size:
            if not tensor.dims or tensor.dims[0] != -1:
                raise ConfigError(
                    f"{subject}for the model to support batching the shape should have at least 1 dimension and the "
                    f"first dimension must be -1; but shape expected by the model is {_shown(tensor.dims)}",
                    file=self._file,
                    field=side,
                )
            complete = (-1, *dims)
        pairs = list(zip(tensor.dims, complete, strict=False))
        if len(tensor.dims) != len(complete) or any(have != want and -1 not in (have, want) for have, want in pairs):
            detail = f"shape {_shown(complete)}"
            if self._config.max_batch_size:
                detail = (
                    "an initial batch dimension because max_batch_size > 0 followed by the explicit tensor shape, "
                    f"making complete shape {_shown(complete)}"
                )
            raise ConfigError(
                f"{subject}the model expects {len(tensor.dims)} dimensions (shape {_shown(tensor.dims)}) but the model "
                f"configuration specifies {len(complete)} dimensions ({detail})",
                file=self._file,
                field=side,
            )
        if any(want == -1 and have != -1 for have, want in pairs):
            self.notes.append(f"{side} '{tensor.name}': the graph takes {_shown(tensor.dims)} only")
        if side == "output" and any(have == -1 and want != -1 for have, want in pairs):
            self.notes.append(f"output '{tensor.name}': the graph promises no more than {_shown(tensor.dims)}")

    def sequences(self, inputs: dict[str, GraphTensor], outputs: dict[str, GraphTensor]) -> None:
        """Compare controls and states of a stateful model."""
        if self._batching is None:
            return
        for control in self._batching.controls:
            field = "sequence_batching.control_input"
            tensor = inputs.get(control.name)
            if tensor is None:
                reason = (
                    f"configuration specified sequence control '{control.name}', but model does not provide that input"
                )
                raise ConfigError(reason, file=self._file, field=field)
            dims = tensor.dims[1:] if self._config.max_batch_size else tensor.dims
            if len(dims) != 1 or dims[0] not in {1, -1}:
                reason = f"sequence control '{control.name}' in model has dims {_shown(dims)} but dims [1] is expected"
                raise self.error(reason, field)
            if control.data_type != tensor.data_type:
                have, want = DataType.Name(tensor.data_type), DataType.Name(control.data_type)
                reason = (
                    f"sequence control '{control.name}', the model expects data-type {have} but the model "
                    f"configuration specifies data-type {want}"
                )
                raise self.error(reason, field)
        for state in self._batching.states:
            for side, name, graph in (("input", state.input_name, inputs), ("output", state.output_name, outputs)):
                self._state(side, name, graph, state.data_type, state.dims)

    def _state(
        self, side: str, name: str, graph: dict[str, GraphTensor], data_type: int, dims: tuple[int, ...]
    ) -> None:
        field = f"sequence_batching.state.{side}_name"
        tensor = graph.get(name)
        if tensor is None:
            allowed = ", ".join(sorted(graph))
            reason = f"unexpected inference {side} '{name}', allowed {side}s are: {allowed}"
            raise ConfigError(reason, file=self._file, field=field)
        if tensor.data_type != data_type:
            want, have = DataType.Name(data_type), DataType.Name(tensor.data_type)
            reason = f"configuration expects datatype {want} for {side} state '{name}', model provides {have}"
            raise self.error(reason, field)
        self._shape(side, tensor, dims)


def _shown(dims: Iterable[int]) -> str:
    return f"[{','.join(map(str, dims))}]"
