"""Raw sockets against the real server: what reaches the application, what does not, and what is left behind."""

import socket
import struct

import msgspec
import pytest
from tests.api.live import eventually, listening, post_head, read_answer

from sardonyx.api import connection as limits
from sardonyx.api import front

BODY = msgspec.json.encode({"prompt": "hello", "max_tokens": 4})


@pytest.fixture(scope="module")
def server(make_source):
    with listening(make_source()) as server:
        yield server


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    "head",
    [
        post_head("/v1/completions", BODY, "X-Big: " + "a" * 40_000),
        post_head("/v1/completions?" + "a" * 40_000, BODY),
        post_head("/v1/completions", BODY, *(f"X-{n}: 1" for n in range(101))),
        b"GET / HTTP/1.1\r\nX-Endless: " + b"a" * 70_000,
        b"GET /" + b"a" * 70_000,
    ],
)
def test_a_head_over_the_limit_is_refused_and_the_connection_closed(server, head):
    with server.connect() as connection:
        connection.sendall(head)
        status, body = read_answer(connection)
        assert status == 431
        assert body["error"]["type"] == "invalid_request_error"
        assert is_closed(connection)


def test_a_head_under_the_limit_passes(server):
    with server.connect() as connection:
        connection.sendall(post_head("/v1/completions", BODY, "X-Big: " + "a" * 30_000))
        assert read_answer(connection)[0] == 200


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01", b"HELLO\r\n\r\n", b"GET /\x00 HTTP/1.1\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_no_http_is_refused_with_the_envelope(server, data):
    with server.connect() as connection:
        connection.sendall(data)
        status, body = read_answer(connection)
        assert status == 400
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert is_closed(connection)


def test_a_head_that_does_not_come_ends_the_connection(server, monkeypatch):
    monkeypatch.setattr(limits, "HEAD_TIMEOUT_S", 0.05)
    with server.connect() as silent, server.connect() as slow:
        slow.sendall(b"GET /live HTTP/1.1\r\nHo")
        assert read_answer(slow)[0] == 408
        assert is_closed(silent)


def test_a_connection_is_kept_and_used_again(server, monkeypatch):
    monkeypatch.setattr(limits, "HEAD_TIMEOUT_S", 0.2)
    with server.connect() as connection:
        for _ in range(3):
            connection.sendall(post_head("/v1/completions", BODY))
            assert read_answer(connection)[0] == 200


def test_pipelined_requests_are_answered_in_order(server):
    prompts = [msgspec.json.encode({"prompt": "hello", "max_tokens": n}) for n in range(1, 6)]
    with server.connect() as connection:
        connection.sendall(b"".join(post_head("/v1/completions", body) for body in prompts))
        data = b""
        while data.count(b'"completion_tokens":') < 5:
            data += connection.recv(65536)
    counts = [piece.partition(b",")[0] for piece in data.split(b'"completion_tokens":')[1:]]
    assert counts == [b"1", b"2", b"3", b"4", b"5"]


def test_a_client_that_leaves_behind_pipelined_requests_frees_its_slot(make_endless_source):
    with listening(make_endless_source(), drain_timeout_s=5) as server:
        server.served.runner.gate.clear()
        body = msgspec.json.encode({"prompt": "hello", "max_tokens": 200})
        with server.connect() as connection:
            connection.sendall(post_head("/v1/completions", body) * 3)
            eventually(lambda: server.served.model.num_active)
        eventually(lambda: not server.served.model.num_active)
        server.served.runner.gate.set()
        assert server.metric("sardonyx_http_requests_in_flight") == 1


def test_a_body_may_come_in_tiny_chunks(server):
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY + b" " * 5000)
    with server.connect() as connection:
        connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
        assert read_answer(connection)[0] == 200


@pytest.mark.parametrize(
    "lines",
    [
        ("Transfer-Encoding: chunked",),  # beside the length
        ("Content-Length: 5",),  # twice
        ("Transfer-Encoding: identity, chunked",),
    ],
)
def test_a_body_of_two_lengths_is_refused(server, lines):
    with server.connect() as connection:
        connection.sendall(post_head("/v1/completions", BODY, *lines))
        assert read_answer(connection)[0] == 400


def test_a_body_that_does_not_come_is_given_up(server, monkeypatch):
    monkeypatch.setattr(front, "BODY_GRACE_S", 0.05)
    with server.connect() as connection:
        connection.sendall(post_head("/v1/completions", BODY)[:-5])
        status, body = read_answer(connection)
        assert status == 408
        assert body["error"]["code"] == "request_timeout"


def test_a_client_that_leaves_in_its_body_is_counted_and_forgotten(server):
    line = 'sardonyx_http_requests_total{method="POST",route="/v1/completions",status="499"}'
    before = server.metric(line)
    with server.connect() as connection:
        connection.sendall(post_head("/v1/completions", BODY)[:-5])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    eventually(lambda: server.metric(line) > before)
    assert server.metric("sardonyx_http_requests_in_flight") == 1


def test_a_bad_upgrade_is_served_as_plain_http(server):
    with server.connect() as connection:
        connection.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert read_answer(connection)[0] == 200
