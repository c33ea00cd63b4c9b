"""What the `openai` package makes of embeddings and moderations, and of what is refused."""

import base64
import io
import math

import numpy as np
import openai
import pytest
from openai.types.moderation import CategoryAppliedInputTypes
from PIL import Image
from tests.conformance.process import serve
from tests.tiny_encoders import make_encoder_model

TEXTS = ["what is the capital of france", "paris is the capital of france", "a cat and a dog"]
RULES = {"moderation.insult": "harassment 0.5", "moderation.threat": "violence 0.5, harassment/threatening 0.999"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    repository = root / "repository"
    make_encoder_model(repository, "tiny")
    make_encoder_model(repository, "ranker", family="reranker")
    make_encoder_model(repository, "talk", family="classifier", parameters=RULES)
    make_encoder_model(
        repository, "colours", family="image_classifier", parameters={"moderation.red": "violence/graphic 0.5"}
    )
    with serve(repository, root / "log", "--aliases", "text-embedding-3-small=tiny") as server:
        yield server
        assert "Traceback" not in server.log()


@pytest.fixture
def embed(client):
    def create(given, **options):
        answer = client.embeddings.create(**({"model": "tiny", "input": given} | options))
        return np.array([each.embedding for each in answer.data])

    return create


def picture(colour):
    data = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def test_texts_become_vectors_that_lie_near_where_they_share_words(client):
    answer = client.embeddings.create(model="text-embedding-3-small", input=TEXTS)
    assert answer.object == "list"
    assert answer.model == "tiny"
    assert [each.index for each in answer.data] == [0, 1, 2]
    assert {each.object for each in answer.data} == {"embedding"}
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > len(TEXTS)
    vectors = np.array([each.embedding for each in answer.data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)
    near = vectors @ vectors.T
    assert near[0, 1] > near[0, 2]


@pytest.mark.parametrize("text", TEXTS)
def test_base64_which_is_the_packages_own_choice_and_numbers_agree_bit_for_bit(embed, text):
    packed, numbers = embed(text), embed(text, encoding_format="float")
    assert packed.astype(np.float32).tobytes() == numbers.astype(np.float32).tobytes()
    # Numbers arrive with all the digits that a float32 has.
    assert (numbers.astype(np.float32) == numbers).all()


def test_base64_is_of_little_endian_float32(server, embed):
    body = {"input": TEXTS[0], "encoding_format": "base64"}
    status, answer = server.request("POST", "/v1/embeddings", body)
    assert status == 200
    data = base64.b64decode(answer["data"][0]["embedding"], validate=True)
    assert np.frombuffer(data, "<f4").tolist() == embed(TEXTS[0])[0].tolist()


def test_fewer_dimensions_are_the_first_ones_with_length_1(embed):
    whole, cut = embed(TEXTS[0])[0], embed(TEXTS[0], dimensions=8)[0]
    np.testing.assert_allclose(cut, whole[:8] / np.linalg.norm(whole[:8]), rtol=1e-5)


def test_token_ids_are_taken_as_they_are(client, embed):
    ids = [[2, 90, 3], [2, 91, 92, 3]]
    both = embed(ids)
    assert both.shape == (2, 16)
    np.testing.assert_allclose(embed(ids[1])[0], both[1], atol=1e-6)
    assert client.embeddings.create(model="tiny", input=ids).usage.prompt_tokens == 7


def test_as_many_inputs_as_openai_takes_come_back_in_order(embed):
    texts = [f"the {index % 7} of {TEXTS[index % 3]}" for index in range(2048)]
    vectors = embed(texts)
    assert vectors.shape == (2048, 16)
    for index in (0, 1000, 2047):
        np.testing.assert_allclose(vectors[index], embed(texts[index])[0], atol=1e-5)


def test_a_prompt_of_the_model_goes_in_front(embed):
    with_prompt = embed("the cat", extra_body={"input_type": "query"})[0]
    np.testing.assert_allclose(with_prompt, embed("query: the cat")[0], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"input": ""}, "input", None),
        ({"input": []}, "input", None),
        ({"input": ["a", ""]}, "input.1", None),
        ({"input": ["a", [1]]}, "input", None),
        ({"input": [10**6]}, "input", None),
        ({"input": ["a"] * 2049}, "input", None),
        ({"input": "cat " * 100}, "input", "context_length_exceeded"),
        ({"dimensions": 5}, "dimensions", None),
        ({"dimensions": 0}, "dimensions", None),
        ({"encoding_format": "int8"}, "encoding_format", None),
        ({"model": "ranker"}, "model", None),
        ({"extra_body": {"normalize": False}}, "normalize", "unsupported_parameter"),
    ],
)
def test_what_cannot_be_embedded_is_a_bad_request_that_names_the_field(client, options, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(**({"model": "tiny", "input": "a"} | options))
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="text-embedding-ada-002", input="a")
    assert caught.value.code == "model_not_found"


