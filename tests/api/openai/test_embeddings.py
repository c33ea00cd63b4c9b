import asyncio
import base64
import http.client

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.api.live import application, eventually, listening
from tests.api.openai.answers import error
from tests.serving.fake_tasks import FakeEmbedder, FakeReranker, TaskSource

from sardonyx.api.openai.encoder_schemas import EmbeddingRequest
from sardonyx.errors import Overloaded

PROMPTS = {"query": "query: ", "document": "passage: ", "classification": "classify: "}


@pytest.fixture(scope="module")
def tasks():
    return {
        "plain": FakeEmbedder("plain", size=8, matryoshka_dims=[2, 4], max_model_len=64),
        "prompted": FakeEmbedder("prompted", prompts=PROMPTS, default_prompt="document"),
        "query-only": FakeEmbedder("query-only", prompts={"query": "Q: "}),
        "raw": FakeEmbedder("raw", size=8, is_normalized=False, allows_any_dimensions=True),
        "wide": FakeEmbedder("wide", size=384),
    }


@pytest.fixture(scope="module")
def api(tasks):
    source = TaskSource(*tasks.values(), FakeReranker("ranker"))
    with application(source, aliases={"text-embedding-3-small": "plain"}) as api:
        yield api


@pytest.fixture
def embed(api, tasks):
    def post(model="plain", path="/v1/embeddings", headers=None, **body):
        return api.post(path, body if model is None else {"model": model} | body, headers=headers)

    return post


def vectors(answer):
    assert answer.status_code == 200, answer.text
    return np.array([each["embedding"] for each in answer.json()["data"]], np.float32)


def test_an_answer_is_as_openais(embed, tasks):
    answer = embed(input=["the cat", "a dog"], user="somebody").json()
    assert answer == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": tasks["plain"].vector(text).tolist()}
            for index, text in enumerate(["the cat", "a dog"])
        ],
        "model": "plain",
        "usage": {"prompt_tokens": 12, "total_tokens": 12},
    }


def test_a_model_may_be_named_by_alias_or_path_or_not_at_all(embed):
    assert embed("text-embedding-3-small", input="x").json()["model"] == "plain"
    assert embed(None, input="x").json()["model"] == "plain"
    assert embed("plain", path="/v1/engines/raw/embeddings", input="x").json()["model"] == "raw"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("one", ["one"]), (["one", "two"], ["one", "two"]), ([5, 6, 7], [[5, 6, 7]]), ([[5, 6], [7]], [[5, 6], [7]])],
)
def test_every_form_of_input_reaches_the_model(embed, tasks, value, expected):
    assert len(vectors(embed(input=value))) == len(expected)
    assert tasks["plain"].calls[-1] == (expected, "")


@pytest.mark.parametrize(
    ("value", "param", "words"),
    [
        (None, "input", "is required"),
        ("", "input", "is empty"),
        ([], "input", "is empty"),
        (["a", ""], "input.1", "is an empty string"),
        ([[1], []], "input.1", "is an empty list"),
        (["a", [1]], "input", "mixes"),
        (["a", 1], "input", "mixes"),
        ([1, [1]], "input", "mixes"),
        (["x"] * 2049, "input", "2,049 items; at most 2,048"),
        ([[1]] * 2049, "input", "2,049 items; at most 2,048"),
        ([-1], "input.0", ">= 0"),
        ([1.5], "input.0", "expected"),
        ([True], "input.0", "expected"),
        ([[1, "x"]], "input.0.1", "expected int"),
        ([[[1]]], "input.0.0", "expected int"),
        ({"text": "x"}, "input", "expected"),
        (3, "input", "expected"),
    ],
)
def test_input_that_cannot_be_embedded_is_refused_by_name(embed, value, param, words):
    answer = error(embed(input=value))
    assert answer["param"] == param
    assert words in answer["message"]


def test_as_many_inputs_as_openai_takes_are_taken(embed):
    assert len(vectors(embed(input=[f"text {index}" for index in range(2048)]))) == 2048


