"""The KV cache of a decoder on the CPU: slots that are reserved at once and paid for when touched.

Floor 2. Knows layouts and bytes; which sequence holds a slot is the engine's affair.
"""

import contextlib
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from sardonyx.errors import ConfigError
from sardonyx.repository.families import KvLayout
from sardonyx.runtime.dtypes import KV_DATATYPES


def cache_names(layout: KvLayout) -> list[str]:
    """What a graph calls its caches, behind a prefix: ``0.key``, ``0.value``, ``1.key`` ..."""
    return [f"{layer}.{side}" for layer in range(layout.num_layers) for side in ("key", "value")]


def bytes_per_slot(layout: KvLayout, capacity: int) -> int:
    """Memory of one slot once all its `capacity` positions are touched."""
    positions = 2 * layout.num_layers * layout.num_kv_heads * capacity
    return positions * layout.head_size * KV_DATATYPES[layout.datatype].array.itemsize


class KvCache:
    """Past keys and values of all slots: ``(2 * L, slots, K, C, D)``, layer i's keys at 2 * i, its values after them.

    One anonymous private mapping, so that the kernel commits a page when it is first written: 32 slots of 8,192
    positions cost what their sequences hold, not 12 GB. Transparent huge pages are switched off for it: numpy asks
    for them in arrays of its own, and then the first token of a sequence commits 2 MB for each head of each layer.
    (They would make decoding 14 % faster where 32 slots hold 2,000 tokens each, and hardly at all where they hold few.)

    Raises:
        ConfigError: the kernel refuses so much.
    """

    def __init__(self, layout: KvLayout, num_slots: int, capacity: int) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self.capacity = capacity
        self.nbytes = num_slots * bytes_per_slot(layout, capacity)
        """Address space; memory when every slot is full."""
        try:
            memory = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise ConfigError(
                f"{num_slots} slots of {capacity:,} positions need {self.nbytes:,} bytes, more than this machine has",
                field="kv_cache_bytes",
            ) from error
        with contextlib.suppress(AttributeError, OSError):  # a hint: some kernels and systems do not know it
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        flat: npt.NDArray[Any] = np.frombuffer(memory, KV_DATATYPES[layout.datatype].array)
        self._slots = flat.reshape(2 * layout.num_layers, num_slots, layout.num_kv_heads, capacity, layout.head_size)

    def keys(self, layer: int, first_slot: int, num_slots: int) -> npt.NDArray[Any]:
        """Keys of neighbouring slots, ``(num_slots, K, C, D)``: contiguous, so that a session can be bound to them."""
        return self._slots[2 * layer, first_slot : first_slot + num_slots]

    def values(self, layer: int, first_slot: int, num_slots: int) -> npt.NDArray[Any]:
        """As `keys`."""
        return self._slots[2 * layer + 1, first_slot : first_slot + num_slots]

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` positions of every layer from slot `source` to slot `target`.

        Measured with 30 layers, K = 3, D = 64: 1,000 tokens (46 MB) in 20 ms; computing them takes 2 s.
        """
        self._slots[:, target, :, :num_tokens] = self._slots[:, source, :, :num_tokens]

    def close(self) -> None:
        """Let go of the memory; it is freed with the last array that looks into it. No session may be bound to it."""
        self._slots = np.empty((0, 0, 0, 0, 0), self._slots.dtype)
