import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sardonyx.api.kserve.calls import RegionSlice, SharedInput
from sardonyx.api.kserve.infer_request import header_length_of, parse_request, raw_request, read_json
from sardonyx.errors import InvalidRequest, PayloadTooLarge
from sardonyx.runtime.dtypes import DATATYPES
from sardonyx.tensors import Tensor, TensorMetadata

ONE_FIELD = "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "


def parse(body, tail=b"", max_bytes=1 << 20):
    """The request of a JSON value with bytes behind it."""
    head = body if isinstance(body, bytes) else msgspec.json.encode(body)
    json = read_json(head + tail, len(head))
    return parse_request(json, head + tail, len(head), model_name="m", model_version="", max_bytes=max_bytes)


def one(**members):
    """A body of one input."""
    return {"inputs": [{"name": "a", "shape": [2], "datatype": "INT8"} | members]}


def raw(body, *dims, datatype="FP32", has_batch_axis=False, num_inputs=1):
    inputs = [TensorMetadata(name="a", datatype=datatype, shape=dims)] * num_inputs
    return raw_request(body, inputs, model_name="m", model_version="", has_batch_axis=has_batch_axis)


def test_json_and_bytes_may_be_mixed_in_any_order():
    inputs = [
        {"name": "a", "shape": [2], "datatype": "INT8", "parameters": {"binary_data_size": 2}},
        {"name": "b", "shape": [1], "datatype": "BYTES", "data": ["x"]},
        {"name": "c", "shape": [0], "datatype": "FP16", "parameters": {"binary_data_size": 0}},
        {"name": "d", "shape": [1, 1], "datatype": "BF16", "parameters": {"binary_data_size": 2}},
    ]
    request = parse({"id": "7", "inputs": inputs}, b"\x01\x02\x80\x3f").request
    assert request.id == "7"
    assert [each.array.tolist() for each in request.inputs] == [[1, 2], [b"x"], [], [[0x3F80]]]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, ONE_FIELD + ".*But no field is set"),
        ({"data": [1, 2], "parameters": {"binary_data_size": 2}}, ONE_FIELD + ".*But set 'data', 'binary_data_size'"),
        ({"parameters": {"binary_data_size": 2, "shared_memory_region": "r"}}, "But set 'binary_data_size'"),
        ({"parameters": {"binary_data_size": -1}}, "'binary_data_size': it is below 0"),
        ({"parameters": {"binary_data_size": "2"}}, "Unable to parse 'binary_data_size'"),
        ({"parameters": {"binary_data_size": 3}}, "expecting 1 additional bytes for model 'm'"),
        ({"parameters": {"binary_data_size": 1}}, "mismatch for input 'a' for model 'm'. Expected 2, got 1"),
        ({"data": [1, 2]}, "unexpected additional input data for model 'm': 2 bytes"),
        ({"shape": [-2]}, "But no field is set"),
        ({"shape": [2, -1], "data": []}, "Unable to parse 'shape': attempt to access JSON non-unsigned-integer as uns"),
        ({"shape": [1.5], "data": []}, "Unable to parse 'shape': attempt to access JSON non-unsigned-integer as uns"),
        ({"shape": "2", "data": []}, "Unable to parse 'shape'"),
        ({"data": [1, 300]}, "out of range for INT8"),
        ({"datatype": "FP16", "data": [1, 2]}, "receiving FP16 data via JSON is not supported. Please use the binary"),
        ({"datatype": "FP8", "data": [1, 2]}, "no datatype"),
        ({"data": None}, "non-array as array"),
        ({"parameters": {"shared_memory_region": "r"}}, "'shared_memory_byte_size' must be set"),
        ({"parameters": {"shared_memory_region": "r", "shared_memory_byte_size": -1}}, "must not be below 0"),
    ],
)
def test_an_input_that_does_not_add_up_is_refused(members, message):
    with pytest.raises(InvalidRequest, match=message):
        parse(one(**members), b"\x01\x02")


