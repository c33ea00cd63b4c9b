"""Language models on cards: which card, how much of it, and a runner over blocks.

Floor 4. Everything here blocks; the registry runs it in worker threads.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from sardonyx.core import RunnerLimits
from sardonyx.errors import ConfigError, EngineError
from sardonyx.repository.device_placement import read_device
from sardonyx.repository.families import LanguageModel
from sardonyx.repository.layout import ModelEntry
from sardonyx.repository.manifest import Manifest
from sardonyx.runners.paged_decoder import PagedRunner
from sardonyx.runners.paged_graphs import PagedGraphs, check_num_rows
from sardonyx.runners.paged_pass import MAX_GRAPHS, PagedOptions
from sardonyx.runtime.device import Device
from sardonyx.runtime.device_cuda import open_cuda_device
from sardonyx.runtime.device_memory import free_device_bytes
from sardonyx.runtime.providers import execution_provider, num_gpus
from sardonyx.serving.capacity import BlockNeed, EngineLimits, count_blocks, describe_blocks, staging_bytes
from sardonyx.serving.memory import DeviceBudgets, MemoryNeed
from sardonyx.settings import Settings

logger = logging.getLogger(__name__)

ROLES = ("decoder", "sampler", "feed")
WORKSPACE_BYTES = 512 << 20
"""What a step takes beside weights, cache and logits, before it is measured: the libraries' workspaces for the most."""
CAPTURE_BYTES = 256 << 20
"""Left for captured steps, a few MB each, which are made when the cache is there."""
MAX_SCORED_TOKENS = 128
"""Prompt tokens that a step scores at most. Their logits have room for as long as the model lives, 80 MB where the
vocabulary has 150,000: what a request asks for must not be what the card has no memory left for."""


def count_cards() -> int:
    """Cards that this ONNX Runtime can use.

    Raises:
        ConfigError: it was built without CUDA.
    """
    execution_provider("cuda")
    return num_gpus()


class Cards(msgspec.Struct, frozen=True, kw_only=True):
    """How cards are reached."""

    count: Callable[[], int] = count_cards
    open: Callable[[int], Device] = open_cuda_device
    free_bytes: Callable[[int], int] = free_device_bytes


class DeviceText(msgspec.Struct, frozen=True, kw_only=True):
    """A language model on a card, its cache in place."""

    runner: PagedRunner
    settle: Callable[[], None]
    """Call it when the model serves: what it took can be measured from then on."""
    give_back: Callable[[], None]
    """Call it when the model is closed."""


