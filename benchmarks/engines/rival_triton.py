"""NVIDIA's own tritonserver 2.51, out of the nvidia-pytriton wheel, with the ONNX files in its Python backend.

That wheel has no onnxruntime backend, so `triton_model.py` runs ONNX Runtime there. The wheel is only unpacked, and
numpy and ONNX Runtime go into an environment of their own beside it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from v2.models import Model
from v2.servers import Server, free_ports
from v2.wheel import fetch

WHEEL = ("nvidia-pytriton", "0.7.0", "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df")
BACKEND_PACKAGES = ("numpy==1.26.4", "onnxruntime==1.32.0")
SPIN_DURATION_US = "20"
"""As our own sessions: idle compute threads sleep soon, so that they leave the cores to the front."""


def serve(models: list[Model], instances: list[str], threads: int, cache: Path) -> Server:
    """Every model with every choice of instances, as `MODEL_xINSTANCES`; those that nobody asks sleep.

    ``2x1`` is two instances whose runs have one thread each, in place of `threads`.
    """
    folder = _installed(cache)
    repository = cache / "triton-repository"
    shutil.rmtree(repository, ignore_errors=True)
    for model in models:
        for choice in instances:
            count, _, own_threads = choice.partition("x")
            parameters = {"threads": own_threads or str(threads), "spin_duration_us": SPIN_DURATION_US}
            entry = repository / f"{model.name}_x{choice}"
            model.write(entry, model.config(entry.name, "python", int(count), parameters))
            shutil.copy(Path(__file__).with_name("triton_model.py"), entry / "1" / "model.py")
    http_port, grpc_port = free_ports(2)
    command = [
        str(folder / "pytriton/tritonserver/bin/tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={folder / 'pytriton/tritonserver/backends'}",
        "--disable-auto-complete-config",  # the Python backend would ask the model for what its config says
        "--http-address=127.0.0.1",
        f"--http-port={http_port}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={grpc_port}",
        "--allow-metrics=false",
    ]
    variables = {
        "LD_LIBRARY_PATH": f"{folder / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}",
        # The stub's interpreter ignores PYTHONPATH and takes the packages of the first Python on the path.
        "PATH": f"{folder / 'python' / 'bin'}:{os.environ['PATH']}",
    }
    return Server(command, variables, cache / "triton.log", http_port=http_port, grpc_port=grpc_port)


def _installed(cache: Path) -> Path:
    folder = cache / "triton"
    ready = folder / f"ready-{sys.version_info.major}.{sys.version_info.minor}"
    if ready.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(fetch(*WHEEL, cache)) as wheel:
        wheel.extractall(folder)
    home = folder / "pytriton" / "tritonserver"
    backend = home / "backends" / "python"
    stub = home / "python_backend_stubs" / ready.name.removeprefix("ready-") / "triton_python_backend_stub"
    shutil.copy(stub, backend)
    for program in (home / "bin" / "tritonserver", backend / stub.name):
        program.chmod(0o755)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "python")], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "python" / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, *BACKEND_PACKAGES], stdout=2, check=True)
    ready.touch()
    return folder
