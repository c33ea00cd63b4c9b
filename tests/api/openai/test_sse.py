"""Streams on a live server: their beginning, their silences, and their ends."""

import socket
import struct
import threading

import msgspec
import pytest
from tests.api.live import eventually, listening, post_head, read_answer

from sardonyx.api import connection
from sardonyx.api.openai import sse
from sardonyx.api.openai.sse import Frames
from sardonyx.errors import EngineError
from sardonyx.serving.options import Usage


@pytest.fixture
def server(make_endless_source):
    source = make_endless_source()
    source.options.update(max_model_len=4096, num_slots=4)
    with listening(source) as server:
        yield server


def stream_body(**fields):
    return msgspec.json.encode({"prompt": "hello", "stream": True, "max_tokens": 4000} | fields)


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        piece = connection.recv(65536)
        assert piece, data[-500:]
        data += piece
    return data


def reset(connection: socket.socket) -> None:
    """Leave without a goodbye."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def is_idle(served) -> bool:
    stats = served.engine.stats()
    return not (served.model.num_active or stats.num_running or stats.num_waiting)


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_a_client_that_leaves_its_stream_frees_its_slot(server, leave):
    client = server.connect()
    client.sendall(post_head("/v1/completions", stream_body()))
    read_until(client, b"data: ")
    assert server.served.model.num_active == 1
    leave(client)
    eventually(lambda: is_idle(server.served))
    server.served.assert_idle()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_leaves_before_its_answer_frees_its_slot(server, path, is_streamed):
    runner = server.served.runner
    runner.gate.clear()
    messages = [{"role": "user", "content": "hello"}]
    body = msgspec.json.encode({"prompt": "hello", "messages": messages, "max_tokens": 100, "stream": is_streamed})
    client = server.connect()
    client.sendall(post_head(path, body))
    eventually(lambda: server.served.model.num_active)
    reset(client)
    eventually(lambda: not server.served.model.num_active)
    runner.gate.set()
    eventually(lambda: is_idle(server.served))
    server.served.assert_idle()
    assert sum(num_tokens for batch in runner.batches for _, num_tokens in batch) < 100


def test_a_client_that_leaves_while_it_waits_for_the_tokenizer_leaves_nothing(server):
    pool = server.served.model._pool
    hold = threading.Event()
    jobs = [pool._executor.submit(hold.wait) for _ in range(2)]
    client = server.connect()
    client.sendall(post_head("/v1/completions", stream_body()))
    eventually(lambda: server.served.model.num_active)
    reset(client)
    eventually(lambda: not server.served.model.num_active)
    hold.set()
    for job in jobs:
        job.result()
    eventually(lambda: is_idle(server.served))
    server.served.assert_idle()


def test_a_hundred_clients_that_leave_anywhere_leave_nothing(server):
    for number in range(100):
        client = server.connect()
        client.sendall(post_head("/v1/completions", stream_body(n=1 + number % 3))[: None if number % 5 else -3])
        for _ in range(number % 4):
            client.recv(256) if number % 5 else None
        reset(client)
    eventually(lambda: server.metric("sardonyx_http_requests_in_flight") == 1)
    eventually(lambda: is_idle(server.served))
    server.served.assert_idle()
    assert server.request("POST", "/v1/completions", {"prompt": "hello"})[0] == 200


def test_a_silent_stream_is_kept_alive_by_comments(server, monkeypatch):
    monkeypatch.setattr(sse, "PING_INTERVAL_S", 0.02)
    server.served.runner.gate.clear()
    with server.connect() as client:
        client.sendall(post_head("/v1/completions", stream_body(max_tokens=2)))
        early = read_until(client, b": ping\n\n")
        assert b"200 OK" in early
        assert b"data:" not in early
        server.served.runner.gate.set()
        data = read_until(client, b"[DONE]")
    assert data.count(b"data: {") >= 1


def test_a_failure_before_the_first_chunk_has_its_status(server):
    server.served.runner.error = EngineError("the session failed")
    status, body = server.request("POST", "/v1/completions", msgspec.json.decode(stream_body()))
    assert status == 500
    assert body["error"]["code"] == "engine_error"


def test_a_failure_in_a_stream_ends_it_with_an_error_frame(server):
    with server.connect() as client:
        client.sendall(post_head("/v1/completions", stream_body()))
        read_until(client, b"data: ")
        server.served.runner.error = EngineError("the session failed")
        data = read_until(client, b"[DONE]")
        last = data.split(b"\n\n")[-3]
        assert msgspec.json.decode(last.partition(b"data: ")[2]) == {
            "error": {"message": "the session failed", "type": "server_error", "param": None, "code": "engine_error"}
        }
        assert data.endswith(b"0\r\n\r\n") or read_until(client, b"0\r\n\r\n")


def test_a_bug_in_a_stream_ends_it_with_an_error_frame(server, monkeypatch, caplog):
    monkeypatch.setattr(Frames, "text", None)  # calling it is a TypeError
    with server.connect() as client:
        client.sendall(post_head("/v1/completions", stream_body()))
        data = read_until(client, b"[DONE]")
    assert b'"message":"internal error' in data
    assert b"NoneType" not in data
    assert "NoneType" in caplog.text
    eventually(lambda: is_idle(server.served))


def test_a_client_that_stops_reading_is_given_up(server, monkeypatch):
    monkeypatch.setattr(connection, "STALL_TIMEOUT_S", 0.1)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(post_head("/v1/completions", stream_body(prompt=["a"] * 8, logprobs=20)))
        in_flight = "sardonyx_http_requests_in_flight"
        eventually(lambda: server.metric(in_flight) == 2)
        eventually(lambda: server.metric(in_flight) == 1)
        server.served.assert_idle()


def test_a_stopped_generation_ends_as_if_it_were_done(server):
    with server.connect() as client:
        client.sendall(post_head("/v1/chat/completions", stream_body(messages=[{"role": "user", "content": "x"}])))
        first = read_until(client, b'"id":"')
        request_id = first.partition(b'"id":"')[2].partition(b'"')[0].decode()
        assert server.request("POST", "/v1/internal/stop-generation", {"id": request_id}) == (200, '"OK"')
        data = read_until(client, b"[DONE]")
    assert b'"finish_reason":"stop"' in data


def test_frames_are_json_whatever_the_text_holds():
    frames = Frames({"id": 'a"\\', "model": "é"}, include_usage=True, usage=None)
    for text in ('"', "\\", "\n\n", "é😀\u2028", "\x00"):
        data = frames.text(3, b',"text":', text, b"}")
        assert data.endswith(b"\n\n")
        assert data.count(b"\n") == 2
        chunk = msgspec.json.decode(data.removeprefix(b"data: "))
        assert chunk["choices"] == [{"index": 3, "text": text}]
        assert chunk["usage"] is None


def test_usage_in_frames_is_of_the_moment():
    usage = Usage(prompt_tokens=2)
    frames = Frames({"id": "a"}, include_usage=False, usage=usage)
    usage.completion_tokens = 5
    chunk = msgspec.json.decode(frames.choice(b"{}").removeprefix(b"data: "))
    assert chunk["usage"]["total_tokens"] == 7


def test_a_stream_may_be_followed_by_another_request(server):
    with server.connect() as client:
        client.sendall(post_head("/v1/completions", stream_body(max_tokens=3)))
        assert read_answer(client)[0] == 200
        client.sendall(post_head("/v1/completions", stream_body(max_tokens=3)))
        assert read_answer(client)[0] == 200
