"""What the tests on a card share: a device to run on, models with a manifest, and a CPU oracle for each of them.

With ``SARDONYX_REHEARSAL=1`` the tests that need no kernel of CUDA's run without a card, over `tests.reference_device`:
that shows that the tests themselves are sound, and nothing about a card.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from tests.export.builders.arrays import ArrayCheckpoint
from tests.export.builders.test_decoder import CONFIG, arrays
from tests.reference_device import ReferenceDevice

from sardonyx.core import Request, RunnerLimits
from sardonyx.repository.families import KvLayout, LanguageModel
from sardonyx.runners.paged_decoder import PagedRunner
from sardonyx.runners.paged_graphs import PagedGraphs
from sardonyx.runners.paged_pass import PagedOptions
from sardonyx.runtime.device import Device, DeviceTensor
from sardonyx.runtime.device_cuda import open_cuda_device
from sardonyx.runtime.providers import num_gpus
from sardonyx.runtime.session import open_session
from sardonyx_export.builders.decoder import BuildOptions, build_decoder
from sardonyx_export.builders.feed import build_feed
from sardonyx_export.families.llm import read_spec
from sardonyx_export.kv_ranges import KvCacheDtype, KvRange
from sardonyx_export.stages.calibration import measure_ranges
from sardonyx_export.stages.paged_verify import Row, step_feeds

Floats = npt.NDArray[np.float32]

IS_REHEARSAL = bool(os.environ.get("SARDONYX_REHEARSAL"))
HAS_CARD = num_gpus() > 0

needs_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_CARD and not IS_REHEARSAL, reason="needs a card and onnxruntime-gpu"),
]
"""For tests that a rehearsal runs too."""
needs_card = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CARD, reason="needs a card and onnxruntime-gpu")]

TINY: dict[str, Any] = CONFIG | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "max_position_embeddings": 1024,
}
"""Heads of 64, two of four for keys and values: sizes that all of CUDA's kernels take."""
GROUPED: dict[str, Any] = TINY | {"hidden_size": 512, "num_attention_heads": 8}
"""Four heads to each of keys and values: the fewest that ONNX Runtime's XQA takes, which reads quantised blocks."""
SMOLLM2: dict[str, Any] = CONFIG | {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 1024,
}
"""SmolLM2-135M's, with random weights."""
LOGITS_GAIN = 3.0
"""Makes one token in most places clearly likelier than the next, as in trained models."""


def open_device() -> Device:
    """The first card, or what stands for it in a rehearsal."""
    return open_cuda_device(0) if HAS_CARD else ReferenceDevice()


def make_checkpoint(config: dict[str, Any]) -> ArrayCheckpoint:
    """Random weights of a Llama, whose final norm has the gain."""
    tensors = arrays(**config)
    tensors["model.embed_tokens.weight"] /= 4  # tied: logits are as large as the final norm makes them
    tensors["model.norm.weight"] *= np.float32(LOGITS_GAIN)
    return ArrayCheckpoint(config, tensors)


@dataclass(frozen=True)
class PagedModel:
    """The graphs of a model for cards."""

    paths: dict[str, Path]
    """By role."""
    llm: LanguageModel


def build_for_cards(
    checkpoint: ArrayCheckpoint, folder: Path, precision: Any, cache: KvCacheDtype | None = None
) -> PagedModel:
    """Write decoder, sampler and feed into a new folder; a quantised cache is calibrated on tokens drawn by chance."""
    folder.mkdir(parents=True)
    ranges: list[KvRange] = []
    if cache is not None:
        texts = [random_ids(checkpoint.config["vocab_size"], 1000 + seed, 150) for seed in range(4)]
        ranges = measure_ranges(checkpoint, read_spec(checkpoint.config), texts)
    options = BuildOptions(precision=precision, target="cuda", kv_cache_dtype=cache)
    report = build_decoder(checkpoint, folder, options, kv_ranges=ranges)
    paths = {"decoder": report.files[0], "sampler": report.sampler[0], "feed": build_feed(folder)[0]}
    return PagedModel(paths, _language_model(report.kv, checkpoint))


class Oracle:
    """The packed graph of the same weights on the CPU, activations in float32, one whole text at a time.

    ONNX Runtime for CUDA is a version behind the CPU's, and its GroupQueryAttention does not know how many tokens of a
    row are new. For a single text without a past it need not, so that input is taken off.

    Args:
        precision: of the weights: fp32, int8 or int4.
    """

    def __init__(self, checkpoint: ArrayCheckpoint, folder: Path, precision: Any) -> None:
        folder.mkdir(parents=True)
        report = build_decoder(checkpoint, folder, BuildOptions(precision=precision, activations="fp32"))
        path = report.files[0]
        graph = onnx.load(path, load_external_data=False)
        for node in graph.graph.node:
            if node.op_type == "GroupQueryAttention":
                place = list(node.input).index("query_seqlens")
                assert place == len(node.input) - 1
                node.input.pop()
                while not node.input[-1]:
                    node.input.pop()
        (unused,) = (value for value in graph.graph.input if value.name == "query_seqlens")
        graph.graph.input.remove(unused)
        path.write_bytes(graph.SerializeToString())
        self._session = open_session(path, model_name="oracle")
        self._kv = report.kv

    def logits(self, text: Sequence[int], first: int = 0) -> Floats:
        """After each token of a text from the `first` on, (length - first, V)."""
        length, kv = len(text), self._kv
        places = np.arange(length, dtype=np.int64)
        feeds: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.array(text, np.int64),
            "row_gather": places[None],
            "row_scatter": places,
            "seqlens_k": np.array([length - 1], np.int32),
            "total_sequence_length": np.array(length, np.int32),
            "logits_index": places[first:],
        }
        cache = np.zeros((1, kv.num_kv_heads, length, kv.head_size), np.float32)
        feeds |= {name: cache for name in self._session.inputs if name.startswith("past_key_values.")}
        return self._session.run(feeds, ["logits"])["logits"]

    def close(self) -> None:
        self._session.close()


