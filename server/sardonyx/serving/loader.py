"""From names to loaded models, over several repositories: what the registry gets its models from.

Floor 4. Everything here blocks; the registry runs it in worker threads.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from sardonyx.errors import ConfigError, ModelNotFound
from sardonyx.metrics import Metrics
from sardonyx.repository.ensemble import part_names
from sardonyx.repository.index import DUPLICATE, IndexEntry, index, merge
from sardonyx.repository.layout import ModelEntry, Repository, read_manifest
from sardonyx.repository.manifest import Manifest
from sardonyx.runtime.host_memory import free_memory_bytes
from sardonyx.runtime.providers import num_gpus
from sardonyx.runtime.session import configure_threads
from sardonyx.serving.diffusion_loader import DiffusionLoader
from sardonyx.serving.encoder_loader import EncoderLoader
from sardonyx.serving.engines import Engines
from sardonyx.serving.ensemble import EnsembleModel
from sardonyx.serving.entry import (
    CACHING_FAMILIES,
    DIFFUSION_FAMILY,
    ENCODER_FAMILIES,
    IMAGE_CLASSIFIER,
    SPEECH_FAMILY,
    TEXT_FAMILY,
)
from sardonyx.serving.image_loader import ImageClassifierLoader
from sardonyx.serving.load_memory import LoadMemory
from sardonyx.serving.memory import DeviceBudgets, KvBudget
from sardonyx.serving.override import override_config, override_folder
from sardonyx.serving.registry import Registry
from sardonyx.serving.served import LoadedModel, ModelOverride, ServedModel
from sardonyx.serving.speech_device import DeviceSpeeches
from sardonyx.serving.speech_loader import SpeechLoader
from sardonyx.serving.task_finder import Judge, TaskFinder
from sardonyx.serving.task_tensors import TaskTensorModel
from sardonyx.serving.tensor_loader import TensorLoader
from sardonyx.serving.tensors import TensorModel
from sardonyx.serving.text_device import DeviceTexts
from sardonyx.serving.text_loader import TextLoader
from sardonyx.settings import Settings, usable_cores


def build_registry(settings: Settings, metrics: Metrics) -> Registry:
    """A registry over the repositories of the settings, not started. Sets the process's compute threads.

    Raises:
        ConfigError: there is no repository.
    """
    configure_threads(settings.num_threads or usable_cores(), allow_spinning=settings.allow_spinning)
    repositories = [Repository(path) for path in (settings.repository, *settings.more_repositories)]
    entries = merge([index(each) for each in repositories])
    num_models = Counter(entry.target for entry in entries if entry.family in CACHING_FAMILIES)
    budget = KvBudget(int(settings.memory_fraction * free_memory_bytes()), num_models["cpu"])
    devices = DeviceBudgets(settings.device_memory_fraction, num_models["cuda"])
    loader = ModelLoader(repositories, settings, metrics, budget, devices)
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
        budget: for the KV caches of all language and speech models on the host.
        devices: for all that models hold on cards; ``None``: budgets that expect one language model.
    """

    def __init__(
        self,
        repositories: list[Repository],
        settings: Settings,
        metrics: Metrics,
        budget: KvBudget,
        devices: DeviceBudgets | None = None,
    ) -> None:
        self._repositories = repositories
        self._registry: Registry | None = None
        devices = devices or DeviceBudgets(settings.device_memory_fraction)
        self._texts = TextLoader(settings, metrics, budget, DeviceTexts(settings, devices))
        self._speech = SpeechLoader(settings, metrics, budget, DeviceSpeeches(settings, devices))
        self._engines = Engines(settings.engine_cache, metrics)
        self._encoders = EncoderLoader(settings, metrics, self._engines)
        self._images = ImageClassifierLoader(settings, metrics, self._engines)
        self._diffusion = DiffusionLoader(settings, metrics, self._judge, self._engines)
        self._tensors = TensorLoader(settings, metrics, self._part, self._engines)
        self._memory = LoadMemory(devices, num_gpus())

    def connect(self, registry: Registry) -> None:
        """Where ensembles find their parts, and image models their moderators. Once, before the first load."""
        self._registry = registry

    def index(self) -> list[IndexEntry]:
        """Every model of the repositories."""
        return merge([index(each) for each in self._repositories])

    def progress(self, name: str) -> str:
        """Which engine a load of the model is building."""
        return self._engines.progress(name)

    def close(self) -> None:
        """When the last model is closed."""
        self._texts.close()
        self._encoders.close()
        self._images.close()
        self._speech.close()
        self._diffusion.close()

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
            with self._memory.reserve(entry, manifest):
                return self._load(entry, manifest)

    def _load(self, entry: ModelEntry, manifest: Manifest | None) -> LoadedModel:
        if manifest is None:
            versions = _load_versions(entry, self._tensors.load)
            return LoadedModel(versions=versions, depends_on=part_names(entry.config))
        if manifest.family == TEXT_FAMILY:
            text = self._texts.load(entry)
            return LoadedModel(versions={text.version: text})
        if manifest.family in ENCODER_FAMILIES:
            return LoadedModel(versions=_load_versions(entry, self._encoders.load))
        if manifest.family == IMAGE_CLASSIFIER:
            return LoadedModel(versions=_load_versions(entry, self._images.load))
        if manifest.family == SPEECH_FAMILY:
            return LoadedModel(versions=_load_versions(entry, self._speech.load))
        if manifest.family == DIFFUSION_FAMILY:
            return LoadedModel(versions=_load_versions(entry, self._diffusion.load))
        raise ConfigError(f"models of the family {manifest.family} are not served", file=str(entry.path))

    def _entry(self, name: str, override: ModelOverride | None) -> AbstractContextManager[ModelEntry]:
        """The model's folder and config, or what the caller brought in their place while the block runs."""
        if override is None:
            return nullcontext(self._repository(name).entry(name))
        if override.files:
            return override_folder(name, override)
        return nullcontext(self._repository(name).entry(name, override_config(name, override)))

    def _repository(self, name: str) -> Repository:
        having = [each for each in self._repositories if each.has(name)]
        if not having:
            raise ModelNotFound(f"no model {name[:160]!r} in the repository", code="model_not_found")
        if len(having) > 1:
            raise ConfigError(DUPLICATE)
        return having[0]

    def _judge(self, name: str) -> Judge:
        assert self._registry is not None
        return TaskFinder(self._registry).judge(name)

    def _part(self, name: str, version: int | None) -> ServedModel:
        assert self._registry is not None
        return self._registry.part(name, version)


_Discardable = TensorModel | EnsembleModel | TaskTensorModel


def _load_versions(entry: ModelEntry, load: Callable[[ModelEntry, int], _Discardable]) -> dict[int, ServedModel]:
    """Every version, or none."""
    versions: dict[int, _Discardable] = {}
    try:
        for version in entry.versions:
            versions[version] = load(entry, version)
    except BaseException:
        for model in versions.values():
            model.discard()
        raise
    return dict(versions)
