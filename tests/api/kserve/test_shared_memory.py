import os
import uuid
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import pytest
import tritonclient.utils.shared_memory as client
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.api.kserve.calls import RegionStatus
from sardonyx.api.kserve.shared_memory import ROOT, SharedMemory
from sardonyx.errors import InvalidRequest

SIZE = 64
CONTENT = bytes(range(SIZE))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[SharedMemory]:
    memory = SharedMemory(tmp_path)
    (tmp_path / "k").write_bytes(CONTENT)
    yield memory
    memory.unregister()


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def refuse(memory: SharedMemory, match: str, *, name="r", key="k", offset=0, byte_size=SIZE) -> None:
    before = num_open_files()
    with pytest.raises(InvalidRequest, match=match) as refusal:
        memory.register(name, key=key, offset=offset, byte_size=byte_size)
    assert num_open_files() == before
    if len(key) > 1:
        assert key not in refusal.value.message


@pytest.mark.skipif(not ROOT.is_dir(), reason="no /dev/shm here")
def test_regions_of_tritons_client_are_read_and_written():
    key = f"/test_{uuid.uuid4().hex}"
    handle = client.create_shared_memory_region("data", key, 128)
    memory = SharedMemory()
    try:
        values = np.arange(16, dtype=np.int32)
        client.set_shared_memory_region(handle, [values], offset=64)
        memory.register("data", key=key, offset=0, byte_size=128)
        assert memory.read("data", 64, 64) == values.tobytes()
        memory.write("data", 0, memoryview(values + 1))
        np.testing.assert_array_equal(client.get_contents_as_numpy(handle, np.int32, [16]), values + 1)
    finally:
        memory.unregister()
        client.destroy_shared_memory_region(handle)


@pytest.mark.skipif(not ROOT.is_dir(), reason="no /dev/shm here")
def test_region_outlives_the_name_of_its_file():
    block = shared_memory.SharedMemory(create=True, size=SIZE)
    memory = SharedMemory()
    try:
        memory.register("r", key=block.name, offset=0, byte_size=SIZE)
    finally:
        block.unlink()
    memory.write("r", 3, b"abc")
    assert bytes(block.buf[3:6]) == b"abc"
    memory.unregister()
    block.close()


def test_offsets_count_from_the_regions_begin(memory):
    memory.register("r", key="/k", offset=10, byte_size=20)
    assert memory.read("r", 0, 20) == CONTENT[10:30]
    assert memory.read("r", 5, 0) == b""
    memory.write("r", 18, b"xy")
    assert memory.read("r", 18, 2) == b"xy"


def test_status_tells_what_was_registered(memory):
    memory.register("a", key="/k", offset=8, byte_size=16)
    memory.register("b", key="k", offset=0, byte_size=64)
    assert memory.status("a") == [RegionStatus(name="a", key="/k", offset=8, byte_size=16)]
    assert [region.name for region in memory.status()] == ["a", "b"]
    with pytest.raises(InvalidRequest, match="Unable to find system shared memory region: 'c'"):
        memory.status("c")


def test_taken_name_is_refused(memory):
    memory.register("r", key="k", offset=0, byte_size=SIZE)
    refuse(memory, "shared memory region 'r' already in manager")


def test_unregistering_forgets_one_or_all(memory):
    for name in "abc":
        memory.register(name, key="k", offset=0, byte_size=SIZE)
    memory.unregister("b")
    memory.unregister("unknown")
    assert [region.name for region in memory.status()] == ["a", "c"]
    memory.unregister()
    assert memory.status() == []
    with pytest.raises(InvalidRequest, match="Unable to find shared memory region: 'a'"):
        memory.read("a", 0, 1)


def test_held_region_works_after_it_is_unregistered_and_its_file_is_closed_once(memory):
    before = num_open_files()
    memory.register("r", key="k", offset=0, byte_size=SIZE)
    with memory.hold("r") as first, memory.hold("r") as second:
        memory.unregister("r")
        memory.register("r", key="k", offset=1, byte_size=1)
        memory.unregister("r")
        assert num_open_files() == before + 1
        first.write(0, b"Z")
        assert second.read(0, 2) == b"Z\x01"
    assert num_open_files() == before


@pytest.mark.parametrize(
    "key",
    ["", "/", "..", "/..", ".", "a/b", "/a/b", "//k", "../k", "k\n", "k\0", "grün", "k k", "~", "x" * 256, "\\k"],
)
def test_key_that_is_no_plain_name_is_refused(memory, key):
    refuse(memory, "the key is one name", key=key)


