"""Encoder models of a repository, served by everything that serves them: loader, steps, ONNX Runtime."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from tests.tiny_encoders import make_encoder_model, make_tokenizer

from sardonyx.metrics import Metrics
from sardonyx.repository.layout import Repository
from sardonyx.serving.encoder_loader import EncoderLoader
from sardonyx.serving.task_tensors import TaskTensorModel
from sardonyx.settings import Settings
from sardonyx.statistics import InferenceStatistics

Test = Callable[[TaskTensorModel], Awaitable[None]]


def load(root: Path, name: str = "tiny", version: int = 1, **options: Any) -> tuple[EncoderLoader, TaskTensorModel]:
    settings = Settings(**({"repository": root, "num_threads": 2} | options))
    loader = EncoderLoader(settings, Metrics("test"))
    return loader, loader.load(Repository(root).entry(name), version)


def run(
    root: Path,
    test: Test,
    *,
    settings: dict[str, Any] | None = None,
    spoil: Callable[[Path], None] = lambda _: None,
    **options: Any,
) -> InferenceStatistics:
    """Make a tiny model and run a test on it. Afterwards nothing may be admitted or in flight.

    Args:
        settings: of the server.
        spoil: what is done to the graph's file before it is loaded; its size must stay.
        options: of `make_encoder_model`.
    """
    spoil(make_encoder_model(root, **options) / "model.onnx")

    async def main() -> InferenceStatistics:
        loader, model = load(root, **(settings or {}))
        try:
            await test(model)
            assert_idle(model)
            return model.statistics
        finally:
            await model.close()
            loader.close()

    return asyncio.run(main())


def assert_idle(model: TaskTensorModel) -> None:
    """Nothing is admitted or pending."""
    assert (model.statistics.num_pending, model.calls.num_active) == (0, 0)
    admission = model.calls._admission
    assert (admission.num_sequences, admission.num_tokens) == (0, 0)


def table(folder: Path) -> npt.NDArray[np.float32]:
    """The token vectors of a tiny graph."""
    (found,) = [each for each in onnx.load(folder / "model.onnx").graph.initializer if each.name == "table"]
    return numpy_helper.to_array(found)


def embedding_of(folder: Path, ids: list[int]) -> npt.NDArray[np.float32]:
    """What the tiny embedding model makes of a row of which all these tokens are pooled."""
    mean = table(folder)[ids].mean(axis=0)
    return mean / np.linalg.norm(mean)


def ids_of(text: str, pair: str | None = None, *, add_special_tokens: bool = True) -> list[int]:
    return make_tokenizer().encode(text, pair, add_special_tokens=add_special_tokens).ids
