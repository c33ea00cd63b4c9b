"""From a version's folder to a speech model that serves: tokenizer, sessions, caches, step loop.

Floor 4. Everything here blocks; the registry runs it in worker threads.
"""

import logging
from contextlib import ExitStack

from sardonyx.engine.loop import StepLoop
from sardonyx.engine.speech import SpeechOptions, SpeechPolicy
from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics
from sardonyx.processing.log_mel import WINDOW_FRAMES
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.processing.whisper_tokens import WhisperTokens
from sardonyx.repository.device_placement import without_device
from sardonyx.repository.families import Whisper
from sardonyx.repository.layout import ModelEntry, read_manifest
from sardonyx.repository.speech_config import SpeechModelOptions, speech_model_options
from sardonyx.runners.whisper import WhisperRunner, WhisperSessions, slot_bytes
from sardonyx.serving.admission import Admission
from sardonyx.serving.dispatch import EventDispatch
from sardonyx.serving.entry import SPEECH_FAMILY
from sardonyx.serving.loop_calls import LoopCalls
from sardonyx.serving.memory import DeviceBudgets, KvBudget, KvShare
from sardonyx.serving.passage import SpeechTools
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.speech import SpeechLimits, SpeechModel
from sardonyx.serving.speech_device import DeviceSpeeches, OpenSpeech
from sardonyx.serving.speech_requests import SpeechRequests
from sardonyx.serving.speech_tensors import speech_face
from sardonyx.serving.task_tensors import TaskTensorModel
from sardonyx.serving.transcription import SpeechRuntime, Transcription
from sardonyx.serving.version_files import VersionFiles, read_version
from sardonyx.settings import Settings

logger = logging.getLogger(__name__)

MAX_NUM_SEQS = 16
"""Windows that are decoded at once, where the operator's config does not say."""


