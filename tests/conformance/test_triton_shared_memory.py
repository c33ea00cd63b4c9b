"""System shared memory: tensors that do not travel through the socket."""

import base64
import multiprocessing.shared_memory
import uuid

import numpy as np
import pytest
import tritonclient.utils.shared_memory as shm
from tests.conformance.triton import (
    INVALID,
    NOT_FOUND,
    UNSUPPORTED,
    Caller,
    check_sums,
    pair,
    texts,
)
from tritonclient.utils import serialize_byte_tensor, serialized_byte_size

SIZE = 64
DISABLED = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."


class Region:
    """A shared-memory region of ours, and its registration."""

    def __init__(self, caller, name, byte_size):
        self.caller, self.name, self.byte_size = caller, name, byte_size
        self.key = f"/sardonyx_test_{uuid.uuid4().hex}"
        self.handle = shm.create_shared_memory_region(name, self.key, byte_size)

    def register(self, **options):
        self.caller.client.register_system_shared_memory(self.name, self.key, self.byte_size, **options)
        return self

    def close(self):
        self.caller.client.unregister_system_shared_memory(self.name)
        shm.destroy_shared_memory_region(self.handle)


@pytest.fixture
def region(caller):
    """Make regions; they are gone afterwards."""
    regions = []

    def make(name, byte_size=2 * SIZE):
        regions.append(Region(caller, name, byte_size))
        return regions[-1]

    yield make
    for each in regions:
        each.close()


def shared_inputs(caller, region_name):
    made = caller.inputs(pair())
    for index, each in enumerate(made):
        each.set_shared_memory(region_name, SIZE, offset=index * SIZE)
    return made


def shared_outputs(caller, region_name):
    wanted = caller.outputs("OUTPUT0", "OUTPUT1")
    for index, each in enumerate(wanted):
        each.set_shared_memory(region_name, SIZE, offset=index * SIZE)
    return wanted


def test_inputs_and_outputs_may_both_lie_in_shared_memory(caller, region):
    given, got = region("inputs").register(), region("outputs").register()
    tensors = pair(3)
    shm.set_shared_memory_region(given.handle, [tensors["INPUT0"], tensors["INPUT1"]])
    result = caller.client.infer("simple", shared_inputs(caller, "inputs"), outputs=shared_outputs(caller, "outputs"))
    total = shm.get_contents_as_numpy(got.handle, np.int32, [1, 16])
    difference = shm.get_contents_as_numpy(got.handle, np.int32, [1, 16], offset=SIZE)
    np.testing.assert_array_equal(total, tensors["INPUT0"] + tensors["INPUT1"])
    np.testing.assert_array_equal(difference, tensors["INPUT0"] - tensors["INPUT1"])
    output = result.get_output("OUTPUT0")
    shape = output["shape"] if caller.protocol == "http" else list(output.shape)
    assert shape == [1, 16]


def test_only_inputs_may_lie_there(caller, region):
    given = region("inputs").register()
    tensors = pair(1)
    shm.set_shared_memory_region(given.handle, [tensors["INPUT0"], tensors["INPUT1"]])
    check_sums(caller.client.infer("simple", shared_inputs(caller, "inputs")), tensors)


def test_one_input_may_lie_there_and_one_output(caller, region):
    given, got = region("inputs").register(), region("outputs").register()
    tensors = pair(2)
    shm.set_shared_memory_region(given.handle, [tensors["INPUT0"]])
    made = caller.inputs(tensors)
    made[0].set_shared_memory("inputs", SIZE)
    wanted = caller.outputs("OUTPUT0", "OUTPUT1")
    wanted[1].set_shared_memory("outputs", SIZE)
    result = caller.client.infer("simple", made, outputs=wanted)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), tensors["INPUT0"] + tensors["INPUT1"])
    difference = shm.get_contents_as_numpy(got.handle, np.int32, [1, 16])
    np.testing.assert_array_equal(difference, tensors["INPUT0"] - tensors["INPUT1"])


