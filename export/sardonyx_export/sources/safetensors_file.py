"""One ``*.safetensors`` file: its header, checked, and its tensors, read one at a time.

Written out here because the `safetensors` package has no bfloat16 under numpy, and because a header comes from whoever
published the file: every offset is held against the file's real size before anything is read or allocated.

Source: the safetensors format description (github.com/huggingface/safetensors, README, "Format").
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.plain_values import read_values

MAX_HEADER_BYTES = 32 << 20
"""A model of 100,000 tensors needs some 12 MB. The reference implementation takes 100 MB, which parses into 1 GB."""

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_READABLE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(slots=True, frozen=True)
class SafetensorsTensor:
    """A tensor of a `SafetensorsFile`; a `checkpoint.StoredTensor`."""

    path: Path
    name: str
    shape: tuple[int, ...]
    storage: str
    offset: int
    """Of its first byte in the file."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.storage]

    def read(self) -> npt.NDArray[np.float32]:
        """The tensor in float32. Needs its size and some 32 MB besides, whatever it is stored as.

        Raises:
            ExportError: stored in a type that is no plain float, or the file is shorter than when it was opened.
        """
        if self.storage not in _READABLE:
            raise ExportError(f"is stored as {self.storage}, not as a float", file=self.path.name, field=self.name)
        return read_values(
            self.path,
            self.name,
            offset=self.offset,
            shape=self.shape,
            dtype=_READABLE[self.storage],
            convert=_widen_bfloat16 if self.storage == "BF16" else lambda values: values,
        )

    def blocks(self) -> npt.NDArray[np.uint8]:
        raise ValueError(f"{self.name} is stored as {self.storage}, which has no blocks")


def _widen_bfloat16(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (values.astype(np.uint32) << 16).view(np.float32)


def read_header(path: Path) -> dict[str, SafetensorsTensor]:
    """The tensors that a file declares, by name.

    Raises:
        ExportError: not a safetensors file, or its header contradicts itself or the file's size.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise ExportError("is too short to be a safetensors file", file=path.name)
            (header_bytes,) = struct.unpack("<Q", head)
            if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise ExportError(
                    f"declares a header of {header_bytes:,} bytes in a file of {file_bytes:,}", file=path.name
                )
            raw = file.read(header_bytes)
    except OSError as error:
        raise ExportError(f"cannot be read: {error.strerror}", file=path.name) from error
    return _tensors(path, _entries(path, raw), data_start=8 + len(raw), data_bytes=file_bytes - 8 - len(raw))


def _entries(path: Path, raw: bytes) -> dict[str, _Entry]:
    try:
        fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        fields.pop("__metadata__", None)
        return {name: msgspec.json.decode(value, type=_Entry) for name, value in fields.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ExportError(f"has no readable header: {error}", file=path.name) from error


def _tensors(
    path: Path, entries: dict[str, _Entry], *, data_start: int, data_bytes: int
) -> dict[str, SafetensorsTensor]:
    """Check that the entries tile the data exactly, which the format demands and which rules out every overlap."""
    tensors = {}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, end = entry.data_offsets
        if entry.dtype not in _ITEM_BYTES:
            raise ExportError(f"has the unknown type {entry.dtype!r}", file=path.name, field=name)
        if len(entry.shape) > 8 or any(size < 0 for size in entry.shape):
            raise ExportError(f"has the impossible shape {entry.shape}", file=path.name, field=name)
        if math.prod(entry.shape) * _ITEM_BYTES[entry.dtype] != end - start:
            raise ExportError(f"{entry.shape} {entry.dtype} is not {end - start:,} bytes", file=path.name, field=name)
        if start != position or end > data_bytes:
            raise ExportError(
                f"lies at bytes {start:,} to {end:,}; it should begin at {position:,} and end within {data_bytes:,}",
                file=path.name,
                field=name,
            )
        position = end
        tensors[name] = SafetensorsTensor(path, name, tuple(entry.shape), entry.dtype, data_start + start)
    if position != data_bytes:
        raise ExportError(f"has {data_bytes - position:,} bytes that belong to no tensor", file=path.name)
    return tensors
