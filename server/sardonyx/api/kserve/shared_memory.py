"""System shared-memory regions that clients register, so that tensors need not travel through a socket.

Floor 5. Both the name of a region and what lies behind it belong to somebody else: a key is matched before it becomes a
file name, the file is looked at again at every use, and it is read and written by system calls instead of a mapping,
since a client that shortens a mapped file kills the process (SIGBUS). Errors never repeat a key: keys of other
processes are what an attacker is after.

Source: Triton, docs/protocol/extension_shared_memory.md; POSIX shm_open, which on Linux is a file in /dev/shm.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sardonyx.api.kserve.calls import RegionStatus
from sardonyx.errors import InvalidRequest

ROOT = Path("/dev/shm")  # noqa: S108  where Linux has what shm_open names

_KEY = re.compile(r"/?([A-Za-z0-9_.\-]{1,255})")
_RESERVED = ("triton_python_backend_shm_region_", "sem.")
"""Triton's own regions, whose forging led to remote code execution (CVE-2025-23319), and the C library's semaphores."""
_MAX_NAME_LENGTH = 256
_MAX_CHUNK_BYTES = 1 << 30
"""Linux moves at most 2 GiB a call."""


class Region:
    """A part of a shared-memory file. Made by `SharedMemory`; usable while it is held, also after it was unregistered.

    `check`, `read` and `write` may be called by any thread.
    """

    __slots__ = ("_file", "_is_withdrawn", "_num_holders", "status")

    def __init__(self, status: RegionStatus, file: int) -> None:
        self.status = status
        self._file = file
        self._num_holders = 0
        self._is_withdrawn = False

    def check(self, offset: int, size_bytes: int) -> None:
        """See that a slice lies in the region, and the region still in its file.

        Raises:
            InvalidRequest: it does not.
        """
        name = self.status.name
        if not 0 <= offset < self.status.byte_size:
            raise InvalidRequest(f"Invalid offset for shared memory region: '{name}'")
        if not 0 <= size_bytes <= self.status.byte_size - offset:
            raise InvalidRequest(f"Invalid offset + byte size for shared memory region: '{name}'")
        if self.status.offset + offset + size_bytes > os.fstat(self._file).st_size:
            raise self._shortened()

    def read(self, offset: int, size_bytes: int) -> bytes:
        """A copy of a slice; what the client writes later is not seen.

        A file takes no memory for what was never written to it, so `size_bytes` says nothing about what a client
        spent: the caller admits it before.

        Args:
            offset: from the region's begin.

        Raises:
            InvalidRequest: as `check`.
        """
        self.check(offset, size_bytes)
        start, chunks = self.status.offset + offset, []
        while size_bytes:
            try:
                chunk = os.pread(self._file, min(size_bytes, _MAX_CHUNK_BYTES), start)
            except OSError as error:
                raise InvalidRequest(f"shared memory region '{self.status.name}' cannot be read") from error
            if not chunk:
                raise self._shortened()
            chunks.append(chunk)
            start += len(chunk)
            size_bytes -= len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put bytes into the region, all of `data`, which is contiguous.

        Raises:
            InvalidRequest: as `check`; or there is no memory left for a part of the file that was never written.
        """
        view = memoryview(data)
        self.check(offset, view.nbytes)
        if not view.nbytes:
            return  # a view with a 0 in its shape cannot be cast
        view = view.cast("B")
        start = self.status.offset + offset
        while view:
            try:
                num_written = os.pwrite(self._file, view[:_MAX_CHUNK_BYTES], start)
            except OSError as error:
                raise InvalidRequest(f"shared memory region '{self.status.name}' cannot be written") from error
            start += num_written
            view = view[num_written:]

    def _shortened(self) -> InvalidRequest:
        return InvalidRequest(f"shared memory region '{self.status.name}' is smaller than when it was registered")

    def _hold(self) -> None:
        self._num_holders += 1

    def _let_go(self) -> None:
        self._num_holders -= 1
        self._close_if_unused()

    def _withdraw(self) -> None:
        self._is_withdrawn = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._is_withdrawn and not self._num_holders:
            os.close(self._file)


