"""What a Whisper model holds on a card beside its graphs: caches of its rows, windows of sound, inputs and outputs.

Floor 3. A slot has two parts here. Its keys and values of the window lie in its own row, since a step attends to
neighbouring rows; those of its tokens lie in a run of blocks, which block tables find anywhere.
"""

import weakref
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from sardonyx.errors import ConfigError, EngineError
from sardonyx.repository.families import Whisper
from sardonyx.runtime.device import Bytes, Device, DeviceBinding, DeviceTensor
from sardonyx.runtime.dtypes import DATATYPES, KV_DATATYPES
from sardonyx.runtime.kv_cache import cache_names
from sardonyx.speech import Window

_FP32 = DATATYPES["FP32"]


class WindowPlaces:
    """Which windows a card holds, and where. The longest unused one gives way; it is encoded anew when it is needed.

    Args:
        places: their numbers.
    """

    def __init__(self, places: range) -> None:
        self._free = list(reversed(places))
        self._held: OrderedDict[int, weakref.ref[Window]] = OrderedDict()
        """By place; last used last."""

    def take(self, window: Window) -> int:
        """A place for a window that is about to be encoded."""
        place = self._free.pop() if self._free else self._vacate()
        self._held[place] = weakref.ref(window)
        return place

    def use(self, window: Window) -> int:
        """Where a window is that was encoded."""
        assert isinstance(window.cross, int), "the engine has windows encoded first"
        self._held.move_to_end(window.cross)
        return window.cross

    def _vacate(self) -> int:
        place = next((place for place, held in self._held.items() if held() is None), next(iter(self._held)))
        window = self._held.pop(place)()
        if window is not None and window.cross == place:
            window.cross = None
        return place


class WhisperMemory:
    """Memory that stays where it is while the runner lives.

    Rows and places are bound one by one and in stretches: 1,500 positions of Whisper's heads, 64 numbers wide, end
    where a tensor of the device may begin.

    Args:
        device: gives it.
        model: sizes and layout.
        num_slots: rows at once; as many windows have a place beside them.
        input_bytes: of the largest step's inputs, more than a text has that is aligned.
        num_logits: of a step at most.

    Raises:
        ConfigError: the device or the host has not so much.
    """

    def __init__(self, device: Device, model: Whisper, num_slots: int, *, input_bytes: int, num_logits: int) -> None:
        kv, num_positions = model.kv, model.num_frames // 2
        assert kv.block_size is not None, "the cache has blocks"
        self._device = device
        self._model = model
        self._allocated: list[int] = []
        self.blocks_per_slot = -(-model.max_model_len // kv.block_size)
        self.windows = WindowPlaces(range(num_slots, 2 * num_slots))
        self._runs = np.arange(num_slots, dtype=np.int32)
        """By slot: which run of blocks holds its tokens."""
        blocks = (num_slots * self.blocks_per_slot, kv.block_size, kv.num_kv_heads, kv.head_size)
        rows = (2 * num_slots, kv.num_kv_heads, num_positions, kv.head_size)
        aligned_tokens = (len(model.alignment_heads), model.max_model_len, num_positions)
        try:
            self._past = {name: self._tensor(blocks, kv.datatype) for name in cache_names(kv)}
            self._cross = {name: self._tensor(rows, kv.datatype) for name in cache_names(kv)}
            self.mel = self._tensor((1, model.num_mels, model.num_frames), "FP32")
            self.inputs = self._allocate(input_bytes)
            self._logits = self._allocate(num_logits * model.vocab_size * 4)
            self._attention = self._tensor(aligned_tokens, "FP32")
            self._logprobs = self._tensor((model.max_model_len,), "FP32")
            self.host_inputs: Bytes = device.allocate_host(input_bytes)
            self.host_logits = device.allocate_host(num_logits * model.vocab_size * 4)
        except EngineError as error:
            self.close()
            reason = f"{num_slots} windows at once do not fit: {error.message}"
            raise ConfigError(reason, field="max_num_seqs") from None

    def blocks(self, slots: list[int]) -> npt.NDArray[np.int32]:
        """(slots, blocks of a slot)."""
        columns = np.arange(self.blocks_per_slot, dtype=np.int32)
        return self._runs[slots][:, None] * self.blocks_per_slot + columns

    def move(self, source: int, slot: int) -> None:
        """What a slot holds is another's from now on; that one's tokens are the other's."""
        self._runs[[slot, source]] = self._runs[[source, slot]]
        self.fill(slot, source)

    def fill(self, slot: int, source: int) -> None:
        """Copy a window's keys and values into a slot's row, from a place or from another slot: 18 MB of base."""
        for cross in self._cross.values():
            row_bytes = cross.num_bytes // cross.shape[0]
            self._device.copy(cross.address + source * row_bytes, cross.address + slot * row_bytes, row_bytes)

    def cross(self, first: int, count: int) -> dict[str, DeviceTensor]:
        """Keys and values of neighbouring rows or places, by name."""
        parts = {}
        for name, cross in self._cross.items():
            address = cross.address + first * (cross.num_bytes // cross.shape[0])
            parts[f"cross.{name}"] = DeviceTensor(address, (count, *cross.shape[1:]), cross.datatype)
        return parts

    def bind_past(self, binding: DeviceBinding) -> None:
        """The same memory as input and output is what tells the kernel to append in place."""
        for name, tensor in self._past.items():
            binding.bind_input(f"past_key_values.{name}", tensor)
            binding.bind_output(f"present.{name}", tensor)

    def logits(self, count: int) -> DeviceTensor:
        """``(N, V)`` float32."""
        return DeviceTensor(self._logits, (count, self._model.vocab_size), _FP32)

    def alignment(self, num_tokens: int) -> tuple[DeviceTensor, DeviceTensor]:
        """``attention (A, S, P)`` and ``logprobs (S - 1)``, both float32."""
        num_heads, _, num_positions = self._attention.shape
        attention = DeviceTensor(self._attention.address, (num_heads, num_tokens, num_positions), _FP32)
        return attention, DeviceTensor(self._logprobs.address, (num_tokens - 1,), _FP32)

    def close(self) -> None:
        """Free everything of the card's. Nothing may be bound to it. Idempotent."""
        while self._allocated:
            self._device.free(self._allocated.pop())

    def _tensor(self, shape: tuple[int, ...], datatype: str) -> DeviceTensor:
        tensor = DeviceTensor(0, shape, KV_DATATYPES[datatype])
        return DeviceTensor(self._allocate(tensor.num_bytes), shape, KV_DATATYPES[datatype])

    def _allocate(self, num_bytes: int) -> int:
        address = self._device.allocate(max(num_bytes, 1))
        self._allocated.append(address)
        return address
