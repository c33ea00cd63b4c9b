"""The end of a server. Signals are in tests/conformance; here what they set off."""

import threading

import msgspec
import pytest
from tests.api.live import eventually, listening, post_head, read_answer

from sardonyx.api.server import bind
from sardonyx.errors import ConfigError

BODY = msgspec.json.encode({"prompt": "hello", "max_tokens": 8})


def test_requests_under_way_are_finished_and_the_server_ends(make_endless_source):
    with listening(make_endless_source()) as server, server.connect() as client:
        server.served.runner.gate.clear()
        client.sendall(post_head("/v1/completions", BODY))
        eventually(lambda: server.served.model.num_active)
        server.stop()
        eventually(lambda: server.request("GET", "/ready")[0] == 503)
        assert server.request("GET", "/live")[0] == 200
        status, body = server.request("POST", "/v1/completions", {"prompt": "late"})
        assert status == 503
        assert "shutting down" in body["error"]["message"]
        server.served.runner.gate.set()
        status, body = read_answer(client)
        assert status == 200
        assert body["usage"]["completion_tokens"] == 8
        eventually(lambda: not is_listening(server))


def test_new_requests_are_served_while_balancers_have_not_noticed(make_endless_source):
    with listening(make_endless_source(), drain_grace_s=0.5) as server:
        server.stop(with_grace=True)
        eventually(lambda: server.request("GET", "/ready")[0] == 503)
        with server.connect() as client:
            client.sendall(post_head("/v1/completions", BODY))
            assert b"connection: close" in client.recv(300)
        eventually(lambda: not is_listening(server))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_is_left_after_the_drain_is_ended_with_an_error(make_endless_source, is_streamed):
    body = msgspec.json.encode({"prompt": "hello", "max_tokens": 200, "stream": is_streamed})
    source = make_endless_source()
    with listening(source, drain_timeout_s=0.2) as server, server.connect() as client:
        pace = threading.Event()
        script = server.served.runner.script
        server.served.runner.script = lambda sequence: (pace.wait(0.05), script(sequence))[1]
        client.sendall(post_head("/v1/completions", body))
        if is_streamed:
            data = client.recv(65536)
        else:
            eventually(lambda: server.served.model.num_active)
        server.stop()
        if is_streamed:
            while b"[DONE]" not in data:
                data += client.recv(65536)
            assert b'{"error":{"message"' in data
        else:
            status, answer = read_answer(client)
            assert status == 503
            assert answer["error"]["code"] == "model_not_ready"
        pace.set()
        eventually(lambda: not is_listening(server))


def test_an_address_that_is_taken_is_told_at_once():
    with bind("127.0.0.1", 0) as listener, pytest.raises(ConfigError, match="cannot listen on"):
        bind("127.0.0.1", listener.getsockname()[1])


def test_a_host_that_is_no_address_is_told_at_once():
    with pytest.raises(ConfigError, match="cannot listen on"):
        bind("no.such.host.invalid", 0)


def is_listening(server) -> bool:
    try:
        server.connect().close()
    except ConnectionRefusedError:
        return False
    return True
