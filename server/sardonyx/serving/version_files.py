"""A version's folder as its manifest vouches for it: what loaders of all families begin with, and end with.

Floor 4. Blocks.
"""

import logging
import time
from collections.abc import Set
from contextlib import ExitStack
from pathlib import Path

import msgspec

from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics
from sardonyx.repository.layout import ModelEntry, check_files, read_manifest
from sardonyx.repository.manifest import Manifest, all_files
from sardonyx.runtime.session import Session, SessionConfig, open_session
from sardonyx.serving.status import unix_time
from sardonyx.statistics import InferenceStatistics

logger = logging.getLogger(__name__)


class VersionFiles(msgspec.Struct, frozen=True, kw_only=True):
    """One version whose files are all there."""

    name: str
    """Of the model."""
    version: int
    folder: Path
    manifest: Manifest
    created: int
    """Unix time of the export."""
    size_bytes: int
    started_s: float
    """Monotonic: when the load began."""

    def open_graphs(self, undo: ExitStack, config: SessionConfig | None = None) -> dict[str, Session]:
        """A session for each graph, by role; `undo` closes them.

        Raises:
            ConfigError: as `open_session`.
        """
        sessions = {}
        for role, graph in self.manifest.graphs.items():
            sessions[role] = open_session(self.folder / graph.model.path, model_name=self.name, config=config)
            undo.callback(sessions[role].close)
        return sessions

    def count_load(self, metrics: Metrics) -> InferenceStatistics:
        """The version's statistics. That it is loaded is told there, and in the log."""
        statistics = metrics.inference(self.name, self.version)
        statistics.load_s = time.monotonic() - self.started_s
        logger.info("%s: version %d loaded in %.2f s", self.name, self.version, statistics.load_s)
        return statistics


def read_version(entry: ModelEntry, version: int, families: Set[str], kind: str) -> VersionFiles:
    """Begin to load a version.

    Args:
        entry: the model.
        version: of it.
        families: one of which it has to be.
        kind: what messages call them.

    Raises:
        ConfigError: the manifest is missing, wrong or another family's, it was exported for another device, or a file
            is missing or has another size.
    """
    started_s = time.monotonic()
    folder = entry.version_path(version)
    manifest = read_manifest(folder)
    if manifest is None or manifest.family not in families:
        raise ConfigError(f"is no {kind}: its manifest does not say so", file=str(folder))
    if manifest.target != "cpu":
        raise ConfigError(f"was exported for {manifest.target}; this server runs on the CPU", file=str(folder))
    check_files(folder, manifest, hashes=False)
    return VersionFiles(
        name=entry.name,
        version=version,
        folder=folder,
        manifest=manifest,
        created=unix_time(manifest.created) or int(folder.stat().st_mtime),
        size_bytes=sum(each.size_bytes for each in all_files(manifest)),
        started_s=started_s,
    )
