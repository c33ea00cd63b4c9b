"""Writes a ``model.bin`` as CTranslate2's converters do."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

KINDS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def text(value: str) -> bytes:
    data = value.encode() + b"\0"
    return struct.pack("<H", len(data)) + data


def write_model(
    path: Path,
    variables: Mapping[str, npt.NDArray[Any]],
    aliases: Mapping[str, str] | None = None,
    *,
    version: int = 6,
    specification: str = "WhisperSpec",
) -> None:
    """The file with these variables, and other names for some of them."""
    parts = [struct.pack("<I", version), text(specification), struct.pack("<I", 3), struct.pack("<I", len(variables))]
    for name, values in variables.items():
        shape = struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        parts += [text(name), shape, struct.pack("<BI", KINDS[values.dtype.name], values.nbytes), values.tobytes()]
    parts.append(struct.pack("<I", len(aliases or {})))
    for alias, name in (aliases or {}).items():
        parts += [text(alias), text(name)]
    path.write_bytes(b"".join(parts))


def floats(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
