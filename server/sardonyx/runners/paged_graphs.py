"""The graphs of a language model over blocks, and the memory that their steps share.

Floor 3. Three graphs work on one device, in this order in each step: ``feed`` puts the tokens together, those from the
host and those that the step before has drawn; ``decoder`` computes; ``sampler`` draws.
"""

from dataclasses import dataclass

from sardonyx.core import RunnerLimits
from sardonyx.errors import ConfigError, EngineError
from sardonyx.repository.families import LanguageModel
from sardonyx.runners.paged_inputs import DECODER, FEED, METADATA, SAMPLER, StepLayout
from sardonyx.runtime.device import Device, DeviceBinding, DeviceSession, DeviceTensor, aligned
from sardonyx.runtime.dtypes import DATATYPES, KV_DATATYPES
from sardonyx.runtime.kv_cache import cache_names

_INT64, _FP32, _BOOL = DATATYPES["INT64"], DATATYPES["FP32"], DATATYPES["BOOL"]
MAX_ROWS = 256
"""Rows of a step that every version of the kernel takes."""


@dataclass(slots=True, frozen=True)
class PagedGraphs:
    """The open graphs of one model. Whoever opens them closes them, or the runner that takes them over."""

    model_name: str
    device: Device
    decoder: DeviceSession
    sampler: DeviceSession
    feed: DeviceSession

    def close(self) -> None:
        """Give back the sessions, then the device's stream and what is left on it."""
        for session in (self.decoder, self.sampler, self.feed):
            session.close()
        self.device.close()


def check_num_rows(num_rows: int) -> None:
    """Raise ConfigError where a step may have more rows than the kernel takes."""
    if num_rows > MAX_ROWS:
        raise ConfigError(f"is {num_rows}; steps over blocks have {MAX_ROWS} rows", field="max_num_seqs")


def check_graphs(graphs: PagedGraphs, model: LanguageModel, limits: RunnerLimits) -> None:
    """Raise ConfigError unless the graphs follow the contract of steps over blocks, in the manifest's sizes."""
    sides = cache_names(model.kv)
    expected = {
        "decoder": (
            {"input_ids", METADATA, *DECODER, *(f"past_key_values.{side}" for side in sides)},
            {"logits", *(f"present.{side}" for side in sides)},
        ),
        "sampler": ({"logits", *SAMPLER}, {"token_ids", "logprobs", "is_finite"}),
        "feed": ({*FEED, "token_ids"}, {"input_ids"}),
    }
    sessions = {"decoder": graphs.decoder, "sampler": graphs.sampler, "feed": graphs.feed}
    for role, (inputs, outputs) in expected.items():
        session = sessions[role]
        odd = sorted((inputs ^ session.inputs.keys()) | (outputs ^ session.outputs.keys()))
        if odd:
            raise ConfigError(f"is no {role} of steps over blocks: see {', '.join(odd[:4])}", field=f"graphs.{role}")
    kv, cache = model.kv, graphs.decoder.inputs[f"past_key_values.{sides[0]}"]
    if cache.datatype != KV_DATATYPES[kv.datatype] or cache.shape[1:] != (kv.block_size, kv.num_kv_heads, kv.head_size):
        raise ConfigError(f"says {cache.datatype.name} {cache.shape}, unlike the manifest", field="kv")
    if graphs.decoder.outputs["logits"].shape[-1] != model.vocab_size or limits.vocab_size != model.vocab_size:
        raise ConfigError("is not the vocabulary of manifest and limits", field="logits")
    if not 0 < limits.max_chunk_tokens <= limits.max_model_len <= model.max_model_len or limits.num_slots < 1:
        raise ConfigError(
            f"{limits.num_slots} sequences, {limits.max_chunk_tokens} tokens a chunk and {limits.max_model_len} "
            f"positions do not fit a model of {model.max_model_len}",
            field="max_model_len",
        )


