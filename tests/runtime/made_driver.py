"""NVIDIA's driver as a little library in C whose card is the host's memory: pointers, sizes and order of arguments
go through the C ABI, and whoever calls without a context, with a wrong handle or after a failure is answered an error.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from sardonyx.runtime import device_driver

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="builds a driver with cc")

_SOURCE = """
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define STREAM 0x5151
#define EVENT 0xE000
static int initialised, retained, streams, num_waits, fail;
static long num_device, num_host, num_events, next_event;
static __thread int entered;
static int context;
#define NEEDS_CONTEXT if (!entered) return 201; if (fail) return fail;
int cuInit(unsigned flags) { initialised = flags == 0; return 0; }
int cuDeviceGet(int *device, int ordinal) {
    if (!initialised) return 3;
    if (ordinal != 1) return 101;
    *device = 7;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **made, int device) {
    if (device != 7) return 101;
    retained++; *made = &context;
    return 0;
}
int cuDevicePrimaryCtxRelease_v2(int device) { if (device != 7) return 101; retained--; return 0; }
int cuCtxSetCurrent(void *given) { entered = given == &context; return entered ? 0 : 201; }
int cuStreamCreate(uintptr_t *stream, unsigned flags) {
    NEEDS_CONTEXT
    if (flags != 1) return 1;
    streams++; *stream = STREAM;
    return 0;
}
int cuStreamSynchronize(uintptr_t stream) { NEEDS_CONTEXT return stream == STREAM ? 0 : 400; }
int cuStreamDestroy_v2(uintptr_t stream) { if (stream != STREAM) return 400; streams--; return 0; }
int cuEventCreate(uintptr_t *event, unsigned flags) {
    NEEDS_CONTEXT
    if (flags != 2) return 1;
    num_events++; *event = EVENT + ++next_event;
    return 0;
}
int cuEventRecord(uintptr_t event, uintptr_t stream) {
    NEEDS_CONTEXT
    return event > EVENT && stream == STREAM ? 0 : 400;
}
int cuEventSynchronize(uintptr_t event) { NEEDS_CONTEXT num_waits++; return event > EVENT ? 0 : 400; }
int cuEventDestroy_v2(uintptr_t event) { if (event <= EVENT) return 400; num_events--; return 0; }
int cuMemAlloc_v2(uintptr_t *address, size_t size) {
    NEEDS_CONTEXT
    if (size > (size_t)1 << 30) return 2;
    void *memory = aligned_alloc(256, (size + 255) / 256 * 256);
    memset(memory, 0xAB, size);
    num_device++; *address = (uintptr_t)memory;
    return 0;
}
int cuMemFree_v2(uintptr_t address) { NEEDS_CONTEXT free((void *)address); num_device--; return 0; }
int cuMemHostAlloc(void **address, size_t size, unsigned flags) {
    NEEDS_CONTEXT
    if (flags) return 1;
    num_host++; *address = malloc(size);
    return 0;
}
int cuMemFreeHost(void *address) { free(address); num_host--; return 0; }
int cuMemsetD8Async(uintptr_t target, unsigned char value, size_t size, uintptr_t stream) {
    NEEDS_CONTEXT
    memset((void *)target, value, size);
    return stream == STREAM ? 0 : 400;
}
int cuMemcpyHtoDAsync_v2(uintptr_t target, const void *source, size_t size, uintptr_t stream) {
    NEEDS_CONTEXT
    memcpy((void *)target, source, size);
    return stream == STREAM ? 0 : 400;
}
int cuMemcpyDtoHAsync_v2(void *target, uintptr_t source, size_t size, uintptr_t stream) {
    NEEDS_CONTEXT
    memcpy(target, (const void *)source, size);
    return stream == STREAM ? 0 : 400;
}
int cuMemcpyDtoDAsync_v2(uintptr_t target, uintptr_t source, size_t size, uintptr_t stream) {
    NEEDS_CONTEXT
    memcpy((void *)target, (const void *)source, size);
    return stream == STREAM ? 0 : 400;
}
void set_fail(int code) { fail = code; }
long num_held(void) { return retained + streams + num_device + num_host + num_events; }
int waits(void) { return num_waits; }
"""


def make_driver(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Build the library, and have `sardonyx.runtime.device_driver` load it. Its only card is number 1."""
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(_SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
    monkeypatch.setattr(device_driver, "LIBRARY", str(library))
    return ctypes.CDLL(str(library))
