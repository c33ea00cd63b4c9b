import numpy as np
import pytest
from tests.api.kserve.grpc_live import integers
from tritonclient.grpc import service_pb2 as pb

from sardonyx.api.kserve.calls import RegionSlice, SharedInput, SharedOutput, WantedOutput, WireReply
from sardonyx.api.kserve.grpc_messages import (
    MAX_INLINE_ELEMENTS,
    MAX_PARAMETERS,
    MAX_STRINGS,
    MAX_TENSORS,
    MAX_TYPED_VALUES,
    read_request,
    reads_slowly,
    write_reply,
    writes_slowly,
)
from sardonyx.api.kserve.grpc_wire import split_request
from sardonyx.errors import InvalidRequest, PayloadTooLarge
from sardonyx.tensors import Tensor


def read(request):
    return read_request(split_request(request.SerializeToString()))


def typed(datatype, field, *values):
    """A request whose tensor has typed contents."""
    request = pb.ModelInferRequest(model_name="m")
    tensor = request.inputs.add(name="IN", datatype=datatype, shape=[len(values)])
    getattr(tensor.contents, field).extend(values)
    return request


def written(reply, **options):
    head, raw_contents = write_reply(reply, **options)
    return pb.ModelInferResponse.FromString(head), [bytes(each) for each in raw_contents]


def test_a_request_keeps_its_names_and_its_order():
    message = integers(1, 2, model="m", id="7")
    message.model_version = "4"
    message.inputs.add(name="B", datatype="BYTES", shape=[1, 1])
    message.raw_input_contents.append(b"\2\0\0\0hi")
    message.outputs.add(name="O1")
    message.outputs.add(name="O2")
    request, wants_empty_final = read(message)
    assert (request.model_name, request.model_version, request.id) == ("m", "4", "7")
    first, second = request.inputs
    assert first.array.tolist() == [1, 2]
    assert second.array.tolist() == [[b"hi"]]
    assert request.outputs == [WantedOutput(name="O1"), WantedOutput(name="O2")]
    assert not wants_empty_final


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-128, 127]),
        ("INT16", "int_contents", [-32768]),
        ("INT32", "int_contents", [1, 2]),
        ("INT64", "int64_contents", [-(1 << 63)]),
        ("UINT8", "uint_contents", [255]),
        ("UINT16", "uint_contents", [65535]),
        ("UINT32", "uint_contents", [1 << 31]),
        ("UINT64", "uint64_contents", [(1 << 64) - 1]),
        ("FP32", "fp32_contents", [0.5]),
        ("FP64", "fp64_contents", [0.1]),
        ("BYTES", "bytes_contents", [b"a", b"\xff"]),
    ],
)
def test_typed_contents_are_read(datatype, field, values):
    tensor = read(typed(datatype, field, *values))[0].inputs[0]
    assert tensor.datatype == datatype
    assert tensor.array.tolist() == values


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            typed("FP16", "fp32_contents", 1.0),
            "unexpected explicit tensor data for input tensor 'IN' for model 'm' of type 'FP32', "
            "expected datatype 'FP16'",
        ),
        (typed("INT64", "int_contents", 1), "of type 'INT32', expected datatype 'INT64'"),
        (typed("INT8", "int_contents", 128), ""),
        (pb.ModelInferRequest(inputs=[{"name": "A", "datatype": "INT32", "shape": [1]}], model_name="m"),
         "unable to find data for input tensor 'A' for model 'm' in request."),
        (pb.ModelInferRequest(raw_input_contents=[b""], model_name="m"),
         "unexpected additional input data for model 'm'"),
    ],
)  # fmt: skip
def test_data_of_the_wrong_kind_is_refused(request_, message):
    with pytest.raises(InvalidRequest) as raised:
        read(request_)
    assert message in raised.value.message


def test_two_kinds_of_typed_contents_are_refused():
    request = typed("INT32", "int_contents", 1)
    request.inputs[0].contents.int64_contents.append(1)
    with pytest.raises(InvalidRequest, match=r"'IN' for model 'm', binary data was already supplied\."):
        read(request)


def test_typed_beside_raw_contents_are_refused():
    request = integers(1, model="m")
    request.inputs[0].contents.int_contents.append(1)
    with pytest.raises(
        InvalidRequest,
        match="contents field must not be specified when using raw_input_contents for 'IN' for model 'm'",
    ):
        read(request)


def test_parameters_keep_their_types():
    request = integers(1)
    request.parameters["b"].bool_param = True
    request.parameters["i"].int64_param = -5
    request.parameters["s"].string_param = "x"
    request.parameters["d"].double_param = 0.5
    request.parameters["u"].uint64_param = (1 << 64) - 1
    parameters = read(request)[0].parameters
    assert parameters == {"b": True, "i": -5, "s": "x", "d": 0.5, "u": (1 << 64) - 1}
    assert parameters["b"] is True


