"""Language models on a card: logits and tokens of the CPU's packed graph, whatever the steps look like.

Oracle: `tests.gpu.card.Oracle`, the same weights at the same precision on the CPU, computing in float32. What is left
between the two is what 16 bits round, so the tolerances hold for CUDA's kernels and say nothing about quantisation.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from tests.gpu.card import (
    GROUPED,
    HAS_CARD,
    SMOLLM2,
    TINY,
    DecoderOnDevice,
    Oracle,
    PagedModel,
    assert_same_but_for_near_ties,
    build_for_cards,
    make_checkpoint,
    needs_device,
    open_device,
    open_runner,
    random_ids,
)
from tests.reference_device import ReferenceDevice
from tests.runners.test_paged_decoder import run, tokens_of

from sardonyx.core import FinishReason, Request, SamplingParams
from sardonyx.runtime.device import Device
from sardonyx_export.kv_ranges import KvCacheDtype
from sardonyx_export.stages.paged_verify import Row
from sardonyx_export.stages.verify import Tolerance, compare_logits

pytestmark = needs_device

PRECISIONS = ("fp16", "bf16", "int8", "int4")
WEIGHTS = {"fp16": "fp32", "bf16": "fp32", "int8": "int8", "int4": "int4"}
"""Of the oracle."""
TOLERANCES = {
    "fp16": Tolerance(mean_kl=2e-4, top1_agreement=0.97, max_relative_error=0.02),
    "bf16": Tolerance(mean_kl=1e-2, top1_agreement=0.85, max_relative_error=0.15),
    "int8": Tolerance(mean_kl=2e-3, top1_agreement=0.95, max_relative_error=0.03),
    "int4": Tolerance(mean_kl=1e-3, top1_agreement=0.95, max_relative_error=0.03),
}
"""Against the oracle at the same precision; int8 and int4 have scales of 16 bits as well. Five times what the graphs in
numpy are off by: mean KL of fp16 2.5e-5, bf16 1.7e-3, int8 4.4e-4, int4 1.3e-4 (SmolLM2's shape)."""
MARGINS = {"fp16": 0.15, "bf16": 0.8, "int8": 0.4, "int4": 0.3}
"""Of logits that reach from about -12 to 12: what 16 bits may decide either way."""
GREEDY = SamplingParams(temperature=0.0)
SHAPES = {"tiny": TINY, "grouped": GROUPED, "smollm2": SMOLLM2}
CACHES: tuple[KvCacheDtype, ...] = ("int8", "fp8")
CACHE_TOLERANCES = {
    "int8": Tolerance(mean_kl=1e-2, top1_agreement=0.88, max_relative_error=0.3),
    "fp8": Tolerance(mean_kl=5e-2, top1_agreement=0.8, max_relative_error=0.4),
}
"""Against the oracle, weights in fp16. At least four times what the graphs in numpy are off by: mean KL of int8 1.4e-3,
of fp8 1.1e-2 (both shapes)."""
NUMPY_TOLERANCES = {
    "int8": Tolerance(mean_kl=1e-3, top1_agreement=0.96),
    "fp8": Tolerance(mean_kl=5e-3, top1_agreement=0.92),
}
"""Against the same graph in numpy, whose codes differ where 16 bits fall on a border between two. A guess."""
CACHE_MARGINS = {"int8": 0.6, "fp8": 1.6}


class Bench:
    """A model of some shape and precision, and its oracle."""

    def __init__(self, folder: Path, shape: str, precision: str, cache: KvCacheDtype | None) -> None:
        checkpoint = make_checkpoint(SHAPES[shape])
        self.precision = precision
        self.vocab_size: int = SHAPES[shape]["vocab_size"]
        self.model: PagedModel = build_for_cards(checkpoint, folder / "cuda", precision, cache)
        self.oracle = Oracle(checkpoint, folder / "cpu", WEIGHTS[precision])
        self.margin = MARGINS[precision] if cache is None else CACHE_MARGINS[cache]

    def requests(self, lengths: list[int], max_tokens: int = 16, **fields: Any) -> list[Request]:
        made = {"sampling": GREEDY} | fields
        return [
            Request(id=str(index), prompt_ids=random_ids(self.vocab_size, index, length), max_tokens=max_tokens, **made)
            for index, length in enumerate(lengths)
        ]

    def complete(
        self, requests: list[Request], *, max_graphs: int = 64, is_overlapped: bool = True, arrivals: Any = None
    ) -> tuple[dict[str, list[int]], Any, int]:
        """Completions by request, the policy's counts, and how many steps were launched ahead."""
        runner = open_runner(self.model, open_device(), num_seqs=8, max_batch_tokens=256, max_graphs=max_graphs)
        try:
            events, stats, num_ahead = run(
                runner, requests, arrivals, is_overlapped=is_overlapped, max_batch_tokens=256, min_prefill_tokens=16
            )
        finally:
            runner.close()
        return {each: tokens_of(found) for each, found in events.items()}, stats, num_ahead

    def assert_same(self, requests: list[Request], first: Any, second: Any) -> None:
        same = [
            assert_same_but_for_near_ties(
                self.oracle, request, first[request.id], second[request.id], margin=self.margin
            )
            for request in requests
        ]
        assert sum(same) >= len(same) / 2, f"only {sum(same)} of {len(same)} completions are equal to their ends"


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    @cache
    def make(shape: str, precision: str, kv_cache: KvCacheDtype | None = None) -> Bench:
        bench = Bench(tmp_path_factory.mktemp(f"{shape}-{precision}"), shape, precision, kv_cache)
        made.append(bench)
        return bench

    made: list[Bench] = []
    yield make
    for bench in made:
        bench.oracle.close()


def shapes_and_precisions() -> list[Any]:
    needs_time = pytest.mark.skipif(not HAS_CARD, reason="takes minutes in a rehearsal")
    return [
        pytest.param(shape, precision, id=f"{shape}-{precision}", marks=() if shape == "tiny" else needs_time)
        for shape in ("tiny", "smollm2")
        for precision in PRECISIONS
    ]


LENGTHS = [3, 40, 255, 256, 300, 130]
"""Of prompts: within a block, at its border and behind it."""


def texts_of(bench: Bench) -> list[list[int]]:
    return [random_ids(bench.vocab_size, 100 + index, length) for index, length in enumerate(LENGTHS)]


def logits_on(device: Device, bench: Bench) -> list[Any]:
    """After every token of each text."""
    texts = texts_of(bench)
    decoder = DecoderOnDevice(bench.model, device, num_blocks=1 + 2 * len(texts))
    blocks = [[2 * index + 2, 2 * index + 1] for index in range(len(texts))]
    parts: list[list[Any]] = [[] for _ in texts]
    # Chunks of different lengths share steps; then each text's last tokens come one by one, as in decodes.
    cuts = [[0, len(text) * (index + 1) // 9, len(text) - 2, len(text) - 1] for index, text in enumerate(texts)]
    try:
        for place in range(4):
            spans = [(cut[place], [*cut, len(text)][place + 1]) for cut, text in zip(cuts, texts, strict=True)]
            chosen = [(i, begin, end) for i, (begin, end) in enumerate(spans) if begin < end]
            rows: list[Row] = [
                (texts[i][begin:end], begin, blocks[i][: -(-end // (bench.model.llm.kv.block_size or 1))])
                for i, begin, end in chosen
            ]
            logits = decoder.run(rows)
            ends = np.cumsum([end - begin for _, begin, end in chosen])[:-1]
            for (i, _, _), piece in zip(chosen, np.split(logits, ends), strict=True):
                parts[i].append(piece)
    finally:
        decoder.close()
    measured = [np.concatenate(pieces) for pieces in parts]
    assert all(np.isfinite(each).all() for each in measured), "logits are not finite"
    return measured


@pytest.mark.parametrize(("shape", "precision"), shapes_and_precisions())
def test_logits_are_the_cpu_s(benches: Any, shape: str, precision: str) -> None:
    bench: Bench = benches(shape, precision)
    expected = [bench.oracle.logits(text) for text in texts_of(bench)]
    measured = logits_on(open_device(), bench)
    print(compare_logits(expected, measured, TOLERANCES[precision], "the CPU's packed graph", kind=precision))


@pytest.mark.parametrize("shape", ["tiny", "grouped"])
@pytest.mark.parametrize("kv_cache", CACHES)
def test_logits_of_a_quantised_cache_are_near_the_cpu_s_and_numpy_s(
    benches: Any, shape: str, kv_cache: KvCacheDtype
) -> None:
    bench: Bench = benches(shape, "fp16", kv_cache)
    expected = [bench.oracle.logits(text) for text in texts_of(bench)]
    measured = logits_on(open_device(), bench)
    print(compare_logits(expected, measured, CACHE_TOLERANCES[kv_cache], "the CPU's packed graph", kind=kv_cache))
    rehearsed = logits_on(ReferenceDevice(), bench)
    print(compare_logits(rehearsed, measured, NUMPY_TOLERANCES[kv_cache], "the same in numpy", kind=kv_cache))


@pytest.mark.parametrize("shape", ["tiny", "grouped"])
@pytest.mark.parametrize("kv_cache", CACHES)
def test_captured_steps_over_a_quantised_cache_draw_the_tokens_of_eager_ones(
    benches: Any, shape: str, kv_cache: KvCacheDtype
) -> None:
    bench: Bench = benches(shape, "fp16", kv_cache)
    requests = bench.requests(LENGTHS)
    captured, _, _ = bench.complete(requests, max_graphs=64)
    eager, _, _ = bench.complete(requests, max_graphs=0)
    bench.assert_same(requests, captured, eager)


@pytest.mark.parametrize(("shape", "precision"), shapes_and_precisions())
def test_greedy_tokens_are_the_cpu_s(benches: Any, shape: str, precision: str) -> None:
    """Each token is the one that the oracle finds likeliest after those before it, but for near ties."""
    bench: Bench = benches(shape, precision)
    requests = bench.requests(LENGTHS)
    completions, _, num_ahead = bench.complete(requests, arrivals=[0, 0, 1, 2, 2, 5])
    assert num_ahead > 0, "no step was launched ahead"
    num_likeliest = 0
    for request in requests:
        tokens = completions[request.id]
        assert len(tokens) == request.max_tokens
        logits = bench.oracle.logits([*request.prompt_ids, *tokens[:-1]], len(request.prompt_ids) - 1)
        behind = logits.max(axis=1) - logits[np.arange(len(tokens)), tokens]
        assert (behind <= bench.margin).all(), (
            f"request {request.id}: token {int(behind.argmax())} has a logit {behind.max():.3f} behind the oracle's "
            f"best; 16 bits decide within {bench.margin}"
        )
        num_likeliest += int((behind == 0).sum())
    num_tokens = sum(request.max_tokens for request in requests)
    assert num_likeliest >= TOLERANCES[precision].top1_agreement * num_tokens


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_captured_steps_draw_the_tokens_of_eager_ones(benches: Any, precision: str) -> None:
    bench: Bench = benches("tiny", precision)
    requests = bench.requests(LENGTHS)
    captured, _, _ = bench.complete(requests, max_graphs=64)
    eager, _, _ = bench.complete(requests, max_graphs=0)
    bench.assert_same(requests, captured, eager)


@pytest.mark.parametrize("max_graphs", [0, 64])
def test_steps_launched_ahead_draw_the_tokens_of_steps_one_by_one(benches: Any, max_graphs: int) -> None:
    bench: Bench = benches("tiny", "fp16")
    requests = bench.requests(LENGTHS)
    ahead, _, num_ahead = bench.complete(requests, max_graphs=max_graphs)
    alone, _, none_ahead = bench.complete(requests, max_graphs=max_graphs, is_overlapped=False)
    assert num_ahead > 10
    assert none_ahead == 0
    bench.assert_same(requests, ahead, alone)


def test_tokens_drawn_by_chance_are_the_same_however_steps_are_run(benches: Any) -> None:
    """But for draws that fall on a border between two tokens: a prompt's chunks differ, and so does their rounding."""
    bench: Bench = benches("tiny", "fp16")
    requests = [
        msgspec.structs.replace(request, sampling=SamplingParams(temperature=0.7, top_p=0.9, seed=index))
        for index, request in enumerate(bench.requests(LENGTHS))
    ]
    expected, _, _ = bench.complete(requests, max_graphs=0, is_overlapped=False)
    for max_graphs, is_overlapped in ((0, True), (64, False), (64, True)):
        found, _, _ = bench.complete(requests, max_graphs=max_graphs, is_overlapped=is_overlapped)
        num_same = sum(found[each] == tokens for each, tokens in expected.items())
        assert num_same >= 4, f"{num_same} of {len(requests)} completions are as steps one by one draw them"


def test_prefix_from_the_cache_gives_what_computing_it_again_gives(benches: Any) -> None:
    bench: Bench = benches("tiny", "fp16")
    prefix = random_ids(bench.vocab_size, 77, 2 * 256 + 40)
    requests = [
        Request(
            id=str(index),
            prompt_ids=[*prefix, *random_ids(bench.vocab_size, index, 5 + index)],
            max_tokens=16,
            sampling=GREEDY,
        )
        for index in range(4)
    ]
    together, stats, _ = bench.complete(requests, arrivals=[0, 30, 30, 34])
    assert stats.prefix_hit_tokens >= 3 * 2 * 256, f"only {stats.prefix_hit_tokens} tokens were found in the cache"
    afresh: dict[str, list[int]] = {}
    for request in requests:
        found, lonely, _ = bench.complete([request])
        assert lonely.prefix_hit_tokens == 0
        afresh |= found
    bench.assert_same(requests, together, afresh)


def test_company_changes_no_token(benches: Any) -> None:
    bench: Bench = benches("tiny", "fp16")
    requests = bench.requests([5, 17, 90, 200, 11, 64, 257, 30])
    together, _, _ = bench.complete(requests, arrivals=[0, 0, 0, 1, 3, 3, 4, 9])
    lonely: dict[str, list[int]] = {}
    for request in requests:
        lonely |= bench.complete([request])[0]
    bench.assert_same(requests, together, lonely)


def test_a_row_that_is_no_number_fails_alone(benches: Any, tmp_path: Path) -> None:
    bench: Bench = benches("tiny", "fp16")
    broken = 7
    poisoned = poison(bench.model, tmp_path, broken, SHAPES["tiny"]["hidden_size"])
    healthy = [
        Request(
            id=str(index),
            prompt_ids=[token for token in random_ids(bench.vocab_size, index, 60) if token != broken],
            max_tokens=6,
            sampling=GREEDY,
        )
        for index in range(3)
    ]
    sick = Request(id="sick", prompt_ids=[1, 2, broken, 3], max_tokens=6, sampling=GREEDY)
    for max_graphs in (0, 64):
        runner = open_runner(poisoned, open_device(), num_seqs=8, max_batch_tokens=256, max_graphs=max_graphs)
        try:
            events, _, _ = run(runner, [*healthy, sick], max_batch_tokens=256)
        finally:
            runner.close()
        assert events["sick"][-1].finish_reason is FinishReason.ERROR, "the row of NaNs got a token"
        assert "not finite" in (events["sick"][-1].error or "")
        found = {request.id: tokens_of(events[request.id]) for request in healthy}
        intact = {
            request.id: tokens
            for request in healthy
            if broken not in (tokens := bench.complete([request], max_graphs=max_graphs)[0][request.id])
        }
        assert intact, "all healthy completions hold the poisoned token: choose another one"
        bench.assert_same([request for request in healthy if request.id in intact], found, intact)


def poison(model: PagedModel, folder: Path, token_id: int, hidden_size: int) -> PagedModel:
    """A copy of an fp16 model in which a token's embedding is no number.

    The head is tied to the embedding, and a row of NaNs there would reach everybody's logits: it keeps its own values.
    """
    path = model.paths["decoder"]
    graph = onnx.load(path)
    (weight,) = (each for each in graph.graph.initializer if each.name == "embedding.weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    assert values.shape[1] == hidden_size
    values[token_id] = np.nan
    poisoned = onnx.numpy_helper.from_array(values, "embedding.poisoned")
    graph.graph.initializer.append(poisoned)
    (gather,) = (node for node in graph.graph.node if node.op_type == "Gather" and node.input[0] == "embedding.weight")
    gather.input[0] = "embedding.poisoned"
    target = folder / "decoder.onnx"
    onnx.save_model(graph, target, save_as_external_data=True, location="decoder.onnx.data", size_threshold=1 << 14)
    return PagedModel(model.paths | {"decoder": target}, model.llm)
