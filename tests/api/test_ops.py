import pytest
from tests.api.live import application

from sardonyx.errors import ConfigError
from sardonyx.version import __version__


@pytest.mark.parametrize("path", ["/live", "/ready", "/health", "/v1/health", "/ping", "/v1/internal/health"])
def test_probes_answer(api, path):
    answer = api.get(path)
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok"}


def test_a_server_without_its_models_is_alive_but_not_ready(script_source):
    script_source.error = ConfigError("is broken", file="model.onnx")
    with application(script_source, is_loaded=False) as api:
        assert api.get("/live").status_code == 200
        for path in ("/ready", "/health", "/v1/health"):
            answer = api.get(path)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "model_not_ready"
            assert "retry-after" in answer.headers


def test_the_version_is_told(api):
    assert api.get("/version").json() == {"version": __version__}


def test_metrics_come_in_prometheus_form(api):
    api.complete(prompt="hello")
    answer = api.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'sardonyx_http_requests_total{method="POST",route="/v1/completions",status="200"}' in answer.text
    assert "sardonyx_event_loop_lag_seconds_bucket" in answer.text


def test_unknown_paths_share_one_label(api):
    for path in ("/a", "/b", "/v1/c"):
        api.get(path)
    text = api.get("/metrics").text
    assert 'route="unmatched",status="404"' in text
    assert 'route="/a"' not in text


def test_nothing_is_in_flight_when_all_is_answered(api):
    api.complete(prompt="hello", stream=True)
    assert "sardonyx_http_requests_in_flight 1.0" in api.get("/metrics").text  # the scrape itself
