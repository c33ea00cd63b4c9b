import asyncio
import base64
import gzip
import json
import math
import zlib

import msgspec
import numpy as np
import pytest
from litestar import get
from litestar.testing import TestClient
from tests.api.kserve.fake_service import SUM, FakeService, create_app, int32s, serving

from sardonyx.api.kserve import generate, infer_reply, infer_request, inference
from sardonyx.api.kserve.codec import to_raw
from sardonyx.api.kserve.routes import ROUTES
from sardonyx.errors import Overloaded, RequestAborted
from sardonyx.runtime.dtypes import DATATYPES
from sardonyx.tensors import Tensor

LENGTH = "Inference-Header-Content-Length"


def binary(*arrays, datatype="INT32", **members):
    """Body and headers of a request with binary inputs."""
    raws = [bytes(to_raw(Tensor("x", datatype, array))) for array in arrays]
    inputs = [
        {
            "name": f"INPUT{number}",
            "datatype": datatype,
            "shape": array.shape,
            "parameters": {"binary_data_size": len(raw)},
        }
        for number, (array, raw) in enumerate(zip(arrays, raws, strict=True))
    ]
    head = msgspec.json.encode({"inputs": inputs, **members})
    return head + b"".join(raws), {LENGTH: str(len(head))}


def post_binary(api, name, *arrays, headers=None, **members):
    body, own = binary(*arrays, **members)
    return api.post(f"/v2/models/{name}/infer", content=body, headers=own | (headers or {}))


def split(answer):
    """JSON and bytes of a binary answer."""
    length = int(answer.headers[LENGTH])
    return json.loads(answer.content[:length]), answer.content[length:]