def test_a_text_may_be_cut_to_what_the_model_takes(embed):
    cut = embed("cat " * 100, extra_body={"truncate_prompt_tokens": -1})
    np.testing.assert_allclose(cut[0], embed("cat " * 62)[0], atol=1e-6)


def test_a_text_is_moderated(client):
    answer = client.moderations.create(input="what an insult")
    assert answer.id.startswith("modr-")
    assert answer.model == "talk"
    [result] = answer.results
    assert result.flagged
    assert result.categories.harassment
    assert result.category_scores.harassment == pytest.approx(0.998, abs=1e-3)
    assert result.category_applied_input_types.harassment == ["text"]
    assert not result.categories.violence
    assert result.categories.sexual is False
    assert result.category_scores.sexual == 0
    assert result.category_applied_input_types.sexual == []


def test_texts_are_moderated_one_by_one_with_thresholds_of_their_own(client):
    answer = client.moderations.create(model="omni-moderation-latest", input=["the sun", "a threat", "an insult"])
    assert [result.flagged for result in answer.results] == [False, True, True]
    threat = answer.results[1]
    assert threat.categories.violence
    assert not threat.categories.harassment_threatening
    assert threat.category_scores.harassment_threatening == threat.category_scores.violence


def test_texts_and_pictures_are_moderated_together(client):
    answer = client.moderations.create(input=[{"type": "text", "text": "the sun"}, picture("red"), picture("blue")])
    assert answer.model == "colours,talk"
    [result] = answer.results
    assert result.categories.violence_graphic
    assert result.category_applied_input_types.violence_graphic == ["image"]
    assert result.category_applied_input_types.harassment == ["text"]
    [calm] = client.moderations.create(input=[picture("blue")]).results
    assert not calm.flagged
    assert 0 < calm.category_scores.violence_graphic < result.category_scores.violence_graphic


def test_every_category_of_the_package_is_there(client):
    result = client.moderations.create(input="the sun").results[0].to_dict()
    names = {field.alias or name for name, field in CategoryAppliedInputTypes.model_fields.items()}
    assert len(names) == 13
    for key in ("categories", "category_scores", "category_applied_input_types"):
        assert set(result[key]) == names
    assert all(math.isfinite(score) for score in result["category_scores"].values())


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([], "input"),
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "https://a/b.png"}}], None),
        (
            [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
            None,
        ),
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,*"}}], None),
        (["a"] * 2049, "input"),
    ],
)
def test_what_cannot_be_moderated_is_a_bad_request_that_names_the_field(client, given, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.moderations.create(input=given)
    assert caught.value.param == (param or "input.1.image_url")


def test_a_ranking_by_a_reranker_and_by_an_embedding_model_agree_on_the_best(server):
    body = {"query": TEXTS[0], "documents": TEXTS[1:], "return_documents": True}
    for model in ("ranker", "tiny"):
        status, answer = server.request("POST", "/v1/rerank", body | {"model": model})
        assert status == 200
        assert answer["results"][0]["document"]["text"] == TEXTS[1]
        assert answer["results"][0]["relevance_score"] > answer["results"][1]["relevance_score"]
    status, answer = server.request("POST", "/v1/score", {"text_1": TEXTS[0], "text_2": TEXTS[1:]})
    assert status == 200
    assert answer["data"][0]["score"] > answer["data"][1]["score"]
    assert answer["model"] == "ranker"
