"""Where a session's nodes came to lie: providers that could not be set up, and work that fell to the CPU.

Floor 2. ONNX Runtime opens a session all the same where a provider's libraries are missing, and computes on the CPU
what the others cannot. Such a model answers, and is slow; so it is refused, with the reason.
"""

import ctypes
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import onnxruntime as ort

from sardonyx.errors import ConfigError
from sardonyx.runtime.providers import ExecutionProvider

RECORD_ENTRY = "session.record_ep_graph_assignment_info"
NO_FALLBACK_ENTRY = "session.disable_cpu_ep_fallback"

_CPU = "CPUExecutionProvider"
_CPU_REFUSED = "assigned to the default CPU EP"
_SHOWN_OPERATORS = 5
_WAYS = "export the graph without them, or say KIND_AUTO in instance_group, and the CPU runs them"
_PLUMBING = frozenset(
    {
        "Abs",
        "Add",
        "And",
        "Cast",
        "Ceil",
        "Concat",
        "ConcatFromSequence",
        "Constant",
        "ConstantOfShape",
        "Div",
        "Equal",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "If",
        "Less",
        "LessOrEqual",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Range",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "Reshape",
        "ScatterND",
        "SequenceAt",
        "SequenceConstruct",
        "Shape",
        "Size",
        "Slice",
        "Split",
        "Squeeze",
        "Sub",
        "Tile",
        "Unsqueeze",
        "Where",
    }
)
"""Operators that compute shapes. The CUDA provider leaves them to the CPU on purpose, where the sizes are needed; on
tensors it has kernels for each of them."""


class _Assigned(Protocol):
    @property
    def ep_name(self) -> str: ...
    def get_nodes(self) -> Sequence[Any]: ...


def check_placement(
    session: Any, providers: Sequence[ExecutionProvider], *, is_strict: bool, folder: Path | None = None
) -> None:
    """Refuse a session that does not run where it was asked to.

    Args:
        session: an `onnxruntime.InferenceSession`, opened with `RECORD_ENTRY`.
        providers: that it was opened with, in order.
        is_strict: nothing but shapes may be computed on the CPU.
        folder: of ONNX Runtime's libraries, to find out why one is missing.

    Raises:
        ConfigError: a provider is not there, TensorRT has no node, or the CPU has nodes that compute.
    """
    present = session.get_providers()
    for provider in providers:
        if provider.ort_name not in present:
            reason = load_failure(provider, folder or Path(ort.__file__).parent / "capi")
            raise ConfigError(f"the execution provider {provider.name} could not be set up{reason}")
    if providers[0].name == "cpu":
        return
    assigned: list[_Assigned] = list(session.get_provider_graph_assignment_info())
    for provider in providers:
        if provider.name == "tensorrt" and not _operators(assigned, provider.ort_name):
            raise ConfigError("TensorRT takes none of its nodes; leave the accelerator out, and CUDA runs them")
    if is_strict and (left := sorted(set(_operators(assigned, _CPU)) - _PLUMBING)):
        raise ConfigError(f"{providers[0].name} cannot run {_list(left)}: {_WAYS}")


def refused_cpu(error: Exception, providers: Sequence[ExecutionProvider]) -> ConfigError | None:
    """What `NO_FALLBACK_ENTRY` made ONNX Runtime say, in our words; ``None`` for all other errors."""
    if _CPU_REFUSED not in str(error):
        return None
    return ConfigError(
        f"{providers[0].name} leaves nodes to the CPU, or could not be set up, and {NO_FALLBACK_ENTRY} is on; the log "
        "says why"
    )


def load_failure(provider: ExecutionProvider, folder: Path) -> str:
    """Why a provider's library cannot be loaded, as a clause; empty where it can, or is built in."""
    shared, library = (folder / f"libonnxruntime_providers_{name}.so" for name in ("shared", provider.name))
    if not library.is_file():
        return ""
    try:
        ctypes.CDLL(str(shared), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        return f": {str(error).replace(f'{folder}/', '')}"
    return "; the log says why"


def _operators(assigned: Iterable[_Assigned], ort_name: str) -> list[str]:
    """Of the nodes of a provider; those outside of ONNX's own domain with it."""
    return [
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}:{node.op_type}"
        for subgraph in assigned
        if subgraph.ep_name == ort_name
        for node in subgraph.get_nodes()
    ]


def _list(operators: list[str]) -> str:
    more = len(operators) - _SHOWN_OPERATORS
    return ", ".join(operators[:_SHOWN_OPERATORS]) + (f" and {more} more kinds of nodes" if more > 0 else "")
