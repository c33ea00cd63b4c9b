"""From a version's folder to an image classifier that serves: session, steps and task.

Floor 4. Everything here blocks; the registry runs it in worker threads.
"""

from contextlib import ExitStack

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.engine.dynamic import DynamicOptions, DynamicPolicy
from sardonyx.engine.instances import InstanceLoop
from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics
from sardonyx.repository.device_placement import without_device
from sardonyx.repository.encoder_config import EncoderOptions, encoder_options
from sardonyx.repository.families import ImageInput, Labels
from sardonyx.repository.layout import ModelEntry
from sardonyx.repository.tensorrt_bounds import image_bounds
from sardonyx.runners.images import ImageClassifierRunner
from sardonyx.runtime.providers import num_gpus
from sardonyx.runtime.session import SessionConfig
from sardonyx.serving.admission import Admission
from sardonyx.serving.encoder_loader import moderation_rules
from sardonyx.serving.encoder_tensors import image_face
from sardonyx.serving.engines import Engines
from sardonyx.serving.entry import IMAGE_CLASSIFIER
from sardonyx.serving.event_inbox import EventInbox
from sardonyx.serving.image_classifier import ImageClassifier
from sardonyx.serving.item_calls import ItemCalls
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.task_tensors import TaskTensorModel
from sardonyx.serving.tensor_loader import MAX_FAILED_STEPS
from sardonyx.serving.version_files import VersionFiles, read_version
from sardonyx.settings import Settings, usable_cores

MAX_STEP_IMAGES = 8
"""Pictures of a step, where the operator's config does not say."""
MAX_CALL_IMAGES = 64
"""Pictures of a call over KServe-v2, where the operator's config does not say: some bytes may be millions of pixels."""
_OPTIONS = frozenset({"max_batch_size", "num_instances", "moderation"})


class ImageClassifierLoader:
    """Loads image classifiers. What they share is made here."""

    def __init__(self, settings: Settings, metrics: Metrics, engines: Engines | None = None) -> None:
        self._engines = engines or Engines(settings.engine_cache, metrics)
        self._num_gpus = num_gpus()
        self._settings = settings
        self._metrics = metrics
        self._pool = WorkerPool()
        self._admission = Admission(
            settings.max_inflight_inferences,
            settings.max_inflight_tensor_bytes,
            unit="bytes of pictures",
            on_reject=metrics.reject,
        )
        self._num_threads = settings.num_threads or usable_cores()

    def close(self) -> None:
        """When the last model is closed."""
        self._pool.close()

    def load(self, entry: ModelEntry, version: int) -> TaskTensorModel:
        """One version, its instances running.

        Raises:
            ConfigError: a file is missing or wrong, or config, manifest and graph do not suit each other.
        """
        file = str(entry.config_path)
        files = read_version(entry, version, {IMAGE_CLASSIFIER}, "image classifier", num_gpus=self._num_gpus)
        image, labels = _facts(files)
        options = _options(without_device(entry.config), file)
        moderation = moderation_rules(files.manifest, options, file=file)
        inbox = EventInbox()
        loop = self._open_loop(files, image, labels, options, inbox)
        calls = ItemCalls(
            entry.name,
            loop,
            inbox,
            files.count_load(self._metrics),
            admission=self._admission,
            timeout_s=self._settings.request_timeout_s,
        )
        task = ImageClassifier(entry.name, calls, self._pool, image=image, labels=labels, moderation=moderation)
        face = image_face(task, max_batch_size=MAX_CALL_IMAGES)
        return TaskTensorModel(task, face, calls, entry.config, files)

    def _open_loop(
        self, files: VersionFiles, image: ImageInput, labels: Labels, options: EncoderOptions, inbox: EventInbox
    ) -> InstanceLoop:
        """Instances that run. They share a session and divide the threads; one has all, for convolutions use them."""
        num_instances = options.num_instances or 1
        max_batch_size = options.max_batch_size or MAX_STEP_IMAGES
        bounds = image_bounds(image, max_batch_size)
        config = SessionConfig(num_threads=max(1, self._num_threads // num_instances))
        with ExitStack() as undo:
            session = files.open_graphs(undo, config, engines=self._engines, bounds=bounds)["model"]
            runner = ImageClassifierRunner([session] * num_instances, image, len(labels.names))
            runner.warm_up()
            undo.pop_all()
        policy = DynamicPolicy(files.name, DynamicOptions(max_batch_size=max_batch_size, is_batching=True))
        # A processor is not lost for good: where steps fail, the loop goes on.
        max_failed_steps = None if files.device.gpu is None else MAX_FAILED_STEPS
        loop = InstanceLoop(
            files.name, policy, runner, inbox.deliver, num_instances=num_instances, max_failed_steps=max_failed_steps
        )
        loop.start()
        return loop


def _facts(files: VersionFiles) -> tuple[ImageInput, Labels]:
    image, labels = files.manifest.image, files.manifest.labels
    assert image is not None
    assert labels is not None
    least = image.resize if len(image.resize) == 2 else image.resize * 2
    if image.crop[0] > least[0] or image.crop[1] > least[1]:
        raise ConfigError(
            f"is {image.crop}; resized pictures may have no more than {least}",
            file=str(files.folder),
            field="image.crop",
        )
    if 0 in image.std:
        raise ConfigError("has a 0, by which numbers would be divided", file=str(files.folder), field="image.std")
    return image, labels


def _options(config: ModelConfig, file: str) -> EncoderOptions:
    options = encoder_options(config, file=file)
    for field in msgspec.structs.fields(EncoderOptions):
        if field.name not in _OPTIONS and field.name in config.parameters:
            raise ConfigError("has no meaning for an image classifier", file=file, field=f"parameters[{field.name!r}]")
    return options
