from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conformance.process import ServerProcess, serve
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
