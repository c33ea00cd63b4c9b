"""A server as its operator runs it: a process of its own, told by flags and signals, seen by its port and its log."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

_LISTENING = re.compile(r"listening on [\d.]+:(\d+),")
_GRPC_LISTENING = re.compile(r"listening on [\d.]+:(\d+) for gRPC")


class ServerProcess:
    """``sardonyx serve`` under test."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self._log = log
        self.port = 0
        self.grpc_port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, is_true: Any, within_s: float = 30.0) -> Any:
        """Poll until a call gives something true."""
        deadline_s = time.monotonic() + within_s
        while not (value := is_true()):
            assert time.monotonic() < deadline_s, f"it did not happen; log:\n{self.log()[-4000:]}"
            time.sleep(0.005)
        return value

    def wait_until(self, path: str) -> None:
        """Until that is answered with 200."""
        match = self.wait_for(lambda: self._alive() and _LISTENING.search(self.log()))
        self.port = int(match[1])
        self.wait_for(lambda: self._alive() and self.request("GET", path)[0] == 200)
        if match := _GRPC_LISTENING.search(self.log()):
            self.grpc_port = int(match[1])

    def _alive(self) -> bool:
        assert self.process.poll() is None, f"the server ended; log:\n{self.log()[-4000:]}"
        return True

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """One request on a connection of its own; JSON in and out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            data = None if body is None else msgspec.json.encode(body)
            connection.request(method, path, data, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        return answer.status, msgspec.json.decode(content) if content[:1] in b'{["' and content else content.decode()

    def metric(self, name: str) -> float:
        """Sum of the samples of a metric."""
        lines = self.request("GET", "/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if re.match(rf"{re.escape(name)}[ {{]", line))

    def is_idle(self) -> bool:
        """Nothing runs, nothing waits, and nobody is being answered but us."""
        busy = self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting")
        return not busy and self.metric("sardonyx_http_requests_in_flight") == 1

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, within_s: float = 30.0) -> int:
        """The exit code."""
        return self.process.wait(within_s)


@contextmanager
def serve(
    repository: Path,
    log: Path,
    *flags: str,
    env: Mapping[str, str] | None = None,
    command: list[str] | None = None,
    until: str = "/ready",
) -> Iterator[ServerProcess]:
    """Start a server on a free port, wait until a path is answered with 200, and end it."""
    words = [*(command or [sys.executable, "-m", "sardonyx"]), "serve", str(repository)]
    words += ["--port", "0", "--grpc-port", "0", "--num-threads", "1", *flags]
    with log.open("wb") as output:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        process = subprocess.Popen(words, stdout=output, stderr=output, env=environment, cwd=log.parent)
    server = ServerProcess(process, log)
    try:
        server.wait_until(until)
        yield server
    finally:
        process.kill()
        process.wait()


def events(stream: socket.socket, *, until: bytes = b"[DONE]") -> bytes:
    """Everything up to a mark, or to the end of the connection."""
    data = b""
    while until not in data and (piece := stream.recv(65536)):
        data += piece
    return data