def test_inputs_and_outputs_go_from_shared_memory_to_the_socket_and_back(caller, region):
    """One set of objects, used with and without regions."""
    given, got = region("inputs").register(), region("outputs").register()
    tensors = pair(4)
    made, wanted = caller.inputs(tensors), caller.outputs("OUTPUT0", "OUTPUT1")
    check_sums(caller.client.infer("simple", made, outputs=wanted), tensors)
    shm.set_shared_memory_region(given.handle, [tensors["INPUT0"], tensors["INPUT1"]])
    for index, (each, output) in enumerate(zip(made, wanted, strict=True)):
        each.set_shared_memory("inputs", SIZE, offset=index * SIZE)
        output.set_shared_memory("outputs", SIZE, offset=index * SIZE)
    caller.client.infer("simple", made, outputs=wanted)
    total = shm.get_contents_as_numpy(got.handle, np.int32, [1, 16])
    np.testing.assert_array_equal(total, tensors["INPUT0"] + tensors["INPUT1"])
    for each, output in zip(made, wanted, strict=True):
        each.set_data_from_numpy(tensors[each.name()])
        output.unset_shared_memory()
    check_sums(caller.client.infer("simple", made, outputs=wanted), tensors)


def test_text_may_lie_in_shared_memory(caller, region):
    first = texts([str(number) for number in range(16)], 1, 16)
    second = texts(["1"] * 16, 1, 16)
    serialized = [serialize_byte_tensor(first), serialize_byte_tensor(second)]
    sizes = [serialized_byte_size(each) for each in serialized]
    given, got = region("inputs", sum(sizes)).register(), region("outputs", 512).register()
    shm.set_shared_memory_region(given.handle, serialized)
    made = caller.inputs({"INPUT0": first, "INPUT1": second})
    made[0].set_shared_memory("inputs", sizes[0])
    made[1].set_shared_memory("inputs", sizes[1], offset=sizes[0])
    wanted = caller.outputs("OUTPUT0")
    wanted[0].set_shared_memory("outputs", 512)
    caller.client.infer("simple_string", made, outputs=wanted)
    total = shm.get_contents_as_numpy(got.handle, np.object_, [1, 16])
    assert [int(each) for each in total[0]] == list(range(1, 17))


def test_regions_are_listed_while_they_are_registered(caller, region):
    def listed():
        status = caller.show("get_system_shared_memory_status")
        rows = status if caller.protocol == "http" else list(status.get("regions", {}).values())
        return {row["name"]: int(row["byte_size"]) for row in rows}

    assert listed() == {}
    region("first").register()
    region("second", 512).register()
    assert listed() == {"first": 2 * SIZE, "second": 512}
    caller.client.unregister_system_shared_memory("first")
    assert listed() == {"second": 512}
    caller.client.unregister_system_shared_memory()
    assert listed() == {}


def test_a_region_may_start_inside_its_file(caller, region):
    made = region("inputs", 3 * SIZE)
    caller.client.register_system_shared_memory("inputs", made.key, 2 * SIZE, offset=SIZE)
    tensors = pair(6)
    shm.set_shared_memory_region(made.handle, [tensors["INPUT0"], tensors["INPUT1"]], offset=SIZE)
    check_sums(caller.client.infer("simple", shared_inputs(caller, "inputs")), tensors)


def test_a_region_of_pythons_own_making_will_do(caller):
    block = multiprocessing.shared_memory.SharedMemory(create=True, size=2 * SIZE)
    try:
        caller.client.register_system_shared_memory("python", block.name, 2 * SIZE)
        tensors = pair(8)
        block.buf[: 2 * SIZE] = tensors["INPUT0"].tobytes() + tensors["INPUT1"].tobytes()
        check_sums(caller.client.infer("simple", shared_inputs(caller, "python")), tensors)
    finally:
        caller.client.unregister_system_shared_memory("python")
        block.close()
        block.unlink()


def test_a_name_is_registered_once(caller, region):
    made = region("once").register()
    refusal = caller.refused(made.register)
    assert "already in manager" in refusal.message
    assert refusal.status in (*INVALID, "ALREADY_EXISTS")


def test_a_region_that_is_not_there_cannot_be_registered(caller):
    register = caller.client.register_system_shared_memory
    refusal = caller.refused(lambda: register("ghost", "/sardonyx_test_ghost", SIZE))
    assert refusal.message == "Unable to open shared memory region: 'ghost'"
    assert refusal.status in INVALID


