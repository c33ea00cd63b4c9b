"""From a version's folder to a language model that serves: tokenizer, session, KV cache, step loop.

Floor 4. Everything here blocks; the registry runs it in worker threads.
"""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from sardonyx.core import Batch, Runner, RunnerLimits, StepOutput
from sardonyx.engine.continuous import ContinuousOptions, ContinuousPolicy
from sardonyx.engine.loop import StepLoop
from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics
from sardonyx.processing.chat_messages import ChatLimits
from sardonyx.processing.chat_template import ChatTemplate
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.repository.config import language_model_options
from sardonyx.repository.device_placement import without_device
from sardonyx.repository.families import LanguageModel
from sardonyx.repository.layout import ModelEntry, check_files, read_manifest
from sardonyx.repository.manifest import Manifest, all_files
from sardonyx.runners.decoder import DecoderRunner
from sardonyx.runtime.kv_cache import bytes_per_slot
from sardonyx.runtime.session import open_session
from sardonyx.serving.admission import Admission
from sardonyx.serving.capacity import EngineLimits, count_slots, describe_capacity, engine_limits
from sardonyx.serving.dispatch import EventDispatch
from sardonyx.serving.memory import DeviceBudgets, KvBudget, KvShare
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.prompts import BYTES_PER_POSITION
from sardonyx.serving.status import unix_time
from sardonyx.serving.text import TextLimits, TextModel, TextVersion
from sardonyx.serving.text_device import DeviceText, DeviceTexts
from sardonyx.serving.text_tensors import TextTensorModel
from sardonyx.settings import Settings

logger = logging.getLogger(__name__)


class _Opened(msgspec.Struct, frozen=True, kw_only=True):
    """A model's runner, its cache in place, and what is to be done with it later."""

    runner: Runner[Batch, StepOutput]
    block_size: int
    """Tokens: of a block, or of a slot."""
    num_blocks: int
    prepare: Callable[[], None] = lambda: None
    """In the thread that runs the steps, before the first one."""
    settle: Callable[[], None] = lambda: None
    """When the model serves."""
    give_back: Callable[[], None]
    """When it is closed."""


class TextLoader:
    """Loads language models. What they share is made here.

    Args:
        settings: of the server.
        metrics: of the server.
        budget: for the KV caches of all models in the host's memory that bring no `kv_cache_bytes` of their own.
        devices: opens models for cards; ``None``: with budgets that no other family shares.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, budget: KvBudget, devices: DeviceTexts | None = None
    ) -> None:
        self._settings = settings
        self._devices = devices or DeviceTexts(settings, DeviceBudgets(settings.device_memory_fraction))
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
            ConfigError: a file is missing or wrong, one sequence does not fit the memory budget, or the model is for a
                card that is not there.
        """
        started_s = time.monotonic()
        name = entry.name
        folder, manifest, llm = _newest_version(entry)
        is_on_card = manifest.target == "cuda"
        gpu = self._devices.place(entry) if is_on_card else None
        check_files(folder, manifest, hashes=False)
        config = without_device(entry.config) if is_on_card else entry.config
        options = language_model_options(config, file=str(entry.config_path))
        if not is_on_card and options.max_cuda_graphs is not None:
            reason = "is for models that were exported for CUDA"
            raise ConfigError(reason, file=str(entry.config_path), field="parameters.max_cuda_graphs")
        limits = engine_limits(options, self._settings, llm.max_model_len)
        version = _read_version(name, folder, manifest, llm, limits)
        with ExitStack() as undo:
            if gpu is not None:
                opened = _on_card(self._devices.open(gpu, name, folder, manifest, limits, undo))
            else:
                opened = self._open_on_host(name, folder, manifest, limits, undo)
            dispatch = EventDispatch()
            policy = ContinuousPolicy(opened.runner.limits, _policy_options(limits))
            engine = StepLoop(name, policy, opened.runner, dispatch.deliver, prepare=opened.prepare)
            dispatch.connect(engine)
            engine.start()
            undo.pop_all()
        opened.settle()
        metrics = self._metrics.model(name)
        metrics.set_cache_info(block_size=opened.block_size, num_blocks=opened.num_blocks)
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
            on_close=opened.give_back,
        )
        return TextTensorModel(text, entry.config, statistics)

    def _open_on_host(
        self, name: str, folder: Path, manifest: Manifest, limits: EngineLimits, undo: ExitStack
    ) -> _Opened:
        llm = manifest.llm
        assert llm is not None, "a language model"
        slot_bytes = bytes_per_slot(llm.kv, limits.capacity)
        share = self._take_memory(name, limits, slot_bytes)
        undo.callback(self._budget.give_back, share)
        num_slots = self._count_slots(name, limits, slot_bytes, share)
        session = open_session(folder / manifest.graphs["decoder"].model.path, model_name=name)
        undo.callback(session.close)
        runner = DecoderRunner(session, llm, _runner_limits(llm, limits, num_slots))
        undo.callback(runner.close)
        runner.warm_up()
        return _Opened(
            runner=runner,
            block_size=limits.capacity,
            num_blocks=num_slots,
            give_back=lambda: self._budget.give_back(share),
        )

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


def _on_card(text: DeviceText) -> _Opened:
    limits = text.runner.limits
    return _Opened(
        runner=text.runner,
        block_size=limits.block_size,
        num_blocks=limits.num_blocks,
        # A captured step belongs to the thread that captures it, so that is the loop's.
        prepare=text.runner.capture,
        settle=text.settle,
        give_back=text.give_back,
    )


def _newest_version(entry: ModelEntry) -> tuple[Path, Manifest, LanguageModel]:
    if not entry.versions:
        raise ConfigError("has no version to serve", file=str(entry.path))
    folder = entry.version_path(entry.versions[-1])
    manifest = read_manifest(folder)
    if manifest is None or manifest.llm is None:
        raise ConfigError("is no language model: its manifest does not say so", file=str(folder))
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