def test_json_in_json_out(api):
    answer = api.infer({**SUM, "id": "7"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "id": "7",
        "model_name": "simple",
        "model_version": "1",
        "outputs": [
            {"name": "OUTPUT0", "datatype": "INT32", "shape": [1, 16], "data": [3] * 16},
            {"name": "OUTPUT1", "datatype": "INT32", "shape": [1, 16], "data": [-1] * 16},
        ],
    }


def test_bytes_in_bytes_out(api):
    ones = np.ones((1, 16), np.int32)
    answer = post_binary(api, "simple", ones, ones * 2, parameters={"binary_data_output": True, "tag": "t"})
    assert answer.headers["content-type"] == "application/octet-stream"
    head, tail = split(answer)
    assert head["parameters"] == {"tag": "t"}
    assert head["outputs"][0] == {
        "name": "OUTPUT0",
        "datatype": "INT32",
        "shape": [1, 16],
        "parameters": {"binary_data_size": 64},
    }
    assert np.frombuffer(tail, np.int32).tolist() == [3] * 16 + [-1] * 16
    assert "id" not in head


def test_each_output_chooses_for_itself(api):
    outputs = [{"name": "OUTPUT1"}, {"name": "OUTPUT0", "parameters": {"binary_data": True}}]
    head, tail = split(api.infer({**SUM, "outputs": outputs}))
    assert [set(each) for each in head["outputs"]] == [
        {"name", "datatype", "shape", "parameters"},
        {"name", "datatype", "shape", "data"},
    ]
    assert tail == np.full(16, 3, np.int32).tobytes()


@pytest.fixture
def loops_of(monkeypatch):
    """The event loops on which functions of modules run; ``None`` where it is none."""

    def watch(*functions):
        loops = {}

        def watched(name, original):
            def function(*args, **options):
                loops[name] = asyncio._get_running_loop()
                return original(*args, **options)

            return function

        for module, name in functions:
            monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
        return loops

    return watch


def test_many_strings_are_read_and_written_off_the_event_loop(api, loops_of):
    loops = loops_of((infer_request, "from_raw"), (infer_reply, "to_raw"))
    array = np.array([[b"a", b""] * 10_000], object)
    members = {"datatype": "BYTES", "parameters": {"binary_data_output": True}}
    answer = post_binary(api, "identity_bytes", array, **members)
    assert split(answer)[1] == to_raw(Tensor("x", "BYTES", array))
    assert loops == {"from_raw": None, "to_raw": None}


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_many_generated_values_are_written_off_the_event_loop(api, loops_of, monkeypatch, endpoint):
    monkeypatch.setattr(inference, "VALUE_BYTES", 1 << 20)
    loops = loops_of((generate, "encode_answer"))
    assert api.post(f"/v2/models/llm/{endpoint}", json={"PROMPT": "hello", "STREAM": False}).status_code == 200
    assert loops == {"encode_answer": None}


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
def test_every_datatype_comes_back_as_bytes(api, datatype):
    array = np.array([[b"a", b"", b"\xff\x00"]], object) if datatype == "BYTES" else np.array([[1, 0, 1]])
    array = array.astype(DATATYPES[datatype].array)
    members = {"datatype": datatype, "parameters": {"binary_data_output": True}}
    answer = post_binary(api, f"identity_{datatype.lower()}", array, **members)
    assert split(answer)[1] == bytes(to_raw(Tensor("x", datatype, array)))


@pytest.mark.parametrize("datatype", sorted(DATATYPES.keys() - {"FP16", "BF16"}))
def test_every_datatype_comes_back_as_json(api, datatype):
    data = {"BYTES": ["a", "", "é"], "BOOL": [True, False, True]}.get(datatype, [1, 0, 1])
    body = {"inputs": [{"name": "INPUT0", "datatype": datatype, "shape": [1, 3], "data": data}]}
    assert api.infer(body, f"identity_{datatype.lower()}").json()["outputs"][0]["data"] == data


def test_what_json_has_no_number_for_is_read_and_written(api):
    body = b'{"inputs":[{"name":"INPUT0","datatype":"FP32","shape":[1,3],"data":[NaN,-Infinity,1.5]}]}'
    answer = api.post("/v2/models/identity_fp32/infer", content=body)
    data = json.loads(answer.content)["outputs"][0]["data"]
    assert math.isnan(data[0])
    assert data[1:] == [-math.inf, 1.5]


def test_an_empty_output_needs_no_bytes(api):
    answer = post_binary(api, "identity_fp32", np.zeros((1, 0), np.float32), datatype="FP32")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["outputs"][0]["shape"] == [1, 0]


def test_a_body_may_be_one_tensor_and_nothing_else(api):
    data = np.arange(8, dtype=np.float32).tobytes()
    answer = api.post("/v2/models/identity_fp32/infer", content=data, headers={LENGTH: "0"})
    head, tail = split(answer)
    assert head["outputs"][0]["shape"] == [1, 8]
    assert tail == data


def test_a_raw_string_comes_back_with_its_length(api):
    answer = api.post("/v2/models/one_string/infer", content=b"427", headers={LENGTH: "0"})
    assert split(answer)[1] == b"\x03\x00\x00\x00427"


def test_a_raw_body_for_several_inputs_is_refused(api):
    answer = api.post("/v2/models/simple/infer", content=bytes(64), headers={LENGTH: "0"})
    assert answer.status_code == 400
    assert "Raw request must only have 1 input (found 1) to be deduced but got 2 inputs in" in answer.json()["error"]


@pytest.mark.parametrize("size", [10, 3_000_000])
def test_large_tensors_come_back_whole(api, size):
    array = np.arange(size, dtype=np.float32).reshape(1, -1)
    members = {"datatype": "FP32", "parameters": {"binary_data_output": True}}
    assert split(post_binary(api, "identity_fp32", array, **members))[1] == array.tobytes()


def test_large_json_comes_back_whole(api):
    data = [each / 7 for each in range(200_000)]
    body = {"inputs": [{"name": "INPUT0", "datatype": "FP64", "shape": [1, 200_000], "data": data}]}
    assert api.infer(body, "identity_fp64").json()["outputs"][0]["data"] == data


def test_tensors_in_shared_memory_are_named_in_the_answer(api):
    place = {"shared_memory_region": "r", "shared_memory_offset": 4, "shared_memory_byte_size": 64}
    inputs = [{"name": "INPUT0", "datatype": "INT32", "shape": [1, 16], "parameters": place}]
    (output,) = api.infer({"inputs": inputs}).json()["outputs"]
    assert output == {"name": "OUTPUT0", "datatype": "INT32", "shape": [1, 16], "parameters": place}


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_body_may_be_compressed_and_its_header_length_is_that_of_the_text(api, encoding, pack):
    body, headers = binary(np.ones((1, 16), np.int32), np.ones((1, 16), np.int32))
    headers["Content-Encoding"] = encoding
    answer = api.post("/v2/models/simple/infer", content=pack(body), headers=headers)
    assert answer.json()["outputs"][0]["data"] == [2] * 16


@pytest.mark.parametrize(
    "path", ["models/simple/infer", "models/llm/generate", "models/llm/generate_stream", "repository/index"]
)
def test_another_encoding_is_not_supported_and_the_answer_says_which_are(api, path):
    answer = api.post(f"/v2/{path}", content=b"x", headers={"Content-Encoding": "br"})
    assert (answer.status_code, answer.json()) == (501, {"error": "Unsupported compression type"})
    assert answer.headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize(("accepted", "encoding"), [("gzip", "gzip"), ("gzip;q=0.1, deflate", "deflate"), ("br", None)])
def test_a_long_answer_is_compressed_as_its_caller_likes(api, accepted, encoding):
    body = {"inputs": [int32s("INPUT0", 1, shape=[1, 1600], data=[7] * 1600)]}
    answer = api.infer(body, "identity_int32", headers={"Accept-Encoding": accepted})
    assert answer.headers.get("content-encoding") == encoding
    assert answer.json()["outputs"][0]["data"] == [7] * 1600  # the client undoes it


def test_a_short_answer_is_not_compressed(api):
    body = {"inputs": [int32s("INPUT0", 1)]}
    assert "content-encoding" not in api.infer(body, "identity_int32", headers={"Accept-Encoding": "gzip"}).headers


def test_an_error_is_one_string_with_the_requests_id(api):
    answer = api.infer({"id": "7", "inputs": [int32s("INPUT0", 1, shape=[1, 15])]})
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}
    assert answer.json()["error"].startswith("[request id: 7] Unable to parse 'data': Shape does not match")


