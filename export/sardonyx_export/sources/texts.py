"""Small text files of a checkpoint: read within limits and inside their folder, and what a licence line says.

A folder comes from whoever published it. A link in it may point anywhere, so every file is resolved first and must
stay inside the folder, or inside the download cache that the folder is a snapshot of.
"""

import re
from pathlib import Path
from typing import Any

import msgspec

from sardonyx_export.errors import ExportError

MAX_CONFIG_BYTES = 4 << 20
MAX_TOKENIZER_BYTES = 256 << 20
"""The largest published tokenizer.json files are about 40 MB."""

_LICENCE_LINE = re.compile(r"^license:[ \t]*(.*)$", re.MULTILINE)
_LICENCE_NAME = re.compile(r"^license_name:[ \t]*(.+)$", re.MULTILINE)


def trusted_root(folder: Path) -> Path:
    """The folder that links inside `folder` may not leave: itself, or the hub cache entry of which it is a snapshot."""
    folder = folder.resolve()
    entry = folder.parent.parent
    if folder.parent.name == "snapshots" and (entry / "blobs").is_dir():
        return entry
    return folder


def inside(root: Path, path: Path) -> Path:
    """`path` with its links resolved.

    Raises:
        ExportError: it leads out of `root`, or is no regular file.
    """
    resolved = path.resolve()
    if not resolved.is_relative_to(root):
        raise ExportError("is a link that leaves the model's folder", file=path.name)
    if not resolved.is_file():
        raise ExportError("is missing or not a regular file", file=path.name)
    return resolved


def read_bytes(root: Path, path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> bytes:
    """A whole small file.

    Raises:
        ExportError: missing, unreadable, larger than `max_bytes`, or outside `root`.
    """
    try:
        with inside(root, path).open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ExportError(f"cannot be read: {error.strerror}", file=path.name) from error
    if len(data) > max_bytes:
        raise ExportError(f"is larger than {max_bytes:,} bytes", file=path.name)
    return data


def read_optional(root: Path, path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> bytes | None:
    """As `read_bytes`, or ``None`` where there is no such file."""
    return read_bytes(root, path, max_bytes=max_bytes) if path.exists() or path.is_symlink() else None


def parse_object(data: bytes, *, file: str) -> dict[str, Any]:
    """A JSON object whose values are anything: a foreign format, so no struct.

    Raises:
        ExportError: not JSON, or not an object.
    """
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ExportError(f"is not a JSON object: {error}", file=file) from error


def card_licence(card: bytes) -> str | None:
    """The licence in a model card's front matter: ``license``, or ``license_name`` where that is ``other``."""
    text = card[: 64 << 10].decode("utf-8", "replace").replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return None
    front = text[4:].partition("\n---")[0]
    match = _LICENCE_LINE.search(front)
    if match is None:
        return None
    value = _unquoted(match[1])
    if not value:
        first_item = re.match(r"\s*-[ \t]*(.+)", front[match.end() :])
        value = _unquoted(first_item[1]) if first_item else ""
    name = _LICENCE_NAME.search(front)
    if value == "other" and name:
        value = _unquoted(name[1])
    return value or None


def _unquoted(value: str) -> str:
    return value.strip().strip("[]").strip().strip("\"'").strip()