class SpeechLoader:
    """Loads speech models. What they share is made here.

    Args:
        settings: of the server.
        metrics: of the server.
        budget: for the caches of all models in the host's memory that bring no `kv_cache_bytes` of their own.
        devices: opens models for cards; ``None``: with budgets that no other family shares.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, budget: KvBudget, devices: DeviceSpeeches | None = None
    ) -> None:
        self._settings = settings
        self._devices = devices or DeviceSpeeches(settings, DeviceBudgets(settings.device_memory_fraction))
        self._metrics = metrics
        self._budget = budget
        self._pool = WorkerPool()
        self._admission = Admission(
            settings.max_queued_requests,
            settings.max_queued_audio_s,
            unit="seconds of queued sound",
            on_reject=metrics.reject,
        )

    def close(self) -> None:
        """When the last model is closed."""
        self._pool.close()

    def load(self, entry: ModelEntry, version: int) -> TaskTensorModel:
        """One version, its engine running.

        Raises:
            ConfigError: a file is missing or wrong, or one window does not fit the memory budget.
        """
        files = self._read_version(entry, version)
        is_on_card = files.device.gpu is not None
        name, whisper, config = files.name, _facts(files), entry.config
        options = speech_model_options(without_device(config) if is_on_card else config, file=str(entry.config_path))
        tokens = WhisperTokens(Tokenizer.load(files.folder), whisper)
        with ExitStack() as undo:
            wanted = options.max_num_seqs or MAX_NUM_SEQS
            opened = (self._devices.open if is_on_card else self._open_on_host)(files, whisper, options, wanted, undo)
            runner = opened.runner
            num_slots = runner.limits.num_slots
            dispatch = EventDispatch()
            policy = SpeechPolicy(
                runner.limits,
                SpeechOptions(max_num_seqs=num_slots, max_batch_windows=options.max_batch_windows or 1),
                end_id=whisper.end_id,
            )
            engine = StepLoop(name, policy, runner, dispatch.deliver)
            dispatch.connect(engine)
            engine.start()
            undo.pop_all()
        opened.settle()
        metrics = self._metrics.model(name)
        metrics.set_cache_info(block_size=whisper.max_model_len, num_blocks=num_slots)
        requests = SpeechRequests(
            dispatch,
            whisper,
            queue_timeout_s=self._settings.queue_timeout_s,
            retry_after_s=self._admission.retry_after_s,
        )
        runtime = SpeechRuntime(
            model_name=name,
            tools=SpeechTools(requests, tokens, self._pool, whisper.max_model_len),
            language_ids=whisper.language_ids,
            max_passages=2 * num_slots,
            metrics=metrics,
        )
        calls = LoopCalls[Transcription](
            name,
            engine,
            admission=self._admission,
            metrics=metrics,
            statistics=files.count_load(self._metrics),
            on_close=opened.give_back,
        )
        limits = SpeechLimits(max_audio_s=self._settings.max_audio_s, timeout_s=self._settings.request_timeout_s)
        task = SpeechModel(runtime, whisper, calls, limits)
        return TaskTensorModel(task, speech_face(task), calls, entry.config, files)

    def _read_version(self, entry: ModelEntry, version: int) -> VersionFiles:
        """Its config says a device only where it was exported for one."""
        manifest = read_manifest(entry.version_path(version))
        is_for_cards = manifest is not None and manifest.target == "cuda"
        if is_for_cards and entry.config.HasField("optimization"):
            reason = "has no meaning for a speech model: CUDA alone has its operators"
            raise ConfigError(reason, file=str(entry.config_path), field="optimization")
        num_gpus = self._devices.count() if is_for_cards else None
        return read_version(entry, version, {SPEECH_FAMILY}, "speech model", num_gpus=num_gpus)

    def _open_on_host(
        self, files: VersionFiles, whisper: Whisper, options: SpeechModelOptions, wanted: int, undo: ExitStack
    ) -> OpenSpeech:
        share, num_slots = self._take_memory(files.name, options, wanted, slot_bytes(whisper))
        undo.callback(self._budget.give_back, share)
        runner = _open_runner(files, whisper, num_slots)
        undo.callback(runner.close)
        runner.warm_up()
        return OpenSpeech(runner=runner, give_back=lambda: self._budget.give_back(share))

    def _take_memory(self, name: str, options: SpeechModelOptions, wanted: int, bytes_each: int) -> tuple[KvShare, int]:
        """A share of the budget, and how many windows it holds; a line in the log says so."""
        if options.kv_cache_bytes is not None:
            share = self._budget.claim(name, min(wanted * bytes_each, options.kv_cache_bytes))
            source = "kv_cache_bytes"
        else:
            share = self._budget.take(name, wanted * bytes_each)
            source = f"memory_fraction {self._settings.memory_fraction:g}"
        num_slots = share.num_bytes // bytes_each
        mib = bytes_each / (1 << 20)
        if num_slots < 1:
            self._budget.give_back(share)
            raise ConfigError(
                f"one window needs {mib:,.1f} MiB, {source} leaves {share.num_bytes / (1 << 20):,.1f} MiB; raise "
                "kv_cache_bytes or memory_fraction",
                field="kv_cache_bytes",
            )
        logger.info("%s: %d windows at once (%d wanted), %.1f MiB each, from %s", name, num_slots, wanted, mib, source)
        return share, num_slots


def _facts(files: VersionFiles) -> Whisper:
    whisper = files.manifest.whisper
    assert whisper is not None
    if whisper.num_frames != WINDOW_FRAMES:
        raise ConfigError(
            f"takes windows of {whisper.num_frames} frames; Whisper's have {WINDOW_FRAMES}", file=str(files.folder)
        )
    return whisper


def _open_runner(files: VersionFiles, whisper: Whisper, num_slots: int) -> WhisperRunner:
    with ExitStack() as undo:
        sessions = files.open_graphs(undo)
        parts = WhisperSessions(sessions["encoder"], sessions["decoder"], sessions.get("aligner"))
        runner = WhisperRunner(parts, whisper, num_slots)
        undo.pop_all()
    return runner
