"""`sardonyx serve` over a repository, as benchmarks ask it."""

import sys
from pathlib import Path

from v2.servers import Server, free_ports


class OurServer:
    """A server process with so many threads a model."""

    def __init__(self, repository: Path, threads: int, log: Path) -> None:
        http_port, grpc_port = free_ports(2)
        command = [sys.executable, "-m", "sardonyx", "serve", str(repository), "--port", str(http_port)]
        command += ["--grpc-port", str(grpc_port), "--num-threads", str(threads)]
        self._server = Server(command, {}, log, http_port=http_port, grpc_port=grpc_port)
        self.command = command
        self.url = f"http://127.0.0.1:{http_port}"

    def peak_bytes(self) -> int:
        """The most memory that the process had resident, from its start."""
        return self._server.peak_bytes()

    def stop(self) -> None:
        self._server.stop()
