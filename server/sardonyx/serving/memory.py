"""How much memory the KV caches may take: what the machine and the cgroup leave, divided among the models.

Floor 4. Threads of several loads may share a budget.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

import psutil


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that this process could still take without swapping: the machine's, or its cgroup's where that is less.

    Args:
        root: where ``proc`` and ``sys`` lie.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.current), cgroup-v1/memory.rst.
    """
    return max(0, min([int(psutil.virtual_memory().available), *_cgroup_room(root)]))


def _cgroup_room(root: Path) -> Iterator[int]:
    """Bytes left in this process's cgroup and each one above it, where there is a limit; versions 2 and 1."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        limit_name, used_name = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        relative = Path(group.lstrip("/"))
        for folder in {base / relative, *(base / parent for parent in relative.parents), base}:
            limit, used = _read(folder / limit_name), _read(folder / used_name)
            # Page cache counts as used and is given back under pressure, so this is less than there is, never more.
            if limit.isdigit() and used.isdigit():
                yield int(limit) - int(used)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


class KvShare:
    """What one loaded version of a model took. Compared by identity: two versions are two shares."""

    __slots__ = ("model_name", "num_bytes")

    def __init__(self, model_name: str, num_bytes: int) -> None:
        self.model_name = model_name
        self.num_bytes = num_bytes


class KvBudget:
    """Bytes for the KV caches of all models together.

    Args:
        total_bytes: to divide.
        num_models: models that are expected to come; each may take an equal part of what is left when it comes.
    """

    def __init__(self, total_bytes: int, num_models: int = 1) -> None:
        self.total_bytes = total_bytes
        self._num_expected = num_models
        self._known_names: set[str] = set()
        self._shares: set[KvShare] = set()
        self._lock = threading.Lock()

    def take(self, model_name: str, wanted_bytes: int) -> KvShare:
        """So much, or what there is; may be 0.

        A version that replaces another may take that one's part again. Both hold it until the old one is closed: it
        runs dry meanwhile, and a reload that had to find room beside it would fail wherever one model has all.
        """
        with self._lock:
            taken = sum(share.num_bytes for share in self._shares if share.model_name != model_name)
            free = max(0, self.total_bytes - taken)
            num_coming = max(1, self._num_expected - len(self._known_names - {model_name}))
            share = KvShare(model_name, min(wanted_bytes, free // num_coming))
            self._known_names.add(model_name)
            self._shares.add(share)
            return share

    def claim(self, model_name: str, num_bytes: int) -> KvShare:
        """So much, whatever there is: the operator said so. Others find that much less."""
        with self._lock:
            share = KvShare(model_name, num_bytes)
            self._known_names.add(model_name)
            self._shares.add(share)
            return share

    def give_back(self, share: KvShare) -> None:
        """Idempotent."""
        with self._lock:
            self._shares.discard(share)
