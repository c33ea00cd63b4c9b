"""How much memory of the host this process could still take.

Floor 2.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that this process could still take without swapping: the machine's, or its cgroup's where that is less.

    Cached files count as free on both sides: they are dropped for whoever needs the room.

    Args:
        root: where ``proc`` and ``sys`` lie.

    Source: Linux, Documentation/filesystems/proc.rst (MemAvailable), Documentation/admin-guide/cgroup-v2.rst
    (memory.max, memory.current), cgroup-v1/memory.rst.
    """
    return max(0, min([int(psutil.virtual_memory().available), *_cgroup_room(root)]))


def _cgroup_room(root: Path) -> Iterator[int]:
    """Bytes left in this process's cgroup and each one above it, where there is a limit; versions 2 and 1."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        limit_name, used_name, prefix = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            if controllers
            else ("memory.max", "memory.current", "")
        )
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        relative = Path(group.lstrip("/"))
        for folder in {base / relative, *(base / parent for parent in relative.parents), base}:
            limit, used = _read(folder / limit_name), _read(folder / used_name)
            if limit.isdigit() and used.isdigit():
                yield int(limit) - int(used) + _cached_bytes(folder / "memory.stat", prefix)


def _cached_bytes(path: Path, prefix: str) -> int:
    """Page cache of a cgroup and those below it, of files only: not tmpfs, which would have to be swapped."""
    lines = (line.split() for line in _read(path).splitlines())
    wanted = {f"{prefix}inactive_file", f"{prefix}active_file"}
    return sum(int(words[1]) for words in lines if len(words) == 2 and words[0] in wanted and words[1].isdigit())


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
