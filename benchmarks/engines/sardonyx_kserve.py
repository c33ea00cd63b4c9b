"""Our server with the same ONNX files, as `sardonyx serve` starts it."""

import json
import shutil
import subprocess
from pathlib import Path

from v2.models import Model
from v2.servers import Server, free_ports

PACKAGES = ("sardonyx", "onnxruntime", "numpy", "uvicorn", "litestar", "grpcio")


def serve(models: list[Model], instances: list[str], threads: int, cache: Path, python: str) -> Server:
    """Every model with every number of instances, as `MODEL_xINSTANCES`, as the rival has them."""
    repository = cache / "sardonyx-repository"
    shutil.rmtree(repository, ignore_errors=True)
    for model in models:
        for count in instances:
            entry = repository / f"{model.name}_x{count}"
            model.write(entry, model.config(entry.name, "onnxruntime", int(count), {}))
    http_port, grpc_port = free_ports(2)
    command = [python, "-m", "sardonyx", "serve", str(repository)]
    command += ["--port", str(http_port), "--grpc-port", str(grpc_port), "--num-threads", str(threads)]
    variables = {"SARDONYX_LOG_LEVEL": "warning"}
    return Server(command, variables, cache / "sardonyx.log", http_port=http_port, grpc_port=grpc_port)


def versions(python: str) -> dict[str, str]:
    """Of what that interpreter has installed."""
    code = (
        f"import importlib.metadata as m, json\nprint(json.dumps({{name: m.version(name) for name in {PACKAGES!r}}}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found
