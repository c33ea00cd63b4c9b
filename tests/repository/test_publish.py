"""Publishing under kills, power cuts and races."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.repository.conftest import fill_version

from sardonyx.repository.check import check_repository
from sardonyx.repository.layout import Repository

CALLS = ("mkdir", "rename", "fsync", "unlink", "rmdir")
CONFIG = 'name: "tiny"'


@contextmanager
def before_each_call(look: Callable[[str, tuple], None]) -> Iterator[None]:
    """Call a function before every system call of this thread that changes names or flushes."""
    is_looking = False

    def watched(name: str, original: Callable) -> Callable:
        def call(*arguments, **options):
            nonlocal is_looking
            if not is_looking:
                is_looking = True
                try:
                    look(name, arguments)
                finally:
                    is_looking = False
            return original(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, watched(name, getattr(os, name)))
        yield


def publish(repository: Repository, name: str = "tiny", config_text: str | None = CONFIG) -> int:
    with repository.staging(name) as staged:
        fill_version(staged)
        return repository.publish(name, staged, config_text)


@pytest.mark.parametrize("num_published", [0, 1])
def test_kill_before_any_system_call_leaves_the_old_state_or_the_new_one(tmp_path, num_published):
    repository = Repository(tmp_path / "repository")
    repository.root.mkdir()
    for _ in range(num_published):
        publish(repository)
    states: list[Path] = []

    def copy(name: str, arguments: tuple) -> None:
        states.append(tmp_path / f"killed-{len(states)}")
        shutil.copytree(repository.root, states[-1])

    with before_each_call(copy):
        publish(repository)
    assert len(states) > 10
    seen = set()
    for state in states:
        killed = Repository(state)
        assert check_repository(state) == []
        versions = [version for entry in killed.entries() for version in entry.versions]
        seen.add(tuple(versions))
        assert publish(killed) == max([0, *versions]) + 1
        assert check_repository(state) == []
        assert list((state / ".staging").iterdir()) == []
    assert seen == {(), (1,)} if num_published == 0 else {(1,), (2,)}


@pytest.mark.parametrize("num_published", [0, 1])
def test_everything_is_on_disk_before_it_gets_its_name(tmp_path, num_published):
    repository = Repository(tmp_path / "repository")
    for _ in range(num_published):
        publish(repository)
    flushed: list[Path] = []
    unflushed: list[set[str]] = []

    def note(name: str, arguments: tuple) -> None:
        if name == "fsync":
            flushed.append(Path(f"/proc/self/fd/{arguments[0]}").readlink())
        if name == "rename" and Path(arguments[1]).parent in {repository.root, repository.root / "tiny"}:
            source = Path(arguments[0])
            # The version folder of a new model was flushed as version/ and then put beside the config as 1/.
            names = {path.name for path in flushed} | {"1"}
            unflushed.append({path.name for path in [source, *source.rglob("*")]} - names)

    with before_each_call(note):
        publish(repository)
    assert unflushed == [set()]
    assert flushed[-1] == (repository.root / "tiny" if num_published else repository.root)


def test_publishers_that_race_get_different_numbers(tmp_path):
    repository = Repository(tmp_path / "repository")
    start = threading.Barrier(8)

    def publish_some(_: int) -> list[int]:
        start.wait(30)
        return [publish(repository) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        versions = sorted(version for some in pool.map(publish_some, range(8)) for version in some)
    assert versions == list(range(1, 25))
    (repository.root / "tiny/config.pbtxt").write_text("version_policy { all { } }")
    assert repository.entry("tiny").versions == versions
    assert check_repository(repository.root) == []
    assert list((repository.root / ".staging").iterdir()) == []


def test_version_that_another_publisher_took_is_passed_over(tmp_path):
    repository = Repository(tmp_path / "repository")
    publish(repository)

    def take(name: str, arguments: tuple) -> None:
        target = Path(arguments[-1]) if name == "rename" else Path()
        if target == repository.root / "tiny/2":
            (target / "taken").mkdir(parents=True)

    with before_each_call(take):
        assert publish(repository) == 3


def test_model_that_another_publisher_made_first_gets_a_second_version(tmp_path):
    repository = Repository(tmp_path / "repository")

    def overtake(name: str, arguments: tuple) -> None:
        if name == "rename" and Path(arguments[-1]) == repository.root / "tiny":
            publish(Repository(repository.root))

    with before_each_call(overtake):
        assert publish(repository) == 2
    assert check_repository(repository.root) == []


def test_full_disk_leaves_the_old_version(tmp_path, monkeypatch):
    repository = Repository(tmp_path / "repository")
    publish(repository)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        publish(repository)
    monkeypatch.undo()
    assert repository.entry("tiny").versions == [1]
    assert list((repository.root / ".staging").iterdir()) == []
