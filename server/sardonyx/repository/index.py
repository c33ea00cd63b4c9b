"""What is in a repository, in a line a model.

Floor 1. Reads configs and manifests and looks at file sizes; opens no weights, so it takes milliseconds a model.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from sardonyx.errors import ConfigError
from sardonyx.repository.check import version_problems
from sardonyx.repository.ensemble import part_names
from sardonyx.repository.layout import ModelEntry, Repository, read_manifest

DUPLICATE = "model appears in two or more repositories"
"""Why a model that does is not served."""


class IndexEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One model as it lies on disk."""

    name: str
    versions: list[int]
    """That the version policy chooses, ascending. What follows is about the last of them."""
    family: str = ""
    """From the manifest; ``tensors`` where there is none, empty where it could not be read."""
    precision: str = ""
    target: str = ""
    """What its graphs are made for: ``cpu`` or ``cuda``. Empty where there is no manifest."""
    size_bytes: int = 0
    """All files of the version folder."""
    created: str = ""
    """RFC 3339, from the manifest."""
    reason: str = ""
    """Why it cannot be served; empty where nothing speaks against it."""
    depends_on: tuple[str, ...] = ()
    """Models that an ensemble is made of."""
    fingerprint: str = ""
    """Changes with any file of the model's folder. Empty where the folder could not be read."""


def index(repository: Repository) -> list[IndexEntry]:
    """Every model of the repository, by name, broken ones with a reason.

    Raises:
        ConfigError: there is no such repository.
    """
    return [_describe_somehow(entry) for entry in repository.entries()]


def merge(indexes: Iterable[list[IndexEntry]]) -> list[IndexEntry]:
    """The models of several repositories, by name. One that is in two of them can be served from neither."""
    merged: dict[str, IndexEntry] = {}
    for entry in (entry for entries in indexes for entry in entries):
        if entry.name in merged:
            entry = IndexEntry(
                name=entry.name,
                versions=[],
                reason=DUPLICATE,
                fingerprint=merged[entry.name].fingerprint + entry.fingerprint,
            )
        merged[entry.name] = entry
    return [merged[name] for name in sorted(merged)]


def _describe_somehow(entry: ModelEntry) -> IndexEntry:
    try:
        return _describe(entry)
    except OSError as error:  # a folder that is being changed
        return IndexEntry(name=entry.name, versions=[], reason=f"cannot be read: {error.strerror}")


def _describe(entry: ModelEntry) -> IndexEntry:
    fingerprint = _fingerprint(entry.path)
    if entry.error is not None:
        return IndexEntry(name=entry.name, versions=[], reason=str(entry.error), fingerprint=fingerprint)
    if not entry.versions:
        reason = "has no version to serve"
        return IndexEntry(name=entry.name, versions=[], reason=reason, fingerprint=fingerprint)
    folder = entry.version_path(entry.versions[-1])
    facts = IndexEntry(
        name=entry.name,
        versions=entry.versions,
        fingerprint=fingerprint,
        depends_on=part_names(entry.config),
        size_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    )
    problem = next(version_problems(entry, folder, hashes=False), None)
    try:
        manifest = read_manifest(folder)
    except ConfigError:
        return msgspec.structs.replace(facts, reason=str(problem))
    return msgspec.structs.replace(
        facts,
        family=manifest.family if manifest else "tensors",
        precision=manifest.precision if manifest else "",
        target=manifest.target if manifest else "",
        created=manifest.created if manifest else "",
        reason=str(problem or ""),
    )


def _fingerprint(path: Path) -> str:
    """Of names, sizes and times of all files of a model's folder; links count as what they are, not where they lead."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for folder, folders, files in os.walk(path):
            folders.sort()
            links = [name for name in folders if Path(folder, name).is_symlink()]
            for name in sorted([*files, *links]):
                status = os.lstat(Path(folder, name))
                piece = (
                    f"{os.path.relpath(folder, path)}/{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}"
                )
                digest.update(piece.encode(errors="surrogateescape"))
            digest.update(f"\0{folders}".encode(errors="surrogateescape"))
    except OSError:
        return ""
    return digest.hexdigest()
