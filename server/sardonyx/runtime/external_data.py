"""Checks a graph's external data before ONNX Runtime opens it.

A model file names the files that hold its weights. ONNX Runtime opens them by itself, so a crafted model could make the
server read, and serve back, any file that it may open. `check_external_data` therefore reads the names first, with a
reader of the protobuf wire format that looks at nothing else, and opens each file the way an attacker cannot bend.

Floor 2. Knows nothing of sessions.

Source: onnx.proto (field numbers), protobuf.dev/programming-guides/encoding; CVE-2022-25882, CVE-2024-27318 and
CVE-2026-27489 (``..``, symlinked parents, hard links) for what must be refused.
"""

import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sardonyx.errors import ConfigError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Message kinds and, by field number, the kinds that they hold. Only what can lead to a tensor is entered.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_EXTERNAL_DATA_FIELD = 13
_OPERATOR_FIELD, _DOMAIN_FIELD = 4, 7  # of a node

# A graph of 100,000 nodes has about 3 million fields. The bound keeps a file made of nothing but tiny fields from
# holding a loader thread for an hour; the reader does about two million a second.
_MAX_FIELDS = 20_000_000
_MAX_DEPTH = 100  # protobuf's own


@dataclass(frozen=True, slots=True)
class ExternalData:
    """Where one tensor's bytes lie."""

    location: str
    """Path relative to the model file's folder."""
    offset: int
    length: int
    """0: to the end of the file."""


def check_external_data(path: Path) -> None:
    """Refuse a model whose external data is not in plain files below its own folder.

    Every component of a location is opened without following links, and the file must be a regular one with a single
    name (a hard link could give any file of the same disk a place in the folder) that is long enough.

    Raises:
        ConfigError: such a location, a file that is missing or too short, or bytes that are no protobuf. Names the
            model file by its last component.
    """
    sizes: dict[str, int] = {}
    try:
        for entry in _read_model(path):
            if entry.location not in sizes:
                sizes[entry.location] = _regular_file_size(path.parent, entry.location)
            if entry.offset + entry.length > sizes[entry.location]:
                raise ConfigError(
                    f"external data {entry.location!r} has {sizes[entry.location]:,} bytes; a tensor lies at "
                    f"{entry.offset:,} with {entry.length:,}"
                )
    except ConfigError as error:
        raise ConfigError(error.reason, file=path.name) from None


def _read_model(path: Path) -> Iterator[ExternalData]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from external_data(data)
    except OSError as error:
        raise ConfigError(f"cannot be read: {os.strerror(error.errno or 0)}") from error
    except ValueError as error:  # mmap of an empty file
        raise ConfigError("is empty") from error


def external_data(model: bytes | mmap.mmap) -> Iterator[ExternalData]:
    """The external data of every tensor of a serialised ``ModelProto``, wherever a tensor can be.

    Raises:
        ConfigError: not in the protobuf wire format, or an entry without sense.
    """
    return GraphReader(model).message("model", 0, len(model), depth=0)