def test_the_wish_for_an_empty_final_answer_is_no_parameter():
    request, wants_empty_final = read(integers(1, triton_enable_empty_final_response=True, other=3))
    assert wants_empty_final
    assert request.parameters == {"other": 3}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("triton_x", {"bool_param": True}, "parameter keys starting with 'triton_' are reserved for Triton usage"),
        ("triton_enable_empty_final_response", {"int64_param": 1}, "expected bool_param."),
        ("x", {}, "invalid value type for 'x' parameter, expected int64_param, bool_param, or string_param."),
    ],
)
def test_reserved_and_empty_parameters_are_refused(name, value, message):
    request = integers(1)
    request.parameters[name].CopyFrom(pb.InferParameter(**value))
    with pytest.raises(InvalidRequest) as raised:
        read(request)
    assert message in raised.value.message


def in_region(field, **values):
    for name, value in values.items():
        kind = "string_param" if isinstance(value, str) else "int64_param"
        setattr(field.parameters[f"shared_memory_{name}"], kind, value)


def test_tensors_may_lie_in_shared_memory():
    request = pb.ModelInferRequest(model_name="m")
    in_region(request.inputs.add(name="A", datatype="FP32", shape=[2]), region="r", offset=4, byte_size=8)
    request.inputs.add(name="B", datatype="INT8", shape=[1])
    request.raw_input_contents.append(b"\5")
    in_region(request.outputs.add(name="O"), region="w", byte_size=16)
    found = read(request)[0]
    assert found.inputs[0] == SharedInput(
        name="A", datatype="FP32", shape=(2,), data=RegionSlice(region="r", offset=4, size_bytes=8)
    )
    assert found.inputs[1].array.tolist() == [5]
    assert found.outputs == [WantedOutput(name="O", data=RegionSlice(region="w", size_bytes=16))]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"region": "r"}, "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter"),
        ({"offset": 1}, "'shared_memory_offset' can not be specified without 'shared_memory_region' parameter"),
        ({"byte_size": 1}, "'shared_memory_byte_size' can not be specified without 'shared_memory_region'"),
        ({"region": 1, "byte_size": 1}, "invalid value type for 'shared_memory_region' parameter"),
        (
            {"region": "r", "byte_size": "1"},
            "'shared_memory_byte_size' parameter for tensor 'O', expected int64_param.",
        ),
        ({"region": "r", "byte_size": -1}, "'shared_memory_byte_size' parameter for tensor 'O', expected >= 0"),
        (
            {"region": "r", "offset": -1, "byte_size": 1},
            "'shared_memory_offset' parameter for tensor 'O', expected >= 0",
        ),
    ],
)
def test_wrong_shared_memory_parameters_are_refused(values, message):
    request = integers(1)
    in_region(request.outputs.add(name="O"), **values)
    with pytest.raises(InvalidRequest) as raised:
        read(request)
    assert message in raised.value.message


def test_contents_beside_shared_memory_are_refused():
    request = typed("INT32", "int_contents", 1)
    in_region(request.inputs[0], region="r", byte_size=4)
    with pytest.raises(InvalidRequest, match="unexpected 'content' provided when using shared memory for input tensor"):
        read(request)


def test_an_output_may_be_wanted_as_classes():
    request = integers(1)
    request.outputs.add(name="O").parameters["classification"].int64_param = 3
    assert read(request)[0].outputs == [WantedOutput(name="O", num_classes=3)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"string_param": "3"}, "invalid value type for 'classification' parameter, expected int64_param"),
        ({"int64_param": 0}, "invalid value for 'classification' parameter, expected >= 1"),
        ({"int64_param": -1}, "expected >= 1"),
    ],
)
def test_wrong_numbers_of_classes_are_refused(value, message):
    request = integers(1)
    request.outputs.add(name="O").parameters["classification"].CopyFrom(pb.InferParameter(**value))
    with pytest.raises(InvalidRequest, match=message):
        read(request)


def test_classes_in_shared_memory_are_refused():
    request = integers(1)
    output = request.outputs.add(name="O")
    output.parameters["classification"].int64_param = 3
    in_region(output, region="r", byte_size=4)
    with pytest.raises(InvalidRequest, match="output can't set both 'shared_memory_region' and 'classification'"):
        read(request)


@pytest.mark.parametrize("kind", ["input", "output"])
def test_a_name_twice_is_refused(kind):
    request = integers(1)
    for _ in range(2):
        getattr(request, f"{kind}s").add(name="X")
    with pytest.raises(InvalidRequest, match=f"{kind} 'X' already exists in request"):
        read(request)


