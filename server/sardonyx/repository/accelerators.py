"""Which execution providers a plain tensor model runs on: Triton's ``optimization`` as ONNX Runtime's options.

Floor 1. Providers have our names; their options ONNX Runtime's.

Source: ONNX Runtime, docs/execution-providers/TensorRT-ExecutionProvider.md and CUDA-ExecutionProvider.md;
onnxruntime_backend, README.md.
"""

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from sardonyx.errors import ConfigError
from sardonyx.repository.config import FILE_NAME
from sardonyx.repository.session_parameters import (
    ALGORITHM_SEARCHES,
    ARENA_STRATEGIES,
    SessionParameters,
    parse_count,
    parse_flag,
)

GPU_PROVIDERS = frozenset({"tensorrt", "cuda"})
"""Those that only instances on a GPU use."""
PATH_OPTIONS = frozenset(
    {
        "trt_engine_cache_path",
        "trt_timing_cache_path",
        "trt_ep_context_file_path",
        "trt_int8_calibration_table_name",
    }
)
"""Options that name a file or a folder. They are relative and without ``..``; ONNX Runtime would take them from the
process's own folder, so who opens the session puts the model's in front."""

_CODE = "trt_extra_plugin_lib_paths"
_GRAPH_REPLAY = "trt_cuda_graph_enable"
_REPLAYS = "it replays one shape at one address"
_PRECISIONS = {"FP32": None, "FP16": "trt_fp16_enable", "BF16": "trt_bf16_enable", "INT8": "trt_int8_enable"}
# The default tries every algorithm whenever a shape is new, which takes seconds.
_CUDA_DEFAULTS = {"cudnn_conv_algo_search": "HEURISTIC"}


class ProviderChoice(msgspec.Struct, frozen=True):
    """One execution provider of a session."""

    name: str
    """Ours: ``tensorrt``, ``cuda``, ``openvino``, ``cpu``."""
    options: dict[str, str] = {}
    """ONNX Runtime's, without ``device_id``, which is the instance's."""


def read_providers(
    config: ModelConfig, session: SessionParameters, *, file: str = FILE_NAME
) -> tuple[list[ProviderChoice], list[str]]:
    """The providers in the order in which they are asked for nodes, the CPU last.

    GPU accelerators come first as listed, then CUDA itself. An accelerator's options win over those of ``parameters``.

    Returns:
        The choices of an instance on a GPU (one on the CPU leaves `GPU_PROVIDERS` out), and notes.

    Raises:
        ConfigError: an accelerator or an option that is unknown or not offered, or a value of the wrong type.
    """
    accelerators = config.optimization.execution_accelerators
    choices: dict[str, ProviderChoice] = {}
    for side, known in (("gpu_execution_accelerator", _GPU), ("cpu_execution_accelerator", _CPU)):
        for index, each in enumerate(getattr(accelerators, side)):
            where = f"optimization.execution_accelerators.{side}[{index}]"
            if each.name not in known:
                reason = f"unknown Execution Accelerator '{each.name}' is requested"
                raise ConfigError(reason, file=file, field=f"{where}.name")
            if each.name in choices:
                raise ConfigError(f"{each.name!r} is there twice", file=file, field=f"{where}.name")
            try:
                choices[each.name] = ProviderChoice(each.name, known[each.name](each.parameters))
            except ValueError as error:
                raise ConfigError(str(error), file=file, field=f"{where}.parameters") from error
    cuda = choices.pop("cuda", ProviderChoice("cuda"))
    ordered = [choices[name] for name in choices if name in _GPU]
    ordered.append(ProviderChoice("cuda", _CUDA_DEFAULTS | session.cuda_options | cuda.options))
    ordered += [choices[name] for name in choices if name in _CPU]
    ordered.append(ProviderChoice("cpu"))
    return ordered, _pinned_notes(config)


def requires_gpu(config: ModelConfig) -> bool:
    """Whether the operator's config, before anything is filled in, insists on a card (KIND_GPU)."""
    return any(group.kind == ModelInstanceGroup.KIND_GPU for group in config.instance_group)


def tensorrt_options(parameters: Mapping[str, str]) -> dict[str, str]:
    """ONNX Runtime's options of the TensorRT provider for Triton's parameters. Raises ValueError."""
    options = {}
    for key in sorted(parameters):
        value = parameters[key]
        if key == "precision_mode":
            if value not in _PRECISIONS:
                raise ValueError(f"unsupported precision mode '{value}' is requested")
            if name := _PRECISIONS[value]:
                options[name] = "1"
            continue
        if key == _CODE:
            raise ValueError(f"{key} loads code into the server and is not offered")
        if key not in _TENSORRT:
            raise ValueError(f"unknown parameter '{key}' is provided for TensorRT Execution Accelerator")
        name, parse = _TENSORRT[key]
        options[name] = _parsed(key, value, parse)
        if key == _GRAPH_REPLAY and options[name] == "1":
            raise ValueError(f"{key} is not offered: {_REPLAYS}")
    return options


