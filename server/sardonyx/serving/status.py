"""Where a model stands, and how that is told to callers. Floor 4."""

import enum
from datetime import datetime
from pathlib import PurePath

import msgspec

from sardonyx.errors import ConfigError, ServeError
from sardonyx.repository.index import IndexEntry
from sardonyx.serving.served import LoadedModel


class ModelState(enum.StrEnum):
    """Triton's words for where a model stands."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the repository."""

    name: str
    version: int | None
    """The version that serves, or the newest one there is; ``None`` without any."""
    family: str
    """From the manifest; ``tensors`` without one, empty where it could not be read."""
    state: ModelState
    reason: str
    """Why it is UNAVAILABLE, what a load waits for, or why the last reload failed; safe to show. Empty otherwise."""
    size_bytes: int
    created: int
    """Unix time of the export, 0 where unknown."""
    max_model_len: int | None
    """``None`` while it is not READY, and for models that take no text."""


class VersionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a model, or a model without any."""

    name: str
    version: int | None = None
    state: ModelState | None = None
    """``None``: nobody asked for it yet."""
    reason: str = ""
    """As `ModelStatus.reason`."""


def describe(facts: IndexEntry, model: LoadedModel | None, state: ModelState, reason: str) -> ModelStatus:
    """The status of a model: what is loaded where there is one, else what lies on disk."""
    newest = facts.versions[-1] if facts.versions else None
    served = None if model is None else model.newest
    return ModelStatus(
        name=facts.name,
        version=newest if served is None else served.version,
        family=facts.family,
        state=state,
        reason=reason,
        size_bytes=facts.size_bytes if served is None else served.size_bytes,
        created=unix_time(facts.created) if served is None else served.created,
        max_model_len=getattr(served.task, "max_model_len", None) if served is not None else None,
    )


def describe_versions(
    name: str, versions: set[int], model: LoadedModel | None, state: ModelState | None, reason: str
) -> list[VersionStatus]:
    """A row for each version; one without a version where there is none."""
    if state is None or not versions:
        return [VersionStatus(name=name, state=state, reason="" if state is None else reason)]
    rows = []
    for version in sorted(versions):
        if model is None or version in model.versions:
            rows.append(VersionStatus(name=name, version=version, state=state, reason=reason))
        else:
            rows.append(VersionStatus(name=name, version=version, state=ModelState.UNAVAILABLE, reason="unloaded"))
    return rows


def safe_reason(error: ServeError) -> str:
    """What callers may read about an error: file names without their folders."""
    if not isinstance(error, ConfigError):
        return error.message
    file = PurePath(error.file).name if error.file else None
    return ": ".join(part for part in (file, error.field, error.reason) if part)


def unix_time(created: str) -> int:
    """Seconds since 1970 of a manifest's time, 0 where it has none."""
    try:
        return int(datetime.fromisoformat(created).timestamp())
    except ValueError:
        return 0