class StepMemory:
    """What stays where it is on the device while the runner lives: cache, inputs of a step, logits and what is drawn.

    Args:
        graphs: that read and write it.
        model: the cache's layout.
        limits: the cache's size.
        input_bytes: of the largest step's inputs.
        max_tokens: T at most.
        max_rows: B at most, buckets included.
        max_logits: N at most.

    Raises:
        ConfigError: the device has not so much.
    """

    def __init__(
        self,
        graphs: PagedGraphs,
        model: LanguageModel,
        limits: RunnerLimits,
        *,
        input_bytes: int,
        max_tokens: int,
        max_rows: int,
        max_logits: int,
    ) -> None:
        self._device = graphs.device
        self._allocated: list[int] = []
        self._vocab_size = model.vocab_size
        self.max_rows = max_rows
        kv = model.kv
        shape = (limits.num_blocks, limits.block_size, kv.num_kv_heads, kv.head_size)
        try:
            self.cache = {name: self._tensor(shape, kv.datatype) for name in cache_names(kv)}
            self.inputs = self._allocate(input_bytes)
            self._input_ids = self._allocate(max_tokens * 8)
            self._logits = self._allocate(max_logits * model.vocab_size * 4)
            self.drawn = DrawnLayout(max_rows)
            self._drawn = self._allocate(self.drawn.num_bytes)
        except EngineError as error:
            self.close()
            reason = f"{limits.num_blocks:,} blocks of {limits.block_size} tokens do not fit: {error.message}"
            raise ConfigError(reason, field="kv_cache_bytes") from None

    @property
    def drawn_address(self) -> int:
        return self._drawn

    def input_ids(self, num_tokens: int) -> DeviceTensor:
        """``(T,)`` int64, what ``feed`` makes and ``decoder`` reads."""
        return DeviceTensor(self._input_ids, (num_tokens,), _INT64)

    def logits(self, num_rows: int) -> DeviceTensor:
        """``(N, V)`` float32; N is `max_logits` at most."""
        return DeviceTensor(self._logits, (num_rows, self._vocab_size), _FP32)

    def bind_cache(self, binding: DeviceBinding) -> None:
        """The same memory as input and output is what tells the kernel to append in place."""
        for name, tensor in self.cache.items():
            binding.bind_input(f"past_key_values.{name}", tensor)
            binding.bind_output(f"present.{name}", tensor)

    def bind_feed(self, binding: DeviceBinding, layout: StepLayout, num_tokens: int) -> None:
        for name in FEED:
            binding.bind_input(name, layout.tensor(name, self.inputs))
        binding.bind_input("token_ids", self.drawn.tensors(self._drawn, self.max_rows)["token_ids"])
        binding.bind_output("input_ids", self.input_ids(num_tokens))

    def bind_decoder(self, binding: DeviceBinding, layout: StepLayout, num_tokens: int, logits: DeviceTensor) -> None:
        binding.bind_input("input_ids", self.input_ids(num_tokens))
        for name in DECODER:
            binding.bind_input(name, layout.tensor(name, self.inputs))
        binding.bind_output("logits", logits)

    def bind_sampler(self, binding: DeviceBinding, layout: StepLayout, logits: DeviceTensor) -> None:
        """`logits` are the rows that the device draws from."""
        binding.bind_input("logits", logits)
        for name in SAMPLER:
            binding.bind_input(name, layout.tensor(name, self.inputs))
        for name, tensor in self.drawn.tensors(self._drawn, logits.shape[0]).items():
            binding.bind_output(name, tensor)

    def close(self) -> None:
        """Free everything. Nothing may be bound to it. Idempotent."""
        while self._allocated:
            self._device.free(self._allocated.pop())

    def _tensor(self, shape: tuple[int, ...], datatype: str) -> DeviceTensor:
        tensor = DeviceTensor(0, shape, KV_DATATYPES[datatype])
        return DeviceTensor(self._allocate(tensor.num_bytes), shape, KV_DATATYPES[datatype])

    def _allocate(self, num_bytes: int) -> int:
        address = self._device.allocate(num_bytes)
        self._allocated.append(address)
        return address


class DrawnLayout:
    """Where the sampler's outputs lie in the one stretch of memory that is copied back: N is `max_rows` at most."""

    def __init__(self, max_rows: int) -> None:
        self._logprobs = aligned(max_rows * 8)
        self._is_finite = self._logprobs + aligned(max_rows * 4)
        self.num_bytes = self._is_finite + aligned(max_rows)

    def tensors(self, base: int, num_rows: int) -> dict[str, DeviceTensor]:
        """By output, where the whole begins at `base`."""
        shape = (num_rows,)
        return {
            "token_ids": DeviceTensor(base, shape, _INT64),
            "logprobs": DeviceTensor(base + self._logprobs, shape, _FP32),
            "is_finite": DeviceTensor(base + self._is_finite, shape, _BOOL),
        }
