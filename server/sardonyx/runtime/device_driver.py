"""Streams, copies and memory of one NVIDIA card, through the driver's library: what ONNX Runtime's Python API lacks.

Floor 2. ONNX Runtime can be told to work on a stream of ours, and then not to wait for it; waiting for one step while
the next one is queued behind it takes an event, copies in the stream's order take the driver. Its library has one name
on every machine, and an interface that does not change with CUDA's version, unlike the runtime's.

Not yet run on a card: the functions, their order of arguments and their constants are those of ``cuda.h``.

Source: NVIDIA, CUDA Driver API (context, memory, stream and event management).
"""

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from sardonyx.errors import ConfigError, EngineError
from sardonyx.runtime.device import Bytes

LIBRARY = "libcuda.so.1"
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no waiting for the default stream, where others may work
_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY

_pointer, _handle, _size, _int, _uint = (
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.c_uint64,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_uint,
)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (_uint,),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), _int),
    "cuDevicePrimaryCtxRetain": (_pointer, _int),
    "cuDevicePrimaryCtxRelease_v2": (_int,),
    "cuCtxSetCurrent": (_handle,),
    "cuStreamCreate": (_pointer, _uint),
    "cuStreamSynchronize": (_handle,),
    "cuStreamDestroy_v2": (_handle,),
    "cuEventCreate": (_pointer, _uint),
    "cuEventRecord": (_handle, _handle),
    "cuEventSynchronize": (_handle,),
    "cuEventDestroy_v2": (_handle,),
    "cuMemAlloc_v2": (_pointer, _size),
    "cuMemFree_v2": (_handle,),
    "cuMemHostAlloc": (_pointer, _size, _uint),
    "cuMemFreeHost": (_handle,),
    "cuMemsetD8Async": (_handle, ctypes.c_ubyte, _size, _handle),
    "cuMemcpyHtoDAsync_v2": (_handle, _handle, _size, _handle),
    "cuMemcpyDtoHAsync_v2": (_handle, _handle, _size, _handle),
    "cuMemcpyDtoDAsync_v2": (_handle, _handle, _size, _handle),
}
"""Arguments of what is called. All return a ``CUresult``, an int; handles and addresses are 64 bits wide."""


class Stream(Protocol):
    """What `sardonyx.runtime.device_cuda` asks of a card beside sessions. Errors are EngineError."""

    @property
    def handle(self) -> int:
        """``cudaStream_t``, for ONNX Runtime."""
        ...

    def allocate(self, num_bytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def allocate_host(self, num_bytes: int) -> Bytes: ...
    def write(self, target: int, source: Bytes) -> None: ...
    def read(self, source: int, target: Bytes) -> None: ...
    def copy(self, source: int, target: int, num_bytes: int) -> None: ...
    def record(self) -> int: ...
    def wait(self, event: int) -> None: ...
    def close(self) -> None: ...


class CudaStream:
    """A stream on one card. Any thread, one at a time.

    Args:
        device_id: number of the card.
        library: the driver's; ``None``: the one that is installed.

    Raises:
        ConfigError: there is no driver, or no such card.
    """

    def __init__(self, device_id: int, library: Any = None) -> None:
        self._driver = _load() if library is None else library
        self._host: list[int] = []
        self._is_open = False
        try:
            self._call("cuInit", 0)
            device = ctypes.c_int()
            self._call("cuDeviceGet", ctypes.byref(device), device_id)
            self._device = device.value
            # The primary context is the one that CUDA's runtime, and so ONNX Runtime, works in.
            self._context = self._create("cuDevicePrimaryCtxRetain", self._device)
            self._is_open = True
            self._enter()
            self.handle = self._create("cuStreamCreate", _NON_BLOCKING)
        except EngineError as error:
            if self._is_open:
                self._is_open = False
                self._driver.cuDevicePrimaryCtxRelease_v2(self._device)
            raise ConfigError(f"the card {device_id} cannot be used: {error.message}", field="instance_group") from None

    def allocate(self, num_bytes: int) -> int:
        """Zeroed memory of the card."""
        self._enter()
        address = self._create("cuMemAlloc_v2", num_bytes)
        self._call("cuMemsetD8Async", address, 0, num_bytes, self.handle)
        return address

    def free(self, address: int) -> None:
        """Free what `allocate` gave, once nothing uses it. A card that has failed has nothing to give back."""
        self._driver.cuCtxSetCurrent(self._context)
        self._driver.cuStreamSynchronize(self.handle)
        self._driver.cuMemFree_v2(address)

    def allocate_host(self, num_bytes: int) -> Bytes:
        """Memory that the card copies from and to without the host; freed by `close`."""
        self._enter()
        address = self._create("cuMemHostAlloc", num_bytes, 0)
        self._host.append(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def write(self, target: int, source: Bytes) -> None:
        self._enter()
        self._call("cuMemcpyHtoDAsync_v2", target, source.ctypes.data, source.nbytes, self.handle)

    def read(self, source: int, target: Bytes) -> None:
        self._enter()
        self._call("cuMemcpyDtoHAsync_v2", target.ctypes.data, source, target.nbytes, self.handle)

    def copy(self, source: int, target: int, num_bytes: int) -> None:
        self._enter()
        self._call("cuMemcpyDtoDAsync_v2", target, source, num_bytes, self.handle)

    def record(self) -> int:
        """An event at the stream's present end."""
        self._enter()
        event = self._create("cuEventCreate", _DISABLE_TIMING)
        self._call("cuEventRecord", event, self.handle)
        return event

    def wait(self, event: int) -> None:
        """Wait for an event, and let go of it. Other Python threads go on meanwhile."""
        self._enter()
        try:
            self._call("cuEventSynchronize", event)
        finally:
            self._driver.cuEventDestroy_v2(event)

    def close(self) -> None:
        """Give everything back but memory that `allocate` gave. Arrays of `allocate_host` are invalid afterwards.

        Also where the card has failed; idempotent.
        """
        if not self._is_open:
            return
        self._is_open = False
        self._driver.cuCtxSetCurrent(self._context)
        self._driver.cuStreamSynchronize(self.handle)
        for address in self._host:
            self._driver.cuMemFreeHost(address)
        self._driver.cuStreamDestroy_v2(self.handle)
        self._driver.cuDevicePrimaryCtxRelease_v2(self._device)

    def _enter(self) -> None:
        """Contexts are current by thread, and a model is loaded by another thread than the one that runs its steps."""
        self._call("cuCtxSetCurrent", self._context)

    def _create(self, function: str, *arguments: int) -> int:
        """Call a function whose first argument takes what it made."""
        made = ctypes.c_uint64()
        self._call(function, ctypes.byref(made), *arguments)
        return made.value

    def _call(self, function: str, *arguments: Any) -> None:  # numbers, and pointers to them
        called: Callable[..., int] = getattr(self._driver, function)
        code = called(*arguments)
        if code == _OUT_OF_MEMORY:
            raise EngineError("the card has not so much memory left")
        if code:
            raise EngineError(f"CUDA's driver answers {function} with error {code}")


def _load() -> Any:
    """The driver's library with the types of its functions.

    Raises:
        ConfigError: it is not there, or older than CUDA 11.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
        for name, arguments in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
    except (OSError, AttributeError) as error:
        raise ConfigError(
            f"{LIBRARY} is missing or too old: install NVIDIA's driver, or start the container with GPUs",
            field="execution provider",
        ) from error
    return library
