"""Which TensorRT the provider of the installed ONNX Runtime is built for, and which cards there are for it.

Floor 2. Where the library is missing or another one, ONNX Runtime logs it and goes on without the provider. It is asked
here before, so that a load fails with the reason.

Source: TensorRT, NvInferRuntime.h (``getInferLibVersion``); CUDA Driver API, "Device Management".
"""

import ctypes
import functools
import importlib.util
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort

from sardonyx.errors import ConfigError
from sardonyx.repository.tensorrt_versions import Version

_PROVIDER = "libonnxruntime_providers_tensorrt.so"
_NEEDED = re.compile(rb"lib(nvinfer|nvinfer_plugin|nvonnxparser)\.so\.([0-9]{1,3})\b")
_WHEEL = "tensorrt_libs"
"""The package in which NVIDIA's wheels put the libraries, where no dynamic loader looks."""
_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""

Load = Callable[[str], Any]
"""Opens a shared library by name or path; raises OSError where there is none."""


@functools.cache
def tensorrt_version() -> Version:
    """Of the library that the provider will use. Loads it.

    Raises:
        ConfigError: as `find_version`.
    """
    return find_version(Path(ort.__file__).parent / "capi", wheel_folder(), _load_global)


def find_version(folder: Path, wheel: Path | None, load: Load) -> Version:
    """The version of the library that the provider in `folder` was built for.

    Args:
        folder: of ONNX Runtime's libraries.
        wheel: folder of NVIDIA's wheel, where it is installed. What is loaded from there, the provider finds as well.
        load: opens libraries for the whole process.

    Raises:
        ConfigError: this ONNX Runtime has no such provider, or the library cannot be loaded; with the loader's reason.
    """
    for name in _needed_libraries(folder / _PROVIDER):
        path = None if wheel is None else wheel / name
        try:
            library = load(str(path) if path is not None and path.exists() else name)
        except OSError as error:
            raise ConfigError(
                f"the execution provider tensorrt of ONNX Runtime {ort.__version__} needs {name}, which cannot be "
                f"loaded ({error}); install TensorRT {name.rpartition('.')[2]}",
                field="execution provider",
            ) from error
        if name.startswith("libnvinfer."):
            number = int(library.getInferLibVersion())
    # Three digits a part since 10; 8.6.1 was 8601.
    return (number // 10_000, number // 100 % 100, number % 100) if number >= 100_000 else (number // 1000, 0, 0)


def compute_capability(device_id: int, load: Load = ctypes.CDLL) -> int:
    """Of a card: 90 of an H100, 87 of a Jetson Orin. An engine runs on cards of its own only.

    Raises:
        ConfigError: there is no driver, or no such card.
    """
    try:
        driver = load(_DRIVER)
    except OSError as error:
        raise ConfigError(f"no engine can be built for cuda:{device_id}: no {_DRIVER}") from error
    device, value = ctypes.c_int(), ctypes.c_int()
    _call(driver, "cuInit", device_id, ctypes.c_uint(0))
    _call(driver, "cuDeviceGet", device_id, ctypes.byref(device), ctypes.c_int(device_id))
    parts = []
    for attribute in (_MAJOR, _MINOR):
        _call(driver, "cuDeviceGetAttribute", device_id, ctypes.byref(value), ctypes.c_int(attribute), device)
        parts.append(value.value)
    return 10 * parts[0] + parts[1]


def wheel_folder() -> Path | None:
    """Where NVIDIA's wheel has its libraries; ``None`` where it is not installed. Imports nothing of it."""
    spec = importlib.util.find_spec(_WHEEL)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _needed_libraries(provider: Path) -> list[str]:
    try:
        with provider.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = {match[0].decode() for match in _NEEDED.finditer(data)}
    except OSError:
        found = set()
    if not any(name.startswith("libnvinfer.") for name in found):
        raise ConfigError(
            f"the installed ONNX Runtime {ort.__version__} has no execution provider tensorrt",
            field="execution provider",
        )
    return sorted(found)


def _load_global(name: str) -> Any:
    return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)


def _call(driver: Any, name: str, device_id: int, *arguments: Any) -> None:
    code = getattr(driver, name)(*arguments)
    if code:
        raise ConfigError(f"no engine can be built for cuda:{device_id}: {name} failed with {code}")
