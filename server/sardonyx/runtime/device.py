"""A device with memory of its own, as runners see it: everything given to it is done in order, later.

Floor 2. The seam between runners and CUDA: `sardonyx.runtime.device_cuda` is the production side. Addresses are
numbers; whoever allocates memory frees it.
"""

from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from sardonyx.runtime.dtypes import Datatype
from sardonyx.runtime.session import TensorSpec

EAGER = -1
"""The graph id of a run that is neither captured nor replayed."""
ALIGNMENT = 256
"""Bytes: where tensors that share an allocation may begin, as CUDA's own allocations do."""

Bytes = npt.NDArray[np.uint8]


def aligned(num_bytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class DeviceTensor(msgspec.Struct, frozen=True):
    """A tensor in the device's memory. It owns nothing."""

    address: int
    shape: tuple[int, ...]
    datatype: Datatype

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.datatype.array.itemsize


class Mark(Protocol):
    """A point in the order of what was given to a device."""

    def wait(self) -> None:
        """Return when all that was given before it is done. Once.

        Raises:
            EngineError: the device failed.
        """
        ...


class DeviceBinding(Protocol):
    """Inputs and outputs of a session bound by address, ready to run again and again. It owns no tensor."""

    def bind_input(self, name: str, source: DeviceTensor | npt.NDArray[Any]) -> None:
        """Read `name` from a tensor at each run; or from a host array, C-contiguous, as it is when `run` is called."""
        ...

    def bind_output(self, name: str, target: DeviceTensor) -> None:
        """Write `name` into a tensor at each run. It has the shape that the graph gives the output."""
        ...

    def run(self, graph_id: int = EAGER) -> None:
        """Give the device a run and return.

        Args:
            graph_id: of a captured graph, which is replayed: nothing may be bound otherwise than it was, and host
                arrays are not read again.

        Raises:
            EngineError: it was not taken.
        """
        ...

    def capture(self, graph_id: int) -> None:
        """Run, and keep all that the device was given for it under `graph_id`, above 0 and new to the session.

        Returns when that is done. Graphs belong to the thread that captures them: the one that runs them later.

        Raises:
            EngineError: the run failed, or cannot be captured.
        """
        ...


class DeviceSession(Protocol):
    """An open graph, all of whose nodes run on the device."""

    @property
    def inputs(self) -> dict[str, TensorSpec]: ...

    @property
    def outputs(self) -> dict[str, TensorSpec]: ...

    def new_binding(self) -> DeviceBinding:
        """An empty one."""
        ...

    def close(self) -> None:
        """Free it once its last binding is gone."""
        ...


class Device(Protocol):
    """One device, and one order in which it works for this object. Used by one thread at a time."""

    @property
    def name(self) -> str:
        """``cuda:0``."""
        ...

    def open(self, path: Path, *, model_name: str) -> DeviceSession:
        """Open a graph.

        Raises:
            ConfigError: it is missing, unsafe, or has a node that the device cannot run.
        """
        ...

    def allocate(self, num_bytes: int) -> int:
        """Memory of the device, all zero; its address is a multiple of `ALIGNMENT`.

        Raises:
            EngineError: there is not so much.
        """
        ...

    def free(self, address: int) -> None:
        """Free what `allocate` gave, when all that was given before is done. Never fails."""
        ...

    def allocate_host(self, num_bytes: int) -> Bytes:
        """Host memory from which and to which the device copies by itself. It lives as long as the device.

        Raises:
            EngineError: there is not so much.
        """
        ...

    def write(self, target: int, source: Bytes) -> None:
        """Copy to an address of the device. `source` has to stay as it is until a later mark is reached."""
        ...

    def read(self, source: int, target: Bytes) -> None:
        """Copy from an address of the device. `target` has it when a later mark is reached."""
        ...

    def copy(self, source: int, target: int, num_bytes: int) -> None:
        """Copy within the device's memory, between stretches that do not overlap."""
        ...

    def mark(self) -> Mark:
        """The present end of what was given to the device."""
        ...

    def close(self) -> None:
        """Wait for the end of everything and free what is left. Idempotent."""
        ...
