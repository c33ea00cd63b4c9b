"""Signals to a real process."""

import shlex
import signal
import subprocess
import time

import msgspec
from tests.api.live import post_head, read_answer
from tests.conformance.process import events, serve

LONG = {"prompt": "the cat", "max_tokens": 1500, "ignore_eos": True}


def start(server, **fields):
    """A stream that has begun."""
    connection = server.connect()
    connection.sendall(post_head("/v1/completions", msgspec.json.encode(LONG | {"stream": True} | fields)))
    return connection, events(connection, until=b"data: ")


def test_sigterm_finishes_what_is_under_way_and_exits_with_0(repository, tmp_path):
    with serve(repository, tmp_path / "log", "--drain-grace-s", "0.3") as server:
        connection, data = start(server)
        server.signal(signal.SIGTERM)
        server.wait_for(lambda: server.request("GET", "/ready")[0] == 503)
        assert server.request("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200  # the grace
        data += events(connection)
        assert data.count(b'"finish_reason":"length"') == 1
        assert b'"error"' not in data
        connection.close()
        assert server.wait() == 0
        assert "stopped" in server.log()


def test_new_requests_are_refused_after_the_grace(repository, tmp_path):
    with serve(repository, tmp_path / "log", "--drain-grace-s", "0") as server:
        connection, _ = start(server)
        server.signal(signal.SIGTERM)
        server.wait_for(lambda: server.request("GET", "/ready")[0] == 503)
        with server.connect() as late:
            late.sendall(post_head("/v1/completions", msgspec.json.encode({"prompt": "x"})))
            status, answer = read_answer(late)
            assert status == 503
            assert answer["error"]["code"] == "model_not_ready"
            assert late.recv(1) == b""  # the connection is closed
        connection.close()
        assert server.wait() == 0


def test_what_takes_too_long_is_ended_with_an_error(repository, tmp_path):
    flags = ["--drain-grace-s", "0", "--drain-timeout-s", "0.05"]
    with serve(repository, tmp_path / "log", *flags) as server:
        connections = [start(server, n=8)[0] for _ in range(4)]
        server.signal(signal.SIGTERM)
        for connection in connections:
            data = events(connection)
            assert b'{"error":{"message"' in data
            assert b"[DONE]" in data
            connection.close()
        assert server.wait() == 0


def test_a_second_signal_ends_it_at_once(repository, tmp_path):
    with serve(repository, tmp_path / "log", "--drain-grace-s", "60") as server:
        server.signal(signal.SIGTERM)
        server.wait_for(lambda: "shutting down" in server.log())
        started_s = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - started_s < 5


def test_ctrl_c_on_an_idle_server_does_not_wait_for_balancers(repository, tmp_path):
    with serve(repository, tmp_path / "log", "--drain-grace-s", "60") as server:
        started_s = time.monotonic()
        server.signal(signal.SIGINT)
        assert server.wait() == 0
        assert time.monotonic() - started_s < 10


def test_the_command_that_is_logged_works(repository, tmp_path):
    with serve(repository, tmp_path / "log") as server:
        server.wait_for(lambda: " curl " in server.log())
        line = next(line for line in server.log().splitlines() if " curl " in line)
        command = shlex.split(line[line.index("curl ") :])
        answer = subprocess.run([*command, "--silent"], capture_output=True, check=True, timeout=30)
        assert msgspec.json.decode(answer.stdout)["object"] == "chat.completion"


def test_the_log_holds_no_prompt_and_no_answer(repository, tmp_path):
    with serve(repository, tmp_path / "log", "--log-level", "debug", "--log-json") as server:
        canary = "canary-7c1e"
        body = {"prompt": canary, "max_tokens": 8, "ignore_eos": True, "user": canary}
        answer = server.request("POST", "/v1/completions", body)[1]
        server.request("POST", "/v1/completions", {"prompt": canary, "temperature": "hot"})
        server.request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": canary}], "n": 0})
        assert canary not in server.request("GET", "/metrics")[1]
        server.signal(signal.SIGINT)
        server.wait()
        text = server.log()
        assert canary not in text
        assert answer["choices"][0]["text"] not in text
        lines = [msgspec.json.decode(line) for line in text.splitlines()]
        assert any(line.get("completion_tokens") == 8 for line in lines)
