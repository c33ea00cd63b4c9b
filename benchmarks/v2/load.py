"""Closed-loop load from h2load, which shares the servers' cores and so must cost little: some 20 us of CPU a request.

Runs are counted, not timed. When its time is up h2load drops what is in flight, and Triton 2.51 segfaults on dropped
gRPC requests now and then (as in triton-inference-server/server#8034). Counted runs leave nothing behind for the next
turn, and the server's own counters must agree with them to the last request.
"""

import math
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from v2.payloads import GRPC, Payload
from v2.servers import Server

WARM_UP_S = 0.5
TIMEOUT_S = 300
_COUNTED_SHARE = 0.9
"""Each client sends its share of the requests; the last tenth is left out of the rate, as some are done by then."""


@dataclass(frozen=True)
class Run:
    requests: int
    refused: int
    """Answers other than 200, and requests without an answer."""
    inferences_per_s: float
    latency_ms: npt.NDArray[np.float64]
    client_cpu_s: float


@dataclass(frozen=True)
class Measured:
    """One server at one number of clients, once."""

    run: Run
    errors: list[str]
    server_cpu_ms: float
    """Of the server and its children for each inference."""
    mean_batch: float


class Load:
    """Requests of one kind to one server."""

    def __init__(self, server: Server, model: str, protocol: str, payload: Payload, scratch: Path) -> None:
        self._server, self._model = server, model
        body = scratch / "body"
        body.write_bytes(payload.body)
        self._log = scratch / "requests.log"
        port = server.grpc_port if protocol == GRPC else server.http_port
        self._command = ["h2load", "--max-concurrent-streams=1", f"--data={body}", f"--log-file={self._log}"]
        self._command += [] if protocol == GRPC else ["--h1"]
        self._command += [f"--header={name}: {value}" for name, value in payload.headers.items()]
        self._command += [f"http://127.0.0.1:{port}{payload.path}"]
        if shutil.which("h2load") is None:
            raise SystemExit("h2load is missing: apt-get install nghttp2-client")

    def measure(self, clients: int, seconds: float) -> Measured:
        """Warm up, then send about as many requests as the server answers in `seconds`, at least two a client."""
        start = self._server.statistics(self._model)
        sent, rate = self._warm_up(clients)
        rounds = max(2, math.ceil(rate * seconds / clients))
        before, cpu_s = self._server.statistics(self._model, start.successes + sent), self._server.cpu_s()
        run = self.run(clients, rounds * clients)
        cpu_s = self._server.cpu_s() - cpu_s
        after = self._server.statistics(self._model, before.successes + run.requests)
        successes = after.successes - before.successes
        errors = []
        if run.refused:
            errors.append(f"{run.refused} of {run.requests} requests got no answer or a refusal")
        if successes != run.requests or after.failures != before.failures:
            errors.append(
                f"{successes} successes and {after.failures - before.failures} failures of {run.requests} sent"
            )
        return Measured(
            run=run,
            errors=errors,
            server_cpu_ms=1e3 * cpu_s / run.requests,
            mean_batch=successes / max(1, after.executions - before.executions),
        )

    def _warm_up(self, clients: int) -> tuple[int, float]:
        """Ever longer runs until one is long enough to be believed.

        Returns:
            How many requests that took, and the answers a second.
        """
        sent, requests = 0, clients
        while True:
            start = time.perf_counter()
            self.run(clients, requests)
            wall_s = time.perf_counter() - start
            sent += requests
            if wall_s >= WARM_UP_S / 2:
                return sent, requests / wall_s
            requests = clients * math.ceil(requests * min(20.0, WARM_UP_S / wall_s) / clients)

    def run(self, clients: int, requests: int) -> Run:
        self._log.unlink(missing_ok=True)
        command = [*self._command[:-1], f"--clients={clients}", f"--requests={requests}", self._command[-1]]
        cpu = _children_cpu_s()
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        cpu = _children_cpu_s() - cpu
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
        started_us, status, took_us = np.loadtxt(self._log, dtype=np.int64).reshape(-1, 3).T
        answered = status == 200
        ended_us = np.sort(started_us[answered] + took_us[answered])
        counted = max(1, int(_COUNTED_SHARE * len(ended_us)))
        span_s = (ended_us[counted - 1] - started_us.min()) / 1e6 if len(ended_us) else math.inf
        return Run(
            requests=requests,
            refused=requests - len(ended_us),
            inferences_per_s=float(counted / span_s),
            latency_ms=took_us[answered] / 1e3,
            client_cpu_s=cpu,
        )


def _children_cpu_s() -> float:
    """CPU of the children that ended: of h2load, as the servers go on."""
    times = os.times()
    return times.children_user + times.children_system