class SharedMemory:
    """The registered regions by name. Used by one thread, the event loop's; a held `Region` by any.

    Args:
        root: folder of the shared-memory files. Nothing outside of it is opened.
        max_regions: each keeps a file open.
    """

    def __init__(self, root: Path = ROOT, *, max_regions: int = 512) -> None:
        self._root = root
        self._max_regions = max_regions
        self._regions: dict[str, Region] = {}

    def register(self, name: str, *, key: str, offset: int, byte_size: int) -> None:
        """Make a part of a shared-memory file known under a name.

        Args:
            key: what the client gave to shm_open, with or without the leading slash.
            offset: of the region's begin in the file; need not be a page's.

        Raises:
            InvalidRequest: the name is taken, empty or too long, the key is reserved or malformed, there is no such
                shared memory or we may not write to it, the region does not lie in it, or there are too many.
        """
        if not 0 < len(name) <= _MAX_NAME_LENGTH:
            raise InvalidRequest(
                f"the name of a shared memory region has 1 to {_MAX_NAME_LENGTH} characters", param="name"
            )
        file_name = _file_name(name, key)
        if name in self._regions:
            raise InvalidRequest(f"shared memory region '{name}' already in manager", param="name")
        if len(self._regions) >= self._max_regions:
            raise InvalidRequest(
                f"failed to register shared memory region '{name}': {self._max_regions} are registered, "
                "which is the limit; unregister some"
            )
        file = self._open(name, file_name)
        try:
            information = os.fstat(file)
            if not stat.S_ISREG(information.st_mode):
                raise _unable_to_open(name)
            if offset < 0 or byte_size < 1 or offset + byte_size > information.st_size:
                raise InvalidRequest(f"failed to register shared memory region '{name}': invalid args")
        except BaseException:
            os.close(file)
            raise
        self._regions[name] = Region(RegionStatus(name=name, key=key, offset=offset, byte_size=byte_size), file)

    def unregister(self, name: str = "") -> None:
        """Forget one region, or all of them. Who holds it may go on; an unknown name is no error.

        The name is free at once, also while the old region is held.
        """
        for each in [name] if name else list(self._regions):
            region = self._regions.pop(each, None)
            if region is not None:
                region._withdraw()

    def status(self, name: str = "") -> list[RegionStatus]:
        """All regions, or one.

        Raises:
            InvalidRequest: there is none of that name.
        """
        if not name:
            return [region.status for region in self._regions.values()]
        if name not in self._regions:
            raise InvalidRequest(f"Unable to find system shared memory region: '{name}'")
        return [self._regions[name].status]

    @contextmanager
    def hold(self, name: str) -> Iterator[Region]:
        """A region that stays usable until the end of the block, whoever unregisters it meanwhile.

        Raises:
            InvalidRequest: there is none of that name.
        """
        region = self._regions.get(name)
        if region is None:
            raise InvalidRequest(f"Unable to find shared memory region: '{name}'")
        region._hold()
        try:
            yield region
        finally:
            region._let_go()

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        """A copy of a slice of a region. Raises as `hold` and `Region.read`."""
        with self.hold(name) as region:
            return region.read(offset, size_bytes)

    def write(self, name: str, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put bytes into a region. Raises as `hold` and `Region.write`."""
        with self.hold(name) as region:
            region.write(offset, data)

    def _open(self, name: str, file_name: str) -> int:
        # Not to wait for the other end of a pipe, and not to follow a link that somebody put there.
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            return os.open(self._root / file_name, flags)
        except OSError:
            raise _unable_to_open(name) from None


def _file_name(name: str, key: str) -> str:
    """The file in the root that a key stands for. Raises InvalidRequest."""
    match = _KEY.fullmatch(key)
    if match is None or match[1] in {".", ".."}:
        raise InvalidRequest(
            f"failed to register shared memory region '{name}': the key is one name of letters, digits, '.', '_' and "
            "'-', with or without a slash in front",
            param="key",
        )
    for prefix in _RESERVED:
        if match[1].startswith(prefix):
            raise InvalidRequest(
                f"cannot register shared memory region '{name}' as the key contains the reserved prefix '{prefix}'",
                param="key",
            )
    return match[1]


def _unable_to_open(name: str) -> InvalidRequest:
    return InvalidRequest(f"Unable to open shared memory region: '{name}'")
