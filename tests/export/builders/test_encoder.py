"""Whole graphs of tiny encoders, run as the server runs them, against `transformers`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from msgspec.structs import replace
from tests.export.builders.arrays import ArrayCheckpoint
from tests.export.builders.packing import run_packed
from tests.export.encoder_checkpoints import MAX_MODEL_LEN, VOCAB_SIZE, make_encoder, write_released_nomic_config
from tests.export.families.encoder_cases import CASES, Case

from sardonyx_export.builders import encoder_attention
from sardonyx_export.builders.encoder import EncoderBuildReport, build_encoder
from sardonyx_export.encoder_spec import EncoderSpec, Head, Normalise, Pooling, RelativeBias
from sardonyx_export.errors import ExportError
from sardonyx_export.families.encoder import read_encoder_spec
from sardonyx_export.families.encoder_heads import read_classification_head
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder
from sardonyx_export.stages import encoder_reference
from sardonyx_export.stages.encoder_reference import EncodedRow, reference_outputs

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")

Array = npt.NDArray[np.float32]
TOLERANCE = 1e-5
LENGTHS = (3, MAX_MODEL_LEN, 17, 1, 30, 2)
POOLINGS: tuple[Pooling, ...] = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
POOLINGS_OF_ONE: tuple[Pooling, ...] = ("cls", "lasttoken")
SEVERAL = Head(poolings=("cls", "mean", "lasttoken"))
UNIT_MEAN = Head(poolings=("mean",), steps=(Normalise(),))


@pytest.mark.parametrize("name", CASES)
def test_rows_of_any_lengths_equal_transformers_together_and_alone(tmp_path: Path, name: str) -> None:
    model, checkpoint, spec = make(tmp_path, CASES[name])
    head = SEVERAL if CASES[name].num_labels is None else read_classification_head(checkpoint, spec)[0]
    report = build(tmp_path / "1", checkpoint, spec, head)
    rows = random_rows(spec)
    expected = np.stack([from_transformers(model, row, CASES[name].num_labels) for row in rows])
    together, backwards, *alone = run_packed(report.files[0], rows, rows[::-1], *([row] for row in rows))
    np.testing.assert_allclose(together, expected, atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(backwards[::-1], together, atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(np.concatenate(alone), together, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    "name", ["bert", "bert-relu", "bert-silu", "bert-gelu-new", "distilbert", "mpnet", "modernbert-biased", "nomic"]
)
def test_int8_embeddings_point_where_those_of_the_weights_do(tmp_path: Path, name: str) -> None:
    _, checkpoint, spec = make(tmp_path, CASES[name])
    report = build(tmp_path / "1", checkpoint, spec, UNIT_MEAN, precision="int8")
    rows = random_rows(spec)
    together, *alone = run_packed(report.files[0], rows, *([row] for row in rows))
    cosines = (reference_outputs(checkpoint, spec, UNIT_MEAN, rows) * together).sum(axis=1)
    assert 0.995 < cosines.min() < 0.999999
    # A rounding that tips over moves an embedding by about as much as rounding itself.
    assert (np.concatenate(alone) * together).sum(axis=1).min() > 0.995


@pytest.mark.parametrize("pools_prompt", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_equals_the_reference(tmp_path: Path, pooling: Pooling, pools_prompt: bool) -> None:
    _, checkpoint, spec = make(tmp_path, CASES["bert"])
    head = Head(poolings=(pooling,), pools_prompt=pools_prompt)
    report = build(tmp_path / "1", checkpoint, spec, head)
    rows = [
        EncodedRow(token_ids=row.token_ids, token_type_ids=row.token_type_ids, num_prompt_tokens=num_prompt_tokens)
        for row, num_prompt_tokens in zip(random_rows(spec), (2, 5, 0, 0, 29, 1), strict=True)
    ]
    (actual,) = run_packed(report.files[0], rows)
    expected = reference_outputs(checkpoint, spec, head, rows)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert ("num_prompt_tokens" in inputs(report)) is not pools_prompt


@pytest.mark.parametrize("name", ["bert", "modernbert", "nomic"])
def test_one_token_of_a_row_is_the_same_whether_pooled_alone_or_beside_others(tmp_path: Path, name: str) -> None:
    _, checkpoint, spec = make(tmp_path, CASES[name])
    both = build(tmp_path / "1", checkpoint, spec, Head(poolings=("cls", "lasttoken")))
    (expected,) = run_packed(both.files[0], random_rows(spec))
    for i, pooling in enumerate(POOLINGS_OF_ONE):
        report = build(tmp_path / pooling, checkpoint, spec, Head(poolings=(pooling,)))
        (actual,) = run_packed(report.files[0], random_rows(spec))
        expected_part = expected[:, i * spec.hidden_size : (i + 1) * spec.hidden_size]
        np.testing.assert_allclose(actual, expected_part, atol=TOLERANCE, rtol=TOLERANCE)


def test_last_layer_goes_on_with_the_pooled_tokens_alone(tmp_path: Path) -> None:
    _, checkpoint, spec = make(tmp_path, CASES["bert"])
    report = build(tmp_path / "1", checkpoint, spec, Head(poolings=("cls",)))
    producers = {node.output[0]: node for node in nodes(report)}
    last = producers[producers["layer.1.attention.output"].input[0]]
    assert list(last.input) == ["layer.1.attention.rows", "wanted.rows"]
    before = producers[producers["layer.0.attention.output"].input[0]]
    assert list(before.input) == ["layer.0.attention.rows", "row_scatter"]


def test_an_encoder_without_layers_pools_its_embeddings(tmp_path: Path) -> None:
    _, checkpoint, spec = make(tmp_path, CASES["bert"])
    spec, head = replace(spec, layers=()), Head(poolings=("lasttoken",))
    arrays = {name: values for name, values in held(checkpoint).items() if not name.startswith("encoder.")}
    report = build(tmp_path / "1", ArrayCheckpoint({}, arrays), spec, head)
    (actual,) = run_packed(report.files[0], random_rows(spec))
    expected = reference_outputs(checkpoint, spec, head, random_rows(spec))
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)


def test_graph_takes_token_types_where_there_is_a_choice(tmp_path: Path) -> None:
    for name, has_types in (("bert", True), ("nomic", True), ("roberta", False), ("distilbert", False)):
        _, checkpoint, spec = make(tmp_path / name, CASES[name])
        report = build(tmp_path / name / "1", checkpoint, spec, UNIT_MEAN)
        expected = {"input_ids", "position_ids", "row_gather", "row_scatter", "seqlens"}
        assert inputs(report) == expected | ({"token_type_ids"} if has_types else set())


def test_a_shorter_limit_shortens_the_tables_and_changes_no_result(tmp_path: Path) -> None:
    for name in ("roberta", "mpnet", "modernbert"):
        _, checkpoint, spec = make(tmp_path / name, CASES[name])
        whole = build(tmp_path / name / "1", checkpoint, spec, UNIT_MEAN)
        cut = build(tmp_path / name / "2", checkpoint, replace(spec, max_model_len=17), UNIT_MEAN)
        rows = random_rows(spec, (3, 17, 9))
        (expected,), (actual,) = run_packed(whole.files[0], rows), run_packed(cut.files[0], rows)
        np.testing.assert_allclose(actual, expected, atol=1e-6)
        assert cut.files[1].stat().st_size < whole.files[1].stat().st_size


def test_rotation_follows_the_position_where_there_are_more_tokens_than_positions(tmp_path: Path) -> None:
    _, checkpoint, spec = make(tmp_path, CASES["nomic"])
    report = build(tmp_path / "1", checkpoint, replace(spec, max_model_len=4), UNIT_MEAN)
    rows = random_rows(spec, (4, 3, 4, 1, 4))
    (actual,) = run_packed(report.files[0], rows)
    np.testing.assert_allclose(actual, reference_outputs(checkpoint, spec, UNIT_MEAN, rows), atol=TOLERANCE)


def test_report_says_what_became_of_the_weights(tmp_path: Path) -> None:
    _, checkpoint, spec = make(tmp_path, CASES["bert"])
    plain = build(tmp_path / "1", checkpoint, spec, UNIT_MEAN)
    assert [file.name for file in plain.files] == ["model.onnx", "model.onnx.data"]
    assert (plain.activations, plain.weights) == ("fp32", "F32 -> fp32")
    quantised = build(tmp_path / "2", checkpoint, spec, UNIT_MEAN, precision="int8")
    assert quantised.activations == "int8_rows"
    assert quantised.weights == (
        "F32 -> int8 in blocks of 32, re-quantised and fp32 and int8 per channel (7 bits), re-quantised and "
        "int8 per channel (8 bits), re-quantised; activations int8_rows"
    )
    assert quantised.files[1].stat().st_size < 0.45 * plain.files[1].stat().st_size


def test_progress_ends_with_every_weight_counted(tmp_path: Path) -> None:
    _, checkpoint, spec = make(tmp_path, CASES["bert-masked-lm"])
    calls: list[tuple[int, int]] = []
    (tmp_path / "1").mkdir()
    build_encoder(
        checkpoint,
        spec,
        UNIT_MEAN,
        tmp_path / "1",
        precision="fp32",
        output="values",
        progress=lambda *call: calls.append(call),
    )
    total = sum(int(np.prod(checkpoint.tensor(name).shape)) for name in checkpoint.names())
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_a_tensor_that_no_encoder_has_is_refused(tmp_path: Path) -> None:
    _, checkpoint, spec = make(tmp_path, CASES["bert"])
    arrays = held(checkpoint)
    for extra in ("encoder.layer.0.attention.self.relative.weight", "encoder.layer.2.output.dense.weight", "adapter"):
        folder = tmp_path / extra
        with pytest.raises(ExportError, match="does not have") as caught:
            build(folder, ArrayCheckpoint({}, arrays | {extra: np.ones(3, np.float32)}), spec, UNIT_MEAN)
        assert caught.value.field == extra


def test_what_lies_beside_an_encoder_is_left_out(tmp_path: Path) -> None:
    _, checkpoint, spec = make(tmp_path, CASES["bert"])
    beside = ("embeddings.position_ids", "bert.pooler.dense.bias", "cls.predictions.bias", "lm_head.dense.weight")
    arrays = held(checkpoint) | {name: np.ones(3, np.float32) for name in beside}
    build(tmp_path / "1", ArrayCheckpoint({}, arrays), spec, UNIT_MEAN)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embeddings.position_embeddings.weight", "has 47 rows; the configuration asks for 48"),
        ("encoder.layer.1.output.dense.weight", "asks for 32 rows"),
        ("encoder.layer.0.output.LayerNorm.bias", "asks for 32"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_tensor_with_too_few_rows_is_refused(
    tmp_path: Path, name: str, message: str, precision: Literal["fp32", "int8"]
) -> None:
    _, checkpoint, spec = make(tmp_path, CASES["bert"])
    arrays = held(checkpoint)
    arrays[name] = arrays[name][:-1]
    with pytest.raises(ExportError, match=message) as caught:
        build(tmp_path / "1", ArrayCheckpoint({}, arrays), spec, UNIT_MEAN, precision)
    assert caught.value.field == name


def test_buckets_of_offsets_are_those_of_the_reference() -> None:
    offsets = np.arange(-600, 601)
    for bias in (RelativeBias(name="any", num_buckets=32, max_distance=128),):
        np.testing.assert_array_equal(
            encoder_attention.relative_buckets(offsets, bias), encoder_reference.relative_buckets(offsets, bias)
        )


def make(folder: Path, case: Case) -> tuple[Any, SafetensorsFolder, EncoderSpec]:
    model = make_encoder(folder, case.architecture, num_labels=case.num_labels, **case.fields)
    if case.has_released_config:
        write_released_nomic_config(folder)
    checkpoint = SafetensorsFolder(folder, uri="tiny")
    return model, checkpoint, read_encoder_spec(checkpoint.config, list(checkpoint.names()))


def build(
    folder: Path, checkpoint: Any, spec: EncoderSpec, head: Head, precision: Literal["fp32", "int8"] = "fp32"
) -> EncoderBuildReport:
    folder.mkdir()
    return build_encoder(checkpoint, spec, head, folder, precision=precision, output="values")


def held(checkpoint: SafetensorsFolder) -> dict[str, Array]:
    return {name: checkpoint.tensor(name).read() for name in checkpoint.names()}


def nodes(report: EncoderBuildReport) -> list[onnx.NodeProto]:
    return list(onnx.load(report.files[0], load_external_data=False).graph.node)


def inputs(report: EncoderBuildReport) -> set[str]:
    return {each.name for each in onnx.load(report.files[0], load_external_data=False).graph.input}


def random_rows(spec: EncoderSpec, lengths: Iterable[int] = LENGTHS) -> list[EncodedRow]:
    """Tokens above the special ones, which some models number by themselves."""
    generator = np.random.default_rng(5)
    return [
        EncodedRow(
            token_ids=generator.integers(5, VOCAB_SIZE, length).tolist(),
            token_type_ids=generator.integers(0, spec.num_token_types, length).tolist()
            if spec.num_token_types
            else None,
        )
        for length in lengths
    ]


def from_transformers(model: Any, row: EncodedRow, num_labels: int | None) -> Array:
    """A classifier's logits; of others the first, the mean and the last of the last hidden states."""
    inputs = {"input_ids": torch.tensor([row.token_ids])}
    if row.token_type_ids is not None:
        inputs["token_type_ids"] = torch.tensor([row.token_type_ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        if num_labels is not None:
            logits: Array = model(**inputs).logits[0].numpy()
            return logits
        x = model.base_model(**inputs).last_hidden_state[0].numpy()
    return np.concatenate([x[0], x.mean(axis=0), x[-1]])
