"""Bodies over HTTP that no client library sends: raw, chunked, oversize and malformed ones."""

import json
import struct

import msgspec
import numpy as np
import pytest
from tests.api.live import post_head, read_answer
from tests.conformance.triton import post, post_json

IDENTITY = "/v2/models/identity_fp32/infer"
SIMPLE = "/v2/models/simple/infer"
LENGTH = "Inference-Header-Content-Length"


def one(data=(1.0,), shape=None, datatype="FP32", **more):
    """A request to an identity model."""
    shape = [1, len(data)] if shape is None else shape
    return {"inputs": [{"name": "INPUT0", "datatype": datatype, "shape": shape, "data": list(data), **more}]}


def sums(**more):
    rows = [
        {"name": name, "datatype": "INT32", "shape": [1, 16], "data": data}
        for name, data in (("INPUT0", list(range(16))), ("INPUT1", [1] * 16))
    ]
    return {"inputs": rows, **more}


def refusal(server, path, body, **headers):
    """Status and text of an error."""
    status, answered, answer = post(
        server, path, body if isinstance(body, bytes) else msgspec.json.encode(body), **headers
    )
    assert answered["content-type"] == "application/json"
    shown = json.loads(answer)
    assert set(shown) == {"error"}
    return status, shown["error"]


def binary(head, *tensors, length=None):
    """A body and its header, as the binary extension has them."""
    encoded = msgspec.json.encode(head)
    return encoded + b"".join(tensors), {
        "Inference_Header_Content_Length": str(len(encoded) if length is None else length)
    }


def of_size(size, shape=(1, 4), datatype="FP32"):
    return {
        "inputs": [
            {"name": "INPUT0", "datatype": datatype, "shape": list(shape), "parameters": {"binary_data_size": size}}
        ]
    }


# Raw binary requests.


def test_a_raw_tensor_is_answered_with_one(triton):
    array = np.arange(8, dtype=np.float32)
    status, headers, body = post(triton, IDENTITY, array.tobytes(), Inference_Header_Content_Length="0")
    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    length = int(headers["inference-header-content-length"])
    head = json.loads(body[:length])
    assert head["outputs"][0]["shape"] == [1, 8]
    assert body[length:] == array.tobytes()


def test_raw_text_is_one_element(triton):
    text = "grüße".encode()
    status, headers, body = post(triton, "/v2/models/one_text/infer", text, Inference_Header_Content_Length="0")
    assert status == 200
    length = int(headers["inference-header-content-length"])
    assert body[length:] == struct.pack("<I", len(text)) + text


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("identity_bytes", "For BYTE datatype raw input 'INPUT0', the model must have input shape [1]"),
        ("two_open", "there are more than one variable-sized dimension"),
        (
            "three_inputs",
            "Raw request must only have 1 input (found 1) to be deduced but got 3 inputs in 'three_inputs'",
        ),
    ],
)
def test_a_raw_tensor_whose_shape_cannot_be_told_is_refused(triton, model, told):
    status, error = refusal(triton, f"/v2/models/{model}/infer", bytes(16), Inference_Header_Content_Length="0")
    assert status == 400
    assert told in error


def test_raw_bytes_that_are_no_whole_number_of_elements_are_refused(triton):
    assert refusal(triton, IDENTITY, bytes(7), Inference_Header_Content_Length="0")[0] == 400


# Chunks.


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_a_body_may_come_in_chunks(triton, piece):
    body = msgspec.json.encode(sums())
    pieces = (body[start : start + piece] for start in range(0, len(body), piece))
    status, _, answer = post(triton, SIMPLE, pieces)
    assert status == 200
    assert json.loads(answer)["outputs"][0]["data"] == list(range(1, 17))


def test_a_raw_tensor_may_come_in_chunks(triton):
    data = np.arange(64, dtype=np.float32).tobytes()
    pieces = (data[start : start + 16] for start in range(0, len(data), 16))
    headers = {"Inference_Header_Content_Length": "0"}
    status, answered, body = post(triton, IDENTITY, pieces, **headers)
    assert status == 200
    assert body[int(answered["inference-header-content-length"]) :] == data


