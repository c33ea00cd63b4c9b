"""``/generate`` and ``/generate_stream``: tensors as members of a JSON object."""

import json

import msgspec
import numpy as np
import pytest
from tests.api.live import post_head
from tests.conformance.process import events
from tests.conformance.triton import post, post_json, texts

GREEDY = {"temperature": 0, "ignore_eos": True}


def generate(server, model="tiny", **body):
    return post_json(server, f"/v2/models/{model}/generate", body)


def generate_stream(server, model="tiny", **body):
    """Status, content type and the events, decoded."""
    status, headers, answer = post(server, f"/v2/models/{model}/generate_stream", msgspec.json.encode(body))
    text = answer.decode()
    if status != 200:
        return status, headers["content-type"], json.loads(text)
    assert text.endswith("\n\n")
    return (
        status,
        headers["content-type"],
        [json.loads(each.removeprefix("data: ")) for each in text.split("\n\n")[:-1]],
    )


def completion(server, **parameters):
    body = {"model": "tiny", "prompt": "the cat", **GREEDY, **parameters}
    status, answer = server.request("POST", "/v1/completions", body)
    assert status == 200
    return answer["choices"][0]["text"]


def test_text_is_the_same_as_over_openais_api(triton):
    status, answer = generate(triton, text_input="the cat", max_tokens=12, **GREEDY)
    assert status == 200
    assert answer["text_output"] == completion(triton, max_tokens=12)
    assert (answer["model_name"], answer["model_version"]) == ("tiny", "1")
    assert answer["finish_reason"] == "length"


def test_text_is_the_same_as_over_infer(triton, http, grpc):
    _, answer = generate(triton, text_input="the cat", max_tokens=12, **GREEDY)
    for caller in (http, grpc):
        result = caller.infer("tiny", {"text_input": texts(["the cat"])}, parameters={"max_tokens": 12, **GREEDY})
        assert result.as_numpy("text_output").tolist() == [answer["text_output"].encode()]


def test_sampling_may_be_set_in_a_tensor(triton, http):
    """As clients of vLLM's backend do."""
    sampling = json.dumps({"max_tokens": "12", "temperature": "0", "ignore_eos": True})
    tensors = {
        "text_input": texts(["the cat"]),
        "sampling_parameters": texts([sampling]),
        "exclude_input_in_output": np.array([False]),
    }
    (text,) = http.infer("tiny", tensors).as_numpy("text_output")
    assert text.decode() == "the cat" + completion(triton, max_tokens=12)


def test_parameters_may_lie_in_an_object_of_their_own(triton):
    _, flat = generate(triton, text_input="the cat", max_tokens=5, **GREEDY)
    status, nested = generate(triton, text_input="the cat", parameters={"max_tokens": 5, **GREEDY})
    assert status == 200
    assert nested == flat


def test_the_callers_id_comes_back(triton):
    assert generate(triton, id="mine", text_input="x", max_tokens=1)[1]["id"] == "mine"
    assert "id" not in generate(triton, text_input="x", max_tokens=1)[1]


def test_a_version_may_be_named(triton):
    status, answer = post_json(
        triton, "/v2/models/tiny/versions/1/generate", {"text_input": "the cat", "max_tokens": 3, **GREEDY}
    )
    assert (status, answer["text_output"]) == (200, completion(triton, max_tokens=3))


