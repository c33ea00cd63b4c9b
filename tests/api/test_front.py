import pytest


def test_a_callers_request_id_comes_back(api):
    assert api.get("/live", headers={"X-Request-Id": "trace-42:a/b"}).headers["x-request-id"] == "trace-42:a/b"


@pytest.mark.parametrize("value", [b"", b"a b", b"x" * 129, "é".encode(), b'"quoted"'])
def test_a_request_id_that_is_not_safe_to_repeat_is_replaced(api, value):
    answer = api.get("/live", headers={b"X-Request-Id": value})
    assert answer.headers["x-request-id"].encode() != value
    assert len(answer.headers["x-request-id"]) == 24


def test_every_request_gets_an_id_of_its_own(api):
    ids = {api.get("/live").headers["x-request-id"] for _ in range(20)}
    assert len(ids) == 20


def test_answers_of_a_draining_server_close_their_connections(script_source):
    from tests.api.live import application

    with application(script_source) as api:
        assert "connection" not in api.get("/live").headers
        api.client.app.asgi_handler.is_draining = True
        assert api.get("/live").headers["connection"] == "close"
        assert api.get("/no/such/path").headers["connection"] == "close"
