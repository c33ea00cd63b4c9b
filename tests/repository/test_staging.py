import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sardonyx.errors import ConfigError
from sardonyx.repository import staging

DIE = """
import os, signal, sys
from pathlib import Path
from sardonyx.repository import staging
with staging.claim(Path(sys.argv[1]), "tiny") as folder:
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_folder_of_a_killed_process_is_removed_by_the_next(tmp_path):
    died = subprocess.run([sys.executable, "-c", DIE, str(tmp_path / "staging")], check=False, timeout=60)
    assert died.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "staging").iterdir()
    assert (left / "half").exists()
    with staging.claim(tmp_path / "staging", "tiny") as folder:
        assert list((tmp_path / "staging").iterdir()) == [folder]
    assert list((tmp_path / "staging").iterdir()) == []


def test_folder_of_a_living_process_stays(tmp_path):
    with staging.claim(tmp_path, "a") as first, staging.claim(tmp_path, "b") as second:
        assert sorted(tmp_path.iterdir()) == sorted([first, second])


def test_file_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "note").write_text("")
    with staging.claim(tmp_path, "a"):
        pass
    assert (tmp_path / "note").exists()


def test_links_are_not_followed(tmp_path):
    (tmp_path / "precious/data").mkdir(parents=True)
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging/link").symlink_to(tmp_path / "precious")
    with staging.claim(tmp_path / "staging", "a"):
        pass
    (tmp_path / "linked").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="is a link"), staging.claim(tmp_path / "linked", "a"):
        pass
    assert (tmp_path / "precious/data").exists()


def test_folder_that_a_cleaner_took_first_is_made_again(tmp_path, monkeypatch):
    original, taken = os.open, []

    def open_after_cleaner(path, flags, *arguments, **options):
        if Path(path).parent == tmp_path and not taken:
            taken.append(path)
            Path(path).rmdir()
        return original(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", open_after_cleaner)
    with staging.claim(tmp_path, "a") as folder:
        assert folder.exists()
        assert folder != taken[0]


@pytest.mark.parametrize("when", ["before", "after"])
def test_folder_that_a_cleaner_locked_first_is_made_again(tmp_path, monkeypatch, when):
    original, taken = fcntl.flock, []

    def lock_after_cleaner(descriptor, operation):
        folder = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not taken:
            taken.append(folder)
            if when == "before":
                raise BlockingIOError(errno.EWOULDBLOCK, "locked")
            folder.rmdir()
        return original(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock_after_cleaner)
    with staging.claim(tmp_path, "a") as folder:
        assert folder.exists()
        assert folder != taken[0]


def test_file_system_without_locks_keeps_leftovers(tmp_path, monkeypatch):
    (tmp_path / "left-0123").mkdir()

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with staging.claim(tmp_path, "a") as folder:
        assert folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["left-0123"]


def test_file_system_that_cannot_flush_folders_is_accepted(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    staging.flush_tree(tmp_path)
