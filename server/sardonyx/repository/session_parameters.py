"""What ``parameters`` of a plain tensor model say about its ONNX Runtime session, under the names of Triton's backend.

Floor 1. A parameter that nothing reads is refused by name.
"""

from collections.abc import Callable
from typing import Literal

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.config import FILE_NAME
from sardonyx.repository.model_options import unknown_parameter

ALGORITHM_SEARCHES: tuple[Literal["EXHAUSTIVE", "HEURISTIC", "DEFAULT"], ...] = ("EXHAUSTIVE", "HEURISTIC", "DEFAULT")
"""By the numbers that ``cudnn_conv_algo_search`` has in ``parameters``."""
ARENA_STRATEGIES: tuple[Literal["kNextPowerOfTwo", "kSameAsRequested"], ...] = ("kNextPowerOfTwo", "kSameAsRequested")

_DEVICE_ALLOCATOR = "session.use_device_allocator_for_initializers"
_NO_FALLBACK = "session.disable_cpu_ep_fallback"
_ARENA_SHRINKAGE = "memory.enable_memory_arena_shrinkage"
_SHARED_SESSION = "share_session_between_instances"
_MAX_THREADS = 4096


class SessionParameters(msgspec.Struct, frozen=True, kw_only=True):
    """How the model's sessions are opened. What is ``None`` is the server's or ONNX Runtime's own choice."""

    is_parallel: bool = False
    """``execution_mode`` 1: branches of the graph run at once."""
    num_intra_op_threads: int | None = None
    """``intra_op_thread_count``: threads inside one operator."""
    num_inter_op_threads: int | None = None
    """``inter_op_thread_count``: operators that run at once in parallel mode."""
    enable_arena: bool | None = None
    """``enable_mem_arena``"""
    enable_mem_pattern: bool | None = None
    session_entries: dict[str, str] = {}
    """ONNX Runtime's session config entries."""
    run_entries: dict[str, str] = {}
    """ONNX Runtime's run config entries."""
    cuda_options: dict[str, str] = {}
    """Options of the CUDA provider that Triton reads here for old configs' sake. They are already in the model's
    `ProviderChoice`, unless an accelerator says otherwise."""
    notes: list[str] = []
    """What is accepted and changes nothing."""


def read_session_parameters(config: ModelConfig, *, file: str = FILE_NAME) -> SessionParameters:
    """Check and read ``parameters``.

    Raises:
        ConfigError: a parameter that nothing reads, or a value out of range.
    """
    values = {}
    for key in sorted(config.parameters):
        parse = _PARSERS.get(key)
        if parse is None:
            raise unknown_parameter(key, _PARSERS, owner="an ONNX model", file=file)
        text = config.parameters[key].string_value.strip()
        try:
            values[key] = parse(text)
        except ValueError as error:
            raise ConfigError(str(error), file=file, field=f"parameters[{key!r}]") from error
    return SessionParameters(
        is_parallel=values.get("execution_mode") == "1",
        num_intra_op_threads=int(values.get("intra_op_thread_count", 0)) or None,
        num_inter_op_threads=int(values.get("inter_op_thread_count", 0)) or None,
        enable_arena=_as_bool(values.get("enable_mem_arena")),
        enable_mem_pattern=_as_bool(values.get("enable_mem_pattern")),
        session_entries={key: values[key] for key in (_DEVICE_ALLOCATOR, _NO_FALLBACK) if key in values},
        run_entries={key: values[key] for key in (_ARENA_SHRINKAGE,) if key in values},
        cuda_options={key: values[key] for key in _CUDA if key in values},
        notes=[f"{_SHARED_SESSION} changes nothing: instances on one device always share a session"]
        if _SHARED_SESSION in values
        else [],
    )


def parse_flag(text: str) -> str:
    """``1`` or ``0`` of what Triton takes for a boolean. Raises ValueError."""
    match text.lower():
        case "1" | "true":
            return "1"
        case "0" | "false":
            return "0"
        case _:
            raise ValueError(f"failed to convert '{text}' to boolean value")


def parse_count(text: str, limit: int = 1 << 62) -> str:
    """A decimal number from 0 up to `limit`, as text. Raises ValueError."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 19 and int(text) <= limit):
        raise ValueError(f"failed to convert '{text}' to integral number from 0 to {limit:,}")
    return str(int(text))


def _as_bool(flag: str | None) -> bool | None:
    return None if flag is None else flag == "1"


def _parse_mode(text: str) -> str:
    if text not in {"0", "1"}:
        raise ValueError(
            f"Invalid configuration value provided. Expected values for execution_mode are 0 or 1 but got {text}"
        )
    return text


def _parse_threads(text: str) -> str:
    return parse_count(text, _MAX_THREADS)


def _parse_shrinkage(text: str) -> str:
    devices = text.split(";")
    for device in devices:
        kind, _, number = device.partition(":")
        if kind not in {"cpu", "gpu"} or not (number.isascii() and number.isdecimal()):
            raise ValueError(f"is a list of devices such as 'cpu:0;gpu:0', not '{text}'")
    return text


def _one_of(name: str, choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not (text.isascii() and text.isdecimal() and len(text) == 1 and int(text) < len(choices)):
            raise ValueError(f"unsupported {name} value '{text}' is requested")
        return choices[int(text)]

    return parse


_CUDA: dict[str, Callable[[str], str]] = {
    "cudnn_conv_algo_search": _one_of("cudnn_conv_algo_search", ALGORITHM_SEARCHES),
    "gpu_mem_limit": parse_count,
    "arena_extend_strategy": _one_of("arena_extend_strategy", ARENA_STRATEGIES),
    "do_copy_in_default_stream": parse_flag,
}
_PARSERS: dict[str, Callable[[str], str]] = {
    "execution_mode": _parse_mode,
    "intra_op_thread_count": _parse_threads,
    "inter_op_thread_count": _parse_threads,
    "enable_mem_arena": parse_flag,
    "enable_mem_pattern": parse_flag,
    _DEVICE_ALLOCATOR: parse_flag,
    _NO_FALLBACK: parse_flag,
    _ARENA_SHRINKAGE: _parse_shrinkage,
    _SHARED_SESSION: parse_flag,
    **_CUDA,
}
