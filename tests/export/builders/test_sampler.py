"""The sampling graph against the host's sampler, on the CPU."""

import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sardonyx.core import SamplingParams
from sardonyx.runners.logprobs import token_logprobs
from sardonyx.runners.sampler import MIN_TEMPERATURE, Sampler
from sardonyx.runtime.session import Session, open_session
from sardonyx_export.builders.sampler import MAX_CANDIDATES, SAMPLER_FILE, build_sampler

Floats = npt.NDArray[np.float32]
SMALL, LARGE = 300, 3000
ON_BORDER = 1e-5
"""Shares of the mass within which float32's sums may fall on the other side."""


@cache
def sampler(vocab_size: int) -> Session:
    with TemporaryDirectory() as folder:
        build_sampler(vocab_size, Path(folder))
        return open_session(Path(folder) / SAMPLER_FILE, model_name="sampler")


def run(logits: Floats, params: list[SamplingParams], uniform: list[float]) -> dict[str, npt.NDArray[Any]]:
    feeds = {
        "logits": logits,
        "uniform": np.array(uniform, np.float32),
        "top_k": np.array([row.top_k for row in params], np.int64),
    }
    for name in ("temperature", "top_p", "min_p"):
        feeds[name] = np.array([getattr(row, name) for row in params], np.float32)
    return {name: values.copy() for name, values in sampler(logits.shape[1]).run(feeds).items()}


def host(row: Floats, params: SamplingParams, position: float) -> int:
    """What the server draws on the host."""
    winner = int(row.argmax())
    if params.temperature < MIN_TEMPERATURE:
        return winner
    return Sampler(len(row))._draw(row, float(row[winner]), params, position)


def agrees(row: Floats, params: SamplingParams, position: float, token: int) -> bool:
    """The host draws this token here, or within rounding of here."""
    near = (position, max(position - ON_BORDER, 0.0), min(position + ON_BORDER, math.nextafter(1.0, 0.0)))
    return token in {host(row, params, each) for each in near}


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-6, 0.05, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 40, 299, 300, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-4]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
UNIFORM = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.731, 0.95, float(np.nextafter(np.float32(1), np.float32(0)))])


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(PARAMS, UNIFORM), min_size=1, max_size=4),
    st.sampled_from([0.5, 3.0, 12.0]),
    st.booleans(),
)
def test_rows_get_the_host_s_tokens(
    seed: int, rows: list[tuple[SamplingParams, float]], spread: float, is_coarse: bool
) -> None:
    logits = (np.random.default_rng(seed).standard_normal((len(rows), SMALL)) * spread).astype(np.float32)
    if is_coarse:  # many tokens are equally likely
        logits = np.round(logits)
    params = [row for row, _ in rows]
    result = run(logits, params, [position for _, position in rows])
    assert result["is_finite"].all()
    for i, (row, position) in enumerate(rows):
        token = int(result["token_ids"][i])
        # A nucleus whose border is itself within rounding may have a token more or less.
        borders = (row.top_p, row.top_p * (1 - ON_BORDER), min(1.0, row.top_p * (1 + ON_BORDER)))
        assert any(agrees(logits[i], msgspec.structs.replace(row, top_p=each), position, token) for each in borders)
        logprob = token_logprobs(logits[i], token, 0).logprob
        assert result["logprobs"][i] == pytest.approx(logprob, abs=1e-4)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.8, top_k=40),
        SamplingParams(temperature=1.3, top_p=0.9),
        SamplingParams(temperature=1.0, min_p=0.05),
        SamplingParams(temperature=1.0, min_p=0.02, top_k=30, top_p=0.8),
    ],
)
def test_tokens_come_in_the_proportions_of_the_host(params: SamplingParams) -> None:
    row = (np.random.default_rng(3).standard_normal(LARGE) * 2.5).astype(np.float32)
    positions = [(i + 0.5) / 400 for i in range(400)]
    result = run(np.repeat(row[None], 400, axis=0), [params] * 400, positions)
    expected = [host(row, params, position) for position in positions]
    assert (result["token_ids"] != expected).sum() <= 1  # one that lies on a border
    assert len(set(expected)) > 5


def test_the_lowest_of_equal_tokens_wins() -> None:
    logits = np.zeros((3, LARGE), np.float32)
    logits[1, [2999, 700, 256]] = 4
    logits[2, [513, 512]] = 4
    result = run(logits, [SamplingParams(temperature=0.0)] * 3, [0.9, 0.9, 0.9])
    assert result["token_ids"].tolist() == [0, 256, 512]


def test_equal_tokens_fill_a_top_k_from_the_lowest_id() -> None:
    logits = np.full((4, LARGE), -5, np.float32)
    logits[:, ::300] = 1  # ten tokens, in as many blocks
    positions = [0.1, 0.4, 0.6, 0.9]
    result = run(logits, [SamplingParams(temperature=1.0, top_k=4)] * 4, positions)
    assert result["token_ids"].tolist() == [0, 300, 600, 900]


def test_a_nucleus_is_cut_at_the_candidates() -> None:
    logits = np.zeros((2, LARGE), np.float32)
    params = [SamplingParams(temperature=1.0, top_p=0.99), SamplingParams(temperature=1.0)]
    result = run(logits, params, [0.9999, 0.9999])
    assert result["token_ids"][0] == MAX_CANDIDATES - 1
    assert result["token_ids"][1] == LARGE - 1


def test_neighbours_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal((6, SMALL)) * 4).astype(np.float32)
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p)
        for t, k, p in ((0.0, 0, 1.0), (1.0, 5, 1.0), (0.7, 0, 0.9), (2.0, 0, 1.0), (1.0, 7, 0.5), (0.3, 0, 0.2))
    ]
    positions = rng.random(6).tolist()
    together = run(logits, params, positions)
    for i in range(6):
        alone = run(logits[i : i + 1], params[i : i + 1], positions[i : i + 1])
        assert alone["token_ids"][0] == together["token_ids"][i]
        assert alone["logprobs"][0] == pytest.approx(together["logprobs"][i], abs=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_fails_alone(value: float) -> None:
    logits = np.random.default_rng(6).standard_normal((3, SMALL)).astype(np.float32)
    logits[1, 17] = value
    result = run(logits, [SamplingParams(temperature=1.0, top_k=3)] * 3, [0.3, 0.3, 0.3])
    assert result["is_finite"].tolist() == [True, False, True]
    assert 0 <= result["token_ids"][1] < SMALL
    assert np.isfinite(result["logprobs"][[0, 2]]).all()


def test_nothing_but_impossible_tokens_is_not_finite() -> None:
    logits = np.full((1, SMALL), -np.inf, np.float32)
    assert not run(logits, [SamplingParams(temperature=1.0)], [0.5])["is_finite"][0]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = np.full((5, SMALL), -np.inf, np.float32)
    logits[:, [3, 299]] = 0
    positions = [0.0, 0.3, 0.49, 0.51, 1 - 2**-24]
    result = run(logits, [SamplingParams(temperature=1.0, top_k=10)] * 5, positions)
    assert result["token_ids"].tolist() == [3, 3, 3, 299, 299]


def test_all_operators_are_onnx_s_own_in_versions_that_cuda_has(tmp_path: Path) -> None:
    (path,) = build_sampler(SMALL, tmp_path)
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} == {""}
    assert next(opset.version for opset in model.opset_import if not opset.domain) == 18
    onnx.checker.check_model(model, full_check=True)
    assert list(tmp_path.iterdir()) == [path]
