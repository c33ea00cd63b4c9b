"""A rival in a process of its own, asked over its standard input: a JSON object a line, answers likewise."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any


class LineProcess:
    """Starts the process, and waits until it says that it is ready.

    Args:
        command: of the process.
        threads: for libraries that take their number from the environment.
        log: where its standard error goes.
    """

    def __init__(self, command: list[str], threads: int, log: Path) -> None:
        self.command = command
        variables = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "true",
        }
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, env=variables
        )
        self._read()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.command)} died")
        answer: dict[str, Any] = json.loads(line)
        return answer