@pytest.mark.parametrize("model", ["plain", "wide"])
@pytest.mark.parametrize("num_inputs", [1, 50, 300])
def test_base64_and_numbers_are_the_same_bit_for_bit(embed, tasks, model, num_inputs):
    inputs = [f"text {index} of {index * 7}" for index in range(num_inputs)]
    expected = np.stack([tasks[model].vector(text) for text in inputs])
    answer = embed(model, input=inputs, encoding_format="float")
    assert vectors(answer).tobytes() == expected.tobytes()
    answer = embed(model, input=inputs, encoding_format="base64").json()
    assert b"".join(base64.b64decode(each["embedding"]) for each in answer["data"]) == expected.astype("<f4").tobytes()
    assert [each["index"] for each in answer["data"]] == list(range(num_inputs))


def test_a_cut_embedding_has_length_1(embed):
    whole = vectors(embed(input="the cat sat"))[0]
    cut = vectors(embed(input="the cat sat", dimensions=4))[0]
    np.testing.assert_allclose(cut, whole[:4] / np.linalg.norm(whole[:4]), rtol=1e-6)
    assert (vectors(embed(input="the cat sat", dimensions=8))[0] == whole).all()
    assert (vectors(embed(input="the cat sat", output_dimension=4))[0] == cut).all()


def test_nothing_left_of_an_embedding_is_zeros_and_not_an_error(embed):
    assert vectors(embed(input="ddd", dimensions=2)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("model", "dimensions", "possible"),
    [("plain", 3, "2, 4, 8"), ("plain", 9, "2, 4, 8"), ("wide", 128, "384"), ("raw", 9, "1 to 8")],
)
def test_a_size_that_the_model_does_not_have_is_refused_with_those_it_has(embed, model, dimensions, possible):
    answer = error(embed(model, input="x", dimensions=dimensions))
    assert answer["param"] == "dimensions"
    assert answer["message"].endswith(f"possible: {possible}")


def test_the_operator_may_allow_any_size(embed):
    assert vectors(embed("raw", input="the cat", dimensions=3)).shape == (1, 3)


def test_length_is_the_models_unless_the_caller_asks_for_1(embed, tasks):
    raw = tasks["raw"].vector("the cat")
    assert (vectors(embed("raw", input="the cat"))[0] == raw).all()
    assert (vectors(embed("raw", input="the cat", normalize=False))[0] == raw).all()
    assert (vectors(embed("raw", input="the cat", normalize=False, dimensions=3))[0] == raw[:3]).all()
    for name in ("normalize", "normalized"):
        long = vectors(embed("raw", input="the cat", **{name: True}))[0]
        np.testing.assert_allclose(long, raw / np.linalg.norm(raw), rtol=1e-6)


@pytest.mark.parametrize("name", ["normalize", "normalized"])
def test_lengths_that_the_graph_has_taken_away_cannot_be_asked_for(embed, name):
    answer = error(embed(input="x", **{name: False}))
    assert answer["param"] == name
    assert answer["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    ("model", "fields", "prompt"),
    [
        ("plain", {}, ""),
        ("plain", {"prompt": "say: "}, "say: "),
        ("plain", {"input_type": "search_query"}, ""),
        ("plain", {"task": "text-matching"}, ""),
        ("prompted", {}, "passage: "),
        ("prompted", {"prompt": ""}, ""),
        ("prompted", {"prompt_name": "query"}, "query: "),
        ("prompted", {"input_type": "search_query"}, "query: "),
        ("prompted", {"input_type": "QUERY"}, "query: "),
        ("prompted", {"input_type": "search_document"}, "passage: "),
        ("prompted", {"task": "retrieval.passage"}, "passage: "),
        ("prompted", {"input_type": "classification"}, "classify: "),
        ("query-only", {}, ""),
        ("query-only", {"input_type": "document"}, ""),
        ("query-only", {"task": "retrieval.query"}, "Q: "),
    ],
)
def test_the_prompt_in_front_is_what_the_caller_means(embed, tasks, model, fields, prompt):
    vectors(embed(model, input="x", **fields))
    assert tasks[model].calls[-1] == (["x"], prompt)


