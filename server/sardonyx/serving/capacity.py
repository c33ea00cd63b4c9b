"""How large a language model's KV cache becomes, from the operator's wishes and a memory budget.

Floor 4. Pure.
"""

import msgspec

from sardonyx.errors import ConfigError
from sardonyx.repository.config import LanguageModelOptions
from sardonyx.repository.families import KvLayout
from sardonyx.runtime.kv_cache import bytes_per_slot
from sardonyx.settings import Settings


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator wants of one model: its parameters in config.pbtxt, else the server's settings."""

    max_num_seqs: int
    max_model_len: int
    max_chunk_tokens: int
    max_batch_tokens: int
    max_step_ms: float
    kv_cache_bytes: int | None
    """``None``: what the memory budget gives."""
    max_cuda_graphs: int | None = None
    """``None``: as many as the runner likes."""

    @property
    def capacity(self) -> int:
        """C: a row's past and padded chunk must fit, also in the step that computes its last token."""
        return self.max_model_len + self.max_chunk_tokens - 1


def engine_limits(options: LanguageModelOptions, settings: Settings, graph_len: int) -> EngineLimits:
    """Join a model's parameters and the settings; nobody gets more than `graph_len`, the positions of the graph."""
    max_model_len = min(options.max_model_len or settings.max_model_len or graph_len, graph_len)
    return EngineLimits(
        max_num_seqs=options.max_num_seqs or settings.max_num_seqs,
        max_model_len=max_model_len,
        max_chunk_tokens=min(options.max_chunk_tokens or settings.max_chunk_tokens, max_model_len),
        max_batch_tokens=options.max_batch_tokens or settings.max_batch_tokens,
        max_step_ms=options.max_step_ms or settings.max_step_ms,
        kv_cache_bytes=options.kv_cache_bytes or settings.kv_cache_bytes or None,
        max_cuda_graphs=options.max_cuda_graphs,
    )


def count_slots(limits: EngineLimits, slot_bytes: int, budget_bytes: int, *, source: str) -> int:
    """Slots that fit into a budget, at most one for each sequence that may run.

    Args:
        limits: what is wanted.
        slot_bytes: one slot of `EngineLimits.capacity` tokens.
        budget_bytes: for all slots together.
        source: where the budget comes from, for the error.

    Raises:
        ConfigError: not even one fits; the message says what to lower.
    """
    num_slots = min(limits.max_num_seqs, budget_bytes // slot_bytes)
    if num_slots < 1:
        token_bytes = slot_bytes // limits.capacity
        fitting = max(0, budget_bytes // token_bytes - limits.max_chunk_tokens + 1)
        raise ConfigError(
            f"one sequence of {limits.max_model_len:,} tokens needs {_mib(slot_bytes)} of KV cache, {source} leaves "
            f"{_mib(budget_bytes)}: lower max_model_len (to {fitting:,} at most) or max_chunk_tokens, or raise "
            "kv_cache_bytes or memory_fraction",
            field="max_model_len",
        )
    return num_slots


def describe_capacity(limits: EngineLimits, slot_bytes: int, num_slots: int, budget_bytes: int, source: str) -> str:
    """One line for the log: how the KV cache came to its size."""
    wanted = "as many as wanted" if num_slots == limits.max_num_seqs else f"{limits.max_num_seqs} were wanted"
    return (
        f"KV cache: {num_slots} slots ({wanted}) of {limits.capacity:,} tokens "
        f"({limits.max_model_len:,} + a chunk of {limits.max_chunk_tokens:,} - 1), {_mib(slot_bytes)} each, "
        f"{_mib(num_slots * slot_bytes)} in all, within {_mib(budget_bytes)} from {source}; taken when used"
    )


class BlockNeed(msgspec.Struct, frozen=True, kw_only=True):
    """A cache in blocks: what one sequence needs, and what is wanted. Block 0 belongs to nobody and is counted in."""

    block_size: int
    """Tokens."""
    block_bytes: int
    least: int
    """Blocks: one sequence of `EngineLimits.max_model_len` fits."""
    wanted: int
    """Blocks: as many such sequences as may run."""

    @staticmethod
    def of(limits: EngineLimits, kv: KvLayout) -> "BlockNeed":
        """What these limits need of such a cache."""
        assert kv.block_size is not None, "the cache has blocks"
        each = -(-limits.max_model_len // kv.block_size)
        return BlockNeed(
            block_size=kv.block_size,
            block_bytes=bytes_per_slot(kv, kv.block_size),
            least=1 + each,
            wanted=1 + limits.max_num_seqs * each,
        )


def staging_bytes(limits: EngineLimits, kv: KvLayout) -> int:
    """What a step of prompt chunks takes beside a quantised cache: one layer of all rows' caches in 16 bits.

    Each row counts as long as the longest: the kernel is told bounds, not lengths.

    Source: ONNX Runtime, ``paged_attention.cc``: FlashAttention reads no quantised blocks, so they are gathered for it.
    """
    positions = limits.max_num_seqs * limits.max_model_len
    return 2 * 2 * positions * kv.num_kv_heads * kv.head_size if kv.is_quantised else 0


def count_blocks(limits: EngineLimits, need: BlockNeed, budget_bytes: int, *, source: str) -> int:
    """Blocks that fit into a budget, at most those that are wanted.

    Args:
        limits: what is wanted.
        need: the same in blocks.
        budget_bytes: for all blocks together.
        source: where the budget comes from, for the error.

    Raises:
        ConfigError: not even one sequence fits; the message says what to lower.
    """
    num_blocks = min(need.wanted, budget_bytes // need.block_bytes)
    if num_blocks < need.least:
        fitting = max(0, budget_bytes // need.block_bytes - 1) * need.block_size
        raise ConfigError(
            f"one sequence of {limits.max_model_len:,} tokens needs {_mib(need.least * need.block_bytes)} of KV cache, "
            f"{source} leaves {_mib(budget_bytes)}: lower max_model_len (to {fitting:,} at most), or raise "
            "kv_cache_bytes or device_memory_fraction",
            field="max_model_len",
        )
    return num_blocks


def describe_blocks(limits: EngineLimits, need: BlockNeed, num_blocks: int, budget_bytes: int, source: str) -> str:
    """One line for the log: how a cache in blocks came to its size."""
    num_seqs = (num_blocks - 1) // (need.least - 1)
    wanted = "as many as wanted" if num_blocks == need.wanted else f"{limits.max_num_seqs} were wanted"
    return (
        f"KV cache: {num_blocks:,} blocks of {need.block_size} tokens, for {num_seqs} sequences of "
        f"{limits.max_model_len:,} tokens ({wanted}), {_mib(need.block_bytes)} each, "
        f"{_mib(num_blocks * need.block_bytes)} in all, within {_mib(budget_bytes)} from {source}"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.1f} MiB"
