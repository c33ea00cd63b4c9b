"""Tensor models of a repository, served by everything that serves them: registry, loader, instances, ONNX Runtime."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from tests import tiny_tensors
from tests.serving.fakes import until

from sardonyx.metrics import Metrics
from sardonyx.serving.ensemble import EnsembleModel
from sardonyx.serving.loader import build_registry
from sardonyx.serving.registry import Registry
from sardonyx.serving.served import InferAnswer, InferCall
from sardonyx.serving.tensors import TensorModel
from sardonyx.settings import Settings
from sardonyx.tensors import SequenceControl, Tensor

HOLD = "dynamic_batching { preferred_batch_size: [ 8 ] max_queue_delay_microseconds: 600000000 }"
"""Requests wait until there are eight rows of them."""
ONE_INSTANCE = "instance_group [ { kind: KIND_CPU count: 1 } ]"

Test = Callable[[Registry], Awaitable[None]]


def run(root: Path, test: Test, **options: Any) -> Metrics:
    """Run a test on a registry over `root`. Afterwards nothing may be admitted or in flight."""
    settings = Settings(**({"repository": root, "num_threads": 1} | options))
    metrics = Metrics("test")

    async def main() -> None:
        registry = build_registry(settings, metrics)
        await registry.start()
        try:
            await test(registry)
            models = [each for model in registry.ready_models() for each in model.versions.values()]
            for model in models:
                assert_idle(model)
        finally:
            await registry.close()

    asyncio.run(main())
    return metrics


def assert_idle(model: Any) -> None:
    """Nothing is admitted, pending or waiting."""
    assert model.statistics.num_pending == 0
    if isinstance(model, TensorModel):
        assert model.num_active == 0
        assert (model._admission.num_sequences, model._admission.num_tokens) == (0, 0)


def tensor_model(registry: Registry, name: str = "m", version: int | None = None) -> TensorModel:
    model = registry.served(name, version)
    assert isinstance(model, TensorModel)
    return model


def ensemble_model(registry: Registry, name: str = "e") -> EnsembleModel:
    model = registry.served(name)
    assert isinstance(model, EnsembleModel)
    return model


def tensor(name: str, values: Any, datatype: str = "INT32") -> Tensor:
    """BYTES from texts or bytes."""
    if datatype == "BYTES":
        array = np.array(values, object)
        flat = array.reshape(-1)
        flat[:] = [value.encode() if isinstance(value, str) else value for value in flat]
        return Tensor(name, datatype, array)
    dtype = np.dtype(tiny_tensors.DATATYPES[datatype].array)
    return Tensor(name, datatype, np.ascontiguousarray(np.array(values, dtype)))


def call(*inputs: Tensor, outputs: list[str] | None = None, **options: Any) -> InferCall:
    return InferCall(inputs=list(inputs), outputs=outputs or [], **options)


def pair(first: Any = ((1,),), second: Any = ((2,),), datatype: str = "INT32", **options: Any) -> InferCall:
    """A call of `tiny_tensors.add_sub`."""
    return call(tensor("INPUT0", first, datatype), tensor("INPUT1", second, datatype), **options)


def one(values: Any = ((1,),), datatype: str = "INT32", name: str = "INPUT0", **options: Any) -> InferCall:
    """A call with one input."""
    return call(tensor(name, values, datatype), **options)


def of_sequence(values: Any, sequence_id: int | str, *, start: bool = False, end: bool = False, **options: Any):
    control = SequenceControl(id=sequence_id, is_start=start, is_end=end)
    return one(values, sequence=control, **options)


def values(answer: InferAnswer) -> dict[str, Any]:
    """Outputs as nested lists, by name in their order."""
    return {each.name: each.array.tolist() for each in answer.outputs}


async def waiting(model: TensorModel, count: int) -> None:
    """Until so many requests wait in the queue."""
    await until(lambda: model._engine.stats().num_waiting == count)  # type: ignore[attr-defined]


async def running(model: TensorModel, count: int = 1) -> None:
    """Until so many requests are being computed."""
    await until(lambda: model._engine.stats().num_running == count)  # type: ignore[attr-defined]


def write_add_sub(
    root: Path, name: str = "m", *, datatype: str = "INT32", rest: str = "", max_batch_size: int = 8, shape=(1,)
):
    """`tiny_tensors.add_sub` with a config."""
    return tiny_tensors.write_model(
        root,
        name,
        tiny_tensors.add_sub(datatype, shape=shape, is_batched=max_batch_size > 0),
        config=tiny_tensors.config_text(
            max_batch_size=max_batch_size,
            inputs=[(f"INPUT{n}", datatype, shape) for n in range(2)],
            outputs=[(f"OUTPUT{n}", datatype, shape) for n in range(2)],
            rest=rest,
        ),
    )


def write_identity(
    root: Path,
    name: str = "m",
    *,
    datatype: str = "INT32",
    rest: str = "",
    max_batch_size: int = 8,
    shape: tuple[int, ...] = (-1,),
    files: dict[str, str | bytes] | None = None,
):
    """`tiny_tensors.identity` with a config."""
    return tiny_tensors.write_model(
        root,
        name,
        tiny_tensors.identity(datatype, shape=shape, is_batched=max_batch_size > 0),
        config=tiny_tensors.config_text(
            max_batch_size=max_batch_size,
            inputs=[("INPUT0", datatype, shape)],
            outputs=[("OUTPUT0", datatype, shape)],
            rest=rest,
        ),
        files=files,
    )


def write_slow(root: Path, name: str = "m", *, rest: str = ONE_INSTANCE):
    """`tiny_tensors.slow` on one instance: a request of 100,000 holds it for about a second."""
    return tiny_tensors.write_model(
        root,
        name,
        tiny_tensors.slow(),
        config=tiny_tensors.config_text(
            inputs=[("INPUT", "INT64", (1,))], outputs=[("OUTPUT", "INT64", (1,))], rest=rest
        ),
    )


def turns(count: int) -> InferCall:
    """A call of `tiny_tensors.slow`."""
    return one([[count]], "INT64", "INPUT")
