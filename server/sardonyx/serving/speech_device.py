"""Speech models on cards: how much of the card, and a runner whose windows and caches lie there.

Floor 4. Everything here blocks; the registry runs it in worker threads.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack

import msgspec

from sardonyx.core import Runner
from sardonyx.errors import ConfigError, EngineError
from sardonyx.repository.families import Whisper
from sardonyx.repository.speech_config import SpeechModelOptions
from sardonyx.runners.paged_graphs import check_num_rows
from sardonyx.runners.whisper import slot_bytes
from sardonyx.runners.whisper_device import WhisperDeviceRunner
from sardonyx.runners.whisper_graphs import WhisperGraphs
from sardonyx.serving.memory import DeviceBudgets, MemoryNeed
from sardonyx.serving.text_device import Cards
from sardonyx.serving.version_files import VersionFiles
from sardonyx.settings import Settings
from sardonyx.speech import SpeechBatch, SpeechOutput

logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 512 << 20
"""What a step takes beside weights, caches and the alignment, before it is measured: the libraries' workspaces for the
most, and the activations of one window."""


class OpenSpeech(msgspec.Struct, frozen=True, kw_only=True):
    """A speech model on a card or on the host, warm, its caches in place."""

    runner: Runner[SpeechBatch, SpeechOutput]
    settle: Callable[[], None] = lambda: None
    """Call it when the model serves: what it took can be measured from then on."""
    give_back: Callable[[], None]
    """Call it when the model is closed."""


class DeviceSpeeches:
    """Opens speech models that were exported for cards.

    Args:
        settings: of the server.
        budgets: of the cards.
        cards: how they are reached.
    """

    def __init__(self, settings: Settings, budgets: DeviceBudgets, cards: Cards | None = None) -> None:
        self._settings = settings
        self._budgets = budgets
        self._cards = cards or Cards()

    def count(self) -> int:
        """Cards that there are.

        Raises:
            ConfigError: this ONNX Runtime was built without CUDA.
        """
        return self._cards.count()

    def open(
        self, files: VersionFiles, whisper: Whisper, options: SpeechModelOptions, wanted: int, undo: ExitStack
    ) -> OpenSpeech:
        """Promise memory, open the graphs, see what the steps of one window take, and fill the rest with windows.

        Args:
            files: of the version; they name the card.
            whisper: the manifest's part.
            options: the operator's.
            wanted: windows at once.
            undo: gives everything back that was taken so far.

        Raises:
            ConfigError: a graph is missing or wrong, or one window does not fit beside the weights.
        """
        gpu = files.device.gpu
        assert gpu is not None, "a model for cards has one"
        if whisper.kv.block_size is None:
            reason = "is missing although the target is cuda"
            raise ConfigError(reason, file=str(files.folder / "manifest.json"), field="whisper.kv.block_size")
        check_num_rows(wanted)  # before the weights are read
        bytes_each = slot_bytes(whisper)
        budget = self._budgets.on(gpu)
        share = budget.take(files.name, _memory_need(files, whisper, options, wanted, bytes_each))
        undo.callback(budget.give_back, share)
        graphs = self._open_graphs(gpu, files, undo)
        free_bytes = self._measure(gpu, graphs, whisper)
        budget_bytes, source, remedy = share.kv_bytes, "kv_cache_bytes", "raise it"
        if options.kv_cache_bytes is None:
            source = f"device_memory_fraction {self._settings.device_memory_fraction:g} of cuda:{gpu}"
        if is_full := free_bytes < budget_bytes:
            budget_bytes, source = free_bytes, f"what weights and steps leave of cuda:{gpu}"
            remedy = "unload another model"
        num_slots = min(wanted, budget_bytes // bytes_each)
        mib = bytes_each / (1 << 20)
        if num_slots < 1:
            there = f"there are {budget_bytes / (1 << 20):,.1f} MiB from {source}"
            raise ConfigError(
                f"one window needs {mib:,.1f} MiB, {there}; {remedy}", field=None if is_full else "kv_cache_bytes"
            )
        logger.info(
            "%s: %d windows at once (%d wanted), %.1f MiB each, from %s", files.name, num_slots, wanted, mib, source
        )
        runner = WhisperDeviceRunner(graphs, whisper, num_slots)
        undo.callback(runner.close)
        _warm_up(runner, gpu)
        return OpenSpeech(runner=runner, settle=lambda: budget.settle(share), give_back=lambda: budget.give_back(share))

    def _open_graphs(self, gpu: int, files: VersionFiles, undo: ExitStack) -> WhisperGraphs:
        device = self._cards.open(gpu)
        undo.callback(device.close)
        sessions = {}
        for role, graph in files.manifest.graphs.items():
            sessions[role] = device.open(files.folder / graph.model.path, model_name=files.name)
            undo.callback(sessions[role].close)
        return WhisperGraphs(files.name, device, sessions["encoder"], sessions["decoder"], sessions.get("aligner"))

    def _measure(self, gpu: int, graphs: WhisperGraphs, whisper: Whisper) -> int:
        """Bytes that are free once the largest steps of one window have been run, with a place for it.

        Raises:
            ConfigError: they do not run.
        """
        probe = WhisperDeviceRunner(graphs, whisper, 1)
        try:
            _warm_up(probe, gpu)
            return self._cards.free_bytes(gpu)
        finally:
            probe.release()


def _warm_up(runner: WhisperDeviceRunner, gpu: int) -> None:
    try:
        runner.warm_up()
        return
    except EngineError as error:
        problem = error.message
    # Behind the block, for the error's frames hold bindings, and sessions must be gone before their stream.
    reason = f"the largest steps do not run beside the weights on cuda:{gpu}: {problem}"
    raise ConfigError(reason, field="max_num_seqs")


def _memory_need(
    files: VersionFiles, whisper: Whisper, options: SpeechModelOptions, wanted: int, bytes_each: int
) -> MemoryNeed:
    graphs = files.manifest.graphs.values()
    alignment = 4 * len(whisper.alignment_heads) * whisper.max_model_len * (whisper.num_frames // 2)
    wanted_bytes = wanted * bytes_each
    if options.kv_cache_bytes is not None:
        wanted_bytes = min(wanted_bytes, options.kv_cache_bytes)
    return MemoryNeed(
        # Also what the aligner has from the decoder's file: each session on a card has its own.
        weights_bytes=sum(file.size_bytes for graph in graphs for file in (graph.model, *graph.data)),
        workspace_bytes=WORKSPACE_BYTES + alignment + 4 * 2 * wanted * whisper.vocab_size,
        kv_bytes=wanted_bytes,
        least_kv_bytes=min(wanted_bytes, bytes_each),
    )