def test_a_hundred_thousand_chunks_are_not_the_end(triton):
    """A stack overflow in Triton once; here they are refused or make a body that is no JSON."""
    with triton.connect() as connection:
        head = f"POST {SIMPLE} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        connection.sendall(head + b"1\r\nA\r\n" * 100_000 + b"0\r\n\r\n")
        assert read_answer(connection)[0] == 400
    assert triton.request("GET", "/v2/health/ready")[0] == 200


# Lengths.


@pytest.mark.parametrize("length", ["-1", "1000000", "99999999999999999999"])
def test_a_header_length_out_of_range_is_refused(triton, length):
    status, error = refusal(triton, IDENTITY, one(), Inference_Header_Content_Length=length)
    assert status == 400
    assert "nference" in error


@pytest.mark.parametrize("length", ["abc", "1.5", "0x10", "", "1 2"])
def test_a_header_length_that_is_no_number_is_refused(triton, length):
    status, error = refusal(triton, IDENTITY, one(), Inference_Header_Content_Length=length)
    assert status == 400
    assert f"Unable to parse {LENGTH}" in error


def test_a_header_length_inside_of_the_json_is_refused(triton):
    body, headers = binary(one(), length=10)
    assert refusal(triton, IDENTITY, body, **headers)[0] == 400


@pytest.mark.parametrize(
    ("head", "data", "told"),
    [
        (of_size(16), bytes(12), "unexpected size for input 'INPUT0', expecting 4 additional bytes for model"),
        (of_size(16), bytes(20), "unexpected additional input data for model 'identity_fp32'"),
        (of_size(12), bytes(12), "input byte size mismatch for input 'INPUT0' for model 'identity_fp32'"),
        (of_size(20, (1, 4)), bytes(20), "input byte size mismatch for input 'INPUT0' for model 'identity_fp32'"),
        (of_size(-4), b"", "binary_data_size"),
        (of_size("16"), bytes(16), "binary_data_size"),
        (of_size(1 << 70), bytes(16), "unexpected size for input 'INPUT0'"),
    ],
)
def test_bytes_that_do_not_fit_their_tensor_are_refused(triton, head, data, told):
    body, headers = binary(head, data)
    status, error = refusal(triton, IDENTITY, body, **headers)
    assert status == 400
    assert told in error


@pytest.mark.parametrize(
    "data",
    [b"\x01", struct.pack("<I", 10) + b"short", struct.pack("<I", 0xFFFFFFFF), b"", struct.pack("<I", 1) + b"a" * 9],
)
def test_byte_strings_with_wrong_lengths_are_refused(triton, data):
    body, headers = binary(of_size(len(data), (1, 1), "BYTES"), data)
    assert refusal(triton, "/v2/models/identity_bytes/infer", body, **headers)[0] == 400


def test_an_empty_tensor_has_no_bytes(triton):
    body, headers = binary(of_size(0, (1, 0)))
    status, _, answer = post(triton, IDENTITY, body, **headers)
    assert status == 200
    assert json.loads(answer)["outputs"][0]["shape"] == [1, 0]


# Shapes.


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        ([1.0, 2.0], [1, 3]),
        ([1.0, 2.0], [1, 1]),
        ([[1.0], [2.0, 3.0]], [1, 2]),
        ([], [1, 1]),
        ([1.0], []),
    ],
)
def test_data_that_does_not_fit_its_shape_is_refused(triton, data, shape):
    assert refusal(triton, IDENTITY, one(data, shape))[0] == 400


@pytest.mark.parametrize("shape", [[1, -1], [-1, 1], [-1, -1]])
def test_negative_dimensions_are_refused(triton, shape):
    status, error = refusal(triton, IDENTITY, one(shape=shape))
    assert status == 400
    assert "shape" in error


@pytest.mark.parametrize(
    "shape",
    [[1, 1 << 40], [1 << 31, 1 << 31], [1 << 62, 4], [1, (1 << 63) - 1], [1, 1 << 63], [1, 1 << 70], [1] * 1000],
)
def test_gigantic_shapes_are_refused_at_once(triton, shape):
    assert refusal(triton, IDENTITY, one(shape=shape))[0] == 400
    body, headers = binary(of_size(4, shape), bytes(4))
    assert refusal(triton, IDENTITY, body, **headers)[0] == 400


