import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tests.api.kserve.grpc_live import integers
from tritonclient.grpc import service_pb2 as pb

from sardonyx.api.kserve import grpc_wire
from sardonyx.api.kserve.grpc_wire import MIN_SPLIT_BYTES, join_reply, join_stream_reply, split_request
from sardonyx.errors import InvalidRequest

names = st.text(max_size=8)
blobs = st.one_of(st.binary(max_size=40), st.sampled_from([b"\1" * 127, b"\2" * 128, b"\3" * MIN_SPLIT_BYTES]))


@st.composite
def requests(draw):
    request = pb.ModelInferRequest(model_name=draw(names), id=draw(names))
    for name in draw(st.lists(names, max_size=3)):
        request.inputs.add(name=name, datatype="INT32", shape=draw(st.lists(st.integers(-1, 1 << 40), max_size=3)))
    for name in draw(st.lists(names, max_size=2)):
        request.parameters[name].int64_param = -1
    request.raw_input_contents.extend(draw(st.lists(blobs, max_size=3)))
    return request


def fields(data):
    """A request's serialized top-level fields, one by one."""
    message = pb.ModelInferRequest.FromString(data)
    found = []
    for field, value in message.ListFields():
        for each in value if field.is_repeated and field.name != "parameters" else [value]:
            part = pb.ModelInferRequest()
            if field.name == "parameters":
                part.MergeFrom(pb.ModelInferRequest(parameters=message.parameters))
            elif field.is_repeated:
                getattr(part, field.name).append(each)
            else:
                setattr(part, field.name, each)
            found.append(part.SerializeToString())
    return found


def parsed(data):
    """What protobuf itself makes of it; ``None`` where it refuses."""
    try:
        message = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        return None
    raw_contents = list(message.raw_input_contents)
    message.ClearField("raw_input_contents")
    return message, raw_contents


def split(data):
    """The same by `split_request`."""
    try:
        message, raw_contents = split_request(data)
    except InvalidRequest:
        return None
    raw_contents = [bytes(each) for each in raw_contents]
    message.ClearField("raw_input_contents")
    return message, raw_contents


@pytest.fixture
def _every_size(monkeypatch):
    monkeypatch.setattr(grpc_wire, "MIN_SPLIT_BYTES", 0)


@pytest.mark.usefixtures("_every_size")
@given(requests())
def test_a_split_message_is_what_protobuf_parses(request):
    data = request.SerializeToString()
    assert split(data) == parsed(data)
    assert split(data) is not None


@pytest.mark.usefixtures("_every_size")
@given(requests(), st.randoms())
def test_fields_may_come_in_any_order(request, random):
    parts = fields(request.SerializeToString())
    random.shuffle(parts)
    data = b"".join(parts)
    assert split(data) == parsed(data)
    assert split(data) is not None


@pytest.mark.usefixtures("_every_size")
@given(requests(), st.data())
def test_damaged_messages_are_refused_or_what_protobuf_makes_of_them(request, data):
    wire = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(wire)))
        match data.draw(st.sampled_from(["cut", "insert", "change"])):
            case "cut":
                del wire[at : at + data.draw(st.integers(1, 4))]
            case "insert":
                wire[at:at] = data.draw(st.binary(min_size=1, max_size=12))
            case "change" if at < len(wire):
                wire[at] = data.draw(st.integers(0, 255))
    assert split(bytes(wire)) == parsed(bytes(wire))


@pytest.mark.usefixtures("_every_size")
def test_a_message_that_is_cut_off_is_refused_or_what_protobuf_makes_of_it():
    request = integers(1, 2, 3, model="m", id="7", priority=1)
    request.raw_input_contents.append(b"last")
    data = request.SerializeToString()
    assert split(data[:-1]) is None
    for length in range(len(data) + 1):
        assert split(data[:length]) == parsed(data[:length]), length


@pytest.mark.usefixtures("_every_size")
@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_refused_or_what_protobuf_makes_of_them(data):
    assert split(data) == parsed(data)


@pytest.mark.usefixtures("_every_size")
@pytest.mark.parametrize(
    "unusual",
    [
        b"\x3b\x3c",  # an empty group of number 7
        b"\x38\x05",  # raw_input_contents as a varint
        b"\x39" + bytes(8),
        b"\x3d" + bytes(4),
        b"\xba\x06\x02hi",  # a tag of two bytes
        b"\x3a\x82\x80\x80\x80\x00hi",  # a length with more bytes than it needs
    ],
)
def test_unusual_fields_beside_tensors_are_as_with_protobuf(unusual):
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"abcd"])
    data = request.SerializeToString() + unusual
    assert split(data) == parsed(data)
    assert split(data) is not None


@pytest.mark.usefixtures("_every_size")
def test_many_fields_are_as_with_protobuf():
    data = pb.ModelInferRequest(raw_input_contents=[b"x"] * (grpc_wire.MAX_SPLIT_FIELDS + 1)).SerializeToString()
    assert split(data) == parsed(data)


def test_tensors_of_a_large_message_are_views_into_it():
    data = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"\7" * MIN_SPLIT_BYTES]).SerializeToString()
    message, raw_contents = split_request(data)
    assert np.shares_memory(np.frombuffer(raw_contents[0], np.uint8), np.frombuffer(data, np.uint8))
    assert message.model_name == "m"


def test_tensors_of_a_small_message_are_found_too():
    data = pb.ModelInferRequest(raw_input_contents=[b"ab", b""]).SerializeToString()
    assert list(split_request(data).raw_contents) == [b"ab", b""]


@given(names, st.lists(blobs, max_size=3))
def test_a_joined_reply_is_what_protobuf_writes(name, raw_contents):
    reply = pb.ModelInferResponse(model_name=name)
    head = reply.SerializeToString()
    reply.raw_output_contents.extend(raw_contents)
    assert join_reply(head, [memoryview(each) for each in raw_contents]) == reply.SerializeToString()


@given(names, st.lists(blobs, max_size=3))
def test_a_joined_stream_reply_is_what_protobuf_writes(name, raw_contents):
    reply = pb.ModelInferResponse(model_name=name)
    head = reply.SerializeToString()
    reply.raw_output_contents.extend(raw_contents)
    expected = pb.ModelStreamInferResponse(infer_response=reply).SerializeToString()
    assert join_stream_reply(head, raw_contents) == expected


def test_views_of_wide_elements_are_measured_in_bytes():
    array = np.arange(300, dtype=np.int32)
    reply = pb.ModelInferResponse.FromString(join_reply(b"", [memoryview(array)]))
    assert reply.raw_output_contents[0] == array.tobytes()
