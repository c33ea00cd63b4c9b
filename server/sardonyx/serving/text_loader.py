"""From a version's folder to a language model that serves: tokenizer, session, KV cache, step loop.

Floor 4. Everything here blocks; the registry runs it in worker threads.
"""

import logging
import time
from contextlib import ExitStack
from pathlib import Path

from sardonyx.core import RunnerLimits
from sardonyx.engine.continuous import ContinuousOptions, ContinuousPolicy
from sardonyx.engine.loop import StepLoop
from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics
from sardonyx.processing.chat_messages import ChatLimits
from sardonyx.processing.chat_template import ChatTemplate
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.repository.config import language_model_options
from sardonyx.repository.families import LanguageModel
from sardonyx.repository.layout import ModelEntry, check_files, read_manifest
from sardonyx.repository.manifest import Manifest, all_files
from sardonyx.runners.decoder import DecoderRunner
from sardonyx.runtime.kv_cache import bytes_per_slot
from sardonyx.runtime.session import open_session
from sardonyx.serving.admission import Admission
from sardonyx.serving.capacity import EngineLimits, count_slots, describe_capacity, engine_limits
from sardonyx.serving.dispatch import EventDispatch
from sardonyx.serving.memory import KvBudget, KvShare
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.prompts import BYTES_PER_POSITION
from sardonyx.serving.status import unix_time
from sardonyx.serving.text import TextLimits, TextModel, TextVersion
from sardonyx.serving.text_tensors import TextTensorModel
from sardonyx.settings import Settings

logger = logging.getLogger(__name__)


class TextLoader:
    """Loads language models. What they share is made here.

    Args:
        budget: for the KV caches of all models that bring no `kv_cache_bytes` of their own.
    """

    def __init__(self, settings: Settings, metrics: Metrics, budget: KvBudget) -> None:
        self._settings = settings
        self._metrics = metrics
        self._budget = budget
        self._pool = WorkerPool()
        self._admission = Admission(settings.max_queued_requests, settings.max_queued_tokens, on_reject=metrics.reject)

    def close(self) -> None:
        """When the last model is closed."""
        self._pool.close()

    def load(self, entry: ModelEntry) -> TextTensorModel:
        """The newest version of a model, its engine running.

        Raises:
            ConfigError: a file is missing or wrong, or one sequence does not fit the memory budget.
        """
        started_s = time.monotonic()
        name = entry.name
        folder, manifest, llm = _newest_version(entry)
        check_files(folder, manifest, hashes=False)
        options = language_model_options(entry.config, file=str(entry.config_path))
        limits = engine_limits(options, self._settings, llm.max_model_len)
        version = _read_version(name, folder, manifest, llm, limits)
        with ExitStack() as undo:
            share = self._take_memory(name, limits, bytes_per_slot(llm.kv, limits.capacity))
            undo.callback(self._budget.give_back, share)
            num_slots = self._count_slots(name, limits, bytes_per_slot(llm.kv, limits.capacity), share)
            session = open_session(folder / manifest.graphs["decoder"].model.path, model_name=name)
            undo.callback(session.close)
            runner = DecoderRunner(session, llm, _runner_limits(llm, limits, num_slots))
            undo.callback(runner.close)
            runner.warm_up()
            dispatch = EventDispatch()
            engine = StepLoop(name, ContinuousPolicy(runner.limits, _policy_options(limits)), runner, dispatch.deliver)
            dispatch.connect(engine)
            engine.start()
            undo.pop_all()
        metrics = self._metrics.model(name)
        metrics.set_cache_info(block_size=limits.capacity, num_blocks=num_slots)
        statistics = self._metrics.inference(name, version.version)
        statistics.load_s = time.monotonic() - started_s
        logger.info("%s: version %d loaded in %.1f s", name, version.version, statistics.load_s)
        text = TextModel(
            version,
            engine,
            dispatch,
            admission=self._admission,
            pool=self._pool,
            metrics=metrics,
            limits=TextLimits(
                max_choices=self._settings.max_choices,
                request_timeout_s=self._settings.request_timeout_s,
                queue_timeout_s=self._settings.queue_timeout_s,
            ),
            on_close=lambda: self._budget.give_back(share),
        )
        return TextTensorModel(text, entry.config, statistics)

    def _take_memory(self, name: str, limits: EngineLimits, slot_bytes: int) -> KvShare:
        wanted = limits.max_num_seqs * slot_bytes
        if limits.kv_cache_bytes is not None:
            return self._budget.claim(name, min(wanted, limits.kv_cache_bytes))
        return self._budget.take(name, wanted)

    def _count_slots(self, name: str, limits: EngineLimits, slot_bytes: int, share: KvShare) -> int:
        """Slots of the KV cache, and a line in the log that says why so many."""
        if limits.kv_cache_bytes is not None:
            budget_bytes, source = limits.kv_cache_bytes, "kv_cache_bytes"
        else:
            budget_bytes = share.num_bytes
            total = self._budget.total_bytes / (1 << 20)
            source = f"memory_fraction {self._settings.memory_fraction:g} ({total:,.0f} MiB for all models)"
        num_slots = count_slots(limits, slot_bytes, budget_bytes, source=source)
        logger.info("%s: %s", name, describe_capacity(limits, slot_bytes, num_slots, budget_bytes, source))
        return num_slots


def _newest_version(entry: ModelEntry) -> tuple[Path, Manifest, LanguageModel]:
    if not entry.versions:
        raise ConfigError("has no version to serve", file=str(entry.path))
    folder = entry.version_path(entry.versions[-1])
    manifest = read_manifest(folder)
    if manifest is None or manifest.llm is None:
        raise ConfigError("is no language model: its manifest does not say so", file=str(folder))
    if manifest.target != "cpu":
        raise ConfigError(f"was exported for {manifest.target}; this server runs on the CPU", file=str(folder))
    return folder, manifest, manifest.llm


def _read_version(name: str, folder: Path, manifest: Manifest, llm: LanguageModel, limits: EngineLimits) -> TextVersion:
    tokenizer = Tokenizer.load(folder)
    template = None
    if tokenizer.chat_template is not None:
        template = ChatTemplate(
            tokenizer.chat_template,
            special_tokens=tokenizer.special_tokens,
            limits=ChatLimits(max_chars=BYTES_PER_POSITION * limits.max_model_len),
        )
    return TextVersion(
        name=name,
        version=int(folder.name),
        manifest=manifest,
        created=unix_time(manifest.created) or int(folder.stat().st_mtime),
        size_bytes=sum(file.size_bytes for file in all_files(manifest)),
        max_model_len=limits.max_model_len,
        vocab_size=llm.vocab_size,
        eos_token_ids=frozenset(llm.eos_token_ids or tokenizer.eos_token_ids),
        tokenizer=tokenizer,
        chat_template=template,
    )


def _runner_limits(llm: LanguageModel, limits: EngineLimits, num_slots: int) -> RunnerLimits:
    return RunnerLimits(
        num_slots=num_slots,
        max_model_len=limits.max_model_len,
        max_chunk_tokens=limits.max_chunk_tokens,
        vocab_size=llm.vocab_size,
    )


def _policy_options(limits: EngineLimits) -> ContinuousOptions:
    return ContinuousOptions(
        max_num_seqs=limits.max_num_seqs, max_batch_tokens=limits.max_batch_tokens, max_step_ms=limits.max_step_ms
    )
