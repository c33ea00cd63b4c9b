"""From names to loaded models, over several repositories: what the registry gets its models from.

Floor 4. Everything here blocks; the registry runs it in worker threads.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from google.protobuf import text_format

from sardonyx.errors import ConfigError, ModelNotFound
from sardonyx.metrics import Metrics
from sardonyx.repository.config import FILE_NAME, parse_override
from sardonyx.repository.index import IndexEntry, index, merge
from sardonyx.repository.layout import ModelEntry, Repository, read_manifest, validate_model_name
from sardonyx.runtime.session import configure_threads
from sardonyx.serving.ensemble import EnsembleModel
from sardonyx.serving.memory import KvBudget, free_memory_bytes
from sardonyx.serving.registry import TEXT_FAMILY, Registry
from sardonyx.serving.served import LoadedModel, ModelOverride, ServedModel
from sardonyx.serving.tensor_loader import TensorLoader
from sardonyx.serving.tensors import TensorModel
from sardonyx.serving.text_loader import TextLoader
from sardonyx.settings import Settings, usable_cores

_FILE_PATH = re.compile(r"[1-9][0-9]{0,17}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}){1,4}|[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_MAX_FILES = 256


def build_registry(settings: Settings, metrics: Metrics) -> Registry:
    """A registry over the repositories of the settings, not started. Sets the process's compute threads.

    Raises:
        ConfigError: there is no repository.
    """
    configure_threads(settings.num_threads or usable_cores(), allow_spinning=settings.allow_spinning)
    repositories = [Repository(path) for path in (settings.repository, *settings.more_repositories)]
    num_models = sum(entry.family == TEXT_FAMILY for entry in merge([index(each) for each in repositories]))
    budget = KvBudget(int(settings.memory_fraction * free_memory_bytes()), num_models)
    loader = ModelLoader(repositories, settings, metrics, budget)
    registry = Registry(
        loader,
        default_model=settings.default_model,
        aliases=settings.aliases,
        unload_timeout_s=settings.drain_timeout_s,
        is_strict=settings.strict_readiness,
        max_loads=settings.model_load_thread_count,
    )
    loader.connect(registry)
    return registry


class ModelLoader:
    """Loads models of any family; a `registry.ModelSource`. Made before the registry; `connect` closes the circle.

    Args:
        budget: for the KV caches of all language models.
    """

    def __init__(self, repositories: list[Repository], settings: Settings, metrics: Metrics, budget: KvBudget) -> None:
        self._repositories = repositories
        self._registry: Registry | None = None
        self._texts = TextLoader(settings, metrics, budget)
        self._tensors = TensorLoader(settings, metrics, self._served)

    def connect(self, registry: Registry) -> None:
        """Where ensembles find their parts. Once, before the first load."""
        self._registry = registry

    def index(self) -> list[IndexEntry]:
        """Every model of the repositories."""
        return merge([index(each) for each in self._repositories])

    def close(self) -> None:
        """When the last model is closed."""
        self._texts.close()

    def load(self, name: str, override: ModelOverride | None = None) -> LoadedModel:
        """Every version that the model's policy chooses, or none; of a language model the newest one.

        Raises:
            ConfigError: a file is missing or wrong, or something does not fit.
            ModelNotFound: no such model.
        """
        with self._entry(name, override) as entry:
            if not entry.versions:
                raise ConfigError("has no version to serve", file=str(entry.path))
            manifest = read_manifest(entry.version_path(entry.versions[-1]))
            if manifest is not None:
                if manifest.family != TEXT_FAMILY:
                    raise ConfigError(f"models of the family {manifest.family} are not served", file=str(entry.path))
                text = self._texts.load(entry)
                return LoadedModel(versions={text.version: text})
            return LoadedModel(versions=self._load_versions(entry))

    def _load_versions(self, entry: ModelEntry) -> dict[int, ServedModel]:
        versions: dict[int, TensorModel | EnsembleModel] = {}
        try:
            for version in entry.versions:
                versions[version] = self._tensors.load(entry, version)
        except BaseException:
            for model in versions.values():
                model.discard()
            raise
        return dict(versions)

    @contextmanager
    def _entry(self, name: str, override: ModelOverride | None) -> Iterator[ModelEntry]:
        """The model's folder and config, or what the caller brought in their place while the block runs."""
        if override is None:
            yield self._repository(name).entry(name)
            return
        config = parse_override(override.config, name=name)
        if not override.files:
            yield self._repository(name).entry(name, config)
            return
        root = Path(tempfile.mkdtemp(prefix="sardonyx-load-"))
        try:
            write_files(root, name, override.files)
            (root / name / FILE_NAME).write_text(text_format.MessageToString(config))
            yield Repository(root).entry(name)
        finally:
            shutil.rmtree(root, ignore_errors=True)

    def _repository(self, name: str) -> Repository:
        having = [each for each in self._repositories if each.has(name)]
        if not having:
            raise ModelNotFound(f"no model {name[:160]!r} in the repository", code="model_not_found")
        if len(having) > 1:
            raise ConfigError("model appears in two or more repositories")
        return having[0]

    def _served(self, name: str, version: int | None) -> ServedModel:
        assert self._registry is not None
        return self._registry.served(name, version)


def write_files(root: Path, name: str, files: dict[str, bytes]) -> None:
    """Make a model's folder of files that came over the network. `root` is fresh and ours alone.

    Raises:
        ConfigError: too many, or a path that is not plain: a version and file names, or one file name.
    """
    validate_model_name(name)
    if len(files) > _MAX_FILES:
        raise ConfigError(f"at most {_MAX_FILES} files can be brought along, not {len(files)}")
    folder = root / name
    folder.mkdir()
    for path, data in sorted(files.items()):
        if not _FILE_PATH.fullmatch(path):
            raise ConfigError(f"Invalid file parameter '{path[:160]}' must stay within model directory.")
        if path == FILE_NAME:
            raise ConfigError("the config comes as a parameter of its own, not as a file")
        target = folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                file.write(data)
        except OSError as error:
            raise ConfigError(f"cannot be written: {error.strerror}", file=path) from error
