from pathlib import Path

import pytest
from tests.tiny_models import make_language_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version folder with real tokenizer and graph."""
    return make_language_model(tmp_path_factory.mktemp("repository"))
