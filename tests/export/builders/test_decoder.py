"""Whole graphs from tiny checkpoints in memory; numbers are compared in `tests/export/families/test_llm_parity.py`."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from tests.export.builders.arrays import ArrayCheckpoint, Stored

from sardonyx.core import RunnerLimits
from sardonyx.repository.families import KvLayout, LanguageModel
from sardonyx.runners.decoder import DecoderRunner, ForwardRow
from sardonyx.runtime.session import open_session
from sardonyx_export.builders.decoder import BuildOptions, BuildReport, build_decoder
from sardonyx_export.errors import ExportError

Array = npt.NDArray[np.float32]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 80,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def arrays(seed: int = 0, **config: Any) -> dict[str, Array]:
    """Random weights of a Llama with these sizes."""
    sizes = CONFIG | config
    hidden, ffn = sizes["hidden_size"], sizes["intermediate_size"]
    kv = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    generator = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Array:
        return (generator.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(sizes["vocab_size"], hidden) * 4}
    for i in range(sizes["num_hidden_layers"]):
        shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        layer = {f"self_attn.{name}_proj": matrix(*shape) for name, shape in shapes.items()}
        layer |= {"mlp.gate_proj": matrix(ffn, hidden), "mlp.up_proj": matrix(ffn, hidden)}
        layer |= {"mlp.down_proj": matrix(hidden, ffn)}
        layer |= {name: np.ones(hidden, np.float32) for name in ("input_layernorm", "post_attention_layernorm")}
        tensors |= {f"model.layers.{i}.{name}.weight": values for name, values in layer.items()}
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    if not sizes["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(sizes["vocab_size"], hidden)
    return tensors


def as_gguf(tensors: dict[str, Array], storage: str, embedding_storage: str) -> dict[str, Array | Stored]:
    """The same tensors as a GGUF file would hold them."""

    def store(name: str, values: Array) -> Array | Stored:
        if values.ndim == 1:
            return values
        kind_name = embedding_storage if "embed" in name else storage
        kind = gguf.GGMLQuantizationType[kind_name]
        raw = gguf.quantize(values, kind)
        return kind_name, raw, gguf.dequantize(raw, kind)

    return {name: store(name, values) for name, values in tensors.items()}


def logits(report: BuildReport, ids: list[int]) -> Array:
    model = LanguageModel(vocab_size=report.vocab_size, max_model_len=report.max_model_len, kv=report.kv)
    limits = RunnerLimits(num_slots=2, max_model_len=report.max_model_len, max_chunk_tokens=32, vocab_size=80)
    runner = DecoderRunner(open_session(report.files[0], model_name="tiny"), model, limits)
    try:
        return runner.forward([ForwardRow(1, ids, 0)], range(len(ids)))
    finally:
        runner.close()


def build(folder: Path, checkpoint: ArrayCheckpoint, **options: Any) -> BuildReport:
    folder.mkdir(parents=True, exist_ok=True)
    return build_decoder(checkpoint, folder, BuildOptions(**options))


def operators(report: BuildReport) -> list[str]:
    return [node.op_type for node in onnx.load(report.files[0], load_external_data=False).graph.node]


def test_the_report_states_what_the_manifest_needs(tmp_path: Path) -> None:
    report = build(tmp_path, ArrayCheckpoint(CONFIG, arrays()), precision="int8", max_model_len=40)
    assert [file.name for file in report.files] == ["model.onnx", "model.onnx.data"]
    assert all(file.parent == tmp_path and file.exists() for file in report.files)
    assert report.kv == KvLayout(num_layers=2, num_kv_heads=2, head_size=16)
    assert (report.vocab_size, report.max_model_len) == (80, 40)
    assert report.weights == "F32 -> int8 in blocks of 32, re-quantised; activations int8"


def test_progress_ends_with_every_weight_counted_once(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    tensors = arrays()
    build_decoder(
        ArrayCheckpoint(CONFIG, tensors), tmp_path, BuildOptions(precision="int4"), lambda *call: calls.append(call)
    )
    total = sum(values.size for values in tensors.values())
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize("storage", ["Q4_0", "Q4_1"])
def test_gguf_blocks_of_four_bits_lose_nothing(tmp_path: Path, storage: str) -> None:
    checkpoint = ArrayCheckpoint(CONFIG, as_gguf(arrays(), storage, "Q8_0"))
    quantised = build(tmp_path / "int4", checkpoint, precision="int4")
    plain = build(tmp_path / "fp32", checkpoint, precision="fp32")
    assert quantised.weights == (
        f"{storage} -> int4 in blocks of 32, lossless; Q8_0 -> int8 in blocks of 32, lossless; activations fp32"
    )
    ids = np.random.default_rng(1).integers(0, 80, 24).tolist()
    assert np.abs(logits(quantised, ids) - logits(plain, ids)).max() < 3e-3
    assert quantised.files[1].stat().st_size < plain.files[1].stat().st_size / 4


def test_activations_are_rounded_when_that_is_asked_for(tmp_path: Path) -> None:
    checkpoint = ArrayCheckpoint(CONFIG, as_gguf(arrays(), "Q4_0", "Q8_0"))
    rounded = build(tmp_path / "rounded", checkpoint, precision="int4", activations="int8")
    exact = build(tmp_path / "exact", checkpoint, precision="int4")
    ids = list(range(20))
    difference = np.abs(logits(rounded, ids) - logits(exact, ids)).max()
    assert 1e-2 < difference < 1
    assert operators(rounded).count("MatMulNBits") == 4 * 2 + 1
    assert operators(exact).count("MatMulNBits") == 4 * 2 + 2  # the head splits its input


def test_activations_are_rounded_by_row_when_that_is_asked_for(tmp_path: Path) -> None:
    checkpoint = ArrayCheckpoint(CONFIG, as_gguf(arrays(), "Q4_0", "Q8_0"))
    rows = build(tmp_path / "rows", checkpoint, precision="int8", activations="int8_rows")
    assert rows.activations == "int8_rows"
    assert rows.weights == (
        "Q4_0 -> int8 per channel (7 bits), re-quantised; Q8_0 -> int8 in blocks of 32, lossless; activations int8_rows"
    )
    assert operators(rows).count("MatMulIntegerToFloat") == 4 * 2
    assert operators(rows).count("MatMulNBits") == 1
    ids = list(range(20))
    expected = logits(build(tmp_path / "fp32", checkpoint, precision="fp32"), ids)
    error = np.sqrt(((logits(rows, ids) - expected) ** 2).mean()) / expected.std()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_rows_are_rounded_in_an_int8_graph_only(tmp_path: Path, precision: str) -> None:
    with pytest.raises(ExportError, match=rf"activations: is int8_rows.*{precision}"):
        build(tmp_path, ArrayCheckpoint(CONFIG, arrays()), precision=precision, activations="int8_rows")
    assert not list(tmp_path.iterdir())


def test_blocks_of_more_than_four_bits_stay_at_eight_in_an_int4_graph(tmp_path: Path) -> None:
    tensors = as_gguf(arrays(), "Q4_0", "Q8_0")
    for name, values in arrays().items():
        if "down_proj" in name:
            kind = gguf.GGMLQuantizationType.Q5_0
            raw = gguf.quantize(values, kind)
            tensors[name] = "Q5_0", raw, gguf.dequantize(raw, kind)
    report = build(tmp_path, ArrayCheckpoint(CONFIG, tensors), precision="int4")
    assert "Q5_0 -> int8 in blocks of 32, re-quantised" in report.weights


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantised_graph_stays_near_its_floats(tmp_path: Path, precision: str) -> None:
    checkpoint = ArrayCheckpoint(CONFIG | {"tie_word_embeddings": False}, arrays(tie_word_embeddings=False))
    plain = build(tmp_path / "fp32", checkpoint, precision="fp32")
    report = build(tmp_path / precision, checkpoint, precision=precision)
    ids = list(range(30))
    expected = logits(plain, ids)
    error = np.sqrt(((logits(report, ids) - expected) ** 2).mean()) / expected.std()
    assert 1e-4 < error < (0.03 if precision == "int8" else 0.2)


def test_a_tied_head_and_the_embedding_share_their_bytes(tmp_path: Path) -> None:
    tied = build(tmp_path / "tied", ArrayCheckpoint(CONFIG, arrays()), precision="int8")
    config = CONFIG | {"tie_word_embeddings": False}
    untied = build(tmp_path / "untied", ArrayCheckpoint(config, arrays(tie_word_embeddings=False)), precision="int8")
    head_bytes = 80 * 64 + 80 * 2 * 4
    assert untied.files[1].stat().st_size - tied.files[1].stat().st_size >= head_bytes
    assert operators(tied)[0] == "GatherBlockQuantized"


def test_a_hidden_size_that_is_no_multiple_of_the_block_works_in_every_precision(tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
    checkpoint = ArrayCheckpoint(CONFIG | sizes, arrays(**sizes))
    outputs = [
        logits(build(tmp_path / f"{precision}-{kept}", checkpoint, precision=precision, activations=kept), [1, 2, 3])
        for precision, kept in (("fp32", "fp32"), ("int8", "int8"), ("int8", "fp32"), ("int4", "fp32"))
    ]
    for output in outputs[1:]:
        assert np.sqrt(((output - outputs[0]) ** 2).mean()) / outputs[0].std() < 0.2


def test_a_tensor_that_the_graph_would_leave_out_is_refused(tmp_path: Path) -> None:
    tensors = arrays() | {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}
    with pytest.raises(ExportError, match=r"q_proj\.bias"):
        build(tmp_path, ArrayCheckpoint(CONFIG, tensors), precision="fp32")


def test_a_copy_of_a_tied_head_is_not_missed(tmp_path: Path) -> None:
    tensors = arrays() | {"lm_head.weight": np.zeros((80, 64), np.float32)}
    build(tmp_path, ArrayCheckpoint(CONFIG, tensors), precision="fp32")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model.layers.1.mlp.down_proj.weight", np.zeros((64, 95), np.float32)),
        ("model.layers.1.mlp.gate_proj.weight", np.zeros((95, 64), np.float32)),
        ("model.layers.0.input_layernorm.weight", np.zeros(63, np.float32)),
        ("model.layers.0.input_layernorm.weight", np.zeros((64, 1), np.float32)),
        ("model.layers.0.self_attn.v_proj.weight", np.full((32, 64), np.nan, np.float32)),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(tmp_path: Path, name: str, values: Array) -> None:
    with pytest.raises(ExportError, match=name):
        build(tmp_path, ArrayCheckpoint(CONFIG, arrays() | {name: values}), precision="int8")


def test_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    tensors = arrays()
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ExportError, match=r"layers\.1\.self_attn\.k_proj"):
        build(tmp_path, ArrayCheckpoint(CONFIG, tensors), precision="fp32")


def test_a_block_size_without_a_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="block_size"):
        build(tmp_path, ArrayCheckpoint(CONFIG, arrays()), precision="int4", block_size=48)
