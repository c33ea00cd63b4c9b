"""One tensor in all four spellings: JSON, bytes behind JSON, protobuf's raw bytes, protobuf's typed numbers."""

import grpc as grpcio
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conformance.triton import DATATYPES, address, texts
from tritonclient.grpc import service_pb2, service_pb2_grpc

NOT_IN_JSON = {"FP16", "BF16"}
NOT_TYPED = {"FP16", "BF16"}
FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
FLOATS = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "BF16": ml_dtypes.bfloat16}
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@pytest.fixture(scope="module")
def stub(triton):
    with grpcio.insecure_channel(address(triton, "grpc")) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def elements(datatype):
    """Values of a datatype, its ends among them."""
    if datatype == "BOOL":
        return st.booleans()
    if datatype == "BYTES":
        return TEXT
    if datatype in FLOATS:
        width = {"FP64": 64, "FP32": 32}.get(datatype, 16)
        return st.floats(width=width, allow_nan=False, allow_infinity=False)
    information = np.iinfo(datatype.lower())
    return st.integers(int(information.min), int(information.max))


def array_of(values, datatype):
    """A batch of one."""
    if datatype == "BYTES":
        return texts(values, 1, len(values))
    kind = FLOATS.get(datatype) or np.dtype(datatype.lower())
    return np.array(values, kind).reshape(1, -1)


def typed_answer(stub, model, array, datatype):
    request = service_pb2.ModelInferRequest(model_name=model)
    tensor = request.inputs.add(name="INPUT0", datatype=datatype, shape=array.shape)
    getattr(tensor.contents, FIELDS[datatype]).extend(array.ravel().tolist())
    answer = stub.ModelInfer(request, timeout=30)
    assert answer.outputs[0].datatype == datatype
    return answer.raw_output_contents[0]


def raw(array, datatype):
    if datatype != "BYTES":
        return array.tobytes()
    return b"".join(len(each).to_bytes(4, "little") + each for each in array.ravel())


def as_bytes(array, datatype):
    """The little-endian elements of an answer that the client has read."""
    if datatype != "BYTES":
        return array.tobytes()
    return raw(texts(array.ravel().tolist()), datatype)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_all_spellings_of_a_tensor_give_the_same_numbers(http, grpc, stub, datatype):
    model = f"identity_{datatype.lower()}"

    @settings(deadline=None, max_examples=40, derandomize=True)
    @given(st.lists(elements(datatype), min_size=1, max_size=30))
    def check(values):
        array = array_of(values, datatype)
        expected = raw(array, datatype)
        for caller in (http, grpc):
            result = caller.infer(model, {"INPUT0": array})
            assert as_bytes(result.as_numpy("OUTPUT0"), datatype) == expected
        if datatype not in NOT_TYPED:
            assert typed_answer(stub, model, array, datatype) == expected
        if datatype not in NOT_IN_JSON:
            asked = http.inputs({"INPUT0": array}, binary_data=False)
            wanted = http.outputs("OUTPUT0", binary_data=False)
            answer = http.client.infer(model, asked, outputs=wanted).as_numpy("OUTPUT0")
            assert as_bytes(answer, datatype) == expected

    check()


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64", "BF16"])
def test_numbers_that_are_not_finite_come_back_as_bytes(http, grpc, datatype):
    array = array_of([np.nan, np.inf, -np.inf, -0.0], datatype)
    for caller in (http, grpc):
        result = caller.infer(f"identity_{datatype.lower()}", {"INPUT0": array})
        assert result.as_numpy("OUTPUT0").tobytes() == array.tobytes()


@pytest.mark.parametrize("datatype", sorted(NOT_IN_JSON))
def test_half_precision_is_refused_in_json(triton, datatype):
    body = {"inputs": [{"name": "INPUT0", "datatype": datatype, "shape": [1, 1], "data": [1.0]}]}
    status, answer = triton.request("POST", f"/v2/models/identity_{datatype.lower()}/infer", body)
    assert status == 400
    assert f"receiving {datatype} data via JSON is not supported" in answer["error"]


@pytest.mark.parametrize("datatype", sorted(NOT_TYPED))
def test_half_precision_is_refused_as_typed_numbers(stub, datatype):
    request = service_pb2.ModelInferRequest(model_name=f"identity_{datatype.lower()}")
    tensor = request.inputs.add(name="INPUT0", datatype=datatype, shape=[1, 1])
    tensor.contents.fp32_contents.append(1.0)
    with pytest.raises(grpcio.RpcError) as refusal:
        stub.ModelInfer(request, timeout=30)
    assert refusal.value.code() is grpcio.StatusCode.INVALID_ARGUMENT
    assert "INPUT0" in refusal.value.details()


def test_nested_json_is_the_same_as_flat(triton):
    flat = list(range(6))
    nested = [flat[:3], flat[3:]]
    answers = []
    for data in (flat, nested):
        body = {"inputs": [{"name": "INPUT0", "datatype": "INT32", "shape": [2, 3], "data": data}]}
        status, answer = triton.request("POST", "/v2/models/identity_int32/infer", body)
        assert status == 200
        answers.append(answer["outputs"])
    assert answers[0] == answers[1]
    assert answers[0] == [{"name": "OUTPUT0", "datatype": "INT32", "shape": [2, 3], "data": flat}]


@pytest.mark.parametrize(
    ("datatype", "value", "told"),
    [
        ("INT8", 128, "input 'INPUT0'"),
        ("UINT8", -1, "input 'INPUT0'"),
        ("INT32", 1 << 31, "input 'INPUT0'"),
        ("UINT64", 1 << 64, "input 'INPUT0'"),
        ("INT64", 1.5, "attempt to access JSON non-signed-integer as signed-integer"),
        ("BOOL", 2, "attempt to access JSON non-boolean as boolean"),
        ("FP32", "1", "attempt to access JSON non-double as double"),
        ("BYTES", 1, "attempt to access JSON non-string as string"),
    ],
)
def test_a_value_that_the_datatype_cannot_hold_is_refused(triton, datatype, value, told):
    body = {"inputs": [{"name": "INPUT0", "datatype": datatype, "shape": [1, 1], "data": [value]}]}
    status, answer = triton.request("POST", f"/v2/models/identity_{datatype.lower()}/infer", body)
    assert status == 400
    assert told in answer["error"]