def test_an_unknown_model_is_not_found(api):
    answer = api.infer(SUM, "nonexistent")
    assert (answer.status_code, answer.json()) == (
        404,
        {"error": "Request for unknown model: 'nonexistent' is not found"},
    )


def test_a_full_queue_is_answered_with_when_to_come_again(api):
    api.service.error = Overloaded("Exceeds maximum queue size", retry_after_s=1.2)
    answer = api.infer(SUM)
    assert (answer.status_code, answer.json()) == (503, {"error": "Exceeds maximum queue size"})
    assert answer.headers["retry-after"] == "2"


def test_an_exception_that_nobody_foresaw_says_nothing_about_itself(api, caplog):
    api.service.error = ValueError("secret")
    answer = api.infer(SUM)
    assert (answer.status_code, answer.json()) == (500, {"error": "internal error"})
    assert "secret" in caplog.text


def test_the_body_limit_is_the_servers_own(api):
    with serving(http_max_input_size=2000) as small:
        answer = small.infer(SUM, headers={"X-Filler": "a"})
        assert answer.status_code == 200
        answer = small.infer({"inputs": [int32s("INPUT0", 1, shape=[1, 1600], data=[7] * 1600)]})
        assert answer.status_code == 400
        assert "exceeds the maximum allowed value of 2000 bytes" in answer.json()["error"]
        bomb = gzip.compress(bytes(3000))
        answer = small.post("/v2/models/simple/infer", content=bomb, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 400
        assert "exceeds the maximum allowed value" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/v2x", "/v2/rerank", "/v2/models/a/b/infer", "/v2/models/m/versions/x/infer"])
def test_a_path_that_is_none_is_not_found(api, path):
    answer = api.post(path, json={})
    assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v2/models/m/infer"), ("POST", "/v2"), ("DELETE", "/v2/logging")]
)
def test_another_method_is_not_allowed(api, method, path):
    answer = api.client.request(method, path)
    assert (answer.status_code, answer.json()) == (405, {"error": "Method Not Allowed"})
    assert answer.headers["allow"]


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready"])
def test_health_is_a_status_and_nothing_else(api, path):
    assert (api.get(path).status_code, api.get(path).content) == (200, b"")
    api.service.is_well = False
    assert (api.get(path).status_code, api.get(path).content) == (400, b"")