class DeviceTexts:
    """Opens language models that were exported for cards.

    Args:
        settings: of the server.
        budgets: of the cards.
        cards: how they are reached.
    """

    def __init__(self, settings: Settings, budgets: DeviceBudgets, cards: Cards | None = None) -> None:
        self._settings = settings
        self._budgets = budgets
        self._cards = cards or Cards()

    def place(self, entry: ModelEntry) -> int:
        """The card that a model's config chooses.

        Raises:
            ConfigError: ONNX Runtime or the driver knows no such card, or the config wants another device.
        """
        file = str(entry.config_path)
        if entry.config.HasField("optimization"):
            reason = "has no meaning for a language model: CUDA alone has its operators"
            raise ConfigError(reason, file=file, field="optimization")
        device = read_device(entry.config, needs_gpu=True, num_gpus=self._cards.count(), file=file)
        assert device.gpu is not None, "a model for cards has one"
        return device.gpu

    def open(
        self, gpu: int, name: str, folder: Path, manifest: Manifest, limits: EngineLimits, undo: ExitStack
    ) -> DeviceText:
        """Promise memory, open the graphs, see what the largest steps take, and fill the rest with cache.

        Args:
            gpu: number of the card.
            name: of the model.
            folder: of the version.
            manifest: of it.
            limits: what is wanted.
            undo: gives everything back that was taken so far.

        Raises:
            ConfigError: a graph is missing or wrong, or one sequence does not fit beside the weights.
        """
        llm = manifest.llm
        assert llm is not None, "a language model"
        _check_manifest(manifest, llm, folder)
        check_num_rows(limits.max_num_seqs)  # before the weights are read
        need = BlockNeed.of(limits, llm.kv)
        budget = self._budgets.on(gpu)
        share = budget.take(name, _memory_need(manifest, llm, limits, need))
        undo.callback(budget.give_back, share)
        graphs = self._open_graphs(gpu, name, folder, manifest, undo)
        options = _options(limits)
        measured_bytes = self._measure(gpu, graphs, llm, limits, options)
        budget_bytes, source = share.kv_bytes, "kv_cache_bytes"
        if limits.kv_cache_bytes is None:
            source = f"device_memory_fraction {self._settings.device_memory_fraction:g} of cuda:{gpu}"
        if measured_bytes < budget_bytes:
            budget_bytes, source = measured_bytes, f"what weights and steps leave of cuda:{gpu}"
        num_blocks = count_blocks(limits, need, budget_bytes, source=source)
        logger.info("%s: %s", name, describe_blocks(limits, need, num_blocks, budget_bytes, source))
        runner = PagedRunner(graphs, llm, _runner_limits(llm, limits, num_blocks), options)
        undo.callback(runner.close)
        return DeviceText(runner=runner, settle=lambda: budget.settle(share), give_back=lambda: budget.give_back(share))

    def _open_graphs(self, gpu: int, name: str, folder: Path, manifest: Manifest, undo: ExitStack) -> PagedGraphs:
        device = self._cards.open(gpu)
        undo.callback(device.close)
        sessions = {}
        for role in ROLES:
            sessions[role] = device.open(folder / manifest.graphs[role].model.path, model_name=name)
            undo.callback(sessions[role].close)
        return PagedGraphs(name, device, sessions["decoder"], sessions["sampler"], sessions["feed"])

    def _measure(
        self, gpu: int, graphs: PagedGraphs, llm: LanguageModel, limits: EngineLimits, options: PagedOptions
    ) -> int:
        """Bytes that are free once the largest steps have been run, with the cache's smallest form in place.

        Raises:
            ConfigError: they do not run.
        """
        probe = PagedRunner(graphs, llm, _runner_limits(llm, limits, 1), options)
        try:
            probe.warm_up()
            return max(0, self._cards.free_bytes(gpu) - CAPTURE_BYTES)
        except EngineError as error:
            problem = error.message
        finally:
            probe.release()
        # Behind the block, for the error's frames hold bindings, and sessions must be gone before their stream.
        reason = f"steps of so many tokens do not run beside the weights on cuda:{gpu}, lower it: {problem}"
        raise ConfigError(reason, field="max_batch_tokens")


def _check_manifest(manifest: Manifest, llm: LanguageModel, folder: Path) -> None:
    file = str(folder / "manifest.json")
    for role in ROLES:
        if role not in manifest.graphs:
            raise ConfigError(f"has no {role}; export the model anew", file=file, field="graphs")
    if llm.kv.block_size is None:
        raise ConfigError("is missing although the target is cuda", file=file, field="llm.kv.block_size")


def _memory_need(manifest: Manifest, llm: LanguageModel, limits: EngineLimits, need: BlockNeed) -> MemoryNeed:
    graphs = [manifest.graphs[role] for role in ROLES]
    num_logits = limits.max_num_seqs + MAX_SCORED_TOKENS
    wanted_bytes = need.wanted * need.block_bytes
    if limits.kv_cache_bytes is not None:
        wanted_bytes = min(wanted_bytes, limits.kv_cache_bytes)
    return MemoryNeed(
        weights_bytes=sum(file.size_bytes for graph in graphs for file in (graph.model, *graph.data)),
        workspace_bytes=WORKSPACE_BYTES
        + CAPTURE_BYTES
        + 2 * num_logits * llm.vocab_size * 4
        + staging_bytes(limits, llm.kv),
        kv_bytes=wanted_bytes,
        least_kv_bytes=min(wanted_bytes, need.least * need.block_bytes),
    )


def _options(limits: EngineLimits) -> PagedOptions:
    max_graphs = MAX_GRAPHS if limits.max_cuda_graphs is None else limits.max_cuda_graphs
    return PagedOptions(max_batch_tokens=limits.max_batch_tokens, max_graphs=max_graphs)


def _runner_limits(llm: LanguageModel, limits: EngineLimits, num_blocks: int) -> RunnerLimits:
    assert llm.kv.block_size is not None, "the cache has blocks"
    return RunnerLimits(
        num_slots=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
        max_chunk_tokens=min(limits.max_chunk_tokens, limits.max_batch_tokens),
        vocab_size=llm.vocab_size,
        block_size=llm.kv.block_size,
        num_blocks=num_blocks,
        max_scored_tokens=MAX_SCORED_TOKENS,
    )
