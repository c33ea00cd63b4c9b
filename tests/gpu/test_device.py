"""The driver's side of a card: memory, copies, order. What everything else stands on comes first."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.gpu.card import HAS_CARD, needs_device, open_device

from sardonyx.errors import EngineError
from sardonyx.runtime.device import ALIGNMENT, Device, DeviceTensor
from sardonyx.runtime.device_memory import measure_device
from sardonyx.runtime.dtypes import DATATYPES
from sardonyx_export.builders.feed import build_feed

pytestmark = needs_device
INT64 = DATATYPES["INT64"]
needs_memory = pytest.mark.skipif(not HAS_CARD, reason="a rehearsal's device has no memory that can be measured")


@pytest.fixture
def device() -> Iterator[Device]:
    opened = open_device()
    yield opened
    opened.close()


def test_memory_is_aligned_and_all_zero_also_where_it_was_used_before(device: Device) -> None:
    num_bytes = (1 << 20) + 17
    found = device.allocate_host(num_bytes)
    for fill in (0xAB, 0xCD):
        address = device.allocate(num_bytes)
        assert address % ALIGNMENT == 0
        found[:] = 1
        device.read(address, found)
        device.mark().wait()
        assert not found.any(), f"{np.count_nonzero(found)} bytes of fresh memory are not 0"
        device.write(address, np.full(num_bytes, fill, np.uint8))
        device.mark().wait()
        device.free(address)


def test_bytes_come_back_as_they_were_written(device: Device) -> None:
    source = np.random.default_rng(0).integers(0, 256, 3_000_001, dtype=np.uint8)
    address, found = device.allocate(source.nbytes), device.allocate_host(source.nbytes)
    device.write(address, source)
    device.read(address, found)
    device.mark().wait()
    np.testing.assert_array_equal(found, source)


def test_work_is_done_in_the_order_in_which_it_is_given(device: Device) -> None:
    first, second = (device.allocate_host(1 << 20) for _ in range(2))
    found_first, found_second = (device.allocate_host(1 << 20) for _ in range(2))
    first[:], second[:] = 1, 2
    address = device.allocate(1 << 20)
    device.write(address, first)
    device.read(address, found_first)
    early = device.mark()
    device.write(address, second)
    device.read(address, found_second)
    early.wait()
    assert (found_first == 1).all()
    device.mark().wait()
    assert (found_second == 2).all()


@pytest.mark.parametrize("is_captured", [False, True])
def test_graph_reads_and_writes_by_address(device: Device, tmp_path: Path, is_captured: bool) -> None:
    session = device.open(build_feed(tmp_path)[0], model_name="feed")
    values = {
        "tokens": np.array([10, 11, 12, 13], np.int64),
        "token_ids": np.array([20, 21], np.int64),
        "source": np.array([-1, 1, -1, 0], np.int64),
    }
    binding, addresses = session.new_binding(), {}
    for name, array in values.items():
        addresses[name] = device.allocate(array.nbytes)
        binding.bind_input(name, DeviceTensor(addresses[name], array.shape, INT64))
        device.write(addresses[name], array.view(np.uint8))
    output = DeviceTensor(device.allocate(32), (4,), INT64)
    binding.bind_output("input_ids", output)
    if is_captured:
        binding.capture(1)
        # A replay reads what is at the addresses now.
        values["tokens"] = values["tokens"] + 100
        device.write(addresses["tokens"], values["tokens"].view(np.uint8))
    binding.run(1 if is_captured else -1)
    found = np.empty(4, np.int64)
    device.read(output.address, found.view(np.uint8))
    device.mark().wait()
    tokens, drawn = values["tokens"], values["token_ids"]
    assert found.tolist() == [tokens[0], drawn[1], tokens[2], drawn[0]]
    session.close()


def test_more_memory_than_the_card_has_is_refused_and_the_card_stays_usable(device: Device) -> None:
    with pytest.raises(EngineError, match="has not so much memory left"):
        device.allocate(1 << 50)
    address = device.allocate(1 << 20)
    device.free(address)


@needs_memory
@pytest.mark.usefixtures("device")
def test_what_is_freed_is_free_again() -> None:
    before = measure_device(0).free_bytes
    second = open_device()
    address = second.allocate(1 << 30)
    during = measure_device(0).free_bytes
    second.free(address)
    after = measure_device(0).free_bytes
    second.close()
    assert before - during >= 1 << 30, f"1 GiB was taken, {(before - during) / 2**20:,.0f} MiB are missing"
    assert after - during >= 1 << 30, f"1 GiB was freed, {(after - during) / 2**20:,.0f} MiB came back"


@needs_memory
def test_measured_memory_is_the_card_s() -> None:
    memory = measure_device(0)
    assert 0 < memory.free_bytes < memory.total_bytes
    assert memory.total_bytes > 1 << 30
