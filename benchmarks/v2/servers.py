"""A KServe-v2 server in a process of its own."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0
STATISTICS_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Statistics:
    """What the server counted for one model, from its start."""

    successes: int
    failures: int
    executions: int


class Server:
    """Started and ready when made; `stop` ends it and what it started."""

    def __init__(
        self, command: list[str], variables: dict[str, str], log: Path, *, http_port: int, grpc_port: int
    ) -> None:
        self.command, self.http_port, self.grpc_port = command, http_port, grpc_port
        self._log = log
        with log.open("w") as sink:
            self._process = psutil.Popen(command, env=os.environ | variables, stdout=sink, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._ready():
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.stop()
                raise SystemExit(f"{command[0]} did not become ready; see {log}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End it and its children, by force where asking is not enough. Triton's stubs notice when Triton dies."""
        if self._process.poll() is not None:
            return
        processes = [self._process, *self._process.children(recursive=True)]
        self._process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
        for process in alive:
            process.kill()

    def metadata(self) -> dict[str, Any]:
        return self._get("v2")

    def statistics(self, model: str, at_least: int = 0) -> Statistics:
        """The counters, as soon as `at_least` successes are among them: a server may answer first and count then."""
        deadline = time.monotonic() + STATISTICS_TIMEOUT_S
        while True:
            (found,) = self._get(f"v2/models/{model}/stats")["model_stats"]
            counts = found["inference_stats"]
            if counts["success"]["count"] >= at_least or time.monotonic() > deadline:
                return Statistics(counts["success"]["count"], counts["fail"]["count"], found["execution_count"])
            time.sleep(0.05)

    def cpu_s(self) -> float:
        processes = [self._process, *self._process.children(recursive=True)]
        return sum(times.user + times.system for times in (process.cpu_times() for process in processes))

    def peak_bytes(self) -> int:
        """The most memory that it had resident, from its start."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def _get(self, path: str) -> dict[str, Any]:
        if self._process.poll() is not None:
            raise SystemExit(f"{self.command[0]} died ({self._process.returncode}); see {self._log}")
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/{path}", timeout=30) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/v2/health/ready", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports
