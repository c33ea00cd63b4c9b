"""What is in a repository, in a line a model.

Floor 1. Reads configs and manifests and looks at file sizes; opens no weights, so it takes milliseconds a model.
"""

import msgspec

from sardonyx.errors import ConfigError
from sardonyx.repository.check import version_problems
from sardonyx.repository.layout import ModelEntry, Repository, read_manifest


class IndexEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One model as it lies on disk."""

    name: str
    versions: list[int]
    """That the version policy chooses, ascending. What follows is about the last of them."""
    family: str = ""
    """From the manifest; ``tensors`` where there is none, empty where it could not be read."""
    precision: str = ""
    size_bytes: int = 0
    """All files of the version folder."""
    created: str = ""
    """RFC 3339, from the manifest."""
    reason: str = ""
    """Why it cannot be served; empty where nothing speaks against it."""


def index(repository: Repository) -> list[IndexEntry]:
    """Every model of the repository, by name, broken ones with a reason.

    Raises:
        ConfigError: there is no such repository.
    """
    return [_describe(entry) for entry in repository.entries()]


def _describe(entry: ModelEntry) -> IndexEntry:
    if entry.error is not None:
        return IndexEntry(name=entry.name, versions=[], reason=str(entry.error))
    if not entry.versions:
        return IndexEntry(name=entry.name, versions=[], reason="has no version to serve")
    folder = entry.version_path(entry.versions[-1])
    facts = IndexEntry(
        name=entry.name,
        versions=entry.versions,
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
        created=manifest.created if manifest else "",
        reason=str(problem or ""),
    )
