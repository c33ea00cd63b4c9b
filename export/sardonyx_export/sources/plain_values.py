"""Values that lie in a file one after the other, read as float32 without holding them twice."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sardonyx_export.errors import ExportError

_CHUNK_BYTES = 32 << 20
"""What is read at once: conversion needs this much besides the result."""


def read_values(
    path: Path,
    field: str,
    *,
    offset: int,
    shape: tuple[int, ...],
    dtype: str,
    convert: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] = lambda values: values,
) -> npt.NDArray[np.float32]:
    """A tensor. Needs its size in float32 and some 32 MB besides, whatever it is stored as.

    Args:
        path: of the file.
        field: name of the tensor, for messages.
        offset: of its first byte.
        shape: of the result.
        dtype: numpy's, of what is stored.
        convert: makes numbers of what is stored, where numpy has no such type.

    Raises:
        ExportError: the file is shorter than when it was opened.
    """
    out = np.empty(math.prod(shape), np.float32)
    item_bytes = np.dtype(dtype).itemsize
    with path.open("rb") as file:
        file.seek(offset)
        step = _CHUNK_BYTES // item_bytes
        for start in range(0, out.size, step):
            stop = min(start + step, out.size)
            data = file.read((stop - start) * item_bytes)
            if len(data) != (stop - start) * item_bytes:
                raise ExportError("ended early while it was read", file=path.name, field=field)
            out[start:stop] = convert(np.frombuffer(data, dtype))
    return out.reshape(shape)
