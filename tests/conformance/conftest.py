from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conformance.process import ServerProcess, serve
from tests.conformance.triton import Caller, copy_examples, write_repository
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


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of tensor models and a language model, as open to clients as a Triton that trusts its network."""
    repository = tmp_path_factory.mktemp("tensors")
    write_repository(repository)
    flags = ["--id", "triton", "--allow-client-shm", "--allow-setting-updates", "--response-cache-bytes", "1MiB"]
    with serve(repository, repository / "server.log", *flags) as server:
        yield server


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
