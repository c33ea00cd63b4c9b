"""Without a network: nothing is fetched, at the start or later."""

import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conformance import offline
from tests.conformance.process import serve

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in offline.PLATFORMS, reason="needs seccomp"
)

SCRIPT = Path(offline.__file__)


def test_an_edge_server_starts_and_serves_where_it_can_reach_nobody(repository, tmp_path):
    command = [sys.executable, str(SCRIPT)]
    with serve(repository, tmp_path / "log", "--profile", "edge", command=command) as server:
        body = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4, "ignore_eos": True}
        status, answer = server.request("POST", "/v1/chat/completions", body)
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 4
        for path in ("/v1/models", "/schema/openapi.json", "/metrics", "/v2/models/tiny/config"):
            assert server.request("GET", path)[0] == 200
        server.signal(signal.SIGINT)
        assert server.wait() == 0


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.create_connection(listener.getsockname())",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "socket.getaddrinfo('example.org', 80)",
    ],
)
def test_an_attempt_to_reach_someone_would_have_ended_it(attempt):
    code = (
        "import socket; from tests.conformance.offline import forbid_connections; forbid_connections(); "
        f"listener = socket.create_server(('127.0.0.1', 0)); print('listens', flush=True); {attempt}; print('reached')"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert (ended.stdout, ended.returncode) == ("listens\n", -signal.SIGSYS)
