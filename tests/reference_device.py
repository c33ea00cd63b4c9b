"""A device without a card: graphs in `onnx.reference` or on the CPU, work that is done late, a record of all of it.

It keeps the promises of `sardonyx.runtime.device.Device` and no others. Nothing is done before a mark is waited for, so
host memory that is overwritten too early changes numbers; a captured graph reads and writes where it was captured, host
inputs as they were then.
"""

import ctypes
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from tests.paged_reference import evaluator

from sardonyx.errors import EngineError
from sardonyx.runtime.device import ALIGNMENT, EAGER, Bytes, DeviceTensor, aligned
from sardonyx.runtime.dtypes import DATATYPES, FP8
from sardonyx.runtime.session import TensorSpec, open_session

Array = npt.NDArray[Any]
_BY_ELEMENT_TYPE = {datatype.element_type: datatype for datatype in (*DATATYPES.values(), FP8)}
_ARRAYS = {"BF16": ml_dtypes.bfloat16, "FP8": ml_dtypes.float8_e4m3fn}
"""Where a tensor's array is more than its bits."""


@dataclass(frozen=True)
class Call:
    """What the device was given: ``write``, ``read``, ``copy``, ``run``, ``capture``, ``mark`` or ``wait``."""

    what: str
    graph: str = ""
    graph_id: int = EAGER
    inputs: dict[str, DeviceTensor | Array] = field(default_factory=dict)
    host_address: int = 0
    """Of a write's source or a read's target."""
    mark: int = 0


class ReferenceDevice:
    """See the module.

    Args:
        capacity_bytes: what `allocate` gives at most.
    """

    name = "reference:0"

    def __init__(self, capacity_bytes: int = 1 << 40) -> None:
        self.calls: list[Call] = []
        self.capacity_bytes = capacity_bytes
        self.allocated: dict[int, Bytes] = {}
        self.on_run: Callable[[str], None] | None = None
        """Called when a run is done, with the graph's name; may raise EngineError."""
        self.on_capture: Callable[[str, int], None] | None = None
        """Called before a capture; may raise EngineError."""
        self.is_closed = False
        self._hosts: list[Bytes] = []
        self._queue: deque[Callable[[], None]] = deque()
        self._num_marks = 0
        self._num_done = 0
        self._num_queued = 0

    def open(self, path: Path, *, model_name: str) -> "ReferenceSession":
        return ReferenceSession(self, path)

    def allocate(self, num_bytes: int) -> int:
        if num_bytes > self.capacity_bytes - sum(memory.nbytes for memory in self.allocated.values()):
            raise EngineError("the card has not so much memory left")
        memory = np.zeros(aligned(max(num_bytes, 1)) + ALIGNMENT, np.uint8)
        address = aligned(memory.ctypes.data)
        self.allocated[address] = memory
        return address

    def free(self, address: int) -> None:
        self.finish()
        memory = self.allocated.pop(address)
        memory[:] = 0xFF  # whoever still reads it reads no number

    def allocate_host(self, num_bytes: int) -> Bytes:
        memory = np.zeros(num_bytes, np.uint8)
        self._hosts.append(memory)
        return memory

    def write(self, target: int, source: Bytes) -> None:
        self.calls.append(Call("write", host_address=source.ctypes.data))
        self._put(lambda: bytes_at(target, source.nbytes).__setitem__(slice(None), source))

    def read(self, source: int, target: Bytes) -> None:
        self.calls.append(Call("read", host_address=target.ctypes.data))
        self._put(lambda: target.__setitem__(slice(None), bytes_at(source, target.nbytes)))

    def copy(self, source: int, target: int, num_bytes: int) -> None:
        assert source + num_bytes <= target or target + num_bytes <= source, "the stretches overlap"
        self.calls.append(Call("copy"))
        self._put(lambda: bytes_at(target, num_bytes).__setitem__(slice(None), bytes_at(source, num_bytes)))

    def mark(self) -> "ReferenceMark":
        self._num_marks += 1
        self.calls.append(Call("mark", mark=self._num_marks))
        return ReferenceMark(self, self._num_marks, self._num_queued)

    def close(self) -> None:
        self.finish()
        self.allocated.clear()
        self.is_closed = True

    def finish(self, num_done: int | None = None) -> None:
        """Do what was given, as far as to a mark."""
        while self._queue and (num_done is None or self._num_done < num_done):
            self._num_done += 1
            self._queue.popleft()()

    def _put(self, work: Callable[[], None]) -> None:
        self._num_queued += 1
        self._queue.append(work)


class ReferenceMark:
    def __init__(self, device: ReferenceDevice, number: int, num_done: int) -> None:
        self._device = device
        self._number = number
        self._num_done = num_done

    def wait(self) -> None:
        self._device.calls.append(Call("wait", mark=self._number))
        self._device.finish(self._num_done)