def _language_model(kv: KvLayout, checkpoint: ArrayCheckpoint) -> LanguageModel:
    sizes = checkpoint.config
    return LanguageModel(vocab_size=sizes["vocab_size"], max_model_len=sizes["max_position_embeddings"], kv=kv)


def open_runner(
    model: PagedModel,
    device: Device,
    *,
    num_seqs: int,
    max_batch_tokens: int,
    max_graphs: int = 0,
    num_blocks: int | None = None,
) -> PagedRunner:
    """A runner that closes the device with itself; its steps are captured in this thread."""
    sessions = {role: device.open(path, model_name="test") for role, path in model.paths.items()}
    graphs = PagedGraphs("test", device, sessions["decoder"], sessions["sampler"], sessions["feed"])
    kv, length = model.llm.kv, model.llm.max_model_len
    assert kv.block_size is not None
    each = -(-length // kv.block_size)
    limits = RunnerLimits(
        num_slots=num_seqs,
        max_model_len=length,
        max_chunk_tokens=min(max_batch_tokens, length),
        vocab_size=model.llm.vocab_size,
        block_size=kv.block_size,
        num_blocks=num_blocks or 1 + num_seqs * each,
    )
    options = PagedOptions(max_batch_tokens=max_batch_tokens, max_graphs=max_graphs)
    runner = PagedRunner(graphs, model.llm, limits, options)
    runner.capture()
    return runner


class DecoderOnDevice:
    """The graph ``decoder`` alone, run eagerly: what its logits are, whatever is drawn from them."""

    def __init__(self, model: PagedModel, device: Device, num_blocks: int) -> None:
        self._device = device
        self._block_size = model.llm.kv.block_size or 0
        self._vocab_size = model.llm.vocab_size
        self._session = device.open(model.paths["decoder"], model_name="test")
        self._caches = {
            name: self._new((num_blocks, *spec.shape[1:]), spec.datatype)
            for name, spec in self._session.inputs.items()
            if name.startswith("past_key_values.")
        }

    def run(self, rows: Sequence[Row]) -> Floats:
        """Logits after every token of a step, packed, (T, V)."""
        num_tokens = sum(len(ids) for ids, _, _ in rows)
        feeds = step_feeds(rows, self._block_size, range(num_tokens))
        binding, device, taken = self._session.new_binding(), self._device, []
        for name, tensor in self._caches.items():
            binding.bind_input(name, tensor)
            binding.bind_output(name.replace("past_key_values", "present"), tensor)
        for name, values in feeds.items():
            if name == "attention_metadata":
                binding.bind_input(name, values)
                continue
            tensor = self._new(values.shape, self._session.inputs[name].datatype)
            taken.append(tensor)
            device.write(tensor.address, values.view(np.uint8).reshape(-1))
            binding.bind_input(name, tensor)
        logits = self._new((num_tokens, self._vocab_size), self._session.outputs["logits"].datatype)
        binding.bind_output("logits", logits)
        binding.run()
        found = np.empty(logits.shape, np.float32)
        device.read(logits.address, found.view(np.uint8).reshape(-1))
        device.mark().wait()
        for tensor in [*taken, logits]:
            device.free(tensor.address)
        return found

    def close(self) -> None:
        self._session.close()
        self._device.close()

    def _new(self, shape: Any, datatype: Any) -> DeviceTensor:
        tensor = DeviceTensor(0, tuple(shape), datatype)
        return DeviceTensor(self._device.allocate(tensor.num_bytes), tuple(shape), datatype)


def random_ids(vocab_size: int, seed: int, count: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, vocab_size, count).tolist()
    return ids


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Where two completions part; ``None``: nowhere."""
    places = range(min(len(first), len(second)))
    parted = next((place for place in places if first[place] != second[place]), None)
    return parted if parted is not None or len(first) == len(second) else len(places)


def assert_same_but_for_near_ties(
    oracle: Oracle, request: Request, first: Sequence[int], second: Sequence[int], *, margin: float
) -> bool:
    """Two completions are equal, or part where the oracle finds both tokens almost equally likely.

    From there on they are completions of different texts, and say nothing about each other.

    Args:
        margin: of logits: what 16 bits may decide either way.

    Returns:
        They are equal.
    """
    assert len(first) == len(second) == request.max_tokens
    place = first_difference(first, second)
    if place is None:
        return True
    text = [*request.prompt_ids, *first[:place]]
    logits = oracle.logits(text, len(text) - 1)[0]
    best = float(logits.max())
    for token in (first[place], second[place]):
        assert best - logits[token] <= margin, (
            f"request {request.id} parts at token {place}: {first[place]} (logit {logits[first[place]]:.4f}) and "
            f"{second[place]} ({logits[second[place]]:.4f}); the oracle's best is {int(logits.argmax())} ({best:.4f}), "
            f"and 16 bits decide within {margin} only"
        )
    return False