@pytest.mark.parametrize(
    "key", ["/triton_python_backend_shm_region_abc", "triton_python_backend_shm_region_1", "sem.x"]
)
def test_reserved_key_is_refused(memory, tmp_path, key):
    (tmp_path / key.strip("/")).write_bytes(CONTENT)
    refuse(memory, "cannot register shared memory region 'r' as the key contains the reserved prefix", key=key)


def test_missing_file_is_refused(memory):
    refuse(memory, "Unable to open shared memory region: 'r'", key="missing")


def test_link_is_not_followed(memory, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "k")
    refuse(memory, "Unable to open", key="link")


def test_folders_and_pipes_are_refused(memory, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    refuse(memory, "Unable to open", key="folder")
    refuse(memory, "Unable to open", key="pipe")


@pytest.mark.parametrize("name", ["", "x" * 257])
def test_empty_or_endless_name_is_refused(memory, name):
    refuse(memory, "1 to 256 characters", name=name)


def test_more_regions_than_the_limit_are_refused(tmp_path):
    (tmp_path / "k").write_bytes(CONTENT)
    memory = SharedMemory(tmp_path, max_regions=2)
    for name in "ab":
        memory.register(name, key="k", offset=0, byte_size=SIZE)
    refuse(memory, "2 are registered", name="c")
    memory.unregister("a")
    memory.register("c", key="k", offset=0, byte_size=SIZE)
    memory.unregister()


def test_shortened_file_is_noticed_at_the_next_use(memory, tmp_path):
    memory.register("r", key="k", offset=0, byte_size=SIZE)
    os.truncate(tmp_path / "k", 10)
    assert memory.read("r", 0, 10) == CONTENT[:10]
    for use in (lambda: memory.read("r", 0, 11), lambda: memory.write("r", 9, b"ab")):
        with pytest.raises(InvalidRequest, match="smaller than when it was registered"):
            use()
    assert (tmp_path / "k").stat().st_size == 10


def test_slice_that_ends_at_the_regions_end_is_written_whole(memory):
    memory.register("r", key="k", offset=0, byte_size=SIZE)
    values = np.arange(8, dtype=np.int64).reshape(2, 4)
    memory.write("r", 0, memoryview(values))
    assert memory.read("r", 0, SIZE) == values.tobytes()
    memory.write("r", 0, memoryview(np.zeros((2, 0))))


numbers = st.integers(-2, SIZE + 2) | st.sampled_from([-(1 << 63), (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 200])


@given(offset=numbers, byte_size=numbers)
def test_region_must_lie_in_its_file(tmp_path_factory, offset, byte_size):
    root = tmp_path_factory.getbasetemp()
    (root / "k").write_bytes(CONTENT)
    memory = SharedMemory(root)
    if offset >= 0 and byte_size > 0 and offset + byte_size <= SIZE:
        memory.register("r", key="k", offset=offset, byte_size=byte_size)
        assert memory.read("r", 0, byte_size) == CONTENT[offset : offset + byte_size]
        memory.unregister()
    else:
        refuse(memory, "failed to register shared memory region 'r': invalid args", offset=offset, byte_size=byte_size)


@given(offset=numbers, size_bytes=numbers)
def test_slice_must_lie_in_its_region(tmp_path_factory, offset, size_bytes):
    root = tmp_path_factory.getbasetemp()
    (root / "k").write_bytes(CONTENT)
    memory = SharedMemory(root)
    memory.register("r", key="k", offset=16, byte_size=32)
    try:
        if 0 <= offset < 32 and 0 <= size_bytes <= 32 - offset:
            assert memory.read("r", offset, size_bytes) == CONTENT[16:48][offset : offset + size_bytes]
            memory.write("r", offset, b"\xff" * size_bytes)
        else:
            with pytest.raises(InvalidRequest, match=r"^Invalid offset( \+ byte size)? for shared memory region: 'r'$"):
                memory.read("r", offset, size_bytes)
            with pytest.raises(InvalidRequest, match=r"^Invalid offset"):
                memory.write("r", offset, b"\xff" * 40)
        expected = bytearray(CONTENT)
        if 0 <= offset < 32 and 0 <= size_bytes <= 32 - offset:
            expected[16 + offset : 16 + offset + size_bytes] = b"\xff" * size_bytes
        assert (root / "k").read_bytes() == expected
    finally:
        memory.unregister()
