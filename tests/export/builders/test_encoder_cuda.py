"""Graphs of tiny encoders for CUDA, their operators in numpy, against the source's weights in float32."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from tests.export.builders.arrays import ArrayCheckpoint
from tests.export.builders.test_encoder import held, make, nodes, random_rows
from tests.export.families.encoder_cases import CASES

from sardonyx_export.builders.encoder import EncoderBuildReport, build_encoder
from sardonyx_export.encoder_spec import EncoderSpec, Head, Normalise
from sardonyx_export.errors import ExportError
from sardonyx_export.families.encoder_heads import read_classification_head
from sardonyx_export.stages.encoder_reference import EncodedRow, reference_outputs
from sardonyx_export.stages.encoder_verify import run_in_numpy

Array = npt.NDArray[np.float32]
Floats = Literal["fp16", "bf16"]
ERRORS: dict[Floats, float] = {"fp16": 0.004, "bf16": 0.03}
"""Root mean square, as a share of the reference's deviation. Most are 0.0005 and 0.005."""
ALL_POOLINGS = Head(
    poolings=("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"), pools_prompt=False
)
CLS = Head(poolings=("cls",), steps=(Normalise(),))
NAMES = (
    *("bert", "bert-relu", "bert-silu", "bert-gelu-new", "roberta", "distilbert", "mpnet", "nomic"),
    *("modernbert", "modernbert-biased", "modernbert-yarn", "bert-classifier"),
)
BFLOAT_NAMES = ("bert", "mpnet", "modernbert", "nomic")
"""What bf16 alone could break is the same in all."""


@pytest.mark.parametrize(
    ("name", "floats"), [*((name, "fp16") for name in NAMES), *((name, "bf16") for name in BFLOAT_NAMES)]
)
def test_results_are_those_of_the_weights(tmp_path: Path, name: str, floats: Floats) -> None:
    _, checkpoint, spec = make(tmp_path, CASES[name])
    head = ALL_POOLINGS if CASES[name].num_labels is None else read_classification_head(checkpoint, spec)[0]
    report = build(tmp_path / "1", checkpoint, spec, head, floats)
    rows = prompted(random_rows(spec))
    together, backwards = run_in_numpy(report.files[0], "values", [rows, rows[::-1]])
    assert together.dtype == np.float32
    expected = reference_outputs(checkpoint, spec, head, rows)
    assert share(together, expected) < ERRORS[floats]
    # One rounding more or less, where a matrix product adds up in another order.
    assert share(backwards[::-1], together) < ERRORS[floats]


def test_fp16_pads_no_row_in_attention_and_bf16_masks_what_it_pads(tmp_path: Path) -> None:
    _, checkpoint, spec = make(tmp_path, CASES["bert"])
    packed = build(tmp_path / "1", checkpoint, spec, CLS, "fp16")
    padded = build(tmp_path / "2", checkpoint, spec, CLS, "bf16")
    shared = {"input_ids", "token_type_ids", "position_ids", "row_gather", "seqlens"}
    assert inputs(packed) == shared | {"token_offset", "cumulative_sequence_length"}
    assert inputs(padded) == shared | {"row_scatter"}
    assert (packed.activations, packed.weights) == ("fp16", "F32 -> fp16")
    assert (padded.activations, padded.weights) == ("bf16", "F32 -> bf16")
    assert "MultiHeadAttention" not in {node.op_type for node in nodes(packed)}
    masks = [node.input[4] for node in nodes(padded) if node.op_type == "MultiHeadAttention"]
    assert masks == ["seqlens"] * len(spec.layers)


def test_all_weights_but_the_heads_are_of_16_bits(tmp_path: Path) -> None:
    _, checkpoint, spec = make(tmp_path, CASES["modernbert-classifier"])
    head = read_classification_head(checkpoint, spec)[0]
    report = build(tmp_path / "1", checkpoint, spec, head, "fp16")
    initializers = onnx.load(report.files[0], load_external_data=False).graph.initializer
    wide = {each.name for each in initializers if each.data_type == onnx.TensorProto.FLOAT}
    assert wide
    assert all(name.startswith("head.") or "shortest" in name for name in wide)


def test_last_layer_goes_on_with_the_pooled_tokens_alone(tmp_path: Path) -> None:
    _, checkpoint, spec = make(tmp_path, CASES["bert"])
    report = build(tmp_path / "1", checkpoint, spec, CLS, "fp16")
    producers = {node.output[0]: node for node in nodes(report)}
    last = producers[producers["layer.1.attention.output"].input[0]]
    assert list(last.input) == ["layer.1.attention.attended", "cls.entry"]
    assert producers["layer.0.attention.output"].input[0] == "layer.0.attention.attended"


def test_weights_that_fp16_cannot_hold_are_refused_with_a_way_out(tmp_path: Path) -> None:
    _, checkpoint, spec = make(tmp_path, CASES["bert"])
    arrays = held(checkpoint)
    for name in ("encoder.layer.0.output.dense.weight", "embeddings.position_embeddings.weight"):
        changed = {name: np.where(arrays[name] == arrays[name].max(), np.float32(1e5), arrays[name])}
        with pytest.raises(ExportError, match="fp16 ends at 65,504; bf16 can hold it") as caught:
            build(tmp_path / name, ArrayCheckpoint({}, arrays | changed), spec, CLS, "fp16")
        assert caught.value.field == name


def build(folder: Path, checkpoint: Any, spec: EncoderSpec, head: Head, floats: Floats) -> EncoderBuildReport:
    folder.mkdir()
    return build_encoder(checkpoint, spec, head, folder, precision=floats, output="values")


def inputs(report: EncoderBuildReport) -> set[str]:
    return {each.name for each in onnx.load(report.files[0], load_external_data=False).graph.input}


def prompted(rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    """With leading tokens that are not pooled."""
    return [
        EncodedRow(token_ids=row.token_ids, token_type_ids=row.token_type_ids, num_prompt_tokens=number)
        for row, number in zip(rows, (2, 5, 0, 0, 29, 1), strict=True)
    ]


def share(actual: Array, expected: Array) -> float:
    """How far numbers are off, by the square mean, as a share of what they vary."""
    return float(np.sqrt(np.square(actual - expected).mean()) / expected.std())