def test_text_streams_as_events(triton):
    status, kind, pieces = generate_stream(triton, text_input="the cat", stream=True, max_tokens=500, **GREEDY)
    assert (status, kind) == (200, "text/event-stream; charset=utf-8")
    assert len(pieces) > 1
    assert "".join(piece["text_output"] for piece in pieces) == completion(triton, max_tokens=500)
    assert [piece.get("finish_reason") for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert all((piece["model_name"], piece["model_version"]) == ("tiny", "1") for piece in pieces)


def test_text_comes_as_one_event_without_stream(triton):
    status, _, pieces = generate_stream(triton, text_input="the cat", max_tokens=12, **GREEDY)
    assert status == 200
    assert [piece["text_output"] for piece in pieces] == [completion(triton, max_tokens=12)]


def test_a_tensor_model_can_be_asked_as_well(triton):
    status, answer = generate(triton, "simple_accumulate", INPUT=5, sequence_id=77, sequence_start=True)
    assert (status, answer["OUTPUT"]) == (200, 5)
    status, answer = generate(triton, "simple_accumulate", INPUT=[6], sequence_id=77, sequence_end=True)
    assert (status, answer["OUTPUT"]) == (200, 11)


def test_outputs_of_several_elements_are_lists(triton):
    status, answer = generate(triton, "simple", INPUT0=list(range(16)), INPUT1=[1] * 16)
    assert status == 200
    assert answer["OUTPUT0"] == [value + 1 for value in range(16)]
    assert answer["OUTPUT1"] == [value - 1 for value in range(16)]


def test_a_tensor_model_streams_its_one_answer(triton):
    status, _, answers = generate_stream(triton, "simple", INPUT0=list(range(16)), INPUT1=[1] * 16)
    assert status == 200
    assert [answer["OUTPUT0"][0] for answer in answers] == [1]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "text_input"),
        ({"text_input": 7}, "attempt to access JSON non-string as string"),
        ({"text_input": "x", "stream": "yes"}, "attempt to access JSON non-boolean as boolean"),
        ({"text_input": ["a", "b"]}, "text_input"),
        ({"text_input": "x", "max_tokens": "many"}, "max_tokens"),
        ({"text_input": "x", "max_token": 5}, "max_token"),
        ({"text_input": "x", "parameters": 5}, "parameters"),
        ({"text_input": "x", "parameters": {"text_input": "y"}}, "text_input"),
        ({"text_input": "x", "stop": {"a": 1}}, "stop"),
        ({"text_input": "x", "id": 5}, "id"),
        ({"text_input": {"a": 1}}, "attempt to access JSON non-string as string"),
    ],
)
@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_what_cannot_be_asked_is_refused_before_anything_is_sent(triton, endpoint, body, told):
    status, headers, answer = post(triton, f"/v2/models/tiny/{endpoint}", msgspec.json.encode(body))
    assert status == 400
    assert headers["content-type"] == "application/json"
    assert told in json.loads(answer)["error"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"7", b'"text"', b"\xff"])
@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_a_body_that_is_no_object_is_refused(triton, endpoint, body):
    status, _, answer = post(triton, f"/v2/models/tiny/{endpoint}", body)
    assert status == 400
    assert json.loads(answer)["error"]


def test_a_key_that_comes_twice_is_refused(triton):
    status, _, answer = post(triton, "/v2/models/tiny/generate", b'{"text_input": "a", "text_input": "b"}')
    assert status == 400
    assert "input 'text_input' already exists in request" in json.loads(answer)["error"]


def test_an_unknown_model_is_not_found(triton):
    for endpoint in ("generate", "generate_stream"):
        status, answer = post_json(triton, f"/v2/models/no_such/{endpoint}", {"text_input": "x"})
        assert (status, answer["error"]) == (404, "Request for unknown model: 'no_such' is not found")


def test_a_shape_that_a_list_cannot_have_is_refused(triton):
    status, answer = generate(triton, "simple", INPUT0=[1, 2, 3], INPUT1=[1] * 16)
    assert status == 400
    assert "The schema can not convert input 'INPUT0' to tensor with proper shape" in answer["error"]


def test_generate_wants_exactly_one_answer(triton):
    status, answer = generate(triton, text_input="the cat", stream=True, max_tokens=500, **GREEDY)
    assert status == 400
    assert "generate expects model to produce exactly 1 response" in answer["error"]


def test_infer_over_http_does_not_stream(http):
    tensors = {"text_input": texts(["x"]), "stream": np.array([True])}
    refusal = http.refusal("tiny", tensors)
    assert refusal.status == "501"
    assert "HTTP end point doesn't support models with decoupled transaction policy" in refusal.message


def test_compressed_bodies_are_refused(triton):
    for endpoint in ("generate", "generate_stream"):
        status, _, answer = post(triton, f"/v2/models/tiny/{endpoint}", b"x", Content_Encoding="gzip")
        assert (status, json.loads(answer)["error"]) == (501, "Unsupported compression type")


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_a_reader_who_leaves_ends_its_text(triton, endpoint):
    is_streaming = endpoint == "generate_stream"
    asked = {"text_input": "the cat", "stream": is_streaming, "max_tokens": 2000, "ignore_eos": True}
    before = triton.metric("vllm:generation_tokens_total")
    with triton.connect() as connection:
        connection.sendall(post_head(f"/v2/models/tiny/{endpoint}", msgspec.json.encode(asked)))
        if is_streaming:
            assert b"text_output" in events(connection, until=b"text_output")
        else:
            triton.wait_for(lambda: triton.metric("vllm:num_requests_running"))
    triton.wait_for(triton.is_idle)
    assert triton.metric("vllm:generation_tokens_total") - before < 2000