def cuda_options(parameters: Mapping[str, str]) -> dict[str, str]:
    """ONNX Runtime's options of the CUDA provider, whose names Triton takes as they are. Raises ValueError.

    Those that hold addresses (streams, allocators), name the device or pin addresses (CUDA graphs) are not offered.
    """
    options = {}
    for key in sorted(parameters):
        if key in _NOT_OFFERED_CUDA:
            raise ValueError(f"{key} is not offered: {_NOT_OFFERED_CUDA[key]}")
        if key not in _CUDA:
            raise ValueError(f"unknown parameter '{key}' is provided for CUDA Execution Accelerator")
        options[key] = _parsed(key, parameters[key], _CUDA[key])
    return options


def openvino_options(parameters: Mapping[str, str]) -> dict[str, str]:
    """ONNX Runtime's options of the OpenVINO provider on the CPU. Raises ValueError for any parameter."""
    if parameters:
        raise ValueError(f"unknown parameter '{min(parameters)}' is provided for OpenVINO Execution Accelerator")
    return {"device_type": "CPU"}


def _pinned_notes(config: ModelConfig) -> list[str]:
    sides = ("input_pinned_memory", "output_pinned_memory")
    return [
        f"optimization.{side} changes nothing: ONNX Runtime decides where it copies"
        for side in sides
        if config.optimization.HasField(side) and not getattr(config.optimization, side).enable
    ]


def _parsed(key: str, value: str, parse: Callable[[str], str]) -> str:
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _parse_text(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("is empty or has characters that are not printable")
    return text


def _parse_path(text: str) -> str:
    path = PurePosixPath(_parse_text(text))
    if path.is_absolute() or ".." in path.parts or "\\" in text:
        raise ValueError("must be a relative path without '..'; it begins at the model's folder")
    return text


def _parse_prefix(text: str) -> str:
    if "/" in _parse_path(text):
        raise ValueError("must not hold '/'")
    return text


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"is '{text}'; there are {', '.join(choices)}")
        return text

    return parse


def _parse_integer(text: str) -> str:
    """Some of TensorRT's take -1 for "as it likes"."""
    return "-1" if text == "-1" else parse_count(text, (1 << 31) - 1)


_TENSORRT: dict[str, tuple[str, Callable[[str], str]]] = {
    "max_workspace_size_bytes": ("trt_max_workspace_size", parse_count),
    "int8_calibration_table_name": ("trt_int8_calibration_table_name", _parse_path),
    "int8_use_native_calibration_table": ("trt_int8_use_native_calibration_table", parse_flag),
    **{
        key: (key, parse_flag)
        for key in (
            "trt_dla_enable",
            "trt_engine_cache_enable",
            "trt_dump_subgraphs",
            "trt_force_sequential_engine_build",
            "trt_context_memory_sharing_enable",
            "trt_layer_norm_fp32_fallback",
            "trt_timing_cache_enable",
            "trt_force_timing_cache",
            "trt_detailed_build_log",
            "trt_build_heuristics_enable",
            "trt_sparsity_enable",
            "trt_cuda_graph_enable",
            "trt_dump_ep_context_model",
        )
    },
    **{
        key: (key, _parse_integer)
        for key in (
            "trt_max_partition_iterations",
            "trt_min_subgraph_size",
            "trt_dla_core",
            "trt_builder_optimization_level",
            "trt_auxiliary_streams",
            "trt_ep_context_embed_mode",
        )
    },
    **{
        key: (key, _parse_text)
        for key in (
            "trt_tactic_sources",
            "trt_profile_min_shapes",
            "trt_profile_max_shapes",
            "trt_profile_opt_shapes",
        )
    },
    **{
        key: (key, _parse_path)
        for key in ("trt_engine_cache_path", "trt_timing_cache_path", "trt_ep_context_file_path")
    },
    "trt_engine_cache_prefix": ("trt_engine_cache_prefix", _parse_prefix),
}

_CUDA: dict[str, Callable[[str], str]] = {
    "arena_extend_strategy": _one_of(*ARENA_STRATEGIES),
    "cudnn_conv_algo_search": _one_of(*ALGORITHM_SEARCHES),
    "gpu_mem_limit": parse_count,
    "sdpa_kernel": parse_count,
    "tunable_op_max_tuning_duration_ms": parse_count,
    **dict.fromkeys(
        (
            "cudnn_conv1d_pad_to_nc1d",
            "cudnn_conv_use_max_workspace",
            "do_copy_in_default_stream",
            "enable_skip_layer_norm_strict_mode",
            "fuse_conv_bias",
            "prefer_nhwc",
            "tunable_op_enable",
            "tunable_op_tuning_enable",
            "use_ep_level_unified_stream",
            "use_tf32",
        ),
        parse_flag,
    ),
}
_NOT_OFFERED_CUDA = {
    "device_id": "instance_group says which card",
    "enable_cuda_graph": _REPLAYS,
    **dict.fromkeys(
        (
            "user_compute_stream",
            "has_user_compute_stream",
            "gpu_external_alloc",
            "gpu_external_free",
            "gpu_external_empty_cache",
            "default_memory_arena_cfg",
        ),
        "it is an address in the process",
    ),
}
_GPU: dict[str, Callable[[Mapping[str, str]], dict[str, str]]] = {"tensorrt": tensorrt_options, "cuda": cuda_options}
_CPU: dict[str, Callable[[Mapping[str, str]], dict[str, str]]] = {"openvino": openvino_options}