@pytest.mark.parametrize("shape", ["1", [1.5], ["1"], None, [[1]], {}, [True]])
def test_shapes_that_are_no_lists_of_numbers_are_refused(triton, shape):
    body = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": shape, "data": [1.0]}]}
    assert refusal(triton, IDENTITY, body)[0] == 400


# JSON.


def nested(depth):
    return (
        b'{"inputs":[{"name":"INPUT0","datatype":"FP32","shape":[1,1],"data":'
        + b"[" * depth
        + b"1"
        + b"]" * depth
        + b"}]}"
    )


@pytest.mark.parametrize("depth", [150, 5_000, 1_000_000])
def test_deep_nesting_is_refused(triton, depth):
    assert refusal(triton, IDENTITY, nested(depth))[0] == 400
    assert refusal(triton, IDENTITY, b"[" * depth)[0] == 400


def test_a_usual_depth_is_read(triton):
    status, _, _ = post(triton, IDENTITY, nested(20))
    assert status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b"{}",
        b"\xff\xfe",
        b'{"inputs":',
        b'{"inputs":{}}',
        b'{"inputs":[]}',
        b'{"inputs":[7]}',
        b'{"inputs":[{}]}',
        b'{"inputs":[{"name":"INPUT0"}]}',
        b'{"inputs":[{"name":7,"datatype":"FP32","shape":[1,1],"data":[1]}]}',
        b'{"inputs":[{"name":"INPUT0","datatype":"FLOAT","shape":[1,1],"data":[1]}]}',
        b'{"inputs":[{"name":"INPUT0","datatype":"FP32","shape":[1,1],"data":{}}]}',
        b'{"inputs":[{"name":"INPUT0","datatype":"FP32","shape":[1,1],"data":[1]}],"outputs":{}}',
        b'{"inputs":[{"name":"INPUT0","datatype":"FP32","shape":[1,1],"data":[1]}],"outputs":[{}]}',
        b'{"inputs":[{"name":"INPUT0","datatype":"FP32","shape":[1,1],"data":[1]}],"parameters":[]}',
        b'{"inputs":[{"name":"INPUT0","datatype":"FP32","shape":[1,1],"data":[1]}],"parameters":{"a":{}}}',
        b'{"inputs":[{"name":"INPUT0","datatype":"FP32","shape":[1,1],"data":[1]}],"id":7}',
        b'{"inputs":[{"name":"INPUT0","datatype":"FP32","shape":[1,1],"data":[1]}]} trailing',
        b'{"inputs":[{"name":"INPUT0","datatype":"BYTES","shape":[1,1],"data":["\xff"]}]}',
    ],
)
def test_bodies_that_are_no_requests_are_refused(triton, body):
    assert refusal(triton, IDENTITY, body)[0] == 400


@pytest.mark.parametrize(
    "parameters",
    [
        {"sequence_start": "yes"},
        {"sequence_id": -1},
        {"sequence_id": 1.5},
        {"priority": -1},
        {"priority": "high"},
        {"timeout": -5},
        {"timeout": "soon"},
        {"binary_data_output": "yes"},
        {"triton_final_response": True},
    ],
    ids=str,
)
def test_request_parameters_of_the_wrong_kind_are_refused(triton, parameters):
    status, error = refusal(triton, SIMPLE, sums(parameters=parameters))
    assert status == 400
    assert next(iter(parameters)) in error or "triton_" in error


@pytest.mark.parametrize(
    "extra",
    [
        {"parameters": {"binary_data_size": 4}},
        {"parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 4}},
    ],
    ids=["bytes", "region"],
)
def test_an_input_has_one_kind_of_data(triton, extra):
    status, error = refusal(triton, IDENTITY, one(**extra))
    assert status == 400
    assert "Input must set only one of the following fields" in error


def test_an_input_without_data_is_told_what_is_missing(triton):
    body = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 1]}]}
    status, error = refusal(triton, IDENTITY, body)
    assert status == 400
    assert "But no field is set" in error


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"shared_memory_region": "r", "shared_memory_byte_size": 64, "classification": 1}, "classification"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 64, "binary_data": True}, "binary_data"),
        ({"shared_memory_region": "r"}, "shared_memory_byte_size"),
    ],
)
def test_an_output_has_one_kind_of_answer(triton, parameters, told):
    status, error = refusal(triton, SIMPLE, sums(outputs=[{"name": "OUTPUT0", "parameters": parameters}]))
    assert status == 400
    assert told in error


