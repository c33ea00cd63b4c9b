"""What a config leaves open, filled from the graph and with Triton's defaults.

Floor 1. Whether the result suits the graph is `graph_check`'s matter.

Source: Triton, docs/user_guide/model_configuration.md ("Auto-Generated Model Configuration"); onnxruntime_backend.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.config import BACKEND, ENSEMBLE, PLATFORM
from sardonyx.repository.graph_check import GraphTensor, check_graph
from sardonyx.repository.instances import normalize_instance_groups
from sardonyx.repository.sequence_batching import DEFAULT_IDLE_US

__all__ = ["DEFAULT_GRAPH", "GraphTensor", "check_graph", "complete_config"]

DEFAULT_GRAPH = "model.onnx"


def complete_config(
    config: ModelConfig,
    inputs: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
    *,
    num_gpus: int,
    default_max_batch_size: int = 4,
    auto_complete: bool = True,
) -> ModelConfig:
    """Complete a model's config.

    A side of the tensors that the config names is left as it is; where it names both, the batch size is too. A graph
    all of whose tensors have an open first dimension is taken to batch.

    Args:
        config: parsed and named; never changed.
        inputs: the graph's, in its order. Optional ones (initializers) are not derived: naming them is up to the
            operator. An ensemble has no graph, hence none.
        outputs: the graph's.
        num_gpus: cards that instances may use.
        default_max_batch_size: of a model that can batch and does not say how far; 0 leaves it without batches.
        auto_complete: look at the graph at all; without it, only Triton's defaults are filled in.

    Returns:
        What the config endpoint shows.

    Raises:
        ConfigError: the config asks for batches, and the graph cannot.
    """
    full = ModelConfig()
    full.CopyFrom(config)
    if full.platform != ENSEMBLE and not full.HasField("ensemble_scheduling"):
        full.platform = full.platform or PLATFORM
        full.backend = full.backend or BACKEND
        full.default_model_filename = full.default_model_filename or DEFAULT_GRAPH
        for side in ("input_pinned_memory", "output_pinned_memory"):
            if not full.optimization.HasField(side):
                getattr(full.optimization, side).enable = True
        if auto_complete and not (full.input and full.output):
            _derive(full, [each for each in inputs if not each.is_optional], outputs, default_max_batch_size)
    _fill_scheduling(full)
    normalize_instance_groups(full, num_gpus)
    return full


def _derive(
    config: ModelConfig, inputs: Sequence[GraphTensor], outputs: Sequence[GraphTensor], default_max_batch_size: int
) -> None:
    can_batch = all(tensor.dims and tensor.dims[0] == -1 for tensor in (*inputs, *outputs))
    if config.max_batch_size and not can_batch:
        reason = (
            f"autofill failed for model '{config.name}': model does not support batching while non-zero max_batch_size "
            "is specified"
        )
        raise ConfigError(reason, field="max_batch_size")
    if can_batch:
        config.max_batch_size = config.max_batch_size or default_max_batch_size
        if config.max_batch_size > 1 and config.WhichOneof("scheduling_choice") is None:
            config.dynamic_batching.SetInParent()
    batching = config.sequence_batching if config.HasField("sequence_batching") else None
    # The server feeds these itself. A stateful model's config names its tensors, or none of them.
    hidden_inputs = {each.name for each in batching.control_input} if batching else set()
    hidden_inputs |= {state.input_name for state in batching.state} if batching else set()
    hidden_outputs = {state.output_name for state in batching.state} if batching else set()
    if not config.input:
        _fill_side(config.input, (each for each in inputs if each.name not in hidden_inputs), config.max_batch_size)
    if not config.output:
        _fill_side(config.output, (each for each in outputs if each.name not in hidden_outputs), config.max_batch_size)


def _fill_side(items: Any, tensors: Iterable[GraphTensor], max_batch_size: int) -> None:  # a repeated field
    for tensor in tensors:
        dims = tensor.dims[1:] if max_batch_size else tensor.dims
        item = items.add(name=tensor.name, data_type=tensor.data_type, dims=dims or (1,))
        if not dims and max_batch_size:
            item.reshape.SetInParent()


def _fill_scheduling(config: ModelConfig) -> None:
    if config.version_policy.WhichOneof("policy_choice") is None:
        config.version_policy.latest.num_versions = 1
    preferred = [config.max_batch_size] if config.max_batch_size > 0 else []
    if config.HasField("dynamic_batching") and not config.dynamic_batching.preferred_batch_size:
        config.dynamic_batching.preferred_batch_size.extend(preferred)
    if config.HasField("sequence_batching"):
        batching = config.sequence_batching
        batching.max_sequence_idle_microseconds = batching.max_sequence_idle_microseconds or DEFAULT_IDLE_US
        if batching.WhichOneof("strategy_choice") == "oldest" and not batching.oldest.preferred_batch_size:
            batching.oldest.preferred_batch_size.extend(preferred)