class GraphReader:
    """Walks a message tree, counting fields."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.operators: set[str] = set()
        """Of the nodes that were walked, as ``domain:Operator``; ONNX's own domain is empty."""
        self._data = data
        self._num_left = _MAX_FIELDS

    def message(self, kind: str, position: int, end: int, depth: int) -> Iterator[ExternalData]:
        """The external data of a message of that kind, which lies from `position` to `end`.

        Raises:
            ConfigError: as `external_data`.
        """
        if depth > _MAX_DEPTH:
            raise ConfigError(f"has graphs more than {_MAX_DEPTH} messages deep")
        fields = _FIELDS.get(kind, {})
        entries: dict[str, str] = {}
        names = {_OPERATOR_FIELD: b"", _DOMAIN_FIELD: b""}
        while position < end:
            number, wire, start, position = self._field(position, end)
            if wire != _BYTES:
                continue
            if kind == "node" and number in names:
                names[number] = bytes(self._data[start:position])
            elif number in fields:
                yield from self.message(fields[number], start, position, depth + 1)
            elif kind == "tensor" and number == _EXTERNAL_DATA_FIELD:
                key, value = self._string_pair(start, position)
                if key == "location" and entries.get(key, value) != value:
                    raise ConfigError("names two locations for one tensor")
                entries[key] = value
        if entries:
            yield _external_data(entries)
        if kind == "node":
            self.operators.add(
                f"{names[_DOMAIN_FIELD].decode(errors='replace')}:{names[_OPERATOR_FIELD].decode(errors='replace')}"
            )

    def fields(self, position: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Numbers of the message's length-delimited fields, and where the payload of each lies. Raises ConfigError."""
        while position < end:
            number, wire, start, position = self._field(position, end)
            if wire == _BYTES:
                yield number, start, position

    def number(self, wanted: int, position: int, end: int) -> int | None:
        """The last varint field of that number; ``None`` without one. Raises ConfigError."""
        value = None
        while position < end:
            number, wire, start, position = self._field(position, end)
            if number == wanted and wire == _VARINT:
                value, _ = self._varint(start, position)
        return value

    def data(self, start: int, end: int) -> bytes:
        """What lies there."""
        return bytes(self._data[start:end])

    def _string_pair(self, position: int, end: int) -> tuple[str, str]:
        """A ``StringStringEntryProto``. As in protobuf, the last of a repeated field counts."""
        texts = {1: b"", 2: b""}
        while position < end:
            number, wire, start, position = self._field(position, end)
            if wire == _BYTES and number in texts:
                texts[number] = bytes(self._data[start:position])
        try:
            return texts[1].decode(), texts[2].decode()
        except UnicodeDecodeError:
            raise ConfigError("names external data that is not UTF-8") from None

    def _field(self, position: int, end: int) -> tuple[int, int, int, int]:
        """Read one field's head at `position`.

        Returns:
            Field number, wire type, and where its payload starts and ends.
        """
        self._num_left -= 1
        if self._num_left < 0:
            raise ConfigError(f"has more than {_MAX_FIELDS:,} fields")
        tag, position = self._varint(position, end)
        number, wire = tag >> 3, tag & 7
        start = position
        if wire == _VARINT:
            _, position = self._varint(position, end)
        elif wire == _FIXED64:
            position += 8
        elif wire == _FIXED32:
            position += 4
        elif wire == _BYTES:
            length, start = self._varint(position, end)
            position = start + length
        else:  # groups, which onnx.proto does not use
            raise ConfigError("is not an ONNX model")
        # protobuf reads a tag as 32 bits: a longer one could be another field to it than to us.
        if position > end or not number or tag >> 32:
            raise ConfigError("is not an ONNX model, or it is cut off")
        return number, wire, start, position

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while position < end and shift < 70:
            byte = self._data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
        raise ConfigError("is not an ONNX model, or it is cut off")


def _external_data(entries: dict[str, str]) -> ExternalData:
    numbers = []
    for key in ("offset", "length"):
        text = entries.get(key, "0")
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise ConfigError(f"{key} {text[:40]!r} of external data is not a whole number")
        numbers.append(int(text))
    return ExternalData(entries.get("location", ""), *numbers)


def _regular_file_size(folder: Path, location: str) -> int:
    """Size of a file below `folder`, reached by plain names and without following a link."""
    parts = location.split("/")
    if (
        not all(parts)
        or PurePosixPath(location).is_absolute()
        or {".", ".."} & set(parts)
        or set("\\\0") & set(location)
    ):
        raise ConfigError(f"external data {location[:200]!r} is not a plain path inside the model's folder")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for index, part in enumerate(parts):
            # O_NONBLOCK: opening a named pipe must not wait for a writer.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            if index < len(parts) - 1:
                flags |= os.O_DIRECTORY
            inner = os.open(part, flags, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        status = os.fstat(descriptor)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConfigError(f"external data {location!r} cannot be opened inside the model's folder: {reason}") from error
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"external data {location!r} is not a regular file")
    if status.st_nlink != 1:
        raise ConfigError(f"external data {location!r} has {status.st_nlink} hard links; replace it by a copy")
    return status.st_size
