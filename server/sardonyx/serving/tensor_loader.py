"""From a folder with an ONNX file, or an ensemble's config, to a model that serves tensors.

Floor 4. Everything here blocks; the registry runs it in worker threads.
"""

import logging
import time
from contextlib import ExitStack
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from sardonyx.engine.dynamic import DynamicOptions, DynamicPolicy
from sardonyx.engine.instances import InstanceLoop, TensorPolicy
from sardonyx.engine.request_queue import QueuePolicy
from sardonyx.engine.sequences import SequenceOptions, SequencePolicy
from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics
from sardonyx.repository import dynamic_batching
from sardonyx.repository.accelerators import requires_gpu
from sardonyx.repository.autocomplete import GraphTensor, check_graph, complete_config
from sardonyx.repository.layout import ModelEntry
from sardonyx.repository.tensor_config import TensorConfig, TensorSpec, read_placement, read_tensor_config
from sardonyx.repository.tensorrt_bounds import tensor_bounds
from sardonyx.repository.tensorrt_shapes import OpenBounds
from sardonyx.runners.tensors import TensorModelRunner
from sardonyx.runtime import session as sessions
from sardonyx.runtime.dtypes import DATATYPES, not_served
from sardonyx.runtime.external_data import check_external_data
from sardonyx.runtime.graph_inputs import DeclaredTensor, read_graph
from sardonyx.runtime.providers import num_gpus
from sardonyx.runtime.session import Session
from sardonyx.serving.admission import Admission
from sardonyx.serving.engines import Engines, GraphPlace
from sardonyx.serving.ensemble import EnsembleModel, EnsembleVersion, Resolve, check_parts
from sardonyx.serving.event_inbox import EventInbox
from sardonyx.serving.quick_models import is_quick
from sardonyx.serving.response_cache import ResponseCache
from sardonyx.serving.tensor_files import kserve_datatype, read_labels, tensor_graph, warm_up
from sardonyx.serving.tensor_sessions import SessionOpener
from sardonyx.serving.tensors import TensorModel, TensorVersion
from sardonyx.settings import Settings, usable_cores
from sardonyx.tensors import TensorMetadata

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 5
"""Of a model on GPUs, one after the other: then it is no more ready."""
_MAX_WAITING_SEQUENCES = 4096
"""Of one model, without a slot: each may hold requests, so there is an end to them."""


