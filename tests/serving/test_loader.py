"""The whole floor on a real graph: repository to text."""

import asyncio
import logging
import math
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from tests.tiny_models import make_language_model
from tests.tiny_tensors import config_text, identity, truncated, write_model

from sardonyx.core import FinishReason, SamplingParams
from sardonyx.errors import ConfigError, ModelNotReady
from sardonyx.metrics import Metrics
from sardonyx.repository.index import DUPLICATE
from sardonyx.repository.layout import Repository
from sardonyx.serving.loader import ModelLoader, build_registry
from sardonyx.serving.memory import KvBudget
from sardonyx.serving.registry import Registry
from sardonyx.serving.served import InferCall, LoadedModel
from sardonyx.serving.text import GenerationOptions, TextModel
from sardonyx.serving.text_tensors import TextTensorModel
from sardonyx.settings import Settings
from sardonyx.tensors import Tensor

GREEDY = SamplingParams(temperature=0.0)
SLOT_BYTES = 2 * 2 * 2 * 16 * 4 * (256 + 64 - 1)
"""Of the tiny model with chunks of 64: sides, layers, heads, head size, bytes, C."""


def settings(root: Path, **options: object) -> Settings:
    defaults = {"repository": root, "num_threads": 1, "max_num_seqs": 4, "max_chunk_tokens": 64}
    return Settings(**(defaults | options))  # type: ignore[arg-type]


def make_loader(root: Path, metrics: Metrics, budget_bytes: int = 1 << 30) -> ModelLoader:
    return ModelLoader([Repository(root)], settings(root), metrics, KvBudget(budget_bytes))


def load_text(loader: ModelLoader, name: str) -> TextModel:
    model = loader.load(name).newest
    assert isinstance(model, TextTensorModel)
    return model.text


def run_registry(root: Path, test: Callable[[Registry], Awaitable[None]], **options: object) -> Metrics:
    metrics = Metrics("test")

    async def main() -> None:
        registry = build_registry(settings(root, **options), metrics)
        await registry.start()
        try:
            await test(registry)
        finally:
            await registry.close()

    asyncio.run(main())
    return metrics


async def complete(model: TextModel, prompt: str | list[int], **options: object) -> str:
    options = {"max_tokens": 12, "sampling": GREEDY} | options
    generation = await model.start([prompt], GenerationOptions(**options), request_id=f"{prompt}{id(options)}")  # type: ignore[arg-type]
    (choice,) = await generation.collect()
    return choice.text


def num_slots(metrics: Metrics, name: str = "tiny") -> int:
    ((_, blocks),) = [labels for family, labels, _ in metrics.model(name).rows() if family == "cache_config_info"]
    return int(blocks)


def test_a_model_of_the_repository_completes_text_the_same_alone_and_in_company(tmp_path: Path) -> None:
    make_language_model(tmp_path)

    async def test(registry: Registry) -> None:
        model = registry.resolve(None)
        prompts = ["the cat", "that was", "you and they", "x" * 70, "this"]
        alone = [await complete(model, prompt) for prompt in prompts]
        together = await asyncio.gather(*(complete(model, prompt) for prompt in prompts * 3))
        assert together == alone * 3
        assert len(set(alone)) == len(alone)
        assert all(alone)

    metrics = run_registry(tmp_path, test)
    assert sum(value for name, _, value in metrics.model("tiny").rows() if name == "request_success") == 20


def test_scoring_a_text_gives_what_generating_it_gave(tmp_path: Path) -> None:
    make_language_model(tmp_path)

    async def test(registry: Registry) -> None:
        model = registry.resolve("tiny")
        ids = await model.tokenize("that was the")
        sampling = SamplingParams(temperature=0.0, num_logprobs=1)
        options = GenerationOptions(max_tokens=20, sampling=sampling, ignore_eos=True)
        (written,) = await (await model.start([ids], options, request_id="write")).collect()
        options = GenerationOptions(max_tokens=1, sampling=sampling, num_prompt_logprobs=1)
        scoring = await model.start([ids + written.token_ids], options, request_id="score")
        (extra,) = await scoring.collect()
        scores = scoring.prompts[0].logprobs
        assert scores is not None
        assert len(scores) + len(extra.tokens) == len(ids) + 20 + 1
        for score, token in zip(scores[len(ids) :], written.tokens, strict=True):
            assert score is not None
            assert score.token_id == token.token_id == score.top[0][0]
            assert math.isclose(score.logprob, token.logprob, abs_tol=1e-3)
            assert score.logprob == score.top[0][3]

    run_registry(tmp_path, test)