class ReferenceSession:
    """One graph. The file's stem is its name in `ReferenceDevice.calls`."""

    def __init__(self, device: ReferenceDevice, path: Path) -> None:
        self.device = device
        self.graph = path.stem
        model = onnx.load(path, load_external_data=False)
        self.compute = _opened(path, model)
        self.inputs = {value.name: _spec(value) for value in model.graph.input}
        self.outputs = {value.name: _spec(value) for value in model.graph.output}
        self.captured: dict[int, tuple[dict[str, Any], dict[str, DeviceTensor]]] = {}
        self.is_closed = False

    def new_binding(self) -> "ReferenceBinding":
        return ReferenceBinding(self)

    def close(self) -> None:
        self.is_closed = True


class ReferenceBinding:
    def __init__(self, session: ReferenceSession) -> None:
        self._session = session
        self._inputs: dict[str, DeviceTensor | Array] = {}
        self._outputs: dict[str, DeviceTensor] = {}

    def bind_input(self, name: str, source: DeviceTensor | Array) -> None:
        _check_shape(self._session.inputs[name], source)
        self._inputs[name] = source

    def bind_output(self, name: str, target: DeviceTensor) -> None:
        _check_shape(self._session.outputs[name], target)
        self._outputs[name] = target

    def run(self, graph_id: int = EAGER) -> None:
        session = self._session
        inputs = {name: _as_now(source) for name, source in self._inputs.items()}
        if graph_id != EAGER:
            captured, outputs = session.captured[graph_id]
            for name, source in captured.items():
                if isinstance(source, DeviceTensor):
                    assert source == self._inputs[name], f"{name} is not where it was when the graph was captured"
            assert outputs == self._outputs, "outputs are not where they were when the graph was captured"
            inputs = captured
        self._give("run", graph_id, inputs)

    def capture(self, graph_id: int) -> None:
        device, session = self._session.device, self._session
        assert graph_id > 0
        assert graph_id not in session.captured, f"{session.graph} has a graph {graph_id}"
        if device.on_capture is not None:
            device.on_capture(session.graph, graph_id)
        inputs = {name: _as_now(source) for name, source in self._inputs.items()}
        self._give("capture", graph_id, inputs)
        device.finish()
        session.captured[graph_id] = inputs, dict(self._outputs)

    def _give(self, what: str, graph_id: int, inputs: dict[str, Any]) -> None:
        session, outputs = self._session, dict(self._outputs)
        assert not session.is_closed
        assert inputs.keys() == session.inputs.keys(), f"not bound: {session.inputs.keys() - inputs.keys()}"
        assert outputs.keys() == session.outputs.keys(), f"not bound: {session.outputs.keys() - outputs.keys()}"
        session.device.calls.append(Call(what, session.graph, graph_id, inputs))
        session.device._put(lambda: _compute(session, inputs, outputs))


def _compute(session: ReferenceSession, inputs: dict[str, Any], outputs: dict[str, DeviceTensor]) -> None:
    feeds = {name: tensor_at(each) if isinstance(each, DeviceTensor) else each for name, each in inputs.items()}
    names = list(outputs)
    for name, value in zip(names, session.compute(names, feeds), strict=True):
        target = tensor_at(outputs[name])
        assert value.shape == target.shape, f"{name} is {value.shape}, bound as {target.shape}"
        assert value.dtype == target.dtype, f"{name} is {value.dtype}, bound as {target.dtype}"
        if not np.shares_memory(value, target):
            target[...] = value
    if session.device.on_run is not None:
        session.device.on_run(session.graph)


def _opened(path: Path, model: onnx.ModelProto) -> Callable[[list[str], dict[str, Array]], list[Array]]:
    """What runs a graph: ONNX Runtime's CPU where it has all operators, else `onnx.reference`."""
    if not {"PagedAttention", "MultiHeadAttention"}.isdisjoint(node.op_type for node in model.graph.node):
        reference = evaluator(path)
        return lambda names, feeds: reference.run(names, feeds)
    session = open_session(path, model_name="reference")
    return lambda names, feeds: list(session.run(feeds, names).values())


def bytes_at(address: int, num_bytes: int) -> Bytes:
    """Memory of the device."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))


def tensor_at(tensor: DeviceTensor) -> Array:
    """A tensor of the device, as it is now."""
    dtype = _ARRAYS.get(tensor.datatype.name, tensor.datatype.array)
    return bytes_at(tensor.address, tensor.num_bytes).view(dtype).reshape(tensor.shape)


def _as_now(source: DeviceTensor | Array) -> DeviceTensor | Array:
    return source if isinstance(source, DeviceTensor) else source.copy()


def _check_shape(spec: TensorSpec, given: DeviceTensor | Array) -> None:
    shape = given.shape
    assert len(shape) == len(spec.shape), f"{spec.name} is {spec.shape}, bound as {shape}"
    for wanted, size in zip(spec.shape, shape, strict=True):
        assert not isinstance(wanted, int) or wanted == size, f"{spec.name} is {spec.shape}, bound as {shape}"
    if isinstance(given, DeviceTensor):
        assert given.datatype == spec.datatype
        assert given.address % ALIGNMENT == 0


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim)
    return TensorSpec(value.name, _BY_ELEMENT_TYPE[kind.elem_type], dims)
