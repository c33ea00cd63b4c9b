from typing import Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sardonyx.errors import ConfigError
from sardonyx.repository.config import LanguageModelOptions
from sardonyx.repository.families import KvLayout
from sardonyx.serving.capacity import (
    BlockNeed,
    EngineLimits,
    count_blocks,
    count_slots,
    describe_blocks,
    describe_capacity,
    engine_limits,
    staging_bytes,
)
from sardonyx.settings import Settings


def make(**fields: int) -> EngineLimits:
    defaults = {"max_num_seqs": 4, "max_model_len": 900, "max_chunk_tokens": 101, "max_batch_tokens": 512}
    return EngineLimits(**(defaults | fields), max_step_ms=100.0, kv_cache_bytes=None)  # type: ignore[arg-type]


def test_a_models_parameters_win_over_the_servers_settings() -> None:
    server = Settings(max_num_seqs=8, max_model_len=100, max_step_ms=50.0, kv_cache_bytes=7)
    plain = engine_limits(LanguageModelOptions(), server, 256)
    assert (plain.max_num_seqs, plain.max_model_len, plain.max_step_ms, plain.kv_cache_bytes) == (8, 100, 50.0, 7)
    options = LanguageModelOptions(max_num_seqs=2, max_model_len=50, max_step_ms=10.0, kv_cache_bytes=9)
    own = engine_limits(options, server, 256)
    assert (own.max_num_seqs, own.max_model_len, own.max_step_ms, own.kv_cache_bytes) == (2, 50, 10.0, 9)


def test_nobody_can_ask_for_more_positions_than_the_graph_has() -> None:
    for options in (LanguageModelOptions(max_model_len=999), LanguageModelOptions()):
        limits = engine_limits(options, Settings(), 256)
        assert limits.max_model_len == 256
        assert limits.kv_cache_bytes is None


def test_a_chunk_is_no_longer_than_the_model() -> None:
    limits = engine_limits(LanguageModelOptions(), Settings(max_chunk_tokens=256), 100)
    assert (limits.max_chunk_tokens, limits.capacity) == (100, 199)


def test_slots_are_as_many_as_fit_and_no_more_than_sequences() -> None:
    assert count_slots(make(), 100, 399, source="x") == 3
    assert count_slots(make(), 100, 10_000, source="x") == 4


def test_a_budget_without_room_for_one_slot_names_what_to_lower() -> None:
    with pytest.raises(ConfigError) as caught:
        count_slots(make(), 1_000 << 20, 500 << 20, source="memory_fraction")
    assert caught.value.field == "max_model_len"
    assert "memory_fraction leaves 500.0 MiB: lower max_model_len (to 400 at most)" in caught.value.reason


@settings(deadline=None)
@given(
    token_bytes=st.integers(1, 1 << 20),
    budget=st.integers(0, 1 << 40),
    limits=st.builds(make, max_model_len=st.integers(1, 1 << 20), max_chunk_tokens=st.integers(1, 512)),
)
def test_slots_never_take_more_than_the_budget(token_bytes: int, budget: int, limits: EngineLimits) -> None:
    slot_bytes = token_bytes * limits.capacity
    try:
        num_slots = count_slots(limits, slot_bytes, budget, source="x")
    except ConfigError:
        assert slot_bytes > budget
    else:
        assert 1 <= num_slots <= limits.max_num_seqs
        assert num_slots * slot_bytes <= budget


def test_the_log_says_how_the_cache_came_to_its_size() -> None:
    line = describe_capacity(make(), 1 << 20, 3, 7 << 19, "half of the free memory")
    assert line == (
        "KV cache: 3 slots (4 were wanted) of 1,000 tokens (900 + a chunk of 101 - 1), 1.0 MiB each, 3.0 MiB in all, "
        "within 3.5 MiB from half of the free memory; taken when used"
    )


KV = KvLayout(num_layers=2, num_kv_heads=3, head_size=8, datatype="FP16", block_size=64)
BLOCK_BYTES = 2 * 2 * 3 * 64 * 8 * 2


def test_a_cache_in_blocks_needs_whole_blocks_for_each_sequence_and_one_for_nobody() -> None:
    need = BlockNeed.of(make(max_model_len=130, max_num_seqs=4), KV)
    assert (need.block_size, need.block_bytes) == (64, BLOCK_BYTES)
    assert (need.least, need.wanted) == (1 + 3, 1 + 12)


def test_blocks_are_as_many_as_fit_and_no_more_than_wanted() -> None:
    limits = make(max_model_len=130, max_num_seqs=4)
    need = BlockNeed.of(limits, KV)
    assert count_blocks(limits, need, 6 * BLOCK_BYTES - 1, source="x") == 5
    assert count_blocks(limits, need, 1 << 40, source="x") == 13


def test_a_budget_without_blocks_for_one_sequence_names_what_to_lower() -> None:
    limits = make(max_model_len=130)
    with pytest.raises(ConfigError) as caught:
        count_blocks(limits, BlockNeed.of(limits, KV), 3 * BLOCK_BYTES, source="kv_cache_bytes")
    assert caught.value.field == "max_model_len"
    assert "kv_cache_bytes leaves" in caught.value.reason
    assert "lower max_model_len (to 128 at most)" in caught.value.reason


def test_the_log_says_how_a_cache_in_blocks_came_to_its_size() -> None:
    limits = make(max_model_len=1000, max_num_seqs=4)
    need = BlockNeed(block_size=256, block_bytes=1 << 20, least=5, wanted=17)
    assert describe_blocks(limits, need, 10, 21 << 19, "half of the card") == (
        "KV cache: 10 blocks of 256 tokens, for 2 sequences of 1,000 tokens (4 were wanted), 1.0 MiB each, 10.0 MiB "
        "in all, within 10.5 MiB from half of the card"
    )


@pytest.mark.parametrize("datatype", ["INT8", "FP8"])
def test_a_block_of_a_quantised_cache_takes_half_the_bytes(datatype: Literal["INT8", "FP8"]) -> None:
    sizes = {"num_layers": 28, "num_kv_heads": 8, "head_size": 128, "block_size": 128}
    half, whole = (
        BlockNeed.of(make(), KvLayout(**sizes, datatype=each))  # type: ignore[arg-type]  # all are counts
        for each in (datatype, "BF16")
    )
    assert half.block_bytes == 2 * 28 * 128 * 8 * 128
    assert whole.block_bytes == 2 * half.block_bytes
    assert (half.least, half.wanted) == (whole.least, whole.wanted)
    budget_bytes = 20 * whole.block_bytes
    assert [count_blocks(make(), need, budget_bytes, source="x") for need in (whole, half)] == [20, 33]


def test_unpacking_a_quantised_cache_takes_one_layer_of_all_rows_in_16_bits() -> None:
    layout = KvLayout(num_layers=28, num_kv_heads=8, head_size=128, block_size=128, datatype="FP8")
    assert staging_bytes(make(max_num_seqs=4, max_model_len=900), layout) == 4 * 900 * (2 * 8 * 128 * 2)
    assert staging_bytes(make(), msgspec.structs.replace(layout, datatype="FP16")) == 0
