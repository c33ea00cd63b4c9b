import inspect

import msgspec
import pytest
from tests.api.live import application

from sardonyx import errors
from sardonyx.api.openai.errors import ANSWERS, DECLARED_STATUSES, answer_for, encode_error, headers_for
from sardonyx.serving.admission import Admission

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.ServeError)]


@pytest.mark.parametrize("kind", TREE)
def test_every_class_of_the_tree_has_a_row(kind):
    assert kind in ANSWERS
    assert 400 <= ANSWERS[kind].status < 600


def test_a_class_without_a_row_is_answered_as_its_nearest_parent():
    class TooFunny(errors.UnsupportedFeature):
        pass

    assert answer_for(TooFunny("x")) is ANSWERS[errors.UnsupportedFeature]


def test_the_envelope_always_has_all_four_keys():
    for error in (errors.InvalidRequest("no"), errors.EngineError("no"), ValueError("secret")):
        envelope = msgspec.json.decode(encode_error(error))
        assert set(envelope) == {"error"}
        assert set(envelope["error"]) == {"message", "type", "param", "code"}


def test_an_unexpected_exception_says_nothing_about_itself():
    assert b"secret" not in encode_error(ValueError("secret"))


def test_an_errors_own_code_wins():
    error = errors.InvalidRequest("no", param="n", code="invalid_value")
    assert msgspec.json.decode(encode_error(error))["error"]["code"] == "invalid_value"


def test_a_full_server_says_when_to_come_again():
    assert headers_for(errors.Overloaded("full", retry_after_s=2.3))["Retry-After"] == "3"
    assert headers_for(errors.Overloaded("full", retry_after_s=0.0))["Retry-After"] == "1"
    assert "Retry-After" in headers_for(errors.ModelNotReady("loading"))


def test_a_failure_that_would_repeat_tells_the_client_not_to_retry():
    assert headers_for(errors.DeadlineExceeded("late"))["x-should-retry"] == "false"
    assert "x-should-retry" not in headers_for(errors.EngineError("once"))


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/no/such/path", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/tiny", 405, "method_not_allowed"),
        ("POST", "/metrics", 405, "method_not_allowed"),
    ],
)
def test_what_the_framework_refuses_has_the_envelope_too(api, method, path, status, code):
    answer = api.client.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["code"] == code
    assert "x-request-id" in answer.headers


def test_a_wrong_method_is_told_the_right_ones(api):
    assert "POST" in api.get("/v1/completions").headers["allow"]


def test_a_body_over_the_limit_is_refused(script_source):
    with application(script_source, max_body_bytes=2000) as api:
        answer = api.complete(prompt="x" * 3000)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "payload_too_large"


def test_a_bug_is_an_internal_error_that_is_logged_with_its_cause(script_source, caplog):
    with application(script_source) as api:
        api.served.model.start = None  # calling it is a TypeError
        answer = api.complete(prompt="hello")
        assert answer.status_code == 500
        assert answer.headers["x-should-retry"] == "false"
        assert "NoneType" not in answer.text
    assert "NoneType" in caplog.text
    assert answer.headers["x-request-id"] in caplog.text


def test_a_failed_step_fails_its_request_only(script_source):
    with application(script_source) as api:
        api.served.runner.error = errors.EngineError("the session failed")
        answer = api.complete(prompt="hello")
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "engine_error"
        api.served.runner.error = None
        assert api.complete(prompt="hello").status_code == 200


def test_a_full_queue_is_told_before_tokenising(folder, make_source):
    source = make_source()
    source.options["admission"] = admission = Admission(1, 10_000)
    with application(source) as api:
        reservation = admission.reserve(1, 1)
        answer = api.complete(prompt="hello")
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_exceeded"
        reservation.release()
        assert api.complete(prompt="hello").status_code == 200


def test_a_dead_engine_is_unavailable(script_source):
    with application(script_source) as api:
        api.served.engine.close()
        answer = api.complete(prompt="hello")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_dead"
        assert api.get("/ready").status_code == 503


def test_a_request_may_bring_its_own_deadline(endless):
    endless.served.runner.gate.clear()
    try:
        answer = endless.post("/v1/completions", {"prompt": "hello"}, headers={"X-Request-Timeout-Ms": "20"})
    finally:
        endless.served.runner.gate.set()
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "", "٣"])
def test_a_deadline_that_is_no_number_is_refused(api, value):
    answer = api.post("/v1/completions", {"prompt": "hello"}, headers={b"X-Request-Timeout-Ms": value.encode()})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-request-timeout-ms"


def test_every_status_of_the_table_is_declared():
    statuses = {answer.status for answer in ANSWERS.values()} - {499}
    assert statuses <= set(DECLARED_STATUSES)