@pytest.mark.parametrize("key", ["../etc/passwd", "/etc/passwd", "/triton_python_backend_shm_region_0", ""])
def test_keys_of_others_cannot_be_registered(caller, key):
    refusal = caller.refused(lambda: caller.client.register_system_shared_memory("other", key, SIZE))
    assert refusal.status in INVALID
    assert "passwd" not in refusal.message


def test_a_region_cannot_be_larger_than_its_file(caller, region):
    made = region("large", SIZE)
    refusal = caller.refused(lambda: caller.client.register_system_shared_memory("large", made.key, 1 << 30))
    assert refusal.status in INVALID


@pytest.mark.parametrize(("size", "offset"), [(SIZE, SIZE + 1), (2 * SIZE + 1, 0), (SIZE, 1 << 40)])
def test_an_input_must_lie_in_its_region(caller, region, size, offset):
    region("inputs").register()
    made = caller.inputs(pair())
    made[0].set_shared_memory("inputs", size, offset=offset)
    refusal = caller.refused(lambda: caller.client.infer("simple", made))
    assert refusal.status in INVALID
    assert "shared memory region: 'inputs'" in refusal.message


def test_an_output_must_fit_into_its_region(caller, region):
    region("outputs").register()
    wanted = caller.outputs("OUTPUT0")
    wanted[0].set_shared_memory("outputs", SIZE - 4)
    refusal = caller.refusal("simple", pair(), outputs=wanted)
    assert refusal.status in INVALID
    assert "OUTPUT0" in refusal.message


def test_a_size_that_is_not_the_tensors_is_refused(caller, region):
    region("inputs").register()
    made = caller.inputs(pair())
    made[0].set_shared_memory("inputs", SIZE - 4)
    refusal = caller.refused(lambda: caller.client.infer("simple", made))
    assert refusal.status in INVALID
    assert "input byte size mismatch for input 'INPUT0' for model 'simple'. Expected 64, got 60" in refusal.message


def test_more_than_the_server_takes_is_refused_unread(caller, region):
    """Regions are sparse files: a client has a terabyte for nothing."""
    region("huge", 1 << 40).register()
    made = caller.inputs(pair())
    made[0].set_shared_memory("huge", 1 << 40)
    refusal = caller.refused(lambda: caller.client.infer("simple", made))
    assert refusal.status in ("400", "RESOURCE_EXHAUSTED")
    assert "input 'INPUT0' in shared memory is larger than" in refusal.message


def test_an_unregistered_region_cannot_be_used(caller):
    refusal = caller.refused(lambda: caller.client.infer("simple", shared_inputs(caller, "nowhere")))
    assert refusal.message.endswith("Unable to find shared memory region: 'nowhere'")
    assert refusal.status in (*INVALID, *NOT_FOUND)


def test_unregistering_what_is_not_registered_is_no_error(caller):
    caller.client.unregister_system_shared_memory("nowhere")
    caller.client.unregister_cuda_shared_memory()


def test_cuda_memory_is_refused(caller):
    refusal = caller.refused(
        lambda: caller.client.register_cuda_shared_memory("gpu", base64.b64encode(b"handle"), 0, SIZE)
    )
    assert refusal.status in UNSUPPORTED
    assert "CUDA shared memory is not supported" in refusal.message
    status = caller.show("get_cuda_shared_memory_status")
    assert status in ([], {})


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_shared_memory_is_off_by_default(guarded, protocol):
    with Caller(protocol, guarded) as caller:
        headers = {"authorization": "Bearer admin-key"}
        refusal = caller.refused(
            lambda: caller.client.register_system_shared_memory("off", "/off", SIZE, headers=headers)
        )
        assert refusal.status in UNSUPPORTED
        assert refusal.message == DISABLED
        made = shared_inputs(caller, "off")
        refusal = caller.refused(lambda: caller.client.infer("simple", made, headers=headers))
        assert refusal.status in UNSUPPORTED
        assert DISABLED in refusal.message
        assert caller.show("get_system_shared_memory_status", headers=headers) in ([], {})