def test_a_models_readiness_is_a_status(api):
    assert api.get("/v2/models/simple/versions/1/ready").status_code == 200
    answer = api.get("/v2/models/other/ready")
    assert (answer.status_code, answer.json()) == (400, {"error": "Model version not ready"})


def test_readiness_of_a_model_that_builds_says_what_it_waits_for(api):
    api.service.waits_for["other"] = "building the TensorRT engine of unet, 1 of 3, 42 s"
    answer = api.get("/v2/models/other/ready")
    assert answer.status_code == 400
    assert answer.json() == {"error": "Model version not ready: building the TensorRT engine of unet, 1 of 3, 42 s"}


@pytest.mark.parametrize("path", ["/v2", "/v2/", "/v2?x=1"])
def test_the_server_says_what_it_is(api, path):
    assert api.get(path).json() == {
        "name": "triton",
        "version": "1.2.3",
        "extensions": ["binary_tensor_data", "statistics"],
    }


def test_a_model_says_what_it_takes(api):
    assert api.get("/v2/models/identity_bytes").json() == {
        "name": "identity_bytes",
        "versions": ["1", "3"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "INPUT0", "datatype": "BYTES", "shape": [-1, -1]}],
        "outputs": [{"name": "OUTPUT0", "datatype": "BYTES", "shape": [-1, -1]}],
    }
    assert api.get("/v2/models/simple/versions/1").json()["versions"] == ["1"]


def test_a_config_is_json_with_numbers(api):
    assert api.get("/v2/models/simple/config").json()["max_batch_size"] == 8


def test_statistics_have_all_members_that_perf_analyzer_reads(api):
    (row,) = api.get("/v2/models/simple/stats").json()["model_stats"]
    assert row.keys() == {
        "name",
        "version",
        "last_inference",
        "inference_count",
        "execution_count",
        "inference_stats",
        "response_stats",
        "batch_stats",
        "memory_usage",
    }
    assert row["version"] == "1"
    assert row["inference_stats"] == {
        "success": {"count": 1, "ns": 9},
        "fail": {"count": 0, "ns": 0},
        "queue": {"count": 1, "ns": 2},
        "compute_input": {"count": 1, "ns": 1},
        "compute_infer": {"count": 1, "ns": 2},
        "compute_output": {"count": 1, "ns": 3},
        "cache_hit": {"count": 0, "ns": 0},
        "cache_miss": {"count": 0, "ns": 0},
    }
    (batch,) = row["batch_stats"]
    assert batch == {
        "batch_size": 4,
        "compute_input": {"count": 1, "ns": 1},
        "compute_infer": {"count": 1, "ns": 2},
        "compute_output": {"count": 1, "ns": 3},
    }


def test_statistics_of_an_unknown_model_are_refused(api):
    answer = api.get("/v2/models/nope/stats")
    assert (answer.status_code, answer.json()) == (400, {"error": "requested model 'nope' is not available"})
    assert len(api.get("/v2/models/stats").json()["model_stats"]) == 1


def test_the_index_may_be_asked_without_a_body(api):
    rows = [{"name": "simple", "version": "1", "state": "READY"}, {"name": "never_loaded"}]
    assert api.post("/v2/repository/index").json() == rows
    assert api.post("/v2/repository/index", json={"ready": True}).json() == rows[:1]


def test_the_index_wants_a_boolean(api):
    answer = api.post("/v2/repository/index", json={"ready": 1})
    assert answer.status_code == 400
    assert "Unable to parse 'ready'" in answer.json()["error"]


def test_nested_json_is_refused_everywhere(api):
    for path in ("repository/index", "logging", "trace/setting", "repository/models/m/load"):
        answer = api.post(f"/v2/{path}", content=b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}")
        assert answer.status_code == 400
        assert "JSON nesting depth exceeds maximum allowed limit (100)" in answer.json()["error"]


