import threading

import numpy as np
import pytest
from tests.runtime.made_driver import make_driver, needs_compiler

from sardonyx.errors import ConfigError, EngineError
from sardonyx.runtime import device_driver
from sardonyx.runtime.device_driver import CudaStream


@needs_compiler
def test_bytes_go_to_the_card_and_back(tmp_path, monkeypatch):
    driver = make_driver(tmp_path, monkeypatch)
    stream = CudaStream(1)
    assert stream.handle == 0x5151
    source, target = stream.allocate_host(1000), stream.allocate_host(1000)
    source[:] = np.arange(1000) % 251
    address = stream.allocate(1000)
    stream.read(address, target)
    assert not target.any(), "memory of the card begins as zeros"
    stream.write(address, source)
    other = stream.allocate(1000)
    stream.copy(address, other, 1000)
    stream.read(other, target)
    stream.wait(stream.record())
    assert (target == source).all()
    assert driver.waits() == 1
    stream.free(address)
    stream.free(other)
    stream.close()
    stream.close()
    assert driver.num_held() == 0


@needs_compiler
def test_another_thread_than_the_one_that_made_it_may_use_it(tmp_path, monkeypatch):
    make_driver(tmp_path, monkeypatch)
    stream, found = CudaStream(1), []

    def use():
        address, host = stream.allocate(16), stream.allocate_host(16)
        host[:] = 5
        stream.write(address, host)
        stream.wait(stream.record())
        stream.free(address)
        found.append(int(host[0]))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    stream.close()
    assert found == [5]


@needs_compiler
def test_a_card_without_memory_says_so_and_goes_on(tmp_path, monkeypatch):
    make_driver(tmp_path, monkeypatch)
    stream = CudaStream(1)
    with pytest.raises(EngineError, match="the card has not so much memory left"):
        stream.allocate(1 << 40)
    stream.free(stream.allocate(64))
    stream.close()


@needs_compiler
def test_a_card_that_fails_is_told_by_the_drivers_number(tmp_path, monkeypatch):
    driver = make_driver(tmp_path, monkeypatch)
    stream = CudaStream(1)
    event, address = stream.record(), stream.allocate(64)
    driver.set_fail(700)
    with pytest.raises(EngineError, match="cuEventSynchronize with error 700"):
        stream.wait(event)
    with pytest.raises(EngineError, match="error 700"):
        stream.write(0, np.zeros(4, np.uint8))
    stream.free(address)
    stream.close()
    driver.set_fail(0)
    assert driver.num_held() == 1, "memory of a card that has failed stays where it is"


@needs_compiler
def test_an_unknown_card_is_told_by_its_number(tmp_path, monkeypatch):
    driver = make_driver(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"instance_group: the card 0 cannot be used: .*cuDeviceGet with error 101"):
        CudaStream(0)
    assert driver.num_held() == 0


@needs_compiler
def test_a_card_without_a_stream_for_us_is_told_and_let_go_of(tmp_path, monkeypatch):
    driver = make_driver(tmp_path, monkeypatch)
    driver.set_fail(46)
    with pytest.raises(ConfigError, match=r"the card 1 cannot be used: .*cuStreamCreate with error 46"):
        CudaStream(1)
    assert driver.num_held() == 0


def test_a_machine_without_a_driver_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(device_driver, "LIBRARY", str(tmp_path / "libcuda.so.1"))
    with pytest.raises(ConfigError, match="is missing or too old: install NVIDIA's driver"):
        CudaStream(0)
