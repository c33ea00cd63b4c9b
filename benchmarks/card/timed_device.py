"""A device that tells how long the host waited for it, and when the card itself began and ended each step.

The card's own clock: an event in front of a step's first copy and one behind its last. Between the end of a step and
the begin of the next one the card has nothing to do, and waits for the host.

Source: NVIDIA, CUDA Driver API, "Event Management".
"""

import ctypes
import time
from pathlib import Path
from typing import Any

from sardonyx.errors import EngineError
from sardonyx.runtime.device import EAGER, Bytes, Device, DeviceBinding, DeviceSession, Mark
from sardonyx.runtime.device_cuda import SessionDevice

Span = tuple[int, int]
"""The events at the begin and at the end of a step."""


class TimedDevice:
    """A `sardonyx.runtime.device.Device` around another.

    Args:
        device: closed with this one.
        is_capturing: allow steps to be captured; else the runner is told that they cannot be.
    """

    def __init__(self, device: Device, *, is_capturing: bool = True) -> None:
        self._device = device
        self._is_capturing = is_capturing
        self.clock = CardClock(device._stream.handle) if isinstance(device, SessionDevice) else None
        self.waited_s = 0.0
        """In all, for marks."""
        self._is_beginning = False
        self._begin = 0

    @property
    def name(self) -> str:
        return self._device.name

    def begin_step(self) -> None:
        """What comes next belongs to a step."""
        self._is_beginning = True

    def end_step(self) -> Span | None:
        """The step's events."""
        return None if self.clock is None else (self._begin, self.clock.record())

    def open(self, path: Path, *, model_name: str) -> DeviceSession:
        session = self._device.open(path, model_name=model_name)
        return session if self._is_capturing else _EagerSession(session)

    def allocate(self, num_bytes: int) -> int:
        return self._device.allocate(num_bytes)

    def free(self, address: int) -> None:
        self._device.free(address)

    def allocate_host(self, num_bytes: int) -> Bytes:
        return self._device.allocate_host(num_bytes)

    def write(self, target: int, source: Bytes) -> None:
        if self._is_beginning and self.clock is not None:
            self._begin = self.clock.record()
        self._is_beginning = False
        self._device.write(target, source)

    def read(self, source: int, target: Bytes) -> None:
        self._device.read(source, target)

    def copy(self, source: int, target: int, num_bytes: int) -> None:
        self._device.copy(source, target, num_bytes)

    def mark(self) -> Mark:
        return _TimedMark(self, self._device.mark())

    def close(self) -> None:
        self._device.close()


class _TimedMark:
    def __init__(self, device: TimedDevice, mark: Mark) -> None:
        self._device = device
        self._mark = mark

    def wait(self) -> None:
        started_s = time.perf_counter()
        self._mark.wait()
        self._device.waited_s += time.perf_counter() - started_s


class _EagerSession:
    """A session whose runs cannot be captured."""

    def __init__(self, session: DeviceSession) -> None:
        self._session = session
        self.inputs = session.inputs
        self.outputs = session.outputs

    def new_binding(self) -> DeviceBinding:
        return _EagerBinding(self._session.new_binding())

    def close(self) -> None:
        self._session.close()


class _EagerBinding:
    def __init__(self, binding: DeviceBinding) -> None:
        self._binding = binding
        self.bind_input = binding.bind_input
        self.bind_output = binding.bind_output

    def run(self, graph_id: int = EAGER) -> None:
        self._binding.run(graph_id)

    def capture(self, graph_id: int) -> None:
        raise EngineError("this benchmark runs every step eagerly")


class CardClock:
    """Events with times on one stream, in the current context. Thread of the stream only."""

    def __init__(self, stream: int) -> None:
        self._driver: Any = ctypes.CDLL("libcuda.so.1")
        self._stream = ctypes.c_void_p(stream)

    def record(self) -> int:
        """An event at the stream's present end."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))
        self._call("cuEventRecord", event, self._stream)
        return event.value or 0

    def between_s(self, first: int, second: int) -> float:
        """Seconds from an event to another, both long past."""
        taken_ms = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(taken_ms), ctypes.c_void_p(first), ctypes.c_void_p(second))
        return taken_ms.value / 1e3

    def forget(self, event: int) -> None:
        self._call("cuEventDestroy_v2", ctypes.c_void_p(event))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            raise EngineError(f"CUDA's driver answers {name} with error {code}")
