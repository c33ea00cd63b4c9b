import asyncio
import base64
import http.client
import io

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.api.live import application, eventually, listening
from tests.api.openai.answers import error
from tests.serving.fake_tasks import FakeClassifier, FakeEmbedder, FakeImageClassifier, TaskSource

from sardonyx.errors import InvalidRequest, Overloaded
from sardonyx.repository.encoder_config import CATEGORIES
from sardonyx.serving.tasks import CategoryRule


def png(colour="red"):
    data = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(data, "PNG")
    return data.getvalue()


def uri(data=None, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data or png()).decode()}"


def image(url=None):
    return {"type": "image_url", "image_url": {"url": url or uri()}}


def text(words):
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def tasks():
    lewd = {"lewd": [CategoryRule("sexual", 0.5)]}
    return {
        "talk": FakeClassifier("talk"),
        "lewd": FakeClassifier("lewd", lewd),
        "pictures": FakeImageClassifier("pictures"),
        "moodless": FakeClassifier("moodless", {}, labels=["happy"]),
        "embedder": FakeEmbedder("embedder"),
    }


@pytest.fixture(scope="module")
def api(tasks):
    with application(TaskSource(*tasks.values()), aliases={"policy": "talk"}) as api:
        yield api


@pytest.fixture
def moderate(api):
    def post(given, **body):
        return api.post("/v1/moderations", {"input": given} | body)

    return post


def test_a_text_gets_a_result_with_every_category(moderate):
    answer = moderate("rude=0.75 lewd=0.25").json()
    assert answer["id"].startswith("modr-")
    assert answer["model"] == "lewd,talk"
    [result] = answer["results"]
    assert result["flagged"] is True
    for key in ("categories", "category_scores", "category_applied_input_types"):
        assert list(result[key]) == list(CATEGORIES)
    assert {name for name, flag in result["categories"].items() if flag} == {"harassment"}
    assert {name: score for name, score in result["category_scores"].items() if score} == {
        "harassment": 0.75,
        "sexual": 0.25,
    }
    assert {name: kinds for name, kinds in result["category_applied_input_types"].items() if kinds} == {
        "harassment": ["text"],
        "sexual": ["text"],
    }


@pytest.mark.parametrize("num_texts", [1, 3, 2048])
def test_texts_get_a_result_each_from_one_call_of_a_model(moderate, tasks, num_texts):
    tasks["talk"].calls.clear()
    results = moderate([f"rude={index % 2}" for index in range(num_texts)]).json()["results"]
    assert [result["flagged"] for result in results] == [index % 2 == 1 for index in range(num_texts)]
    assert len(tasks["talk"].calls) == 1


def test_parts_get_one_result_together(moderate, tasks):
    answer = moderate([text("rude=0.25"), image(), text("rude=0.75 lewd=0.25")]).json()
    assert answer["model"] == "lewd,pictures,talk"
    [result] = answer["results"]
    assert result["category_scores"]["harassment"] == 0.75
    assert result["category_applied_input_types"]["harassment"] == ["text"]
    assert result["category_applied_input_types"]["sexual"] == ["text", "image"]
    assert tasks["pictures"].calls[-1] == [png()]


def test_a_picture_alone_is_judged_by_those_who_see(moderate):
    answer = moderate([image()]).json()
    assert answer["model"] == "pictures"
    assert answer["results"][0]["category_applied_input_types"]["sexual"] == ["image"]


@pytest.mark.parametrize(
    "name", [None, "", "omni-moderation-latest", "omni-moderation-2024-09-26", "text-moderation-007"]
)
def test_openais_names_mean_every_moderator(moderate, name):
    assert moderate("x", model=name).json()["model"] == "lewd,talk"


def test_one_model_may_be_asked_alone_also_by_alias(moderate):
    assert moderate("lewd=1", model="talk").json()["results"][0]["flagged"] is False
    assert moderate("lewd=1", model="lewd").json()["results"][0]["flagged"] is True
    assert moderate("x", model="policy").json()["model"] == "talk"