@pytest.mark.parametrize("kind", ["input", "output"])
def test_more_tensors_than_any_model_has_are_refused(kind):
    request = pb.ModelInferRequest()
    for number in range(MAX_TENSORS + 1):
        getattr(request, f"{kind}s").add(name=str(number))
    with pytest.raises(InvalidRequest, match=f"at most 1,024 {kind}s"):
        read(request)


def test_a_reply_has_raw_contents_for_each_output():
    reply = WireReply(
        model_name="m",
        model_version="2",
        id="9",
        outputs=[
            Tensor("A", "INT32", np.array([[1], [2]], np.int32)),
            SharedOutput(name="S", datatype="FP32", shape=(3,), data=RegionSlice(region="r", offset=8, size_bytes=12)),
            Tensor("B", "BYTES", np.array([b"hi"], object)),
        ],
        parameters={"b": False, "i": -1, "u": 1 << 63, "d": 1.5, "s": "x"},
    )
    message, raw_contents = written(reply)
    assert (message.model_name, message.model_version, message.id) == ("m", "2", "9")
    assert [(each.name, each.datatype, list(each.shape)) for each in message.outputs] == [
        ("A", "INT32", [2, 1]),
        ("S", "FP32", [3]),
        ("B", "BYTES", [1]),
    ]
    assert raw_contents == [np.array([1, 2], np.int32).tobytes(), b"", b"\2\0\0\0hi"]
    shared = message.outputs[1].parameters
    assert shared["shared_memory_region"].string_param == "r"
    assert shared["shared_memory_offset"].int64_param == 8
    assert shared["shared_memory_byte_size"].int64_param == 12
    kinds = {name: value.WhichOneof("parameter_choice") for name, value in message.parameters.items()}
    assert kinds == {
        "b": "bool_param", "i": "int64_param", "u": "uint64_param", "d": "double_param", "s": "string_param",
    }  # fmt: skip


@pytest.mark.parametrize("is_final", [True, False])
def test_on_a_stream_a_reply_says_whether_it_is_the_last(is_final):
    reply = WireReply(model_name="m", model_version="2", outputs=[])
    message, _ = written(reply, is_final=is_final)
    assert message.parameters["triton_final_response"].WhichOneof("parameter_choice") == "bool_param"
    assert message.parameters["triton_final_response"].bool_param is is_final
    assert not written(reply)[0].parameters


def test_only_values_that_are_converted_one_by_one_are_slow():
    strings = integers(1)
    strings.inputs[0].datatype = "BYTES"
    assert not reads_slowly(split_request(integers(1).SerializeToString()))
    assert reads_slowly(split_request(strings.SerializeToString()))
    assert reads_slowly(split_request(typed("INT32", "int_contents", 1).SerializeToString()))


def test_answers_of_many_strings_are_slow():
    def reply(datatype, size):
        return WireReply(model_name="m", model_version="1", outputs=[Tensor("A", datatype, np.zeros(size, object))])

    assert writes_slowly(reply("BYTES", MAX_INLINE_ELEMENTS + 1))
    assert not writes_slowly(reply("BYTES", MAX_INLINE_ELEMENTS))
    assert not writes_slowly(reply("FP32", MAX_INLINE_ELEMENTS + 1))


def test_too_many_parameters_are_refused():
    message = integers(1, model="m")
    for number in range(MAX_PARAMETERS):
        message.parameters[f"p{number}"].bool_param = True
    read(message)
    message.parameters["one more"].bool_param = True
    with pytest.raises(InvalidRequest, match="at most 1,024 parameters"):
        read(message)


@pytest.mark.parametrize(
    ("datatype", "most", "message"),
    [("BYTES", MAX_STRINGS, "at most 1,048,576 strings"), ("INT32", MAX_TYPED_VALUES, "use raw_input_contents")],
)
def test_too_many_values_are_refused_before_they_are_converted(datatype, most, message):
    field = "bytes_contents" if datatype == "BYTES" else "int_contents"
    request = typed(datatype, field, *([b""] if datatype == "BYTES" else [0]) * (most // 2 + 1))
    request.inputs.add().CopyFrom(request.inputs[0])
    request.inputs[1].name = "IN2"
    with pytest.raises(PayloadTooLarge, match=message):
        read(request)


def test_raw_strings_are_counted_by_their_shape():
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="IN", datatype="BYTES", shape=[MAX_STRINGS + 1])
    request.raw_input_contents.append(b"")
    with pytest.raises(PayloadTooLarge, match="strings"):
        read(request)


def test_contents_of_another_number_than_the_shape_says_are_refused():
    request = typed("INT32", "int_contents", 1, 2, 3)
    request.inputs[0].shape[:] = [1 << 40]
    with pytest.raises(InvalidRequest, match="unexpected number of elements in the contents of input tensor 'IN'"):
        read(request)
