"""Clients that leave a real model, seen from outside: by /metrics."""

import random
import socket
import struct

import msgspec
from tests.api.live import post_head


def test_slots_are_free_again_within_a_step_wherever_clients_leave(server):
    """Random points of streams and plain requests; every answer would take thousands of tokens."""
    rng = random.Random(0)
    before = server.metric("vllm:generation_tokens_total")
    for _ in range(60):
        body = {"prompt": "the cat", "max_tokens": 2000, "ignore_eos": True, "stream": rng.random() < 0.5}
        connection = server.connect()
        connection.sendall(post_head("/v1/completions", msgspec.json.encode(body)))
        if body["stream"] and rng.random() < 0.8:
            for _ in range(rng.randrange(4)):
                connection.recv(rng.randrange(1, 2000))
        if rng.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    server.wait_for(server.is_idle)
    assert server.metric("vllm:generation_tokens_total") - before < 60 * 200
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    body = {"prompt": "the cat", "max_tokens": 2, "ignore_eos": True}
    status, answer = server.request("POST", "/v1/completions", body)
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 2


def test_metrics_and_probes_answer_while_the_server_is_full(server):
    body = {"prompt": "the cat", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    connections = [server.connect() for _ in range(64)]
    for connection in connections:
        connection.sendall(post_head("/v1/completions", msgspec.json.encode(body)))
    for path in ("/metrics", "/live", "/ready", "/v1/models") * 3:
        assert server.request("GET", path)[0] == 200
    for connection in connections:
        connection.close()
    server.wait_for(server.is_idle)


def test_what_is_too_much_is_refused_at_once(server):
    """More sequences than may be queued: a 429 that says when to come again, and nobody is cut off."""
    body = msgspec.json.encode({"prompt": "x", "n": 100, "max_tokens": 2000, "ignore_eos": True, "stream": True})
    with server.connect() as first:
        first.sendall(post_head("/v1/completions", body))
        assert first.recv(20).startswith(b"HTTP/1.1 200")
        status, answer = server.request("POST", "/v1/completions", {"prompt": "x", "n": 100})
        assert status == 429
        assert answer["error"]["code"] == "rate_limit_exceeded"
    server.wait_for(server.is_idle)