def test_a_model_of_the_repository_goes_before_openais_name():
    source = TaskSource(FakeClassifier("talk"), FakeClassifier("text-moderation-mine"))
    with application(source, aliases={"omni-moderation-latest": "talk"}) as api:
        for name, judges in (
            ("text-moderation-mine", "text-moderation-mine"),
            ("omni-moderation-latest", "talk"),
            (None, "talk,text-moderation-mine"),
        ):
            assert api.post("/v1/moderations", {"input": "x", "model": name}).json()["model"] == judges


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        (None, "input", "is required"),
        ([], "input", "is an empty list"),
        (3, "input", "expected"),
        ([3], "input.0", "expected"),
        ({"type": "text", "text": "x"}, "input", "expected"),
        (["a", text("b")], "input", "mixes"),
        (["a"] * 2049, "input", "2048"),
        ([text("a")] * 2049, "input", "2048"),
        ([image()] * 17, "input", "17 pictures; at most 16"),
        ([{"type": "audio"}], "input.0.type", "audio"),
        ([{"text": "a"}], "input.0.type", "is required"),
        ([{"type": "text"}], "input.0.text", "is required"),
        ([text("a"), {"type": "image_url"}], "input.1.image_url", "is required"),
        ([text("a"), {"type": "image_url", "image_url": {}}], "input.1.image_url.url", "is required"),
        ([text("a"), {"type": "image_url", "image_url": "x"}], "input.1.image_url", "expected"),
        ([text("a"), image("https://example.org/cat.png")], "input.1.image_url", ""),
        ([text("a"), image("file:///etc/passwd")], "input.1.image_url", ""),
        ([text("a"), image("data:image/png;base64,!!!")], "input.1.image_url", ""),
        ([image(), image("data:image/png,plain")], "input.1.image_url", ""),
        ([image(), image("data:")], "input.1.image_url", ""),
    ],
)
def test_what_cannot_be_judged_is_refused_by_name(moderate, given, param, words):
    answer = error(moderate(given))
    assert answer["param"] == param
    assert words in answer["message"]


def test_a_picture_that_its_model_refuses_is_named_by_its_part(moderate, tasks):
    tasks["pictures"].error = InvalidRequest("images.1: is damaged", param="images.1")
    answer = error(moderate([image(), text("a"), image()]))
    tasks["pictures"].error = None
    assert answer["param"] == "input.2.image_url"
    assert answer["message"] == "input.2.image_url: is damaged"


@pytest.mark.parametrize(
    ("given", "model", "words"),
    [([image()], "talk", "talk judges text only"), ("x", "pictures", "pictures judges pictures only")],
)
def test_a_kind_that_nobody_judges_is_refused_and_not_passed(moderate, given, model, words):
    answer = error(moderate(given, model=model))
    assert (answer["param"], answer["code"]) == ("input", "unsupported_parameter")
    assert words in answer["message"]


def test_models_that_moderate_nothing_say_so(moderate):
    assert "judges no moderation category" in error(moderate("x", model="moodless"))["message"]
    assert error(moderate("x", model="embedder"))["param"] == "model"
    assert error(moderate("x", model="nobody"), 404)["code"] == "model_not_found"
    assert error(moderate("x", model="my-omni-moderation-1"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("name", [None, "omni-moderation-latest"])
def test_without_any_moderator_the_answer_tells_the_way_out(name):
    with application(TaskSource(FakeClassifier("moodless", {}, labels=["a"]))) as api:
        answer = api.post("/v1/moderations", {"input": "x", "model": name})
    assert error(answer, 404)["code"] == "model_not_found"
    assert "moderation.<label>" in error(answer, 404)["message"]


def test_one_model_that_fails_fails_the_request(moderate, tasks):
    tasks["lewd"].error = Overloaded("the queue is full", retry_after_s=2.0)
    answer = moderate("x")
    tasks["lewd"].error = None
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "2"


def test_the_callers_time_reaches_every_model(api, tasks):
    headers = {"X-Request-Timeout-Ms": "2500"}
    body = {"input": [text("a"), image()]}
    assert api.client.post("/v1/moderations", json=body, headers=headers).status_code == 200
    assert {tasks[name].options[-1].timeout_s for name in ("talk", "lewd", "pictures")} == {2.5}


def test_a_client_that_leaves_takes_its_request_along():
    tasks = [FakeClassifier("a"), FakeClassifier("b")]
    for task in tasks:
        task.gate = asyncio.Event()
    with listening(TaskSource(*tasks)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("POST", "/v1/moderations", b'{"input": "x"}', {"Content-Type": "application/json"})
        eventually(lambda: all(task.num_under_way == 1 for task in tasks))
        connection.close()
        eventually(lambda: all(task.num_cancelled == 1 for task in tasks))


KEYS = st.sampled_from(["type", "text", "image_url", "url", "x"])
WORDS = st.text(max_size=8) | st.sampled_from(["text", "image_url", uri(), "data:image/png;base64,AAAA"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url"])},
    optional={"text": WORDS, "image_url": st.fixed_dictionaries({"url": WORDS})},
)


@given(JSON | st.lists(PART, max_size=4), st.none() | st.sampled_from(["talk", "pictures", "nobody"]) | JSON)
@settings(max_examples=150, deadline=None)
def test_any_body_is_answered_or_refused_by_name(api, given, model):
    sent = msgspec.json.encode({"input": given, "model": model})
    answer = api.client.post("/v1/moderations", content=sent, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404)
    if answer.status_code == 400:
        assert answer.json()["error"]["param"].partition(".")[0] in {"input", "model"}
