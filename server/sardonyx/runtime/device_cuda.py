"""A device over ONNX Runtime's CUDA execution provider.

Floor 2, and the only place that knows ONNX Runtime's side of devices: IO binding by address, run options, captured
graphs. All sessions of a device work on its one stream, so a run sees what was written or computed before it and
nobody waits for anybody.

What ONNX Runtime does with it has been run on the CPU alone, where graph ids have no effect; the provider's own
options have not yet met a card.

Source: ONNX Runtime, "CUDA Execution Provider" (options, CUDA graphs) and onnxruntime_run_options_config_keys.h.
"""

import logging
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime as ort

from sardonyx.errors import EngineError
from sardonyx.runtime.device import EAGER, Bytes, Device, DeviceTensor
from sardonyx.runtime.device_driver import CudaStream, Stream
from sardonyx.runtime.providers import ExecutionProvider, execution_provider
from sardonyx.runtime.session import Session, SessionConfig, TensorSpec, open_session

_ort_logger = logging.getLogger("sardonyx.onnxruntime")

SESSION_ENTRIES = {
    # Nodes that the card cannot run are an error: they would cost a copy and a wait in each step, and no graph can be
    # captured.
    "session.disable_cpu_ep_fallback": "1",
    # Without it, MatMulNBits for more than one row unpacks its whole weight to 16 bits first.
    "ep.cuda.fpa_intb_gemm": "1",
}


def open_cuda_device(device_id: int) -> Device:
    """One card and a stream on it.

    Raises:
        ConfigError: the installed ONNX Runtime knows no CUDA, there is no driver or no such card.
    """
    execution_provider("cuda")  # before the driver: who has installed the wrong package is told so
    stream = CudaStream(device_id)
    provider = execution_provider("cuda", provider_options(device_id, stream.handle))
    return SessionDevice(provider, SESSION_ENTRIES, "cuda", device_id, stream)


def provider_options(device_id: int, stream_handle: int) -> dict[str, str]:
    """What the CUDA execution provider is given beside our defaults.

    A stream of ours lets the sessions of a model follow each other without waiting. Graphs are captured in the runs
    that ask for it and in no others.
    """
    return {"device_id": str(device_id), "user_compute_stream": str(stream_handle), "enable_cuda_graph": "1"}


def run_options(graph_id: int, *, is_synchronous: bool) -> ort.RunOptions:
    """Options of a run; with `EAGER` nothing is captured or replayed."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    options.add_run_config_entry("disable_synchronize_execution_providers", str(int(not is_synchronous)))
    return options


class SessionDevice:
    """A `sardonyx.runtime.device.Device` whose graphs are sessions of one execution provider.

    Args:
        provider: for all sessions; it works on `stream`.
        entries: session config entries for all sessions.
        device_type: what ONNX Runtime calls the memory that `stream` allocates.
        device_id: its number.
        stream: belongs to the device from now on.
    """

    def __init__(
        self, provider: ExecutionProvider, entries: dict[str, str], device_type: str, device_id: int, stream: Stream
    ) -> None:
        self.name = f"{device_type}:{device_id}"
        self._config = SessionConfig(providers=(provider,), session_entries=entries)
        self._place = (device_type, device_id)
        self._stream = stream
        self._allocated: set[int] = set()

    def open(self, path: Path, *, model_name: str) -> "OpenGraph":
        return OpenGraph(open_session(path, model_name=model_name, config=self._config), self._place)

    def allocate(self, num_bytes: int) -> int:
        address = self._stream.allocate(num_bytes)
        self._allocated.add(address)
        return address

    def free(self, address: int) -> None:
        self._allocated.remove(address)
        self._stream.free(address)

    def allocate_host(self, num_bytes: int) -> Bytes:
        return self._stream.allocate_host(num_bytes)

    def write(self, target: int, source: Bytes) -> None:
        self._stream.write(target, source)

    def read(self, source: int, target: Bytes) -> None:
        self._stream.read(source, target)

    def copy(self, source: int, target: int, num_bytes: int) -> None:
        self._stream.copy(source, target, num_bytes)

    def mark(self) -> "StreamMark":
        return StreamMark(self._stream, self._stream.record())

    def close(self) -> None:
        while self._allocated:
            self._stream.free(self._allocated.pop())
        self._stream.close()


class StreamMark:
    """A recorded event."""

    __slots__ = ("_event", "_stream")

    def __init__(self, stream: Stream, event: int) -> None:
        self._stream = stream
        self._event = event

    def wait(self) -> None:
        self._stream.wait(self._event)


class OpenGraph:
    """A session whose runs are not waited for."""

    def __init__(self, session: Session, place: tuple[str, int]) -> None:
        self._session = session
        self._place = place
        self._options: dict[int, ort.RunOptions] = {}
        self.inputs: dict[str, TensorSpec] = session.inputs
        self.outputs: dict[str, TensorSpec] = session.outputs

    def new_binding(self) -> "GraphBinding":
        return GraphBinding(self, self._session.new_io_binding(), self._place)

    def run(self, binding: Any, graph_id: int, *, is_synchronous: bool = False) -> None:
        """Run with an ``onnxruntime.IOBinding``."""
        if is_synchronous:
            options = run_options(graph_id, is_synchronous=True)
        else:
            options = self._options.get(graph_id) or run_options(graph_id, is_synchronous=False)
            self._options[graph_id] = options
        self._session.run_binding(binding, options)

    def close(self) -> None:
        self._session.close()


class GraphBinding:
    """An ``onnxruntime.IOBinding`` by address."""

    def __init__(self, graph: OpenGraph, binding: Any, place: tuple[str, int]) -> None:
        self._graph = graph
        self._binding = binding  # onnxruntime.IOBinding, which has no types
        self._place = place
        self._host: dict[str, npt.NDArray[Any]] = {}

    def bind_input(self, name: str, source: DeviceTensor | npt.NDArray[Any]) -> None:
        if isinstance(source, DeviceTensor):
            kind, shape, address = source.datatype.element_type, source.shape, source.address
            self._binding.bind_input(name, *self._place, kind, shape, address)
        else:
            self._host[name] = source
            self._binding.bind_input(name, "cpu", 0, source.dtype, source.shape, source.ctypes.data)

    def bind_output(self, name: str, target: DeviceTensor) -> None:
        kind, shape, address = target.datatype.element_type, target.shape, target.address
        self._binding.bind_output(name, *self._place, kind, shape, address)

    def run(self, graph_id: int = EAGER) -> None:
        self._graph.run(self._binding, graph_id)

    def capture(self, graph_id: int) -> None:
        """One call: ONNX Runtime runs, runs again to capture, and replays what it captured."""
        if graph_id <= 0:
            raise EngineError(f"{graph_id} is no id for a captured graph")
        self._graph.run(self._binding, graph_id, is_synchronous=True)
