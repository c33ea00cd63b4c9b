import numpy as np
import psutil
import pytest

from sardonyx.errors import ConfigError
from sardonyx.repository.families import KvLayout
from sardonyx.runtime.kv_cache import KvCache, bytes_per_slot

LAYOUT = KvLayout(num_layers=3, num_kv_heads=2, head_size=8)


def resident_bytes():
    return psutil.Process().memory_info().rss


def test_slot_costs_keys_and_values_of_every_layer_head_and_position():
    assert bytes_per_slot(LAYOUT, 100) == 2 * 3 * 2 * 100 * 8 * 4
    assert (
        bytes_per_slot(KvLayout(num_layers=3, num_kv_heads=2, head_size=8, datatype="INT8"), 100) == 2 * 3 * 2 * 100 * 8
    )


def test_windows_are_contiguous_parts_of_one_buffer():
    cache = KvCache(LAYOUT, num_slots=4, capacity=16)
    assert cache.nbytes == 4 * bytes_per_slot(LAYOUT, 16)
    window = cache.keys(1, 1, 2)
    assert window.shape == (2, 2, 16, 8)
    assert window.flags.c_contiguous
    window[:] = 1
    assert cache.keys(1, 0, 4).sum() == window.size
    assert not cache.values(1, 0, 4).any()
    assert not cache.keys(0, 0, 4).any()


def test_copy_moves_the_first_positions_of_every_layer_and_nothing_else():
    cache = KvCache(LAYOUT, num_slots=3, capacity=16)
    sides = [side for layer in range(3) for side in (cache.keys(layer, 0, 3), cache.values(layer, 0, 3))]
    random = np.random.default_rng(0)
    for side in sides:
        side[:] = random.standard_normal(side.shape)
    before = [side.copy() for side in sides]
    cache.copy(source=2, target=0, num_tokens=5)
    for side, old in zip(sides, before, strict=True):
        np.testing.assert_array_equal(side[0, :, :5], old[2, :, :5])
        np.testing.assert_array_equal(side[0, :, 5:], old[0, :, 5:])
        np.testing.assert_array_equal(side[1:], old[1:])


def test_memory_is_committed_when_it_is_touched_and_freed_at_close():
    layout = KvLayout(num_layers=8, num_kv_heads=2, head_size=64)
    before = resident_bytes()
    cache = KvCache(layout, num_slots=16, capacity=4096)
    assert cache.nbytes == 1 << 29
    assert resident_bytes() - before < 4 << 20
    for layer in range(8):
        cache.keys(layer, 3, 1)[:, :, :512] = 1
        cache.values(layer, 3, 1)[:, :, :512] = 1
    touched = 512 * bytes_per_slot(layout, 1)
    assert touched <= resident_bytes() - before + (1 << 20) < touched + (5 << 20)
    cache.close()
    cache.close()  # twice does no harm
    assert resident_bytes() - before < 4 << 20


def test_more_than_the_machine_can_address_is_a_config_error():
    with pytest.raises(ConfigError, match="kv_cache_bytes: 1000 slots of 100,000,000,000 positions need"):
        KvCache(LAYOUT, num_slots=1000, capacity=10**11)
