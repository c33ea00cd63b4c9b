import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.api.live import application
from tests.api.openai.answers import error
from tests.serving.fake_tasks import FakeEmbedder, FakeReranker, TaskSource

from sardonyx.api.openai.encoder_schemas import RerankRequest, ScoreRequest
from sardonyx.errors import ContextLengthExceeded, EngineError

PATHS = ["/v1/rerank", "/rerank"]
SCORE_PATHS = ["/v1/score", "/score"]
QUERY = "abc"
DOCUMENTS = ["xyz", "abc", "abxy", "zzz"]
"""Of the fake reranker these get 0, 1, 0.5 and 0."""


@pytest.fixture(scope="module")
def tasks():
    return {
        "ranker": FakeReranker("ranker"),
        "embedder": FakeEmbedder("embedder", size=8),
        "prompted": FakeEmbedder("prompted", prompts={"query": "q: ", "passage": "p: "}),
        "dotted": FakeEmbedder("dotted", size=8, is_normalized=False, similarity="dot"),
        "far": FakeEmbedder("far", size=8, is_normalized=False, similarity="euclidean"),
    }


@pytest.fixture(scope="module")
def api(tasks):
    with application(TaskSource(*tasks.values())) as api:
        yield api


@pytest.fixture
def rerank(api):
    def post(path="/v1/rerank", **body):
        return api.post(path, {"query": QUERY, "documents": DOCUMENTS} | body)

    return post


@pytest.fixture
def score(api):
    def post(path="/v1/score", **body):
        return api.post(path, body)

    return post


def cosine(one, other):
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.mark.parametrize("path", PATHS)
def test_documents_come_best_first_and_equals_as_they_were_sent(rerank, path):
    answer = rerank(path).json()
    assert answer["id"].startswith("rerank-")
    assert answer["model"] == "ranker"
    assert answer["results"] == [
        {"index": 1, "relevance_score": 1.0},
        {"index": 2, "relevance_score": 0.5},
        {"index": 0, "relevance_score": 0.0},
        {"index": 3, "relevance_score": 0.0},
    ]
    assert answer["usage"] == {"prompt_tokens": 25, "total_tokens": 25}


def test_the_best_few_come_with_their_texts_where_asked(rerank):
    results = rerank(top_n=2, return_documents=True).json()["results"]
    assert [(each["index"], each["document"]) for each in results] == [(1, {"text": "abc"}), (2, {"text": "abxy"})]
    assert len(rerank(top_n=99).json()["results"]) == 4


def test_documents_may_be_objects(rerank, tasks):
    results = rerank(documents=["abc", {"text": "xyz", "title": "t"}], return_documents=True).json()["results"]
    assert [each["document"]["text"] for each in results] == ["abc", "xyz"]
    assert tasks["ranker"].calls[-1] == [(QUERY, "abc"), (QUERY, "xyz")]


def test_teis_body_gets_teis_answer(api):
    body = {"query": QUERY, "texts": DOCUMENTS[:3], "raw_scores": False, "return_text": True, "truncate": True}
    assert api.post("/rerank", body).json() == [
        {"index": 1, "score": 1.0, "text": "abc"},
        {"index": 2, "score": 0.5, "text": "abxy"},
        {"index": 0, "score": 0.0, "text": "xyz"},
    ]
    assert "text" not in api.post("/rerank", {"query": QUERY, "texts": ["a"]}).json()[0]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"documents": None}, "documents"),
        ({"documents": []}, "documents"),
        ({"documents": ["a", ""]}, "documents.1"),
        ({"documents": ["a", {"text": ""}]}, "documents.1"),
        ({"documents": [{"title": "a"}]}, "documents.0.text"),
        ({"documents": [1]}, "documents.0"),
        ({"documents": "a"}, "documents"),
        ({"documents": ["a"] * 2049}, "documents"),
        ({"texts": ["a"]}, "texts"),
        ({"texts": [""], "documents": None}, "texts.0"),
        ({"query": ""}, "query"),
        ({"query": None}, "query"),
        ({"top_n": 0}, "top_n"),
        ({"raw_scores": True}, "raw_scores"),
        ({"max_tokens_per_doc": 100}, "max_tokens_per_doc"),
        ({"max_chunks_per_doc": 10}, "max_chunks_per_doc"),
        ({"rank_fields": ["title"]}, "rank_fields"),
        ({"truncate": "MIDDLE"}, "truncate"),
    ],
)
def test_a_ranking_that_cannot_be_is_refused_by_name(rerank, body, param):
    assert error(rerank(**body))["param"] == param


def test_a_document_may_be_cut_where_it_would_be_anyway(rerank, tasks):
    assert rerank(max_tokens_per_doc=4096).status_code == 200
    assert tasks["ranker"].options[-1].truncate is True
    assert rerank(max_tokens_per_doc=4096, truncate_prompt_tokens=64).status_code == 200
    assert tasks["ranker"].options[-1].truncate == 64


def test_errors_about_inputs_name_the_field_that_held_them(rerank, score, api, tasks):
    tasks["ranker"].error = ContextLengthExceeded("text 1 is too long", param="input")
    try:
        answers = [
            rerank(),
            api.post("/rerank", {"query": "a", "texts": ["b"]}),
            score(text_1="a", documents=["b"]),
        ]
    finally:
        tasks["ranker"].error = None
    for answer, field in zip(answers, ["documents", "texts", "documents"], strict=True):
        assert error(answer)["param"] == field
        assert error(answer)["code"] == "context_length_exceeded"
        assert error(answer)["message"] == f"{field}: text 1 is too long"