class TensorLoader:
    """Loads versions of plain tensor models and of ensembles. What the models share is made here.

    Args:
        resolve: the version of a model that serves now, for ensembles.
        engines: opens the sessions; ``None``: of its own.
    """

    def __init__(self, settings: Settings, metrics: Metrics, resolve: Resolve, engines: Engines | None = None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._resolve = resolve
        self._engines = engines or Engines(settings.engine_cache, metrics)
        self._admission = Admission(
            settings.max_inflight_inferences,
            settings.max_inflight_tensor_bytes,
            unit="bytes of input tensors",
            on_reject=metrics.reject,
        )
        self._cache = ResponseCache(settings.response_cache_bytes) if settings.response_cache_bytes else None
        self._num_gpus = num_gpus()
        self._num_threads = settings.num_threads or usable_cores()

    def load(self, entry: ModelEntry, version: int) -> TensorModel | EnsembleModel:
        """One version, its instances running.

        Raises:
            ConfigError: the config or the graph is wrong, or they do not suit each other.
        """
        if entry.config.platform == "ensemble" or entry.config.HasField("ensemble_scheduling"):
            return self._load_ensemble(entry, version)
        file = str(entry.config_path)
        defaults = complete_config(entry.config, [], [], num_gpus=self._num_gpus, auto_complete=False)
        placement = read_placement(defaults, file=file, num_gpus=self._num_gpus)
        path = _graph_path(entry, version, defaults.default_model_filename)
        bounds = self._bounds(entry.config, path, placement, file)
        started_s = time.monotonic()
        with ExitStack() as undo:
            opener = SessionOpener(
                self._engines,
                GraphPlace(path=path, model=entry.name, file=file, bounds=bounds),
                entry.path,
                placement,
                self._num_threads,
                is_strict=requires_gpu(entry.config),
            )
            opened = opener.open_all()
            for session in set(opened):
                undo.callback(session.close)
            config, tensors = self._complete(entry.config, opened[0], file)
            runner = TensorModelRunner(opened, tensor_graph(tensors, entry.path))
            loaded = _version(entry, version, config, tensors, path)
            warm_up(runner, tensors, entry.path)
            quick = is_quick(runner, tensors, path)
            if not quick and (wide := opener.open_wide()) is not None:
                undo.callback(wide.close)
                runner.use_alone(wide)
                warm_up(runner, tensors, entry.path)
            inbox = EventInbox()
            loop = InstanceLoop(
                entry.name,
                _policy(tensors),
                runner,
                inbox.deliver,
                num_instances=len(tensors.instances),
                is_quick=quick,
                # A card may be lost for good. A processor is not: there it is the values of callers that fail.
                max_failed_steps=None if all(each.kind == "cpu" for each in tensors.instances) else MAX_FAILED_STEPS,
            )
            loop.start()
            undo.pop_all()
        for note in tensors.notes:
            logger.info("%s: %s", entry.name, note)
        statistics = self._metrics.inference(entry.name, version)
        statistics.load_s = time.monotonic() - started_s
        logger.info("%s: version %d loaded in %.2f s", entry.name, version, statistics.load_s)
        return TensorModel(
            loaded,
            loop,
            inbox,
            statistics,
            admission=self._admission,
            cache=self._cache if tensors.uses_cache else None,
            timeout_s=self._settings.request_timeout_s,
        )

    def _bounds(self, config: ModelConfig, path: Path, placement: TensorConfig, file: str) -> OpenBounds:
        """For which shapes an engine is built, from the config as the file completes it; empty without TensorRT."""
        if not any(choice.name == "tensorrt" for choice in placement.providers):
            return {}
        check_external_data(path)
        graph = read_graph(path)
        inputs, outputs = (list(map(_declared_tensor, each)) for each in (graph.inputs, graph.outputs))
        is_automatic = self._settings.auto_complete_config
        full = complete_config(config, inputs, outputs, num_gpus=self._num_gpus, auto_complete=is_automatic)
        return tensor_bounds(read_tensor_config(full, file=file, num_gpus=self._num_gpus))

    def _complete(self, config: ModelConfig, session: Session, file: str) -> tuple[ModelConfig, TensorConfig]:
        """A config completed from its graph, as the protocol shows it and as we read it."""
        inputs, outputs = _graph_inputs(session), _graph_outputs(session)
        is_automatic = self._settings.auto_complete_config
        full = complete_config(config, inputs, outputs, num_gpus=self._num_gpus, auto_complete=is_automatic)
        tensors = read_tensor_config(full, file=file, num_gpus=self._num_gpus)
        tensors.notes.extend(check_graph(full, inputs, outputs, file=file))
        return full, tensors

    def _load_ensemble(self, entry: ModelEntry, version: int) -> EnsembleModel:
        file = str(entry.config_path)
        config = complete_config(entry.config, [], [], num_gpus=self._num_gpus)
        tensors = read_tensor_config(config, file=file, num_gpus=self._num_gpus)
        ensemble = EnsembleVersion(
            name=entry.name,
            version=version,
            config=config,
            inputs=_metadata(tensors.inputs, tensors.max_batch_size),
            outputs=_metadata(tensors.outputs, tensors.max_batch_size),
            steps=tuple(tensors.steps),
            labels=read_labels(tensors, entry.path),
            created=int(entry.path.stat().st_mtime),
        )
        check_parts(ensemble, self._resolve)
        return EnsembleModel(ensemble, self._resolve, self._metrics.inference(entry.name, version))


def _graph_path(entry: ModelEntry, version: int, file_name: str) -> Path:
    """The ONNX file, which may also lie with its external data in a folder of that name."""
    path = entry.version_path(version) / file_name
    if path.is_dir():
        path = path / "model.onnx"
    if not path.is_file():
        raise ConfigError(f"unable to find '{file_name}' for model instance '{entry.name}'", file=str(path.parent))
    if not path.resolve().is_relative_to(entry.path.resolve()):
        raise ConfigError("is a link that leads out of the model's folder", file=str(path))
    return path


def _graph_inputs(session: Session) -> list[GraphTensor]:
    required = [_graph_tensor(spec) for spec in session.inputs.values()]
    return required + [_graph_tensor(spec, is_optional=True) for spec in session.optional_inputs.values()]


def _graph_outputs(session: Session) -> list[GraphTensor]:
    return [_graph_tensor(spec) for spec in session.outputs.values()]


def _graph_tensor(spec: sessions.TensorSpec, *, is_optional: bool = False) -> GraphTensor:
    if spec.datatype.name not in DATATYPES:
        raise ConfigError(f"{spec.name}: {not_served(spec.datatype.ort_name).reason}")
    datatype = "STRING" if spec.datatype.name == "BYTES" else spec.datatype.name
    dims = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in spec.shape)
    return GraphTensor(spec.name, DataType.Value(f"TYPE_{datatype}"), dims, is_optional)