def test_a_seed_gives_the_same_text_again_and_each_choice_its_own(tmp_path: Path) -> None:
    make_language_model(tmp_path)

    async def test(registry: Registry) -> None:
        options = GenerationOptions(max_tokens=12, n=3, sampling=SamplingParams(seed=5))
        texts = []
        for request_id in ("a", "b"):
            generation = await registry.resolve(None).start(["the"], options, request_id=request_id)
            texts.append([choice.text for choice in await generation.collect()])
        assert texts[0] == texts[1]
        assert len(set(texts[0])) == 3

    run_registry(tmp_path, test)


def test_a_prompt_that_came_before_is_taken_from_the_cache(tmp_path: Path) -> None:
    make_language_model(tmp_path)

    async def test(registry: Registry) -> None:
        model = registry.resolve(None)
        prompt = [70 + n % 20 for n in range(150)]
        usages = []
        for request_id in ("a", "b"):
            options = GenerationOptions(max_tokens=5, sampling=GREEDY)
            generation = await model.start([prompt], options, request_id=request_id)
            usages.append(((await generation.collect())[0].text, generation.usage.cached_tokens))
        assert usages[0] == (usages[1][0], 0)
        assert usages[1][1] >= 140

    run_registry(tmp_path, test)


def test_chats_end_and_stream(tmp_path: Path) -> None:
    make_language_model(tmp_path)

    async def test(registry: Registry) -> None:
        options = GenerationOptions(max_tokens=8, sampling=GREEDY)
        messages = [{"role": "user", "content": "hi"}]
        generation = await registry.resolve(None).start_chat(messages, options, request_id="r")
        chunks = [chunk async for chunk in generation]
        assert chunks[-1].finish_reason in {FinishReason.LENGTH, FinishReason.STOP}
        assert sum(len(chunk.token_ids) for chunk in chunks) == generation.usage.completion_tokens

    run_registry(tmp_path, test)


def test_slots_are_as_many_as_the_budget_holds_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_language_model(tmp_path)

    async def test() -> None:
        metrics = Metrics("test")
        loader = make_loader(tmp_path, metrics, budget_bytes=3 * SLOT_BYTES + 5)
        model = await asyncio.to_thread(load_text, loader, "tiny")
        assert num_slots(metrics) == 3
        texts = await asyncio.gather(*(complete(model, prompt) for prompt in ("the", "cat", "was", "not", "this")))
        assert all(texts)
        await model.close()
        loader.close()

    with caplog.at_level(logging.INFO, logger="sardonyx.serving"):
        asyncio.run(test())
    assert "KV cache: 3 slots (4 were wanted) of 319 tokens (256 + a chunk of 64 - 1)" in caplog.text


def test_weights_that_would_have_to_be_swapped_are_refused(tmp_path: Path) -> None:
    folder = make_language_model(tmp_path)
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(1 << 42)  # of zeros that take no room on the disk
    with pytest.raises(
        ConfigError, match=r"needs 4,194,30\d MiB on this machine \(weights .* are free; unload another"
    ):
        make_loader(tmp_path, Metrics("test")).load("tiny")


def test_a_closed_model_gives_its_memory_back(tmp_path: Path) -> None:
    make_language_model(tmp_path, "a")
    make_language_model(tmp_path, "b")

    async def test() -> None:
        metrics = Metrics("test")
        loader = make_loader(tmp_path, metrics, budget_bytes=4 * SLOT_BYTES)
        first = await asyncio.to_thread(load_text, loader, "a")
        with pytest.raises(ConfigError, match=r"one sequence of 256 tokens needs .* lower max_model_len"):
            await asyncio.to_thread(loader.load, "b")
        again = await asyncio.to_thread(load_text, loader, "a")
        assert num_slots(metrics, "a") == 4
        await first.close()
        await again.close()
        await (await asyncio.to_thread(load_text, loader, "b")).close()
        loader.close()

    asyncio.run(test())


