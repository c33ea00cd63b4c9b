"""Linear layers through ONNX Runtime, against numpy."""

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from tests.export.builders.arrays import ArrayCheckpoint

from sardonyx_export.builders.graph import GraphWriter
from sardonyx_export.builders.linear import Linears
from sardonyx_export.builders.weights import WeightWriter

Array = npt.NDArray[np.float32]
NUM_ROWS, NUM_COLUMNS = 48, 96


def run(
    folder: Path, x: Array, weights: dict[str, Array], *, bits: int, is_exact: bool, bias: Array | None = None
) -> tuple[Array, Array]:
    """``x`` times the stacked weights, by ONNX Runtime and by numpy with the weights that the graph holds."""
    tensors: dict[str, Array] = dict(weights)
    if bias is not None:
        tensors["bias"] = bias
    num_rows, num_columns = sum(map(len, weights.values())), x.shape[1]
    with GraphWriter(folder) as graph:
        graph.input("x", np.float32, ["T", num_columns])
        graph.output("y", np.float32, ["T", num_rows])
        writer = WeightWriter(graph, ArrayCheckpoint({}, tensors), 32)
        matrix = writer.matrix("w", list(weights), num_rows, num_columns, bits)
        bias_name = writer.vector(["bias"], num_rows) if bias is not None else ""
        Linears(graph, 32, has_exact_activations=is_exact).apply("x", matrix, bias=bias_name, output="y")
        model, _ = graph.save("linear")
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    # The weights as the graph has them, read out by one-hot rows: what is left are the activations.
    held = session.run(None, {"x": np.eye(num_columns, dtype=np.float32)})[0].T
    if bias is not None:
        held -= bias[:, None]
    (actual,) = session.run(None, {"x": x})
    return actual, x @ held.T + (0 if bias is None else bias)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("bits", "is_exact", "tolerance"),
    [(32, True, 3e-5), (4, True, 1e-4), (8, True, 5e-3), (4, False, 0.3), (8, False, 0.3), (7, False, 0.6)],
)
def test_a_layer_multiplies_and_adds_its_bias(
    tmp_path: Path, bits: int, is_exact: bool, tolerance: float, has_bias: bool
) -> None:
    weights = {"a": normal(0, 16, NUM_COLUMNS), "b": normal(1, NUM_ROWS - 16, NUM_COLUMNS)}
    bias = normal(2, NUM_ROWS) if has_bias else None
    actual, expected = run(tmp_path, normal(3, 5, NUM_COLUMNS), weights, bits=bits, is_exact=is_exact, bias=bias)
    assert np.abs(actual - expected).max() < tolerance


def test_two_passes_lose_a_hundredth_of_what_one_loses(tmp_path: Path) -> None:
    x, weights = normal(3, 16, 256), {"w": normal(0, 64, 256)}
    errors = []
    for is_exact in (False, True):
        folder = tmp_path / str(is_exact)
        folder.mkdir()
        actual, expected = run(folder, x, weights, bits=8, is_exact=is_exact)
        errors.append(np.sqrt(((actual - expected) ** 2).mean()))
    assert errors[1] < errors[0] / 100


@pytest.mark.parametrize("bits", [4, 8])
def test_a_width_that_is_no_multiple_of_the_block_is_filled_up(tmp_path: Path, bits: int) -> None:
    actual, expected = run(tmp_path, normal(3, 4, 75), {"w": normal(0, 20, 75)}, bits=bits, is_exact=bits == 4)
    assert np.abs(actual - expected).max() < (1e-4 if bits == 4 else 0.3)


def test_offsets_and_plain_blocks_share_a_matrix(tmp_path: Path) -> None:
    affine = gguf.GGMLQuantizationType.Q4_1
    raw = gguf.quantize(normal(0, 16, NUM_COLUMNS) + 1, affine)
    kept, plain = gguf.dequantize(raw, affine), normal(1, 8, NUM_COLUMNS)
    x = normal(2, 5, NUM_COLUMNS)
    with GraphWriter(tmp_path) as graph:
        graph.input("x", np.float32, ["T", NUM_COLUMNS])
        graph.output("y", np.float32, ["T", 24])
        writer = WeightWriter(graph, ArrayCheckpoint({}, {"kept": ("Q4_1", raw, kept), "plain": plain}), 32)
        matrix = writer.matrix("w", ["kept", "plain"], 24, NUM_COLUMNS, 4, scale=0.5)
        Linears(graph, 32, has_exact_activations=True).apply("x", matrix, output="y")
        model, _ = graph.save("linear")
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"x": x})
    np.testing.assert_allclose(actual[:, :16], x @ kept.T * 0.5, rtol=0, atol=1e-4)
    relative = np.abs(actual[:, 16:] - x @ plain.T * 0.5).max() / np.abs(x @ plain.T).max()
    assert 0 < relative < 0.1  # re-quantised, and not shifted by the others' offsets