def _declared_tensor(tensor: DeclaredTensor) -> GraphTensor:
    datatype = next((each for each in DATATYPES.values() if each.element_type == tensor.element_type), None)
    name = None if datatype is None else "STRING" if datatype.name == "BYTES" else datatype.name
    data_type = 0 if name is None else DataType.Value(f"TYPE_{name}")
    return GraphTensor(tensor.name, data_type, tensor.dims, tensor.is_initializer)


def _metadata(specs: tuple[TensorSpec, ...], max_batch_size: int) -> tuple[TensorMetadata, ...]:
    batch = (-1,) if max_batch_size else ()
    return tuple(
        TensorMetadata(
            name=spec.name,
            datatype=kserve_datatype(spec.data_type),
            shape=(*batch, *spec.dims),
            is_optional=spec.is_optional,
        )
        for spec in specs
    )


def _version(entry: ModelEntry, version: int, config: ModelConfig, tensors: TensorConfig, path: Path) -> TensorVersion:
    controls = tensors.sequences.controls if tensors.sequences else []
    files = [file.stat() for file in path.parent.rglob("*") if file.is_file()]
    return TensorVersion(
        name=entry.name,
        version=version,
        config=config,
        inputs=_metadata(tensors.inputs, tensors.max_batch_size),
        outputs=_metadata(tensors.outputs, tensors.max_batch_size),
        labels=read_labels(tensors, entry.path),
        created=max(int(file.st_mtime) for file in files),
        size_bytes=sum(file.st_size for file in files),
        is_decoupled=tensors.is_decoupled,
        is_stateful=tensors.sequences is not None,
        correlation_datatype=next(
            (kserve_datatype(each.data_type) for each in controls if each.kind == "corrid"), None
        ),
    )


def _policy(tensors: TensorConfig) -> TensorPolicy:
    sequences, dynamic = tensors.sequences, tensors.dynamic
    if sequences is not None:
        return SequencePolicy(
            tensors.name,
            SequenceOptions(
                strategy=sequences.strategy,
                max_batch_size=tensors.max_batch_size,
                max_idle_s=sequences.max_idle_s,
                max_candidate_sequences=sequences.max_candidate_sequences,
                preferred_batch_sizes=sequences.preferred_batch_sizes,
                max_queue_delay_s=sequences.max_queue_delay_s,
                minimum_slot_utilization=sequences.minimum_slot_utilization,
                preserve_ordering=sequences.preserve_ordering,
                max_waiting_sequences=_MAX_WAITING_SEQUENCES,
                num_instances=len(tensors.instances),
            ),
        )
    if dynamic is None:
        return DynamicPolicy(tensors.name, DynamicOptions(max_batch_size=tensors.max_batch_size))
    return DynamicPolicy(
        tensors.name,
        DynamicOptions(
            max_batch_size=tensors.max_batch_size,
            is_batching=tensors.max_batch_size > 0,
            preferred_batch_sizes=dynamic.preferred_batch_sizes,
            max_queue_delay_s=dynamic.max_queue_delay_s,
            preserve_ordering=dynamic.preserve_ordering,
            num_priority_levels=dynamic.num_priority_levels,
            default_priority=dynamic.default_priority,
            default_queue_policy=_queue_policy(dynamic.default_queue_policy),
            queue_policies={level: _queue_policy(each) for level, each in dynamic.queue_policies.items()},
        ),
    )


def _queue_policy(policy: dynamic_batching.QueuePolicy) -> QueuePolicy:
    return QueuePolicy(
        timeout_action=policy.timeout_action,
        default_timeout_s=policy.default_timeout_s,
        allows_timeout_override=policy.allows_timeout_override,
        max_queue_size=policy.max_queue_size,
    )