@pytest.mark.parametrize(
    ("model", "fields", "param", "words"),
    [
        ("prompted", {"prompt": "a", "prompt_name": "query"}, "prompt_name", "not together with prompt"),
        ("prompted", {"input_type": "query", "task": "query"}, "task", "not together with input_type"),
        ("prompted", {"prompt_name": "other"}, "prompt_name", "there are: classification, document, query"),
        ("plain", {"prompt_name": "query"}, "prompt_name", "there are: none"),
        ("prompted", {"input_type": "clustering"}, "input_type", "no prompt 'clustering'"),
        ("prompted", {"prompt_name": "query", "input": [1, 2]}, "prompt_name", "not with token ids"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused_by_name(embed, model, fields, param, words):
    answer = error(embed(model, **({"input": "x"} | fields)))
    assert answer["param"] == param
    assert words in answer["message"]


def test_no_default_prompt_stands_before_token_ids(embed, tasks):
    vectors(embed("prompted", input=[1, 2, 3]))
    assert tasks["prompted"].calls[-1] == ([[1, 2, 3]], "")


@pytest.mark.parametrize(
    ("fields", "truncate", "side"),
    [
        ({}, None, "right"),
        ({"truncate_prompt_tokens": 7}, 7, "right"),
        ({"truncate_prompt_tokens": -1}, True, "right"),
        ({"truncate_prompt_tokens": 7, "truncate": True}, 7, "right"),
        ({"truncate": True}, True, "right"),
        ({"truncate": False}, False, "right"),
        ({"truncate": "NONE"}, False, "right"),
        ({"truncate": "END"}, True, "right"),
        ({"truncate": "START"}, True, "left"),
        ({"truncation": True, "truncation_side": "left"}, True, "left"),
        ({"truncate": True, "truncation_direction": "Left"}, True, "left"),
    ],
)
def test_every_servers_words_for_truncation_are_understood(embed, tasks, fields, truncate, side):
    vectors(embed(input="x", **fields))
    options = tasks["plain"].options[-1]
    assert (options.truncate, options.truncation_side) == (truncate, side)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 5, "truncate": False}, "truncate"),
        ({"truncate": True, "truncation": False}, "truncation"),
        ({"truncate": "MIDDLE"}, "truncate"),
        ({"truncation_side": "up"}, "truncation_side"),
        ({"truncate": "START", "truncation_side": "right"}, "truncation_side"),
        ({"truncation_side": "left", "truncation_direction": "Right"}, "truncation_direction"),
        ({"encoding_format": "binary"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": "4"}, "dimensions"),
        ({"embedding_type": "binary"}, "embedding_type"),
        ({"output_dtype": "int8"}, "output_dtype"),
        ({"late_chunking": True}, "late_chunking"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused_by_name(embed, fields, param):
    assert error(embed(input="x", **fields))["param"] == param


def test_special_tokens_and_time_reach_the_model(embed, tasks):
    vectors(embed(input="x", add_special_tokens=False, headers={"X-Request-Timeout-Ms": "1500"}))
    options = tasks["plain"].options[-1]
    assert options.add_special_tokens is False
    assert options.timeout_s == 1.5
    assert error(embed(input="x", headers={"X-Request-Timeout-Ms": "soon"}))["param"] == "x-request-timeout-ms"


def test_what_the_model_says_comes_through(embed, tasks):
    answer = error(embed(input="x" * 65))
    assert answer["param"] == "input"
    assert answer["code"] == "context_length_exceeded"
    tasks["raw"].error = Overloaded("the queue is full", retry_after_s=2.0)
    answer = embed("raw", input="x")
    tasks["raw"].error = None
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "2"


def test_models_of_other_kinds_and_unknown_ones_are_told_apart(embed):
    answer = embed("nobody", input="x")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "not an embedding model" in error(embed("ranker", input="x"))["message"]


def test_a_repository_without_an_embedding_model_says_so():
    with application(TaskSource(FakeReranker("ranker"))) as api:
        answer = api.post("/v1/embeddings", {"input": "x"})
    assert answer.status_code == 404
    assert "no embedding model" in answer.json()["error"]["message"]


def test_a_client_that_leaves_takes_its_request_along():
    task = FakeEmbedder("slow")
    task.gate = asyncio.Event()
    with listening(TaskSource(task)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("POST", "/v1/embeddings", b'{"input": "x"}', {"Content-Type": "application/json"})
        eventually(lambda: task.num_under_way == 1)
        connection.close()
        eventually(lambda: task.num_cancelled == 1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*EmbeddingRequest.__struct_fields__, *EmbeddingRequest.refused]), JSON))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_body_is_answered_or_refused_by_name(api, fields):
    answer = api.client.post(
        "/v1/embeddings",
        content=msgspec.json.encode({"input": "x"} | fields),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code in (200, 400, 404)
    if answer.status_code == 400:
        assert answer.json()["error"]["param"].partition(".")[0] in fields.keys() | {"input"}
