"""A version's folder as its manifest vouches for it: what loaders of all families begin with, and end with.

Floor 4. Blocks.
"""

import logging
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import msgspec

from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics
from sardonyx.repository.accelerators import ProviderChoice
from sardonyx.repository.device_placement import DevicePlacement, read_device
from sardonyx.repository.layout import ModelEntry, check_files, read_manifest
from sardonyx.repository.manifest import Manifest, all_files
from sardonyx.repository.tensorrt_shapes import OpenBounds
from sardonyx.runtime.session import Session, SessionConfig, open_session
from sardonyx.serving.engines import Engines, GraphPlace
from sardonyx.serving.status import unix_time
from sardonyx.serving.tensor_sessions import open_providers
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
    device: DevicePlacement = DevicePlacement()
    model_folder: Path = Path()
    config_file: str = "config.pbtxt"

    def open_graphs(
        self,
        undo: ExitStack,
        config: SessionConfig | None = None,
        *,
        engines: Engines | None = None,
        bounds: Mapping[str, OpenBounds] | None = None,
        cuda_defaults: Mapping[str, Mapping[str, str]] | None = None,
    ) -> dict[str, Session]:
        """A session for each graph, by role, on the model's device; `undo` closes them.

        Args:
            undo: closes what was opened.
            config: threads, for sessions on the CPU.
            engines: opens them; needed where the model may be on a card.
            bounds: of inputs' axes by graph, for TensorRT.
            cuda_defaults: of the CUDA provider's options by graph, where the operator says nothing.

        Raises:
            ConfigError: as `Engines.open`.
        """
        device = self.device
        own = config or SessionConfig()
        sessions = {}
        total = len(self.manifest.graphs)
        for number, (role, graph) in enumerate(self.manifest.graphs.items(), 1):
            path = self.folder / graph.model.path
            if device.providers:
                choices = _with_defaults(device.providers, (cuda_defaults or {}).get(role, {}))
                providers = open_providers(choices, device.gpu, self.model_folder)
                own = replace(own, providers=tuple(providers), is_strict=device.is_strict)
            if engines is None:
                sessions[role] = open_session(path, model_name=self.name, config=own)
            else:
                place = GraphPlace(
                    path=path,
                    model=self.name,
                    role=role,
                    number=number,
                    total=total,
                    file=self.config_file,
                    bounds=(bounds or {}).get(role, {}),
                    is_alone=total == 1,
                )
                sessions[role] = engines.open(place, own)
            undo.callback(sessions[role].close)
        return sessions

    def count_load(self, metrics: Metrics) -> InferenceStatistics:
        """The version's statistics. That it is loaded is told there, and in the log."""
        statistics = metrics.inference(self.name, self.version)
        statistics.load_s = time.monotonic() - self.started_s
        logger.info("%s: version %d loaded in %.2f s", self.name, self.version, statistics.load_s)
        return statistics


def _with_defaults(choices: Sequence[ProviderChoice], options: Mapping[str, str]) -> list[ProviderChoice]:
    """Options of the CUDA provider that the operator may override."""
    return [ProviderChoice(each.name, {**options, **each.options}) if each.name == "cuda" else each for each in choices]


def read_version(
    entry: ModelEntry, version: int, families: Set[str], kind: str, *, num_gpus: int | None = None
) -> VersionFiles:
    """Begin to load a version.

    Args:
        entry: the model.
        version: of it.
        families: one of which it has to be.
        kind: what messages call them.
        num_gpus: cards that it may run on; ``None``: it runs on the CPU only, and its config says nothing of devices.

    Raises:
        ConfigError: the manifest is missing, wrong or another family's, it was exported for another device, the device
            that the config asks for is not there, or a file is missing or has another size.
    """
    started_s = time.monotonic()
    folder = entry.version_path(version)
    manifest = read_manifest(folder)
    if manifest is None or manifest.family not in families:
        raise ConfigError(f"is no {kind}: its manifest does not say so", file=str(folder))
    device, file = DevicePlacement(), str(entry.config_path)
    if num_gpus is not None:
        device = read_device(entry.config, needs_gpu=manifest.target != "cpu", num_gpus=num_gpus, file=file)
    elif manifest.target != "cpu":
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
        device=device,
        model_folder=entry.path,
        config_file=file,
    )
