"""One ``model.bin`` of CTranslate2: the variables that it declares, checked, and read one at a time.

Written out here because the `ctranslate2` package only runs such files. What the file declares is held against its
real size before anything is read or allocated. Integers are little-endian:

    u32 version · text specification · u32 revision
    u32 count · that often: text name · u8 rank · u32 size of each axis · u8 type · u32 bytes · the values
    u32 count · that often: text alias · text name

where a text is its length as u16, its bytes and a zero that the length counts.

Source: the writer in CTranslate2's Python converters (github.com/OpenNMT/CTranslate2, ``specs/model_spec.py``).
"""

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.plain_values import read_values

MODEL_FILE = "model.bin"

_VERSION = 6
"""Of the binary format. Older ones lack the types or the aliases."""
_MAX_VARIABLES = 100_000
_MAX_RANK = 8
_STORAGES = {0: ("F32", "<f4"), 1: ("I8", "<i1"), 2: ("I16", "<i2"), 3: ("I32", "<i4"), 4: ("F16", "<f2")}
_DTYPES = dict(_STORAGES.values())
_SCALE_SUFFIX = "_scale"


@dataclass(slots=True, frozen=True)
class CTranslate2Tensor:
    """A variable of a ``model.bin``; a `checkpoint.StoredTensor`."""

    path: Path
    name: str
    shape: tuple[int, ...]
    storage: str
    offset: int
    """Of its first byte in the file."""
    scale: "CTranslate2Tensor | None" = None
    """Of int8 weights, (out): what each row was multiplied by before it was rounded."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(_DTYPES[self.storage]).itemsize

    def read(self) -> npt.NDArray[np.float32]:
        """The variable in float32. Needs its size and some 32 MB besides, whatever it is stored as.

        Raises:
            ExportError: integers without a scale, or the file is shorter than when it was opened.
        """
        if self.storage not in ("F32", "F16") and self.scale is None:
            raise ExportError(f"is stored as {self.storage}, not as a float", file=self.path.name, field=self.name)
        dtype = _DTYPES[self.storage]
        values = read_values(self.path, self.name, offset=self.offset, shape=self.shape, dtype=dtype)
        if self.scale is not None:
            values /= self.scale.read().reshape(-1, *[1] * (values.ndim - 1))
        return values

    def scalar(self) -> int:
        """The value of a variable without axes: a flag or a number of heads."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.num_bytes)
        if self.shape not in ((), (1,)) or len(data) != self.num_bytes:
            raise ExportError(f"is {self.shape}; a single number was expected", file=self.path.name, field=self.name)
        return int(np.frombuffer(data, _DTYPES[self.storage])[0])

    def blocks(self) -> npt.NDArray[np.uint8]:
        raise ValueError(f"{self.name} is stored as {self.storage}, which has no blocks")


@dataclass(slots=True, frozen=True)
class CTranslate2File:
    """What a ``model.bin`` declares."""

    specification: str
    """The kind of model: ``WhisperSpec``."""
    revision: int
    variables: dict[str, CTranslate2Tensor]
    """By name: ``encoder/layer_0/self_attention/linear_0/weight``. Aliases have entries of their own, scales none."""


def read_ctranslate2(path: Path) -> CTranslate2File:
    """The variables of a file.

    Raises:
        ExportError: it cannot be read, is no model of CTranslate2, or declares what does not fit into it.
    """
    try:
        with path.open("rb") as file:
            return _read(_Reader(file, path.stat().st_size, path.name), path)
    except OSError as error:
        raise ExportError(f"cannot be read: {error.strerror}", file=path.name) from error


class _Reader:
    """Numbers and texts of an open file, which it does not leave."""

    def __init__(self, file: BinaryIO, num_bytes: int, name: str) -> None:
        self._file = file
        self._num_bytes = num_bytes
        self._name = name

    def bytes(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise ExportError("is no model of CTranslate2, or is cut off", file=self._name)
        return data

    def number(self, kind: str) -> int:
        return int(struct.unpack(kind, self.bytes(struct.calcsize(kind)))[0])

    def text(self) -> str:
        data = self.bytes(self.number("<H"))
        try:
            text = data.removesuffix(b"\0").decode()
        except UnicodeDecodeError as error:
            raise ExportError("has a name that is no text", file=self._name) from error
        return text

    def skip(self, count: int, field: str) -> int:
        """Pass over the values of a variable; where they begin."""
        start = self._file.tell()
        if count > self._num_bytes - start:
            raise ExportError(f"declares {count:,} bytes, which are not there", file=self._name, field=field)
        self._file.seek(count, 1)
        return start

    @property
    def is_at_end(self) -> bool:
        return self._file.tell() == self._num_bytes


def _read(reader: _Reader, path: Path) -> CTranslate2File:
    version = reader.number("<I")
    if version != _VERSION:
        raise ExportError(f"has version {version} of CTranslate2's format; {_VERSION} is read", file=path.name)
    specification, revision = reader.text(), reader.number("<I")
    variables: dict[str, CTranslate2Tensor] = {}
    for _ in range(_count(reader, path)):
        variable = _variable(reader, path)
        if variable.name in variables:
            raise ExportError("is declared twice", file=path.name, field=variable.name)
        variables[variable.name] = variable
    for _ in range(_count(reader, path)):
        alias, name = reader.text(), reader.text()
        if name not in variables:
            raise ExportError(f"stands for {name!r:.200}, which is not there", file=path.name, field=alias)
        variables[alias] = replace(variables[name], name=alias)
    if not reader.is_at_end:
        raise ExportError("has bytes that belong to no variable", file=path.name)
    return CTranslate2File(specification, revision, _with_scales(variables))


def _count(reader: _Reader, path: Path) -> int:
    count = reader.number("<I")
    if count > _MAX_VARIABLES:
        raise ExportError(f"declares {count:,} variables; {_MAX_VARIABLES:,} are read at most", file=path.name)
    return count


def _variable(reader: _Reader, path: Path) -> CTranslate2Tensor:
    name, rank = reader.text(), reader.number("<B")
    if rank > _MAX_RANK:
        raise ExportError(f"has {rank} axes; {_MAX_RANK} are read at most", file=path.name, field=name)
    shape = tuple(reader.number("<I") for _ in range(rank))
    kind, num_bytes = reader.number("<B"), reader.number("<I")
    if kind not in _STORAGES:
        raise ExportError(f"has the unknown type {kind}", file=path.name, field=name)
    storage, dtype = _STORAGES[kind]
    if math.prod(shape) * np.dtype(dtype).itemsize != num_bytes:
        raise ExportError(f"{shape} {storage} is not {num_bytes:,} bytes", file=path.name, field=name)
    return CTranslate2Tensor(path, name, shape, storage, reader.skip(num_bytes, name))


def _with_scales(variables: dict[str, CTranslate2Tensor]) -> dict[str, CTranslate2Tensor]:
    """Weights with the scales that lie beside them."""
    joined = {}
    for name, variable in variables.items():
        if name.endswith(_SCALE_SUFFIX) and name.removesuffix(_SCALE_SUFFIX) in variables:
            continue
        scale = variables.get(name + _SCALE_SUFFIX) if variable.storage == "I8" else None
        if scale is not None and scale.shape != variable.shape[:1]:
            raise ExportError(f"is {scale.shape}; one scale a row was expected", file=scale.path.name, field=scale.name)
        joined[name] = replace(variable, scale=scale)
    return joined
