import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tritonclient.grpc
import tritonclient.http
from tests.conformance.process import ServerProcess, serve
from tests.conformance.triton import Caller, copy_examples, pending, write_repository
from tests.tiny_models import TinyDecoder, make_language_model


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny model with room for long answers."""
    root = tmp_path_factory.mktemp("repository")
    make_language_model(root, sizes=TinyDecoder(max_model_len=2048))
    return root


@pytest.fixture(scope="session")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that every test may use and none changes."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    flags = ["--aliases", "gpt-3.5-turbo=tiny,org/tiny=tiny", "--enable-tokenizer-info"]
    with serve(repository, log, *flags) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    """Of the `server` that the module means."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(params=["http", "grpc"])
def tensor_client(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[tuple[Any, Any]]:
    """Each of Triton's two clients of that server, its module in front."""
    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[request.param]
    port = server.port if request.param == "http" else server.grpc_port
    with module.InferenceServerClient(f"127.0.0.1:{port}") as client:
        yield module, client


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of tensor models and a language model, as open to clients as a Triton that trusts its network."""
    repository = tmp_path_factory.mktemp("tensors")
    write_repository(repository)
    flags = ["--id", "triton", "--allow-client-shm=true", "--allow-setting-updates", "--response-cache-bytes", "1MiB"]
    with serve(repository, repository / "server.log", *flags) as server:
        yield server
        # Whatever the tests sent, nothing of it may have been a surprise.
        assert "Traceback" not in server.log()


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with keys and low limits; what is off by default is off."""
    repository = tmp_path_factory.mktemp("guarded")
    copy_examples(repository, "simple", "simple_identity")
    flags = ["--http-max-input-size", "65536", "--grpc-max-message-bytes", "65536"]
    keys = {"SARDONYX_API_KEYS": "user-key", "SARDONYX_ADMIN_KEYS": "admin-key"}
    with serve(repository, repository / "server.log", *flags, env=keys) as server:
        yield server


@pytest.fixture(scope="session", params=["http", "grpc"])
def caller(request: pytest.FixtureRequest, triton: ServerProcess) -> Iterator[Caller]:
    """Each of the two synchronous clients."""
    with Caller(request.param, triton) as caller:
        yield caller


@pytest.fixture(scope="session")
def http(triton: ServerProcess) -> Iterator[Caller]:
    """The one over HTTP."""
    with Caller("http", triton) as caller:
        yield caller


@pytest.fixture(scope="session")
def grpc(triton: ServerProcess) -> Iterator[Caller]:
    """The one over gRPC."""
    with Caller("grpc", triton) as caller:
        yield caller


@pytest.fixture(scope="session")
def long_run(triton: ServerProcess) -> dict[str, Any]:
    """Inputs of the model `slow` for a run of a second and a half: what runs is not interrupted, but has to be seen."""
    num_turns = 20_000
    with Caller("grpc", triton) as caller:
        started_s = time.monotonic()
        caller.infer("slow", {"INPUT": np.array([[num_turns]], np.int64)})
        duration_s = time.monotonic() - started_s
    return {"INPUT": np.array([[round(num_turns * 1.5 / duration_s)]], np.int64)}


@pytest.fixture
def idle_slow(triton: ServerProcess) -> Iterator[None]:
    """The model `slow` has ended what a test began."""
    yield
    triton.wait_for(lambda: pending(triton, "slow") == 0)
    with Caller("grpc", triton) as caller:
        caller.infer("slow", {"INPUT": np.array([[1]], np.int64)}, client_timeout=60)
