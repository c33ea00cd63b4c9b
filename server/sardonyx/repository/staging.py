"""Locked working folders and durable renames: the steps that publishing is made of.

Floor 1. Knows folders, not models; `layout` gives the order of the steps.
"""

import errno
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sardonyx.errors import ConfigError

logger = logging.getLogger(__name__)

_TAKEN = {errno.ENOTEMPTY, errno.EEXIST}
_MAX_ATTEMPTS = 100


@contextmanager
def claim(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, removed at the end. What killed processes left in `parent` is removed first.

    The folder is locked for as long as the process that claimed it lives: the kernel drops the lock, also on kill -9,
    and also where process ids mean nothing (containers that share a volume).

    Raises:
        ConfigError: `parent` is a link, or no folder of it can be locked.
    """
    parent.mkdir(parents=True, exist_ok=True)
    if parent.is_symlink():
        raise ConfigError("is a link: what lies behind it could be removed by mistake", file=str(parent))
    _remove_leftovers(parent)
    folder, lock = _make_locked(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def rename(source: Path, target: Path) -> bool:
    """Rename a folder; false where a folder that holds something has the name already."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


def write(path: Path, text: str) -> None:
    """Write a file and flush it to disk."""
    path.write_text(text, encoding="utf-8")
    flush(path)


def flush_tree(folder: Path) -> None:
    """Flush every file and folder to disk, the innermost first."""
    for parent, _, files in os.walk(folder, topdown=False):
        for file in files:
            flush(Path(parent) / file)
        flush(Path(parent))


def flush(path: Path) -> None:
    """Flush one file's contents or one folder's names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a folder; they have no use for it either.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def _remove_leftovers(parent: Path) -> None:
    """Remove folders whose lock is free. Where the file system has no locks they stay."""
    for folder in parent.iterdir():
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            logger.info("removed what an unfinished export left: %s", folder.name)
        except OSError:
            continue
        finally:
            os.close(lock)


def _make_locked(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    for _ in range(_MAX_ATTEMPTS):
        folder = parent / f"{prefix}-{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        except OSError:
            # No locks on this file system (NFS gives none on folders): then nobody removes leftovers either.
            return folder, lock
        # Another process may have removed the folder between its making and the lock.
        if folder.exists():
            return folder, lock
        os.close(lock)
    raise ConfigError("cannot be locked", file=str(parent))
