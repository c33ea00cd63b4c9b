import ctypes
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

from sardonyx.errors import ConfigError
from sardonyx.runtime.device_memory import free_device_bytes, measure_device, total_device_bytes

GIB = 1 << 30

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="builds a driver with cc")

DRIVER = """
#include <stddef.h>
/* A driver with two cards, the second one integrated, that remembers whether its calls come in order. */
static int initialised, retained[2], current = -1, releases;
static int context[2];
int cuInit(unsigned flags) { initialised = flags == 0; return FAIL_INIT; }
int cuDeviceGet(int *device, int ordinal) {
    if (!initialised) return 3;
    if (ordinal < 0 || ordinal > 1) return 101;
    *device = ordinal;
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 18 && device == 1; return 0; }
int cuDevicePrimaryCtxRetain(void **made, int device) { retained[device]++; *made = &context[device]; return 0; }
int cuCtxPushCurrent_v2(void *pushed) { current = (int)((int *)pushed - context); return 0; }
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    if (current < 0) return 201;
    if (FAIL_MEASURE) return FAIL_MEASURE;
    *free_bytes = current == 0 ? (size_t)70 << 30 : 4096; /* an integrated card tells MemFree */
    *total = (size_t)80 << 30;
    return 0;
}
int cuCtxPopCurrent_v2(void **popped) { *popped = &context[current]; current = -1; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { retained[device]--; releases++; return 0; }
int num_held(void) { return retained[0] + retained[1] + (current >= 0); }
int num_releases(void) { return releases; }
"""


def build_driver(folder: Path, *, fail_init: int = 0, fail_measure: int = 0) -> ctypes.CDLL:
    """A shared library with the driver's calls: pointers, sizes and order go through the C ABI."""
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(DRIVER)
    flags = [f"-DFAIL_INIT={fail_init}", f"-DFAIL_MEASURE={fail_measure}"]
    subprocess.run(["cc", "-shared", "-fPIC", *flags, "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


@needs_compiler
def test_free_and_total_bytes_are_the_drivers(tmp_path: Path) -> None:
    driver = build_driver(tmp_path)
    memory = measure_device(0, load=lambda _: driver)
    assert (memory.free_bytes, memory.total_bytes) == (70 * GIB, 80 * GIB)
    assert (driver.num_held(), driver.num_releases()) == (0, 1)


@needs_compiler
def test_a_card_that_shares_the_hosts_memory_has_what_the_host_could_give(tmp_path: Path) -> None:
    driver = build_driver(tmp_path)
    memory = measure_device(1, load=lambda _: driver)
    assert memory.total_bytes == 80 * GIB
    assert 1 << 20 < memory.free_bytes <= min(psutil.virtual_memory().total, 80 * GIB)


@needs_compiler
def test_an_unknown_card_is_told_by_its_number(tmp_path: Path) -> None:
    driver = build_driver(tmp_path)
    with pytest.raises(ConfigError, match=r"cuda:2 .* 101: there is no such CUDA device"):
        measure_device(2, load=lambda _: driver)


@needs_compiler
def test_a_driver_that_does_not_fit_is_told(tmp_path: Path) -> None:
    driver = build_driver(tmp_path, fail_init=803)
    with pytest.raises(ConfigError, match=r"cuInit failed with 803: the driver does not fit"):
        measure_device(0, load=lambda _: driver)


@needs_compiler
def test_the_context_is_let_go_when_measuring_fails(tmp_path: Path) -> None:
    driver = build_driver(tmp_path, fail_measure=700)
    with pytest.raises(ConfigError, match=r"cuMemGetInfo_v2 failed with 700$"):
        measure_device(0, load=lambda _: driver)
    assert driver.num_held() == 0


def test_a_machine_without_a_driver_says_so() -> None:
    def load(name: str) -> ctypes.CDLL:
        return ctypes.CDLL(f"/nonexistent/{name}")

    with pytest.raises(ConfigError, match=r"cuda:0 cannot be measured: no libcuda\.so\.1"):
        measure_device(0, load=load)


@pytest.mark.gpu
def test_a_real_card_has_free_memory() -> None:
    assert 0 < free_device_bytes(0) <= total_device_bytes(0)
