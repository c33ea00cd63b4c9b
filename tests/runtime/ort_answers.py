"""What ONNX Runtime answers about a session on a card, for machines without one.

Recorded where it could be: names and shape of `get_provider_graph_assignment_info` from 1.32 on the CPU; that a session
whose provider lacks a library opens with the CPU alone, and the text of the refusal, from public reports on 1.30.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
CPU_REFUSED = (
    "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to the default CPU EP, but "
    "fallback to CPU EP has been explicitly disabled by the user."
)


@dataclass
class Node:
    op_type: str
    domain: str = ""
    name: str = ""


@dataclass
class Assigned:
    ep_name: str
    nodes: list[Node]

    def get_nodes(self) -> list[Node]:
        return self.nodes


def assigned(provider: str, *operators: str) -> Assigned:
    """Operators as ``Add`` or ``domain:Add``."""
    return Assigned(provider, [Node(each.rpartition(":")[2], each.rpartition(":")[0]) for each in operators])


@dataclass
class FakeRuntime:
    """Stands in for `onnxruntime.InferenceSession`; opens the graph on the CPU, and answers as scripted."""

    available: list[str] = field(default_factory=lambda: [TENSORRT, CUDA, CPU])
    """Providers that the build has."""
    missing: set[str] = field(default_factory=set)
    """Of these, whose libraries are not there."""
    assignment: list[Assigned] | None = None
    """``None``: all nodes on the first provider that is there."""
    error: Exception | None = None
    """Raised by sessions that are opened."""
    on_open: Any = None
    """Called with a session's providers while it is opened."""
    stand_in: Path | None = None
    """Opened in place of graphs that only a card could open."""
    opened: list[dict[str, Any]] = field(default_factory=list)
    """Path, providers and session entries of each session."""

    def install(self, monkeypatch: Any) -> "FakeRuntime":
        self.real = ort.InferenceSession
        monkeypatch.setattr(ort, "InferenceSession", self)
        monkeypatch.setattr(ort, "get_available_providers", lambda: self.available)
        return self

    def __call__(
        self, path: str, options: ort.SessionOptions, *, providers: Iterable[Any], **kwargs: Any
    ) -> "FakeSession":
        assert kwargs == {"enable_fallback": 0, "read_config_from_model": 0}
        chosen = [(name, dict(values)) for name, values in providers]
        self.opened.append({"path": path, "providers": chosen, "options": options})
        if self.on_open is not None:
            self.on_open(chosen)
        if self.error is not None:
            raise self.error
        plain = ort.SessionOptions()
        present = [name for name, _ in chosen if name not in self.missing]
        if CPU not in present:
            present.append(CPU)
        assignment = self.assignment or [assigned(present[0], "Add")]
        return FakeSession(self.real(str(self.stand_in or path), plain, providers=[CPU]), present, assignment)


class FakeSession:
    """A session on the CPU that says it were elsewhere."""

    def __init__(self, session: ort.InferenceSession, providers: list[str], assignment: list[Assigned]) -> None:
        self._session = session
        self._providers = providers
        self._assignment = assignment

    def get_providers(self) -> list[str]:
        return self._providers

    def get_provider_graph_assignment_info(self) -> list[Assigned]:
        return self._assignment

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)