def test_other_errors_stay_as_they_are(rerank, tasks):
    tasks["ranker"].error = EngineError("model ranker failed")
    answer = rerank()
    tasks["ranker"].error = None
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_error"


def test_an_embedding_model_ranks_by_cosine(rerank, tasks):
    embedder = tasks["embedder"]
    results = rerank(model="embedder").json()["results"]
    expected = [cosine(embedder.vector(QUERY), embedder.vector(text)) for text in DOCUMENTS]
    assert [each["index"] for each in results] == sorted(range(4), key=lambda index: -expected[index])
    for each in results:
        assert each["relevance_score"] == pytest.approx(expected[each["index"]], abs=1e-6)
    assert embedder.calls[-1] == ([*DOCUMENTS, QUERY], "")


def test_queries_and_documents_get_the_prompts_they_were_trained_with(rerank, tasks):
    prompted = tasks["prompted"]
    prompted.calls.clear()
    answer = rerank(model="prompted").json()
    assert sorted(prompted.calls, key=str) == sorted([([QUERY], "q: "), (DOCUMENTS, "p: ")], key=str)
    assert answer["usage"]["prompt_tokens"] == len(QUERY) + sum(map(len, DOCUMENTS))


@pytest.mark.parametrize("model", ["dotted", "far"])
def test_embeddings_are_compared_as_their_model_was_trained_for(score, tasks, model):
    task = tasks[model]
    one, other = task.vector("aabbb"), task.vector("bbba")
    expected = float(one @ other) if model == "dotted" else cosine(one, other)
    data = score(model=model, text_1="aabbb", text_2="bbba").json()["data"]
    assert data[0]["score"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("path", SCORE_PATHS)
def test_one_text_is_scored_against_many(score, path):
    answer = score(path, model="ranker", text_1=QUERY, text_2=DOCUMENTS).json()
    assert answer["id"].startswith("score-")
    assert answer["object"] == "list"
    assert answer["model"] == "ranker"
    assert isinstance(answer["created"], int)
    assert answer["data"] == [
        {"index": index, "object": "score", "score": value} for index, value in enumerate([0.0, 1.0, 0.5, 0.0])
    ]
    assert answer["usage"] == {"prompt_tokens": 25, "total_tokens": 25}


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")])
def test_texts_are_scored_pair_by_pair(score, tasks, names):
    answer = score(**{names[0]: ["ab", "xy"], names[1]: ["a", "xb"]})
    assert [each["score"] for each in answer.json()["data"]] == [1.0, 0.5]
    assert tasks["ranker"].calls[-1] == [("ab", "a"), ("xy", "xb")]
    assert score(**{names[0]: ["ab"], names[1]: "a"}).json()["data"][0]["score"] == 1.0


def test_embeddings_are_scored_pair_by_pair(score, tasks):
    task = tasks["embedder"]
    data = score(model="embedder", text_1=["ab", "xyz"], text_2=["abc", "xa"]).json()["data"]
    expected = [cosine(task.vector("ab"), task.vector("abc")), cosine(task.vector("xyz"), task.vector("xa"))]
    assert [each["score"] for each in data] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text_1"),
        ({"text_1": "a"}, "text_2"),
        ({"text_1": "a", "text_2": ""}, "text_2"),
        ({"text_1": [], "text_2": "a"}, "text_1"),
        ({"text_1": "a", "text_2": ["b", ""]}, "text_2.1"),
        ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ({"text_1": ["a", "b"], "text_2": "a"}, "text_1"),
        ({"text_1": "a", "queries": "a", "text_2": "a"}, "queries"),
        ({"text_1": [1], "text_2": "a"}, "text_1.0"),
        ({"text_1": "a", "text_2": ["b"] * 2049}, "text_2"),
    ],
)
def test_a_scoring_that_cannot_be_is_refused_by_name(score, body, param):
    assert error(score(**body))["param"] == param


def test_a_reranker_is_preferred_where_no_model_is_named(rerank, score):
    assert rerank().json()["model"] == score(text_1="a", text_2="b").json()["model"] == "ranker"


def test_without_any_model_for_it_the_answer_says_so():
    with application(TaskSource()) as api:
        answer = api.post("/v1/rerank", {"query": "a", "documents": ["b"]})
    assert answer.status_code == 404
    assert "no reranker or embedding model" in answer.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "x"]), inner, max_size=2),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("/v1/rerank", RerankRequest, {"query": "a", "documents": ["b"]}),
        ("/v1/score", ScoreRequest, {"text_1": "a", "text_2": "b"}),
    ],
)
def test_any_body_is_answered_or_refused_by_name(api, path, kind, body):
    @given(st.dictionaries(st.sampled_from(kind.__struct_fields__), JSON, max_size=4))
    @settings(max_examples=100, deadline=None)
    def is_answered(fields):
        sent = msgspec.json.encode(body | fields)
        answer = api.client.post(path, content=sent, headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400, 404)
        if answer.status_code == 400:
            assert answer.json()["error"]["param"].partition(".")[0] in (body | fields)

    is_answered()
