"""Heads as graphs of their own, against numpy and against the same head in a packed graph."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from tests.export.builders.arrays import ArrayCheckpoint

from sardonyx.runtime.session import open_session
from sardonyx_export.builders.head import build_head
from sardonyx_export.encoder_spec import Activation, Dense, EncoderNames, EncoderSpec, Head, Norm, Normalise, Pooling
from sardonyx_export.stages.encoder_reference import EncodedRow, reference_outputs

Array = npt.NDArray[np.float32]
HIDDEN_SIZE = 12
LENGTHS = (1, 7, 4)
PROMPTS = (0, 5, 1)
POOLINGS: tuple[Pooling, ...] = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
GENERATOR = np.random.default_rng(4)
VECTORS = -np.abs(GENERATOR.standard_normal((sum(LENGTHS), HIDDEN_SIZE), np.float32))
"""Below 0 all over, so that a padding of 0 would be a row's maximum."""


@pytest.mark.parametrize("pools_prompt", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_equals_the_reference_whatever_the_padding_holds(
    tmp_path: Path, pooling: Pooling, pools_prompt: bool
) -> None:
    head = Head(poolings=(pooling,), pools_prompt=pools_prompt)
    for padding in (0.0, 1e6, -1e6):
        folder = tmp_path / str(padding)
        np.testing.assert_allclose(run(folder, head, padding), expected(head), atol=1e-6, rtol=1e-6)


def test_poolings_lie_side_by_side_in_their_order(tmp_path: Path) -> None:
    head = Head(poolings=("max", "cls", "mean", "lasttoken", "cls"))
    actual = run(tmp_path, head)
    assert actual.shape == (len(LENGTHS), 5 * HIDDEN_SIZE)
    np.testing.assert_allclose(actual, expected(head), atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "tanh", "sigmoid", "identity"])
def test_steps_equal_the_reference(tmp_path: Path, activation: Activation) -> None:
    def normal(*shape: int) -> Array:
        return GENERATOR.standard_normal(shape, np.float32)

    steps = (
        Dense(normal(9, 2 * HIDDEN_SIZE), normal(9), activation),
        Norm(normal(9), normal(9), 1e-5),
        Dense(normal(6, 9), None),
        Norm(normal(6), None, 1e-3),
        Normalise(),
    )
    head = Head(poolings=("mean", "max"), steps=steps)
    actual = run(tmp_path, head)
    np.testing.assert_allclose(actual, expected(head), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(actual, axis=1), 1, atol=1e-6)


def test_a_vector_of_zeros_is_not_divided_by_its_length(tmp_path: Path) -> None:
    head = Head(poolings=("cls",), steps=(Dense(np.zeros((4, HIDDEN_SIZE), np.float32), None), Normalise()))
    np.testing.assert_array_equal(run(tmp_path, head), np.zeros((len(LENGTHS), 4)))


def test_a_row_that_is_all_prompt_gives_its_last_token(tmp_path: Path) -> None:
    head = Head(poolings=("cls", "mean", "max"), pools_prompt=False)
    actual = run(tmp_path, head, prompts=(1, 99, 4))
    last = VECTORS[np.cumsum(LENGTHS) - 1]
    np.testing.assert_allclose(actual, np.concatenate([last] * 3, axis=1), atol=1e-6)


def test_files_and_ports_are_those_of_the_manifest(tmp_path: Path) -> None:
    files = build_head(Head(poolings=("cls",), pools_prompt=False), 5, tmp_path)
    assert [file.name for file in files] == ["head.onnx", "head.onnx.data"]
    assert all(file.is_file() for file in files)
    graph = onnx.load(files[0]).graph
    onnx.checker.check_model(onnx.load(files[0]))
    assert [port.name for port in graph.input] == ["token_embeddings", "seqlens", "num_prompt_tokens"]
    assert [port.name for port in graph.output] == ["embeddings"]
    plain = build_head(Head(poolings=("mean",)), 5, tmp_path, "plain.onnx")
    assert [port.name for port in onnx.load(plain[0]).graph.input] == ["token_embeddings", "seqlens"]


def run(folder: Path, head: Head, padding: float = 0.0, prompts: tuple[int, ...] = PROMPTS) -> Array:
    """The head's graph on `VECTORS`, in rows of `LENGTHS`."""
    folder.mkdir(exist_ok=True)
    session = open_session(build_head(head, HIDDEN_SIZE, folder)[0], model_name="head")
    tokens = np.full((len(LENGTHS), max(LENGTHS), HIDDEN_SIZE), padding, np.float32)
    tokens[np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]] = VECTORS
    tensors: dict[str, npt.NDArray[Any]] = {
        "token_embeddings": tokens,
        "seqlens": np.array(LENGTHS, np.int32),
        "num_prompt_tokens": np.array(prompts, np.int32),
    }
    values = session.run({name: tensors[name] for name in session.inputs})["embeddings"].copy()
    session.close()
    assert values.shape == (len(LENGTHS), head.width(HIDDEN_SIZE))
    return values


def expected(head: Head) -> Array:
    """The reference's head on `VECTORS`: an encoder without layers, whose word table they are."""
    names = EncoderNames(
        layer="{i}",
        query_key_value=(),
        attention_output="",
        attention_norm="",
        up="",
        down="",
        ffn_norm="",
        word_embeddings="words",
        embeddings_norm=None,
    )
    spec = EncoderSpec(
        vocab_size=len(VECTORS),
        hidden_size=HIDDEN_SIZE,
        ffn_size=1,
        num_heads=1,
        head_size=HIDDEN_SIZE,
        max_model_len=max(LENGTHS),
        layers=(),
        names=names,
        norm_epsilon=1e-5,
    )
    ends = np.cumsum(LENGTHS)
    rows = [
        EncodedRow(token_ids=list(range(end - length, end)), num_prompt_tokens=num_prompt_tokens)
        for end, length, num_prompt_tokens in zip(ends, LENGTHS, PROMPTS, strict=True)
    ]
    return reference_outputs(ArrayCheckpoint({}, {"words.weight": VECTORS}), spec, head, rows)
