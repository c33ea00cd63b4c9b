"""The folders of a model repository: finding models and versions, and publishing a version.

Floor 1. Names and links come from outside (requests, shared disks), so a name is matched before it becomes a path and
every path is resolved before it is trusted.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError, ModelNotFound
from sardonyx.repository import config as model_config
from sardonyx.repository import manifest as model_manifest
from sardonyx.repository import staging
from sardonyx.repository.manifest import Manifest

STAGING = ".staging"
"""Folder in the root for versions that are being written; no model name starts with a dot."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_MAX_ATTEMPTS = 100


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model of the repository, as far as folders and config.pbtxt tell."""

    name: str
    path: Path
    versions: list[int]
    """What the version policy chooses of those that are there, ascending."""
    config: ModelConfig
    error: ConfigError | None = None
    """Why the entry cannot be used; versions and config are then empty."""

    def version_path(self, version: int) -> Path:
        return self.path / str(version)

    @property
    def config_path(self) -> Path:
        """Where config.pbtxt is, or would be."""
        return self.path / model_config.FILE_NAME


def validate_model_name(name: str) -> None:
    """Raise ConfigError unless `name` can be a folder in the repository and a model in a URL."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name[:160]!r} is not a model name: letters, digits, '.', '_' and '-', a letter or digit first, "
            "128 characters at most",
            field="name",
        )


