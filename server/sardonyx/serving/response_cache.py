"""Answers of tensor models that are kept, so that an equal request need not be computed again.

Floor 4. Used by one thread, the event loop's, but for `ResponseCache.key`. One cache serves all models that enable
`response_cache`.
"""

import hashlib
import itertools
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]

# What Python keeps for an entry and for each of its arrays besides the content; measured with tracemalloc, rounded up.
_ENTRY_BYTES = 1024
_ARRAY_BYTES = 256


class CacheKey(NamedTuple):
    """What a request asks, of which load of a model."""

    name: str
    version: int
    generation: int
    digest: bytes


class _Entry(NamedTuple):
    outputs: Arrays
    size_bytes: int


class ResponseCache:
    """The answers used last, as many as fit.

    Args:
        max_bytes: what all entries may take, bookkeeping among it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: dict[CacheKey, _Entry] = {}
        """The one used last is last."""
        self._keys: dict[tuple[str, int], set[CacheKey]] = {}
        self._generations = itertools.count(1)
        self.size_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self.num_evictions = 0

    @property
    def num_entries(self) -> int:
        return len(self._entries)

    def new_generation(self) -> int:
        """A number for a load of a model, which is part of its keys: after a reload no old answer is found."""
        return next(self._generations)

    def key(
        self,
        name: str,
        version: int,
        inputs: Mapping[str, npt.NDArray[Any]],
        outputs: Iterable[str],
        *,
        generation: int,
    ) -> CacheKey:
        """The key of a request. Takes about a millisecond for each megabyte. Any thread.

        Args:
            inputs: by name. BYTES are objects: ``bytes``, or ``str`` that stands for its UTF-8.
            outputs: wanted ones, in any order.
            generation: of the model's load, from `new_generation`.
        """
        return CacheKey(name, version, generation, _digest(inputs, outputs))

    def get(self, key: CacheKey) -> Arrays | None:
        """The outputs that were kept, read-only; ``None`` where there are none."""
        entry = self._entries.pop(key, None)
        if entry is None:
            self.num_misses += 1
            return None
        self._entries[key] = entry
        self.num_hits += 1
        return dict(entry.outputs)

    def put(self, key: CacheKey, outputs: Mapping[str, npt.NDArray[Any]]) -> None:
        """Keep copies of outputs, and let go of the entries used least lately until they fit.

        What alone is larger than the cache is not kept. Copies, because outputs may be views of a batch.
        """
        size_bytes = _ENTRY_BYTES + sum(map(_array_bytes, outputs.values()))
        self._remove(key)
        if size_bytes > self._max_bytes:
            return
        while self.size_bytes + size_bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))
            self.num_evictions += 1
        self._entries[key] = _Entry({name: _frozen_copy(array) for name, array in outputs.items()}, size_bytes)
        self._keys.setdefault(key[:2], set()).add(key)
        self.size_bytes += size_bytes

    def drop(self, name: str, version: int) -> None:
        """Forget all answers of a model's version, whichever load gave them."""
        for key in list(self._keys.get((name, version), ())):
            self._remove(key)

    def _remove(self, key: CacheKey) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self.size_bytes -= entry.size_bytes
        keys = self._keys[key[:2]]
        keys.remove(key)
        if not keys:
            del self._keys[key[:2]]


def _digest(inputs: Mapping[str, npt.NDArray[Any]], outputs: Iterable[str]) -> bytes:
    """A digest of everything that decides an answer.

    Every piece goes in behind its own length, and every list behind its number, so that no two requests are hashed as
    the same bytes: only a collision of BLAKE2b itself could mix them up.
    """
    digest = hashlib.blake2b(digest_size=32)

    def add(piece: bytes) -> None:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)

    def add_numbers(numbers: Iterable[int]) -> None:
        add(np.fromiter(numbers, np.int64).tobytes())

    wanted = sorted(set(outputs))
    add_numbers([len(wanted), len(inputs)])
    for name in wanted:
        add(name.encode())
    for name in sorted(inputs):
        array = np.ascontiguousarray(inputs[name])
        add(name.encode())
        add(array.dtype.str.encode())
        add_numbers(inputs[name].shape)
        if array.dtype == object:
            elements = [_encode(element) for element in array.flat]
            add_numbers(map(len, elements))
            digest.update(b"".join(elements))
        else:
            # Its length follows from datatype and shape.
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.digest()


def _encode(element: str | bytes) -> bytes:
    return element.encode("utf-8", "surrogatepass") if isinstance(element, str) else element


def _array_bytes(array: npt.NDArray[Any]) -> int:
    content = sum(map(sys.getsizeof, array.flat)) if array.dtype == object else 0
    return _ARRAY_BYTES + array.nbytes + content


def _frozen_copy(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    copy = np.array(array, order="C")
    copy.setflags(write=False)
    return copy
