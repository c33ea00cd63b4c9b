"""How much memory of a CUDA device is free, measured: no torch, no NVML, which does not report on Jetson.

Floor 2. Asks the CUDA runtime that ONNX Runtime itself runs on, or else the driver. Both number the devices as ONNX
Runtime's `device_id` does, so ``CUDA_VISIBLE_DEVICES`` holds here too.
"""

import contextlib
import ctypes
import io
from collections.abc import Callable
from typing import Any

import msgspec
import onnxruntime as ort

from sardonyx.errors import ConfigError
from sardonyx.runtime.host_memory import free_memory_bytes

RUNTIMES = ("libcudart.so.13", "libcudart.so.12")
"""CUDA's major versions that builds of ONNX Runtime are for; the one that it has loaded is found by the same name."""
DRIVER = "libcuda.so.1"

_INTEGRATED = 18
"""cudaDevAttrIntegrated, CU_DEVICE_ATTRIBUTE_INTEGRATED."""


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement."""

    free_bytes: int
    total_bytes: int


def free_device_bytes(device_id: int) -> int:
    """Bytes of a CUDA device that could still be taken, by this process or another.

    What arenas of open sessions hold in reserve counts as taken. On a device that shares the host's memory (Jetson)
    it is what the host could give, cgroup and page cache considered. The first call makes the process's CUDA context
    (some hundred MB), so that what it takes is no longer free when the number is told.

    Args:
        device_id: CUDA's ordinal, as in ``cuda:0``.

    Raises:
        ConfigError: there is no CUDA library, or no such device.
    """
    return measure_device(device_id).free_bytes


def total_device_bytes(device_id: int) -> int:
    """Bytes that a CUDA device has. On one that shares the host's memory: that of the host which it may use.

    Raises:
        ConfigError: there is no CUDA library, or no such device.
    """
    return measure_device(device_id).total_bytes


def measure_device(device_id: int, load: Callable[[str], Any] = ctypes.CDLL) -> DeviceMemory:
    """Free and total bytes of one moment.

    Args:
        load: opens a shared library by its name; raises OSError where there is none.

    Raises:
        ConfigError: there is no CUDA library, or no such device.

    Source: CUDA Runtime API (cudaMemGetInfo), Driver API (cuMemGetInfo, primary context). cudaMemGetInfo of an
    integrated device tells the host's MemFree, which page cache makes small: CUDA for Tegra, "Estimating Total
    Allocatable Device Memory on an Integrated GPU Device".
    """
    _preload()
    failures = []
    for name, measure in (*((name, _by_runtime) for name in RUNTIMES), (DRIVER, _by_driver)):
        try:
            free_bytes, total_bytes, is_integrated = measure(load(name), device_id)
        except OSError:
            failures.append(f"{name} is not there")
        except _CudaError as error:
            failures.append(f"{name}: {error}")
        else:
            if is_integrated:
                free_bytes = min(free_memory_bytes(), total_bytes)
            return DeviceMemory(free_bytes=free_bytes, total_bytes=total_bytes)
    raise ConfigError(f"the memory of cuda:{device_id} cannot be measured: {'; '.join(failures)}")


class _CudaError(Exception):
    """A call of CUDA's answered something else than success."""


def _preload() -> None:
    """Have ONNX Runtime open the CUDA libraries of its own choice (NVIDIA's wheels beside it, then the system's).

    A build without CUDA does nothing. It prints what it misses; our errors say it.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls(cudnn=False)


def _call(library: Any, name: str, *arguments: Any) -> None:
    function = getattr(library, name, None)
    if function is None:
        raise _CudaError(f"has no {name}")
    if code := function(*arguments):
        raise _CudaError(f"{name} failed with {code}")


def _by_runtime(library: Any, device_id: int) -> tuple[int, int, bool]:
    """Free bytes, total bytes, whether they are the host's. The thread's current device is as before."""
    before, is_integrated = ctypes.c_int(), ctypes.c_int()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call(library, "cudaGetDevice", ctypes.byref(before))
    _call(library, "cudaSetDevice", ctypes.c_int(device_id))
    try:
        _call(library, "cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        _call(
            library,
            "cudaDeviceGetAttribute",
            ctypes.byref(is_integrated),
            ctypes.c_int(_INTEGRATED),
            ctypes.c_int(device_id),
        )
    finally:
        _call(library, "cudaSetDevice", before)
    return free.value, total.value, bool(is_integrated.value)


def _by_driver(library: Any, device_id: int) -> tuple[int, int, bool]:
    """As `_by_runtime`, in the primary context, which is the one that CUDA runtimes share."""
    device, context, is_integrated = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call(library, "cuInit", ctypes.c_uint(0))
    _call(library, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(device_id))
    _call(library, "cuDeviceGetAttribute", ctypes.byref(is_integrated), ctypes.c_int(_INTEGRATED), device)
    _call(library, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        _call(library, "cuCtxPushCurrent_v2", context)
        try:
            _call(library, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        finally:
            _call(library, "cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    finally:
        _call(library, "cuDevicePrimaryCtxRelease_v2", device)
    return free.value, total.value, bool(is_integrated.value)