class Repository:
    """A model repository on disk. Holds no state: every call looks at the folders.

    Publishing, in this order, so that a kill or a power cut at any moment leaves the old state or the new one:

    1. `staging` makes ``.staging/<name>-<random>/`` and locks it; the writer fills its ``version`` folder. The kernel
       drops the lock with the process, which is how the next `staging` knows what may be removed, also where process
       ids mean nothing (containers that share a volume).
    2. Every file and folder of it is flushed to disk. Only then may a name point there.
    3. A new model's folder is put together in staging, config.pbtxt and ``1/``, and renamed to its place as a whole.
       For a model that exists, the version folder alone is renamed to the next free number.
    4. The folder that got the new name is flushed.

    A rename onto a folder that holds something fails, so publishers that race get different numbers without a lock.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def entries(self) -> list[ModelEntry]:
        """Every model, by name; broken ones with `ModelEntry.error`.

        A folder that has neither config.pbtxt nor a version is no model (``lost+found``, notes).

        Raises:
            ConfigError: there is no such folder.
        """
        try:
            names = sorted(child.name for child in self.root.iterdir() if _looks_like_model(child))
        except OSError as error:
            raise ConfigError(f"no model repository: {error.strerror}", file=str(self.root)) from error
        entries = []
        for name in names:
            try:
                validate_model_name(name)
                entries.append(self.entry(name))
            except ConfigError as error:
                entries.append(ModelEntry(name, self.root / name, [], ModelConfig(), error))
            except ModelNotFound:  # removed since the listing
                continue
        return entries

    def has(self, name: str) -> bool:
        """There is a model of that name, which may come from a request; it may be broken."""
        return bool(_NAME.fullmatch(name)) and _looks_like_model(self.root / name)

    def entry(self, name: str, config: ModelConfig | None = None) -> ModelEntry:
        """The model of that name, which may come from a request.

        Args:
            name: of a folder.
            config: in place of the one that lies there.

        Raises:
            ModelNotFound: there is none, or `name` is no model name.
            ConfigError: it is there but its config is wrong, it cannot be read, or a link leads out of the repository.
        """
        path = self.root / name if _NAME.fullmatch(name) else None
        if path is None or not path.is_dir():
            raise ModelNotFound(f"no model {name[:160]!r} in the repository", code="model_not_found")
        self._check_inside(path)
        self._check_inside(path / model_config.FILE_NAME)
        config = model_config.load_config(path) if config is None else config
        try:
            present = _versions(path)
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
        for version in present:
            self._check_inside(path / str(version))
        return ModelEntry(name, path, model_config.choose_versions(config, present), config)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """An empty folder to write a version into, on the repository's own file system.

        What is not published is removed at the end; what a killed writer left is removed at the start.

        Raises:
            ConfigError: `name` is no model name.
        """
        validate_model_name(name)
        with staging.claim(self.root / STAGING, name) as holder:
            version = holder / "version"
            version.mkdir()
            yield version

    def publish(self, name: str, staged: Path, config_text: str | None = None) -> int:
        """Make a staged folder the model's next version.

        Args:
            name: as given to `staging`.
            staged: what `staging` gave, complete. It is gone afterwards.
            config_text: config.pbtxt for a model that has none. One that is there is its operator's and stays.

        Returns:
            The version's number.

        Raises:
            ConfigError: a bad name or config, or something else has the model's name.
        """
        validate_model_name(name)
        if config_text is not None:
            model_config.parse_config(config_text.encode(), name=name)
        holder = staged.parent
        assert holder.parent == self.root / STAGING, "staged folders come from `staging`"
        staging.flush_tree(staged)
        model = self.root / name
        if not model.exists():
            draft = holder / "model"
            draft.mkdir()
            staged = staged.rename(draft / "1")
            if config_text is not None:
                staging.write(draft / model_config.FILE_NAME, config_text)
            staging.flush(draft)
            if staging.rename(draft, model):
                staging.flush(self.root)
                return 1
        if not model.is_dir():
            raise ConfigError("is in the way: a model is a folder", file=str(model))
        self._check_inside(model)
        if config_text is not None and not (model / model_config.FILE_NAME).exists():
            staging.write(holder / model_config.FILE_NAME, config_text)
            (holder / model_config.FILE_NAME).rename(model / model_config.FILE_NAME)
        for _ in range(_MAX_ATTEMPTS):
            version = _next_version(model)
            if staging.rename(staged, model / str(version)):
                staging.flush(model)
                return version
        raise ConfigError(f"no free version number after {_MAX_ATTEMPTS} attempts", file=str(model))

    def _check_inside(self, path: Path) -> None:
        if not _real(path).is_relative_to(self.root):
            raise ConfigError("is a link that leads out of the repository", file=str(path))


def read_manifest(version_path: Path) -> Manifest | None:
    """The manifest of a version folder; ``None`` where there is none (a plain tensor model).

    Raises:
        ConfigError: it cannot be read or is wrong.
    """
    path = version_path / model_manifest.FILE_NAME
    try:
        _check_beside(path, version_path)
        with path.open("rb") as file:
            data = file.read(model_manifest.MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
    return model_manifest.parse(data, file=str(path))


def check_files(version_path: Path, manifest: Manifest, *, hashes: bool) -> None:
    """Raise the first of `file_problems`: a version that lacks a file must not be loaded."""
    for problem in file_problems(version_path, manifest, hashes=hashes):
        raise problem


def file_problems(version_path: Path, manifest: Manifest, *, hashes: bool) -> Iterator[ConfigError]:
    """What differs between a version folder and what its manifest vouches for: sizes, and with `hashes` sha256 too."""
    for listed in model_manifest.all_files(manifest):
        path = version_path / listed.path
        try:
            _check_beside(path, version_path)
            size = path.stat().st_size
            if not path.is_file():
                yield ConfigError("is not a file", file=str(path))
            elif size != listed.size_bytes:
                yield ConfigError(f"has {size:,} bytes, the manifest says {listed.size_bytes:,}", file=str(path))
            elif hashes and _sha256(path) != listed.sha256:
                yield ConfigError("does not have the sha256 that the manifest says", file=str(path))
        except ConfigError as error:
            yield error
        except FileNotFoundError:
            yield ConfigError("is missing although the manifest lists it", file=str(path))
        except OSError as error:
            yield ConfigError(f"cannot be read: {error.strerror}", file=str(path))


def _check_beside(path: Path, version_path: Path) -> None:
    """A link may point into the model's other versions, no further."""
    if not _real(path).is_relative_to(_real(version_path).parent):
        raise ConfigError("is a link that leads out of the model's folder", file=str(path))


def _real(path: Path) -> Path:
    """Unlike `Path.resolve`, raises nothing on links that go round (before Python 3.13)."""
    return Path(os.path.realpath(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _looks_like_model(path: Path) -> bool:
    if path.name.startswith(".") or not path.is_dir():
        return False
    try:
        return (path / model_config.FILE_NAME).exists() or bool(_versions(path))
    except OSError:
        return bool(_NAME.fullmatch(path.name))


def _versions(path: Path) -> list[int]:
    """Numbers of the version folders, ascending. As in Triton, ``01`` and ``latest`` are none."""
    return sorted(int(child.name) for child in path.iterdir() if _VERSION.fullmatch(child.name) and child.is_dir())


def _next_version(model: Path) -> int:
    return max((int(child.name) for child in model.iterdir() if _VERSION.fullmatch(child.name)), default=0) + 1
