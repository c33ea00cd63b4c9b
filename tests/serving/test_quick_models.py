"""Which models run where their requests are read, and that nobody sees a difference."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from tests import tiny_tensors
from tests.serving.tensor_serving import HOLD, pair, run, tensor_model, values, write_add_sub

from sardonyx.serving import quick_models
from sardonyx.serving.registry import Registry


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this machine is quick just now is not what is tested."""
    monkeypatch.setattr(quick_models, "MAX_RUN_S", 10.0)


def is_quick(root: Path, model: Any, config: str | None = None) -> bool:
    tiny_tensors.write_model(root, "m", model, config=config)
    found: list[bool] = []

    async def test(registry: Registry) -> None:
        found.append(tensor_model(registry)._engine.is_quick)

    run(root, test)
    return found[0]


def test_a_small_graph_of_fixed_shapes_is_quick(tmp_path: Path) -> None:
    assert is_quick(tmp_path, tiny_tensors.add_sub())


def test_a_slow_run_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_models, "MAX_RUN_S", 0.0)
    assert not is_quick(tmp_path, tiny_tensors.add_sub())


@pytest.mark.parametrize(
    "model",
    [
        tiny_tensors.slow(),
        tiny_tensors.identity("FP32"),
        tiny_tensors.add_sub("BYTES"),
        tiny_tensors.add_sub(shape=(4096,)),
    ],
    ids=["a loop", "open shapes", "strings", "many bytes"],
)
def test_what_a_caller_can_make_long_is_not(tmp_path: Path, model: Any) -> None:
    assert not is_quick(tmp_path, model)


async def add(registry: Registry, value: int) -> Any:
    return values(await tensor_model(registry).infer(pair([[value] * 16], [[1] * 16])))["OUTPUT0"]


def test_a_quick_model_answers_in_the_thread_that_asks(tmp_path: Path) -> None:
    tiny_tensors.write_model(tmp_path, "m", tiny_tensors.add_sub())

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        runner = model._engine._runner  # type: ignore[attr-defined]  # who runs it is what is tested
        threads: list[int] = []
        execute = runner.execute

        def note(batch: Any, instance: int) -> Any:
            threads.append(threading.get_ident())
            return execute(batch, instance)

        runner.execute = note
        assert await add(registry, 2) == [[3] * 16]
        assert threads == [threading.get_ident()]

    run(tmp_path, test)


def test_calls_of_one_turn_of_the_event_loop_come_to_share_batches(tmp_path: Path) -> None:
    tiny_tensors.write_model(tmp_path, "m", tiny_tensors.add_sub())

    async def test(registry: Registry) -> None:
        for _ in range(4):
            answers = await asyncio.gather(*(add(registry, value) for value in range(8)))
            assert answers == [[[value + 1] * 16] for value in range(8)]
        statistics = tensor_model(registry).statistics
        assert statistics.inference_count == 32
        assert statistics.execution_count < 32
        assert max(statistics.batches) > 1

    run(tmp_path, test)


def test_a_batch_that_waits_for_company_is_sent_when_it_is_full(tmp_path: Path) -> None:
    write_add_sub(tmp_path, rest=HOLD, shape=(16,))

    async def test(registry: Registry) -> None:
        assert tensor_model(registry)._engine.is_quick
        await asyncio.gather(*(add(registry, value) for value in range(8)))
        assert tensor_model(registry).statistics.execution_count == 1

    run(tmp_path, test)