def test_parameters_of_the_model_win(tmp_path: Path) -> None:
    make_language_model(tmp_path, parameters={"max_num_seqs": "2", "max_model_len": "100", "kv_cache_bytes": "1MiB"})

    async def test() -> None:
        metrics = Metrics("test")
        loader = make_loader(tmp_path, metrics, budget_bytes=0)  # kv_cache_bytes needs no budget
        model = await asyncio.to_thread(load_text, loader, "tiny")
        assert (model.max_model_len, num_slots(metrics)) == (100, 2)
        await model.close()
        loader.close()

    asyncio.run(test())


def test_an_added_version_is_served_after_a_reload(tmp_path: Path) -> None:
    make_language_model(tmp_path)

    async def test(registry: Registry) -> None:
        assert registry.resolve(None).version == 1
        make_language_model(tmp_path / "other", "tiny", version=2).rename(tmp_path / "tiny" / "2")
        assert list((await registry.load("tiny")).versions) == [2]
        (status,) = registry.list()
        assert (status.version, status.state, status.max_model_len) == (2, "READY", 256)
        assert status.created > 0

    # Beside the repository, not in it.
    (tmp_path / "other").mkdir()
    run_registry(tmp_path, test)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json.*missing"),
        (lambda folder: (folder / "model.onnx.data").write_bytes(b""), "model.onnx.data.*has 0 bytes"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json.*missing required field"),
        (lambda folder: (folder.parent / "config.pbtxt").write_text("parameters { key: 'x' }"), "not a parameter"),
    ],
)
def test_a_broken_model_is_refused_and_names_the_file(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(make_language_model(tmp_path))
    loader = make_loader(tmp_path, Metrics("test"))
    with pytest.raises(ConfigError, match=message):
        loader.load("tiny")
    loader.close()


# Tensor models and ensembles


def run_started(root: Path, names: list[str], test: Callable[[Registry], Awaitable[None]], **options: object) -> None:
    """As `run_registry`, with some models loaded."""

    async def main() -> None:
        registry = build_registry(settings(root, **options), Metrics("test"))
        await registry.start(names)
        try:
            await test(registry)
        finally:
            await registry.close()

    asyncio.run(main())


async def identity_of(registry: Registry, name: str, version: int | None = None) -> list[float]:
    call = InferCall(inputs=[Tensor("INPUT0", "FP32", np.array([[1, 2]], np.float32))])
    (output,) = (await registry.served(name, version).infer(call)).outputs
    return output.array[0].tolist()  # type: ignore[no-any-return]


def versions_of(loader: ModelLoader, name: str) -> list[int]:
    """Loads, and frees what was loaded."""
    model = loader.load(name)
    asyncio.run(close(model))
    return list(model.versions)


async def close(model: LoadedModel) -> None:
    for version in model.versions.values():
        await version.close()


def ensemble_config(*parts: str) -> str:
    """Parts in a row, each of one input and one output."""
    steps = []
    for number, part in enumerate(parts):
        source = "IN" if number == 0 else f"t{number}"
        target = "OUT" if number == len(parts) - 1 else f"t{number + 1}"
        steps.append(
            f'step {{ model_name: "{part}" model_version: -1 input_map {{ key: "INPUT0" value: "{source}" }} '
            f'output_map {{ key: "OUTPUT0" value: "{target}" }} }}'
        )
    ports = "\n".join(
        f'{field} {{ name: "{name}" data_type: TYPE_FP32 dims: [ -1 ] }}'
        for field, name in (("input", "IN"), ("output", "OUT"))
    )
    return f'platform: "ensemble"\nmax_batch_size: 8\n{ports}\nensemble_scheduling {{ {" ".join(steps)} }}'


def write_ensemble(root: Path, name: str, *parts: str) -> None:
    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(ensemble_config(*parts))


@pytest.mark.parametrize(
    ("policy", "versions"),
    [
        ("", [4]),
        ("version_policy { latest { num_versions: 2 } }", [3, 4]),
        ("version_policy { all { } }", [1, 3, 4]),
        ("version_policy { specific { versions: [ 1, 2, 3 ] } }", [1, 3]),
    ],
)
def test_the_versions_of_the_policy_are_loaded(tmp_path: Path, policy: str, versions: list[int]) -> None:
    for version in (1, 3, 4):
        write_model(tmp_path, "a", identity(), version=version, config=config_text(rest=policy))
    (tmp_path / "a/05").mkdir()
    (tmp_path / "a/latest").mkdir()

    async def test(registry: Registry) -> None:
        assert registry.versions("a") == versions
        for version in versions:
            assert await identity_of(registry, "a", version) == [1, 2]

    run_started(tmp_path, ["a"], test)


@pytest.mark.parametrize("broken", [1, 2])
def test_a_model_is_loaded_with_all_its_versions_or_not_at_all(tmp_path: Path, broken: int) -> None:
    for version in (1, 2):
        model = truncated(identity()) if version == broken else identity()
        config = config_text(rest="version_policy { all { } }")
        write_model(tmp_path, "a", model, version=version, config=config)
    loader = make_loader(tmp_path, Metrics("test"))
    num_threads = threading.active_count()
    with pytest.raises(ConfigError):
        loader.load("a")
    assert threading.active_count() == num_threads
    write_model(tmp_path, "a", identity(), version=broken)
    assert versions_of(loader, "a") == [1, 2]
    loader.close()


def test_a_model_of_two_repositories_is_served_from_neither(tmp_path: Path) -> None:
    for repository in ("one", "two"):
        write_model(tmp_path / repository, "a", identity(), config=config_text())
    write_model(tmp_path / "two", "b", identity(), config=config_text())

    async def test(registry: Registry) -> None:
        assert registry.startup_failures() == {"a": DUPLICATE}
        assert await identity_of(registry, "b") == [1, 2]
        shutil.rmtree(tmp_path / "one/a")
        await registry.load("a", only_if_changed=True)
        assert await identity_of(registry, "a") == [1, 2]

    run_started(tmp_path / "one", ["a", "b"], test, more_repositories=(tmp_path / "two",))


def test_an_ensemble_is_loaded_with_its_parts_and_runs_them(tmp_path: Path) -> None:
    write_model(tmp_path, "a", identity(), config=config_text())
    write_ensemble(tmp_path, "inner", "a", "a")
    (tmp_path / "inner/config.pbtxt").write_text(
        ensemble_config("a", "a").replace('"IN"', '"INPUT0"').replace('"OUT"', '"OUTPUT0"')
    )
    write_ensemble(tmp_path, "outer", "inner", "inner")

    async def test(registry: Registry) -> None:
        call = InferCall(inputs=[Tensor("IN", "FP32", np.array([[1, 2]], np.float32))])
        (output,) = (await registry.served("outer").infer(call)).outputs
        assert output.array.tolist() == [[1, 2]]
        assert sorted(status.name for status in registry.list() if status.state == "READY") == ["a", "inner", "outer"]
        await registry.unload("a")
        reasons = [row.reason for row in registry.version_index()]
        assert reasons == [
            "unloaded",
            "model a, on which it depends, was unloaded",
            "model inner, on which it depends, was unloaded",
        ]

    run_started(tmp_path, ["outer"], test)


def test_ensembles_in_a_circle_are_refused_by_their_names(tmp_path: Path) -> None:
    write_ensemble(tmp_path, "one", "two")
    write_ensemble(tmp_path, "two", "one")

    async def test(registry: Registry) -> None:
        with pytest.raises(ModelNotReady, match="circular dependency between ensembles: one -> two -> one"):
            await registry.load("one")

    run_started(tmp_path, [], test)
