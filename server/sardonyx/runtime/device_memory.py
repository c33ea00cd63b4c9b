"""How much memory of a CUDA device is free, measured: no torch, no NVML, which does not report on Jetson.

Floor 2. Asks the driver: every CUDA runtime stands on it, its calls are the same under CUDA 12 and 13, and its primary
context is the one that ONNX Runtime works in. It numbers the devices as ONNX Runtime's `device_id` does, so
``CUDA_VISIBLE_DEVICES`` holds here too.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import msgspec

from sardonyx.errors import ConfigError
from sardonyx.runtime.host_memory import free_memory_bytes

_DRIVER = "libcuda.so.1"
_INTEGRATED = 18
"""CU_DEVICE_ATTRIBUTE_INTEGRATED."""
_REASONS = {
    2: "the device has no memory left for a context",
    3: "the driver is shutting down",
    100: "there is no CUDA device",
    101: "there is no such CUDA device",
    803: "the driver does not fit the card or the libraries of this container",
    999: "the driver cannot be used (after suspending, or within a container)",
}
"""What an operator can do something about, by CUresult."""


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement."""

    free_bytes: int
    total_bytes: int


def free_device_bytes(device_id: int) -> int:
    """Bytes of a CUDA device that could still be taken, by this process or another.

    What arenas of open sessions hold in reserve counts as taken, and so does this process's CUDA context (some hundred
    MB), which is made where there is none yet. On a device that shares the host's memory (Jetson) it is what the host
    could give, cgroup and page cache considered.

    Args:
        device_id: CUDA's ordinal, as in ``cuda:0``.

    Raises:
        ConfigError: there is no CUDA driver, or no such device.
    """
    return measure_device(device_id).free_bytes


def total_device_bytes(device_id: int) -> int:
    """Bytes that a CUDA device has; of one that shares the host's memory, those of the host that it may use.

    Raises:
        ConfigError: there is no CUDA driver, or no such device.
    """
    return measure_device(device_id).total_bytes


def measure_device(device_id: int, load: Callable[[str], Any] = ctypes.CDLL) -> DeviceMemory:
    """Free and total bytes of one moment.

    Args:
        load: opens a shared library by its name; raises OSError where there is none.

    Raises:
        ConfigError: there is no CUDA driver, or no such device.

    Source: CUDA Driver API, "Primary Context Management", cuMemGetInfo. Of an integrated device that call tells the
    host's MemFree, which page cache makes small: CUDA for Tegra, "Estimating Total Allocatable Device Memory on an
    Integrated GPU Device".
    """
    try:
        driver = load(_DRIVER)
    except OSError as error:
        raise ConfigError(f"the memory of cuda:{device_id} cannot be measured: no {_DRIVER}") from error
    try:
        return _ask(driver, device_id)
    except _DriverError as error:
        raise ConfigError(f"the memory of cuda:{device_id} cannot be measured: {error}") from error


class _DriverError(Exception):
    """A call of the driver answered something else than success."""


def _ask(driver: Any, device_id: int) -> DeviceMemory:
    device, context, is_integrated = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call(driver, "cuInit", ctypes.c_uint(0))
    _call(driver, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(device_id))
    _call(driver, "cuDeviceGetAttribute", ctypes.byref(is_integrated), ctypes.c_int(_INTEGRATED), device)
    _call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        _call(driver, "cuCtxPushCurrent_v2", context)
        try:
            _call(driver, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        finally:
            _call(driver, "cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    finally:
        _call(driver, "cuDevicePrimaryCtxRelease_v2", device)
    free_bytes = min(free_memory_bytes(), total.value) if is_integrated.value else free.value
    return DeviceMemory(free_bytes=free_bytes, total_bytes=total.value)


def _call(driver: Any, name: str, *arguments: Any) -> None:
    code = getattr(driver, name)(*arguments)
    if code:
        reason = f": {_REASONS[code]}" if code in _REASONS else ""
        raise _DriverError(f"{name} failed with {code}{reason}")
