import pytest
from tests.api.live import application, eventually

from sardonyx.errors import ConfigError


def test_text_is_encoded_counted_and_decoded(api):
    tokens = api.post("/v1/internal/encode", {"text": "the cat"}).json()
    assert tokens["length"] == len(tokens["tokens"])
    assert api.post("/v1/internal/token-count", {"text": "the cat"}).json() == {"length": tokens["length"]}
    assert api.post("/v1/internal/decode", {"tokens": tokens["tokens"]}).json() == {"text": "the cat"}


def test_the_default_model_is_described(api):
    info = api.get("/v1/internal/model/info").json()
    assert info["model_name"] == "tiny"
    assert info["lora_names"] == []
    assert info["max_model_len"] == 256


def test_no_model_is_called_none(script_source):
    script_source.error = ConfigError("is broken")
    with application(script_source, is_loaded=False) as api:
        eventually(lambda: "is broken" in api.complete(prompt="x").text)
        assert api.get("/v1/internal/model/info").json()["model_name"] == "None"
        assert api.get("/v1/internal/model/list").json() == {"model_names": ["tiny"]}


def test_models_are_unloaded_and_loaded_where_the_operator_allows_it(script_source):
    with application(script_source, model_control_mode="explicit", load_model=("*",)) as api:
        assert api.client.post("/v1/internal/model/unload").json() == "OK"
        answer = api.complete(prompt="hello")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_not_ready"
        assert api.post("/v1/internal/model/load", {"model_name": "tiny", "args": {}, "settings": None}).json() == "OK"
        assert api.complete(prompt="hello").status_code == 200
        assert api.post("/v1/internal/model/unload", {"model_name": "tiny"}).json() == "OK"


def test_a_load_that_fails_is_an_error_and_the_old_version_serves_on(script_source):
    with application(script_source, model_control_mode="explicit", load_model=("*",)) as api:
        script_source.error = ConfigError("is broken", file="model.onnx")
        answer = api.post("/v1/internal/model/load", {"model_name": "tiny"})
        assert answer.status_code == 503
        assert "is broken" in answer.json()["error"]["message"]
        assert api.complete(prompt="hello").status_code == 200


def test_a_load_that_asks_for_what_we_do_not_do_is_refused(script_source):
    with application(script_source, model_control_mode="explicit", load_model=("*",)) as api:
        answer = api.post("/v1/internal/model/load", {"model_name": "tiny", "args": {"load_in_4bit": True}})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "args"
        assert api.post("/v1/internal/model/load", {"model_name": "other"}).status_code == 404


@pytest.mark.parametrize("path", ["load", "unload"])
def test_models_are_not_touched_unless_the_operator_allows_it(api, path):
    answer = api.post(f"/v1/internal/model/{path}", {"model_name": "tiny"})
    assert answer.status_code == 403
    assert "model_control_mode" in answer.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"{}", b'{"id": "cmpl-none"}'])
def test_stopping_nothing_is_ok(api, content):
    assert api.client.post("/v1/internal/stop-generation", content=content).json() == "OK"


@pytest.mark.parametrize("path", ["/v1/billing/usage", "/v1/dashboard/billing/usage"])
def test_nothing_is_billed(api, path):
    answer = api.get(path, params={"start_date": "2023-05-01", "end_date": "2023-05-31"}).json()
    assert answer == {"object": "list", "daily_costs": [], "total_usage": 0}
