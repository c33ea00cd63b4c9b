import timeit
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.api.live import Api, ScriptSource, application
from tests.serving.fakes import spell
from tests.tiny_models import make_language_model, make_tokenizer

ANSWER = "the cat sat"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version folder with a real tokenizer."""
    return make_language_model(tmp_path_factory.mktemp("repository"))


def answering(folder: Path, *names: str) -> ScriptSource:
    """Models that answer "the cat sat" and end."""
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(ANSWER, add_special_tokens=False).ids
    return ScriptSource(folder, spell(ids, end=tokenizer.token_to_id("<|im_end|>")), names or ("tiny",))


def rambling(folder: Path) -> ScriptSource:
    """A model that never ends by itself."""
    return ScriptSource(folder, spell(make_tokenizer().encode("the ", add_special_tokens=False).ids))


@pytest.fixture(scope="session")
def make_source(folder: Path) -> Callable[..., ScriptSource]:
    return partial(answering, folder)


@pytest.fixture(scope="session")
def make_endless_source(folder: Path) -> Callable[[], ScriptSource]:
    return partial(rambling, folder)


@pytest.fixture
def script_source(folder: Path) -> ScriptSource:
    """For an application of the test's own."""
    return answering(folder)


@pytest.fixture(scope="session")
def api(folder: Path) -> Iterator[Api]:
    """An application that every test may use and none changes."""
    with application(answering(folder), aliases={"gpt-3.5-turbo": "tiny", "org/tiny": "tiny"}) as api:
        yield api


@pytest.fixture(scope="session")
def endless(folder: Path) -> Iterator[Api]:
    """An application whose model never ends by itself."""
    with application(rambling(folder)) as api:
        yield api


@pytest.fixture
def benchmark_s() -> Callable[[Callable[[], object]], float]:
    """The fastest of three runs, in seconds."""

    def measure(job: Callable[[], object]) -> float:
        return min(timeit.repeat(job, number=1, repeat=3))

    return measure
