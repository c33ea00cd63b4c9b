import gguf
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.export.builders.arrays import ArrayCheckpoint

from sardonyx_export.builders import gguf_blocks
from sardonyx_export.builders.graph import GraphWriter
from sardonyx_export.builders.linear import Linears
from sardonyx_export.builders.weights import WeightWriter

Raw = npt.NDArray[np.uint8]


def random_blocks(storage: str, num_rows: int, num_columns: int, seed: int) -> Raw:
    """Rows of a GGUF format: any codes and any 6-bit scales, half floats of ordinary size."""
    generator = np.random.default_rng(seed)
    kind = gguf.GGMLQuantizationType[storage]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = generator.integers(0, 256, (num_rows, num_columns // block_size, block_bytes), dtype=np.uint8)
    num_halves = 1 if storage in {"Q4_0", "Q8_0"} else 2
    halves = generator.normal(0, 0.02, (*raw.shape[:2], num_halves)).astype("<f2")
    raw[..., : 2 * num_halves] = halves.view(np.uint8)
    return raw.reshape(num_rows, -1)


def dequantised(storage: str, raw: Raw) -> npt.NDArray[np.float32]:
    weights: npt.NDArray[np.float32] = gguf.dequantize(raw, gguf.GGMLQuantizationType[storage])
    return weights


@pytest.mark.parametrize("storage", ["Q4_0", "Q8_0"])
@given(seed=st.integers(0, 2**32 - 1), num_blocks=st.integers(1, 5), num_rows=st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_a_symmetric_format_is_kept_bit_for_bit(storage: str, seed: int, num_blocks: int, num_rows: int) -> None:
    raw = random_blocks(storage, num_rows, 32 * num_blocks, seed)
    blocks = gguf_blocks.decode(storage, raw, 32 * num_blocks)
    assert blocks.offsets is None
    assert (blocks.dequantise(32 * num_blocks) == dequantised(storage, raw)).all()


@pytest.mark.parametrize("storage", ["Q4_1", "Q4_K"])
@given(seed=st.integers(0, 2**32 - 1), num_blocks=st.integers(1, 3), num_rows=st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_an_affine_format_is_kept_to_float32_rounding(storage: str, seed: int, num_blocks: int, num_rows: int) -> None:
    raw = random_blocks(storage, num_rows, 256 * num_blocks, seed)
    blocks = gguf_blocks.decode(storage, raw, 256 * num_blocks)
    expected = dequantised(storage, raw)
    np.testing.assert_allclose(
        blocks.dequantise(256 * num_blocks), expected, rtol=0, atol=np.abs(expected).max() * 1e-6
    )


@pytest.mark.parametrize("storage", sorted(gguf_blocks.FORMATS))
def test_onnx_runtime_multiplies_with_the_very_weights(storage: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    raw = random_blocks(storage, 24, 512, seed=3)
    expected = dequantised(storage, raw)
    folder = tmp_path_factory.mktemp(storage)
    checkpoint = ArrayCheckpoint({}, {"w": (storage, raw, expected)})
    with GraphWriter(folder) as graph:
        graph.input("x", np.float32, ["T", 512])
        graph.output("y", np.float32, ["T", 24])
        weights = WeightWriter(graph, checkpoint, 32)
        bits = weights.bits(["w"], "int4", 24, 512)
        assert bits == (8 if storage == "Q8_0" else 4)
        matrix = weights.matrix("w", ["w"], 24, 512, bits)
        Linears(graph, 32, has_exact_activations=True).apply("x", matrix, output="y")
        model, _ = graph.save("linear")
        assert weights.summary() == f"{storage} -> int{bits} in blocks of 32, lossless"
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    # One-hot rows read the weights out one by one; the kernel's float32 sums add nothing to them.
    (transposed,) = session.run(None, {"x": np.eye(512, dtype=np.float32)})
    np.testing.assert_allclose(transposed.T, expected, rtol=0, atol=np.abs(expected).max() * 1e-6)
    if storage == "Q4_0":
        assert (expected == transposed.T).all()