def test_a_model_is_loaded_with_its_config_and_files(api):
    parameters = {"config": '{"a":1}', "file:1/model.onnx": base64.b64encode(b"\x00\xff").decode()}
    answer = api.post("/v2/repository/models/m/load", json={"parameters": parameters})
    assert (answer.status_code, answer.content) == (200, b"")
    assert api.post("/v2/repository/models/m/load").status_code == 200
    assert api.service.calls == [
        ("load", "m", {"config": '{"a":1}', "file:1/model.onnx": b"\x00\xff"}),
        ("load", "m", {}),
    ]


@pytest.mark.parametrize("parameters", [{"config": 5}, {"config": None}, {"config": {}}, {"file:1/a": "%%"}, 5])
def test_a_load_parameter_that_is_no_text_is_refused(api, parameters):
    answer = api.post("/v2/repository/models/m/load", json={"parameters": parameters})
    assert answer.status_code == 400
    assert api.service.calls == []


def test_a_model_is_unloaded_with_its_dependents(api):
    api.post("/v2/repository/models/m/unload", json={"parameters": {"unload_dependents": True}})
    api.post("/v2/repository/models/m/unload")
    assert api.service.calls == [("unload", "m", True), ("unload", "m", False)]
    assert api.post("/v2/repository/models/m/unload", json={"parameters": {"unload_dependents": 1}}).status_code == 400


@pytest.mark.parametrize("path", ["index", "models/m/load", "models/m/unload"])
def test_a_repository_cannot_be_named(api, path):
    answer = api.post(f"/v2/repository/r/{path}")
    assert (answer.status_code, answer.json()) == (501, {"error": "'repository_name' specification is not supported"})


def test_trace_settings_are_shown_and_changed(api):
    shown = api.get("/v2/trace/setting").json()
    assert shown["trace_level"] == ["OFF"]
    assert shown["trace_rate"] == "1000"
    changes = {"trace_rate": "5", "trace_level": ["TIMESTAMPS"], "trace_count": None}
    assert api.post("/v2/models/simple/trace/setting", json=changes).json() == shown
    expected = {"trace_rate": ["5"], "trace_level": ["TIMESTAMPS"], "trace_count": None}
    assert api.service.calls == [("trace", "simple", expected)]


def test_log_settings_are_shown_and_changed(api):
    shown = api.get("/v2/logging").json()
    assert shown["log_verbose_level"] == 0
    assert api.post("/v2/logging", json={"log_verbose_level": 1}).json() == shown
    assert api.post("/v2/logging").json() == shown
    assert api.service.calls == [("log", {"log_verbose_level": 1}), ("log", {})]


def test_shared_memory_regions_come_and_go(api):
    base = "/v2/systemsharedmemory"
    region = {"name": "r", "key": "/r", "offset": 0, "byte_size": 64}
    assert api.get(f"{base}/status").json() == [region]
    assert api.get(f"{base}/region/q/status").json() == [region | {"name": "q"}]
    assert api.post(f"{base}/region/q/register", json={"key": "/k", "byte_size": 8}).content == b""
    api.post(f"{base}/region/q/unregister")
    api.post(f"{base}/unregister")
    assert api.service.calls == [("register", "q", "/k", 0, 8), ("unregister", "q"), ("unregister", "")]


@pytest.mark.parametrize("body", [None, {}, {"key": "/k"}, {"key": 5, "byte_size": 1}, {"key": "/k", "byte_size": "1"}])
def test_a_region_is_registered_with_all_it_needs(api, body):
    assert api.post("/v2/systemsharedmemory/region/q/register", json=body).status_code == 400
    assert api.service.calls == []


def test_cuda_regions_are_none_and_stay_none(api):
    base = "/v2/cudasharedmemory"
    assert api.get(f"{base}/status").json() == []
    assert api.get(f"{base}/region/r/status").status_code == 400
    assert api.post(f"{base}/region/r/register", json={}).status_code == 501
    assert api.post(f"{base}/unregister").status_code == 200


def test_generate_gives_one_object(api):
    answer = api.post("/v2/models/llm/generate", json={"PROMPT": "hello", "STREAM": False, "id": "7"})
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"id": "7", "model_name": "llm", "model_version": "1", "TEXT": "hello"}