def test_an_input_may_lie_in_shared_memory():
    place = {"shared_memory_region": "r", "shared_memory_offset": 4, "shared_memory_byte_size": 2}
    (tensor,) = parse(one(parameters=place)).request.inputs
    region = RegionSlice(region="r", offset=4, size_bytes=2)
    assert tensor == SharedInput(name="a", datatype="INT8", shape=(2,), data=region)


def test_an_input_name_may_come_once():
    with pytest.raises(InvalidRequest, match="input 'a' already exists in request"):
        parse({"inputs": [*one(data=[1, 2])["inputs"]] * 2})


def test_an_output_name_may_come_once():
    with pytest.raises(InvalidRequest, match="Duplicate output name 'x' is not allowed in a request"):
        parse({**one(data=[1, 2]), "outputs": [{"name": "x"}, {"name": "y"}, {"name": "x"}]})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"shared_memory_region": "r", "shared_memory_byte_size": 4, "classification": 2}, "classification output 'x'"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 4, "binary_data": True}, "'binary_data' can't be"),
        ({"classification": -1}, "'classification': it is below 0"),
        ({"binary_data": 1}, "Unable to parse 'binary_data': attempt to access JSON non-boolean as boolean"),
    ],
)
def test_an_outputs_parameters_may_not_contradict_each_other(parameters, message):
    with pytest.raises(InvalidRequest, match=message):
        parse({**one(data=[1, 2]), "outputs": [{"name": "x", "parameters": parameters}]})


def test_outputs_say_how_they_are_wanted():
    outputs = [
        {"name": "w"},
        {"name": "x", "parameters": {"binary_data": False, "classification": 3}},
        {"name": "y", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 4, "binary_data": False}},
    ]
    parsed = parse({**one(data=[1, 2]), "outputs": outputs, "parameters": {"binary_data_output": True, "mine": 1.5}})
    assert parsed.is_binary
    assert parsed.binary == {"x": False, "y": False}
    assert parsed.request.parameters == {"mine": 1.5}
    assert [(each.num_classes, each.data) for each in parsed.request.outputs] == [
        (0, None),
        (3, None),
        (0, RegionSlice(region="r", size_bytes=4)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abc", "Unable to parse Inference-Header-Content-Length, got: abc"),
        ("", "Unable to parse Inference-Header-Content-Length, got: "),
        ("1e3", "Unable to parse"),
        ("99999999999999999999999", "Unable to parse"),
        ("-1", r"inference header size should be in range \(0, 10\), got: -1"),
        ("11", r"inference header size should be in range \(0, 10\), got: 11"),
    ],
)
def test_a_header_length_out_of_the_body_is_refused(text, message):
    with pytest.raises(InvalidRequest, match=message):
        header_length_of({"inference-header-content-length": text}, 10)


def test_without_the_header_all_of_the_body_is_json():
    assert header_length_of({}, 10) == 10


@pytest.mark.parametrize(
    ("dims", "has_batch_axis", "num_bytes", "shape"),
    [
        ((-1,), False, 32, (8,)),
        ((-1, -1), True, 32, (1, 8)),
        ((-1, 2, -1), True, 32, (1, 2, 4)),
        ((2, 4), False, 32, (2, 4)),
        ((-1,), False, 0, (0,)),
    ],
)
def test_the_shape_of_a_raw_body_follows_from_its_size(dims, has_batch_axis, num_bytes, shape):
    parsed = raw(bytes(num_bytes), *dims, has_batch_axis=has_batch_axis)
    assert parsed.request.inputs[0].array.shape == shape
    assert parsed.is_binary


def test_a_raw_string_gets_its_length():
    assert raw(b"427", 1, datatype="BYTES").request.inputs[0].array.tolist() == [b"427"]


@pytest.mark.parametrize(
    ("dims", "options", "message"),
    [
        ((-1,), {"num_inputs": 3}, r"Raw request must only have 1 input \(found 1\) to be deduced but got 3 inputs in"),
        ((-1,), {"datatype": "BYTES"}, r"For BYTE datatype raw input 'a', the model must have input shape \[1\]"),
        ((-1, -1), {}, "The shape of the raw input 'a' can not be deduced because there are more than one variable-si"),
        ((3, -1), {}, "input byte size mismatch for input 'a'"),
        ((0, -1), {}, "input byte size mismatch for input 'a'"),
    ],
)
def test_a_raw_body_whose_shape_cannot_be_told_is_refused(dims, options, message):
    with pytest.raises(InvalidRequest, match=message):
        raw(bytes(8), *dims, **options)