def test_outputs_that_come_twice_are_refused(triton):
    status, error = refusal(triton, SIMPLE, sums(outputs=[{"name": "OUTPUT0"}, {"name": "OUTPUT0"}]))
    assert status == 400
    assert "output 'OUTPUT0' already exists in request" in error


def test_many_outputs_that_there_are_not_are_refused_quickly(triton):
    outputs = [{"name": f"OUTPUT{number}"} for number in range(20_000)]
    assert refusal(triton, SIMPLE, sums(outputs=outputs))[0] == 400


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_numbers_that_json_does_not_have_are_no_failure_of_the_server(triton, number):
    body = f'{{"inputs":[{{"name":"INPUT0","datatype":"FP32","shape":[1,1],"data":[{number}]}}]}}'.encode()
    status, _, answer = post(triton, IDENTITY, body)
    assert status in {200, 400}
    if status == 200:
        assert not np.isfinite(json.loads(answer)["outputs"][0]["data"][0])


# Sizes, paths, methods.


def test_a_body_over_the_limit_is_refused_by_its_length(guarded):
    with guarded.connect() as connection:
        head = f"POST {SIMPLE} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer user-key\r\n"
        connection.sendall(f"{head}Content-Length: 10000000\r\n\r\n".encode())
        status, answer = read_answer(connection)
    assert status == 400
    assert "exceeds the maximum allowed" in answer["error"]


def test_a_body_over_the_limit_is_refused_in_chunks(guarded):
    pieces = (bytes(8192) for _ in range(9))
    headers = {"Authorization": "Bearer user-key"}
    try:
        status, _, answer = post(guarded, SIMPLE, pieces, **headers)
    except (BrokenPipeError, ConnectionResetError):
        return  # refused while the rest was on its way
    assert status == 400
    assert "exceeds the maximum allowed" in json.loads(answer)["error"]


def test_a_body_just_under_the_limit_is_read(guarded):
    text = "a" * 60_000
    body = {"inputs": [{"name": "INPUT0", "datatype": "BYTES", "shape": [1, 1], "data": [text]}]}
    status, answer = post_json(guarded, "/v2/models/simple_identity/infer", body, Authorization="Bearer user-key")
    assert (status, answer["outputs"][0]["data"]) == (200, [text])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/models/simple/infer"),
        ("DELETE", "/v2/models/simple"),
        ("POST", "/v2/health/live"),
        ("GET", "/v2/repository/index"),
        ("PUT", "/v2/models/simple/infer"),
        ("GET", "/v2/models/tiny/generate"),
    ],
)
def test_another_method_is_not_allowed(triton, method, path):
    assert triton.request(method, path) == (405, {"error": "Method Not Allowed"})


@pytest.mark.parametrize(
    "path",
    [
        "/v2/nothing",
        "/v2/models",
        "/v2/models/simple/levitate",
        "/v2/models/simple/versions/x/infer",
        "/v2/models/simple/versions/1/trace/setting",
        "/v2/models/simple/versions//infer",
    ],
)
def test_an_unknown_path_is_not_found(triton, path):
    status, answer = triton.request("GET", path)
    assert status == 404
    assert answer == {"error": "Not Found"}


@pytest.mark.parametrize("name", ["%2e%2e", "a%2Fb", "..%2f..%2fetc", "%00", "%ff", "simple%0a"])
def test_quoted_names_reach_no_files(triton, name):
    status, answer = triton.request("GET", f"/v2/models/{name}")
    assert status in {400, 404}
    assert set(answer) == {"error"}


def test_a_quoted_name_is_the_name(triton):
    assert triton.request("GET", "/v2/models/s%69mple")[1]["name"] == "simple"


def test_a_query_is_ignored(triton):
    assert triton.request("GET", "/v2/models/simple?a=1&b=2")[0] == 200
    assert triton.request("POST", f"{SIMPLE}?test=1", sums())[0] == 200


def test_two_requests_share_a_connection_also_after_an_error(triton):
    with triton.connect() as connection:
        connection.sendall(post_head(SIMPLE, b"{"))
        assert read_answer(connection)[0] == 400
        connection.sendall(post_head(SIMPLE, msgspec.json.encode(sums())))
        assert read_answer(connection)[0] == 200