@pytest.mark.parametrize("repetition", [0, 2])
def test_generate_wants_exactly_one_answer(api, repetition):
    body = {"PROMPT": "hello", "STREAM": True, "REPETITION": repetition}
    answer = api.post("/v2/models/llm/generate", json=body)
    assert answer.status_code == 400
    assert "generate expects model to produce exactly 1 response" in answer.json()["error"]


@pytest.mark.parametrize("repetition", [0, 1, 3])
def test_generate_stream_gives_an_event_for_each_answer(api, repetition):
    body = {"PROMPT": ["hello"], "STREAM": True, "parameters": {"REPETITION": repetition}}
    answer = api.post("/v2/models/llm/generate_stream", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.text == 'data: {"model_name":"llm","model_version":"1","TEXT":"hello"}\n\n' * repetition


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_an_error_before_the_first_answer_has_its_status(api, path):
    answer = api.post(f"/v2/models/llm/{path}", json={"PROMPT": "hello", "id": "7"})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("[request id: 7] expected 2 inputs but got 1")
    body = {"PROMPT": "hello", "STREAM": True, "REPETITION": 0, "FAIL_LAST": True}
    answer = api.post(f"/v2/models/llm/{path}", json=body)
    assert (answer.status_code, answer.json()) == (500, {"error": "An Error Occurred"})


def test_an_error_after_the_first_answer_is_an_event(api):
    body = {"PROMPT": "hello", "STREAM": True, "FAIL_LAST": True}
    answer = api.post("/v2/models/llm/generate_stream", json=body)
    assert answer.status_code == 200
    assert answer.text.endswith('"TEXT":"hello"}\n\ndata: {"error":"An Error Occurred"}\n\n')


def test_a_request_that_somebody_ended_is_told_so(api):
    api.service.error = RequestAborted("ended by an operator")
    answer = api.infer(SUM)
    assert (answer.status_code, answer.json()) == (499, {"error": "ended by an operator"})


def test_keys_guard_every_route_but_the_public_ones():
    with serving(api_keys=("sk-one",), admin_keys=("sk-root",)) as locked:
        for route in ROUTES:
            path = route.template.format(model="simple", version="1", region="r", repository="r")
            for method, access in route.methods.items():
                statuses = [
                    locked.client.request(method, path, headers=headers).status_code
                    for headers in ({}, {"X-Api-Key": "sk-one"}, {"Authorization": "Bearer sk-root"})
                ]
                refused = [status for status in statuses if status in (401, 403)]
                assert refused == {"public": [], "user": [401], "admin": [401, 403]}[access], path


def test_a_refusal_for_want_of_a_key_is_in_this_protocols_envelope():
    with serving(api_keys=("sk-one",)) as locked:
        answer = locked.infer(SUM)
        assert answer.status_code == 401
        assert isinstance(answer.json()["error"], str)
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}])
def test_an_open_server_refuses_foreign_pages(api, headers):
    answer = api.infer(SUM, headers=headers)
    assert answer.status_code == 403
    assert isinstance(answer.json()["error"], str)
    assert api.get("/v2/health/live", headers=headers).status_code == 200


def test_requests_are_counted_by_their_routes_template():
    with serving() as api:
        api.infer(SUM)
        api.get("/v2/models/simple/versions/1/ready")
        api.get("/v2/nothing/here")
        text = api.client.app.state.metrics.render()[0].decode()
    assert 'route="/v2/models/{model}/infer"' in text
    assert 'route="/v2/models/{model}/versions/{version}/ready"' in text
    assert 'route="unmatched"' in text
    assert "nothing" not in text


def test_the_shortcut_answers_as_the_long_way_does():
    with serving() as long, serving(is_short=True) as short:
        for path in ("/v2/models/simple/infer", "/v2/models/nope/infer", "/v2/models/a/b", "/v2/repository/index"):
            answers = [api.post(path, json=SUM) for api in (long, short)]
            assert answers[0].status_code == answers[1].status_code
            assert answers[0].content == answers[1].content


def test_the_applications_other_routes_go_on(api):
    @get("/v2/rerank")
    async def rerank() -> str:
        return "ranked"

    app = create_app(FakeService())
    app.register(rerank)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        assert client.get("/v2/rerank").text == "ranked"
        assert client.get("/v2/health/live").status_code == 200
