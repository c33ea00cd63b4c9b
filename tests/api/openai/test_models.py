import pytest
from tests.api.live import application, eventually

from sardonyx.errors import ConfigError


def test_models_and_their_aliases_are_listed(api):
    answer = api.get("/v1/models").json()
    assert answer["object"] == "list"
    assert [card["id"] for card in answer["data"]] == ["tiny", "gpt-3.5-turbo", "org/tiny"]
    for card in answer["data"]:
        assert card["object"] == "model"
        assert card["root"] == "tiny"
        assert card["max_model_len"] == 256
        assert isinstance(card["created"], int)


@pytest.mark.parametrize("path", ["tiny", "gpt-3.5-turbo", "org/tiny", "org%2Ftiny"])
def test_a_model_is_described_by_any_of_its_names(api, path):
    answer = api.get(f"/v1/models/{path}").json()
    assert answer["id"] == path.replace("%2F", "/")
    assert answer["root"] == "tiny"


@pytest.mark.parametrize("path", ["other", "tiny/1", "%2e%2e%2ftiny", "a" * 500])
def test_another_name_is_not_found(api, path):
    answer = api.get(f"/v1/models/{path}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_a_model_that_cannot_be_used_is_not_listed(make_source):
    source = make_source("a", "b")
    load = source.load

    def load_but_b(name, override=None):
        if name == "b":
            raise ConfigError("is broken", file="model.onnx")
        return load(name, override)

    source.load = load_but_b
    with application(source, is_loaded=False) as api:
        eventually(lambda: api.complete(prompt="hello", model="a").status_code == 200)
        eventually(lambda: [card["id"] for card in api.get("/v1/models").json()["data"]] == ["a"])
        assert api.get("/v1/models/b").status_code == 404
        assert api.complete(prompt="hello", model="b").status_code == 503
