"""From a version's folder to a speech model that serves: tokenizer, sessions, caches, step loop.

Floor 4. Everything here blocks; the registry runs it in worker threads.
"""

import logging
import time
from contextlib import ExitStack
from pathlib import Path

from sardonyx.engine.loop import StepLoop
from sardonyx.engine.speech import SpeechOptions, SpeechPolicy
from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics
from sardonyx.processing.log_mel import WINDOW_FRAMES
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.processing.whisper_tokens import WhisperTokens
from sardonyx.repository.families import Whisper
from sardonyx.repository.layout import ModelEntry, check_files, read_manifest
from sardonyx.repository.manifest import Manifest, all_files
from sardonyx.repository.speech_config import SpeechModelOptions, speech_model_options
from sardonyx.runners.whisper import WhisperRunner, WhisperSessions, slot_bytes
from sardonyx.runtime.session import open_session
from sardonyx.serving.admission import Admission
from sardonyx.serving.dispatch import EventDispatch
from sardonyx.serving.entry import SPEECH_FAMILY
from sardonyx.serving.loop_calls import LoopCalls
from sardonyx.serving.memory import KvBudget, KvShare
from sardonyx.serving.passage import SpeechTools
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.speech import SpeechLimits, SpeechModel
from sardonyx.serving.speech_requests import SpeechRequests
from sardonyx.serving.speech_tensors import speech_face
from sardonyx.serving.status import unix_time
from sardonyx.serving.task_tensors import TaskTensorModel
from sardonyx.serving.transcription import SpeechRuntime, Transcription
from sardonyx.settings import Settings

logger = logging.getLogger(__name__)

MAX_NUM_SEQS = 16
"""Windows that are decoded at once, where the operator's config does not say."""


class SpeechLoader:
    """Loads speech models. What they share is made here.

    Args:
        budget: for the caches of all models that bring no `kv_cache_bytes` of their own.
    """

    def __init__(self, settings: Settings, metrics: Metrics, budget: KvBudget) -> None:
        self._settings = settings
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
        started_s = time.monotonic()
        name = entry.name
        folder = entry.version_path(version)
        manifest, whisper = _read_manifest(folder)
        check_files(folder, manifest, hashes=False)
        options = speech_model_options(entry.config, file=str(entry.config_path))
        tokens = WhisperTokens(Tokenizer.load(folder), whisper)
        with ExitStack() as undo:
            share, num_slots = self._take_memory(name, options, slot_bytes(whisper))
            undo.callback(self._budget.give_back, share)
            runner = _open_runner(name, folder, manifest, whisper, num_slots)
            undo.callback(runner.close)
            runner.warm_up()
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
        metrics = self._metrics.model(name)
        metrics.set_cache_info(block_size=whisper.max_model_len, num_blocks=num_slots)
        statistics = self._metrics.inference(name, version)
        statistics.load_s = time.monotonic() - started_s
        logger.info("%s: version %d loaded in %.2f s", name, version, statistics.load_s)
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
            statistics=statistics,
            on_close=lambda: self._budget.give_back(share),
        )
        limits = SpeechLimits(max_audio_s=self._settings.max_audio_s, timeout_s=self._settings.request_timeout_s)
        task = SpeechModel(runtime, whisper, calls, limits)
        return TaskTensorModel(
            task,
            speech_face(task),
            calls,
            entry.config,
            version=version,
            created=unix_time(manifest.created) or int(folder.stat().st_mtime),
            size_bytes=sum(each.size_bytes for each in all_files(manifest)),
        )

    def _take_memory(self, name: str, options: SpeechModelOptions, bytes_each: int) -> tuple[KvShare, int]:
        """A share of the budget, and how many windows it holds; a line in the log says so."""
        wanted = options.max_num_seqs or MAX_NUM_SEQS
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


def _open_runner(name: str, folder: Path, manifest: Manifest, whisper: Whisper, num_slots: int) -> WhisperRunner:
    with ExitStack() as undo:
        sessions = {}
        for role, graph in manifest.graphs.items():
            sessions[role] = open_session(folder / graph.model.path, model_name=name)
            undo.callback(sessions[role].close)
        parts = WhisperSessions(sessions["encoder"], sessions["decoder"], sessions.get("aligner"))
        runner = WhisperRunner(parts, whisper, num_slots)
        undo.pop_all()
    return runner


def _read_manifest(folder: Path) -> tuple[Manifest, Whisper]:
    manifest = read_manifest(folder)
    if manifest is None or manifest.family != SPEECH_FAMILY or manifest.whisper is None:
        raise ConfigError("is no speech model: its manifest does not say so", file=str(folder))
    if manifest.target != "cpu":
        raise ConfigError(f"was exported for {manifest.target}; this server runs on the CPU", file=str(folder))
    if manifest.whisper.num_frames != WINDOW_FRAMES:
        raise ConfigError(
            f"takes windows of {manifest.whisper.num_frames} frames; Whisper's have {WINDOW_FRAMES}", file=str(folder)
        )
    return manifest, manifest.whisper