def row_session(folder: Path, tensors: dict[str, Array]) -> ort.InferenceSession:
    """A layer of 7 bits over the stacked tensors."""
    num_rows, num_columns = sum(map(len, tensors.values())), next(iter(tensors.values())).shape[1]
    with GraphWriter(folder) as graph:
        graph.input("x", np.float32, ["T", num_columns])
        graph.output("y", np.float32, ["T", num_rows])
        writer = WeightWriter(graph, ArrayCheckpoint({}, dict(tensors)), 32)
        matrix = writer.matrix("w", list(tensors), num_rows, num_columns, 7, scale=0.5)
        Linears(graph, 32, has_exact_activations=False).apply("x", matrix, output="y")
        model, _ = graph.save("linear")
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"])


def test_rows_are_rounded_by_a_scale_of_their_own(tmp_path: Path) -> None:
    tensors = {"a": normal(0, 40, 576), "b": normal(1, 24, 576) * 100}
    x = normal(2, 9, 576) * np.logspace(-20, 10, 9, dtype=np.float32)[:, None]
    (actual,) = row_session(tmp_path, tensors).run(None, {"x": x})
    expected = x @ np.concatenate(list(tensors.values())).T * 0.5
    for part in (slice(0, 40), slice(40, 64)):
        error = np.linalg.norm(actual[:, part] - expected[:, part], axis=1)
        assert (error < 0.03 * np.linalg.norm(expected[:, part], axis=1)).all()


def test_a_row_is_the_same_alone_and_in_a_batch(tmp_path: Path) -> None:
    session = row_session(tmp_path, {"w": normal(0, 200, 576)})
    x = normal(1, 130, 576) * np.logspace(-3, 3, 130, dtype=np.float32)[:, None]
    (together,) = session.run(None, {"x": x})
    for size in (1, 3, 8):
        alone = [session.run(None, {"x": x[start : start + size]})[0] for start in range(0, len(x), size)]
        np.testing.assert_array_equal(np.concatenate(alone), together)


@pytest.mark.parametrize("num_columns", [75, 576])
def test_rows_of_zeros_and_weights_of_zero_give_zeros(tmp_path: Path, num_columns: int) -> None:
    session = row_session(tmp_path, {"w": normal(0, 20, num_columns), "none": np.zeros((2, num_columns), np.float32)})
    x = normal(1, 5, num_columns)
    x[[1, 4]] = 0
    (actual,) = session.run(None, {"x": x})
    assert not actual[[1, 4]].any()
    assert not actual[:, 20:].any()
    assert np.isfinite(actual).all()
    assert actual[[0, 2, 3], :20].all()


def test_extreme_operands_do_not_saturate(tmp_path: Path) -> None:
    """8-bit weights would, in kernels that add products in 16 bits."""
    (actual,) = row_session(tmp_path, {"w": np.ones((16, 64), np.float32)}).run(
        None, {"x": np.ones((4, 64), np.float32)}
    )
    np.testing.assert_allclose(actual, 32, rtol=1e-6)


def shifted(folder: Path, x: Array, weights: Array, shift: float, *, bits: int) -> tuple[Array, Array]:
    """``(x + shift) @ weights.T`` by ONNX Runtime, and by numpy with the sums that the writer gave."""
    with GraphWriter(folder) as graph:
        graph.input("x", np.float32, ["T", x.shape[1]])
        graph.output("w", np.float32, ["T", len(weights)])
        matrix, sums = WeightWriter(graph, ArrayCheckpoint({}, {"w": weights}), 32).channels(
            "w", ["w"], *weights.shape, bits
        )
        Linears(graph, 32, has_exact_activations=False).apply_shifted("x", shift, matrix)
        model, _ = graph.save("linear")
    (actual,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return actual, x @ weights.T + np.float32(shift) * sums


def test_rows_with_a_lower_bound_lose_half_as_much_to_rounding(tmp_path: Path) -> None:
    weights = np.sign(normal(0, 64, 576))  # 7 bits hold them exactly: what is left is the rounding of the rows.
    x = np.maximum(normal(1, 32, 576), -0.17)
    errors = []
    for name, shift in (("symmetric", None), ("finer", 0.17)):
        folder = tmp_path / name
        folder.mkdir()
        if shift is None:
            (actual,) = row_session(folder, {"w": weights}).run(None, {"x": x})
            actual, expected = 2 * actual, x @ weights.T
        else:
            actual, expected = shifted(folder, x, weights, shift, bits=7)
        errors.append(np.sqrt(np.mean((actual - expected) ** 2)))
    assert errors[1] < 0.6 * errors[0]


def test_rows_of_zeros_give_zeros_where_nothing_is_shifted(tmp_path: Path) -> None:
    x = np.maximum(normal(1, 5, 96), 0)
    x[[1, 4]] = 0
    actual, expected = shifted(tmp_path, x, normal(0, 20, 96), 0.0, bits=8)
    assert not actual[[1, 4]].any()
    np.testing.assert_allclose(actual, expected, atol=0.02 * np.abs(expected).max())