def test_the_objects_of_a_body_are_bounded():
    member = b'{"name":"a","shape":[],"datatype":"INT8"},'
    with pytest.raises(PayloadTooLarge):
        parse(b'{"inputs":[' + member * 140_000 + member[:-1] + b"]}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=2),
    max_leaves=5,
)
PARAMETERS = st.dictionaries(
    st.sampled_from(
        [
            "binary_data_size",
            "binary_data",
            "classification",
            "shared_memory_region",
            "shared_memory_offset",
            "shared_memory_byte_size",
        ]
    ),
    st.integers(-2, 70) | st.text(max_size=2) | st.booleans() | JSON,
    max_size=3,
)
INPUT = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["a", "b"]) | JSON,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=3) | JSON,
        "datatype": st.sampled_from(sorted(DATATYPES)) | JSON,
    },
    optional={"parameters": PARAMETERS, "data": JSON},
)
OUTPUT = st.fixed_dictionaries({"name": st.sampled_from(["x", "y"])}, optional={"parameters": PARAMETERS})
BODY = st.fixed_dictionaries(
    {"inputs": st.lists(INPUT, max_size=3)},
    optional={"id": JSON, "outputs": st.lists(OUTPUT, max_size=3), "parameters": JSON},
)


@settings(deadline=None)
@given(BODY, st.binary(max_size=40))
def test_any_structured_body_is_read_or_refused(body, tail):
    text = msgspec.json.encode(body)
    try:
        parsed = parse(text, tail)
    except (InvalidRequest, PayloadTooLarge):
        return
    for tensor in parsed.request.inputs:
        if isinstance(tensor, Tensor):
            assert tensor.array.dtype == DATATYPES[tensor.datatype].array
            assert tensor.array.flags.c_contiguous


def test_tensors_over_the_limit_are_refused_though_their_text_is_not():
    inputs = [{"name": name, "shape": [4, 100], "datatype": "FP64", "data": [1] * 400} for name in "ab"]
    assert len(parse({"inputs": inputs}, max_bytes=6400).request.inputs) == 2
    with pytest.raises(PayloadTooLarge, match="6400 bytes or more exceeds the maximum allowed input size"):
        parse({"inputs": inputs}, max_bytes=6399)


@pytest.mark.parametrize(
    ("members", "tail"),
    [({"data": [""] * 10}, b""), ({"parameters": {"binary_data_size": 40}}, bytes(40))],
)
def test_strings_count_for_what_python_keeps_of_them(members, tail):
    body = one(datatype="BYTES", shape=[10], **members)
    assert parse(body, tail, max_bytes=640).request.inputs
    with pytest.raises(PayloadTooLarge):
        parse(body, tail, max_bytes=639)


def test_bytes_are_within_the_limit_of_the_body_already():
    body = one(datatype="FP64", parameters={"binary_data_size": 16})
    assert parse(body, bytes(16), max_bytes=1).request.inputs


@settings(deadline=None)
@given(st.binary(max_size=80), st.text(max_size=4) | st.integers(-2, 90).map(str))
def test_any_bytes_and_any_header_are_read_or_refused(body, header):
    try:
        length = header_length_of({"inference-header-content-length": header}, len(body))
        parse_request(read_json(body, length), body, length, model_name="m", model_version="", max_bytes=1 << 20)
    except (InvalidRequest, PayloadTooLarge):
        pass


@settings(deadline=None)
@given(st.data())
def test_every_datatype_travels_as_bytes(data):
    datatype = data.draw(st.sampled_from(sorted(DATATYPES.keys() - {"BYTES"})))
    array = np.arange(6).astype(DATATYPES[datatype].array).reshape(2, 3)
    body = one(shape=[2, 3], datatype=datatype, parameters={"binary_data_size": array.nbytes})
    (tensor,) = parse(body, array.tobytes()).request.inputs
    assert tensor.array.tolist() == array.tolist()
