"""Which fields of ModelConfig a plain tensor model or an ensemble honours, and why the others are refused.

Floor 1. What is in neither table is refused as well: a field that a newer tritonclient brings is never ignored.
"""

from collections.abc import Iterator
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.config import FILE_NAME

_HONOURED = {
    "": "name platform backend runtime max_batch_size default_model_filename parameters.string_value",
    "version_policy.": "latest.num_versions all specific.versions",
    "input.": "name data_type format dims reshape.shape optional",
    "output.": "name data_type dims reshape.shape label_filename",
    "instance_group.": "name kind count gpus",
    "optimization.": "graph.level input_pinned_memory.enable output_pinned_memory.enable",
    "optimization.execution_accelerators.gpu_execution_accelerator.": "name parameters",
    "optimization.execution_accelerators.cpu_execution_accelerator.": "name parameters",
    "dynamic_batching.": (
        "preferred_batch_size max_queue_delay_microseconds preserve_ordering priority_levels default_priority_level"
    ),
    "dynamic_batching.default_queue_policy.": (
        "timeout_action default_timeout_microseconds allow_timeout_override max_queue_size"
    ),
    "dynamic_batching.priority_queue_policy.": (
        "timeout_action default_timeout_microseconds allow_timeout_override max_queue_size"
    ),
    "sequence_batching.": "max_sequence_idle_microseconds",
    "sequence_batching.direct.": "max_queue_delay_microseconds minimum_slot_utilization",
    "sequence_batching.oldest.": (
        "max_candidate_sequences preferred_batch_size max_queue_delay_microseconds preserve_ordering"
    ),
    "sequence_batching.control_input.": "name",
    "sequence_batching.control_input.control.": ("kind int32_false_true fp32_false_true bool_false_true data_type"),
    "sequence_batching.state.": (
        "input_name output_name data_type dims use_same_buffer_for_input_output use_growable_memory"
    ),
    "sequence_batching.state.initial_state.": "name data_type dims zero_data data_file",
    "ensemble_scheduling.step.": "model_name model_version input_map output_map",
    "model_warmup.": "name batch_size count",
    "model_warmup.inputs.": "data_type dims zero_data random_data input_data_file",
    "model_transaction_policy.": "decoupled",
    "response_cache.": "enable",
}
HONOURED = frozenset(prefix + name for prefix, names in _HONOURED.items() for name in names.split())
"""Dotted, without indices and keys. Messages that hold one of them may be there."""

_NO_RAGGED = "ragged batches are not offered: requests of different shapes run in batches of their own"
_TENSORRT_ONLY = "shape tensors and non-linear formats are only supported for TensorRT platform"
_CUDA_GRAPHS = "belongs to Triton's TensorRT backend; ONNX Runtime's providers have options of their own"

REFUSED = {
    "input.is_shape_tensor": _TENSORRT_ONLY,
    "input.is_non_linear_format_io": _TENSORRT_ONLY,
    "input.allow_ragged_batch": _NO_RAGGED,
    "output.is_shape_tensor": _TENSORRT_ONLY,
    "output.is_non_linear_format_io": _TENSORRT_ONLY,
    "batch_input": _NO_RAGGED,
    "batch_output": _NO_RAGGED,
    "optimization.priority": "is not offered: ONNX Runtime has no priorities of models",
    "optimization.cuda": _CUDA_GRAPHS,
    "optimization.gather_kernel_buffer_threshold": _CUDA_GRAPHS,
    "optimization.eager_batching": _CUDA_GRAPHS,
    "sequence_batching.iterative_sequence": "is not offered: a request of a sequence runs once",
    "ensemble_scheduling.max_inflight_requests": "is not offered: ensembles are bounded as every model is",
    "ensemble_scheduling.step.model_namespace": "is not offered: models of a server share one namespace",
    "instance_group.rate_limiter": "is not offered: limit the instances instead",
    "instance_group.secondary_devices": "is not offered: it belongs to NVDLA cores",
    "instance_group.profile": "is only supported for TensorRT models",
    "instance_group.passive": "is not offered: every instance takes requests",
    "instance_group.host_policy": "is not offered: the server has no host policies",
    "cc_model_filenames": "is not offered: name one file in default_model_filename",
    "metric_tags": "is not offered: metrics are labelled with model and version",
    "model_operations.op_library_filename": "loads code into the server and is not offered",
    "model_repository_agents": "loads code into the server and is not offered",
    "model_metrics": "is not offered: the buckets of histograms are the server's",
}
"""What is known and not offered, with the reason that an operator reads."""

_CONTAINERS = frozenset(
    path[:end] for path in HONOURED | REFUSED.keys() for end, char in enumerate(path) if char == "."
)


def refuse_fields(config: ModelConfig, *, file: str = FILE_NAME) -> None:
    """Raise ConfigError for the first field, in order of numbers, that is set and not honoured.

    Also for an enum value that the proto does not name.
    """
    _refuse(config, "", "", file)


def _refuse(message: Any, path: str, shown: str, file: str) -> None:  # any message: tritonclient's are untyped
    for field, value in message.ListFields():
        here = path + field.name
        where = shown + field.name
        if here in REFUSED:
            raise ConfigError(REFUSED[here], file=file, field=where)
        if here not in HONOURED and here not in _CONTAINERS:
            raise ConfigError("is not known to this server", file=file, field=where)
        if field.enum_type is not None and value not in field.enum_type.values_by_number:
            raise ConfigError(f"is {value}, which is no {field.enum_type.name}", file=file, field=where)
        if here in _CONTAINERS:
            for key, child in _children(field, value):
                _refuse(child, f"{here}.", f"{where}{key}.", file)


def _children(field: Any, value: Any) -> Iterator[tuple[str, Any]]:
    if not field.is_repeated:
        yield "", value
    elif field.message_type.GetOptions().map_entry:
        for key in sorted(value):
            yield f"[{key!r}]", value[key]
    else:
        for index, child in enumerate(value):
            yield f"[{index}]", child
