"""The numpy reference says what `transformers` and `sentence-transformers` say of the same weights."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.export.encoder_checkpoints import MAX_MODEL_LEN, VOCAB_SIZE, make_encoder, write_released_nomic_config
from tests.export.families.encoder_cases import CASES, Case

from sardonyx_export.encoder_spec import Activation, Array, Dense, Head, Norm, Normalise, Pooling, RelativeBias
from sardonyx_export.families.encoder import architectures, read_encoder_spec
from sardonyx_export.families.encoder_heads import read_classification_head
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder
from sardonyx_export.stages import encoder_reference
from sardonyx_export.stages.encoder_reference import EncodedRow, reference_outputs, relative_buckets

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
sentence_transformers = pytest.importorskip("sentence_transformers", reason="the extra `parity` is not installed")

TOLERANCE = 1e-5
LENGTHS = (MAX_MODEL_LEN, 17, 2, 1)
POOLINGS: tuple[Pooling, ...] = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def test_every_architecture_has_a_parity_case() -> None:
    assert {case.architecture for case in CASES.values()} == set(architectures)


@pytest.mark.parametrize("name", CASES)
def test_results_equal_transformers_for_rows_of_several_lengths(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    model, checkpoint = _make(tmp_path, case)
    spec = read_encoder_spec(checkpoint.config, list(checkpoint.names()))
    assert spec.max_model_len == MAX_MODEL_LEN
    rows = _rows(spec.num_token_types)
    if case.num_labels is None:
        head = Head(poolings=("cls", "mean", "lasttoken"))
        expected = [_pooled(_last_hidden_state(model, row)) for row in rows]
    else:
        head, _ = read_classification_head(checkpoint, spec)
        expected = [_logits(model, row) for row in rows]
        assert head.width(spec.hidden_size) == case.num_labels
    actual = reference_outputs(checkpoint, spec, head, rows)
    assert actual.dtype == np.float32
    assert np.abs(np.diff(expected, axis=0)).max() > 0.05  # Rows that are alike would prove nothing.
    np.testing.assert_allclose(actual, np.stack(expected), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("num_prompt_tokens", [0, 3])
def test_poolings_equal_sentence_transformers(tmp_path: Path, num_prompt_tokens: int) -> None:
    model, checkpoint = _make(tmp_path, CASES["bert"])
    spec = read_encoder_spec(checkpoint.config, list(checkpoint.names()))
    rows = [
        EncodedRow(token_ids=row.token_ids, token_type_ids=row.token_type_ids, num_prompt_tokens=num_prompt_tokens)
        for row in _rows(spec.num_token_types)[:2]
    ]
    module = sentence_transformers.sentence_transformer.modules.Pooling(
        spec.hidden_size, pooling_mode=POOLINGS, include_prompt=False
    )
    expected = []
    for row in rows:
        features = {
            "token_embeddings": torch.from_numpy(_last_hidden_state(model, row))[None],
            "attention_mask": torch.ones(1, len(row.token_ids), dtype=torch.int64),
            "prompt_length": num_prompt_tokens,
        }
        expected.append(module(features)["sentence_embedding"][0].numpy())
    actual = reference_outputs(checkpoint, spec, Head(poolings=POOLINGS, pools_prompt=False), rows)
    np.testing.assert_allclose(actual, np.stack(expected), atol=TOLERANCE, rtol=TOLERANCE)


def test_prompt_is_pooled_unless_the_head_leaves_it_out(tmp_path: Path) -> None:
    _, checkpoint = _make(tmp_path, CASES["bert"])
    spec = read_encoder_spec(checkpoint.config, list(checkpoint.names()))
    plain, prompted = (EncodedRow(token_ids=[5, 6, 7, 8], num_prompt_tokens=count) for count in (0, 2))
    head = Head(poolings=("mean",))
    expected, actual = reference_outputs(checkpoint, spec, head, [plain, prompted])
    np.testing.assert_array_equal(actual, expected)


def test_steps_follow_the_pooling_in_order(tmp_path: Path) -> None:
    model, checkpoint = _make(tmp_path, CASES["roberta"])
    spec = read_encoder_spec(checkpoint.config, list(checkpoint.names()))
    generator = np.random.default_rng(3)
    weight, second = (generator.standard_normal(shape, np.float32) for shape in ((7, spec.hidden_size), (5, 7)))
    bias, scale = generator.standard_normal(7, np.float32), generator.standard_normal(7, np.float32)
    steps = (Dense(weight, bias, "relu"), Norm(scale, bias, 1e-5), Dense(second, None), Normalise())
    rows = _rows(spec.num_token_types)
    with torch.no_grad():
        x = torch.from_numpy(np.stack([_last_hidden_state(model, row)[0] for row in rows]))
        x = torch.relu(x @ torch.from_numpy(weight).T + torch.from_numpy(bias))
        x = torch.nn.functional.layer_norm(x, (7,), torch.from_numpy(scale), torch.from_numpy(bias), 1e-5)
        expected = torch.nn.functional.normalize(x @ torch.from_numpy(second).T).numpy()
    actual = reference_outputs(checkpoint, spec, Head(poolings=("cls",), steps=steps), rows)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_missing_token_types_mean_type_0(tmp_path: Path) -> None:
    _, checkpoint = _make(tmp_path, CASES["bert"])
    spec = read_encoder_spec(checkpoint.config, list(checkpoint.names()))
    rows = [EncodedRow(token_ids=[5, 6, 7], token_type_ids=types) for types in (None, [0, 0, 0], [0, 1, 1])]
    absent, zeros, mixed = reference_outputs(checkpoint, spec, Head(poolings=("mean",)), rows)
    np.testing.assert_array_equal(absent, zeros)
    assert np.abs(mixed - zeros).max() > 0.05


def test_progress_counts_layers(tmp_path: Path) -> None:
    _, checkpoint = _make(tmp_path, CASES["bert"])
    spec = read_encoder_spec(checkpoint.config, list(checkpoint.names()))
    seen: list[tuple[int, int]] = []
    rows = [EncodedRow(token_ids=[5])]
    reference_outputs(checkpoint, spec, Head(poolings=("cls",)), rows, lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_buckets_equal_transformers_at_every_distance() -> None:
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    offsets = np.arange(-600, 601)
    expected = MPNetEncoder.relative_position_bucket(torch.from_numpy(offsets)).numpy()
    actual = relative_buckets(offsets, RelativeBias(name="any", num_buckets=32, max_distance=128))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("gelu", lambda x: torch.nn.functional.gelu(x)),
        ("gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        ("relu", lambda x: torch.relu(x)),
        ("silu", lambda x: torch.nn.functional.silu(x)),
        ("tanh", lambda x: torch.tanh(x)),
        ("sigmoid", lambda x: torch.sigmoid(x)),
        ("identity", lambda x: x),
    ],
)
def test_activations_equal_torch_without_overflow(tmp_path: Path, kind: Activation, function: Any) -> None:
    x = np.concatenate([np.linspace(-9, 9, 4001), [-1e4, 1e4]]).astype(np.float32)
    _, checkpoint = _make(tmp_path, CASES["bert"])
    spec = read_encoder_spec(checkpoint.config, list(checkpoint.names()))
    # A layer without weights: what it adds is what is activated.
    head = Head(poolings=("cls",), steps=(Dense(np.zeros((len(x), spec.hidden_size), np.float32), x, kind),))
    actual = reference_outputs(checkpoint, spec, head, [EncodedRow(token_ids=[5])])[0]
    np.testing.assert_allclose(actual, function(torch.from_numpy(x)).numpy(), atol=1e-6, rtol=1e-6)


def test_error_function_is_good_to_1e_8_everywhere() -> None:
    points = np.linspace(-6, 6, 20_011)
    exact = np.array([math.erf(point) for point in points])
    table = np.interp(points, encoder_reference._ERF_POINTS, encoder_reference._ERF_VALUES)
    assert np.abs(table - exact).max() < 2e-8


def _make(folder: Path, case: Case) -> tuple[Any, SafetensorsFolder]:
    model = make_encoder(folder, case.architecture, num_labels=case.num_labels, **case.fields)
    if case.has_released_config:
        write_released_nomic_config(folder)
    return model, SafetensorsFolder(folder, uri="tiny")


def _rows(num_token_types: int) -> list[EncodedRow]:
    """Random tokens above the special ones, which some models number by themselves."""
    generator = np.random.default_rng(5)
    return [
        EncodedRow(
            token_ids=generator.integers(5, VOCAB_SIZE, length).tolist(),
            token_type_ids=generator.integers(0, num_token_types, length).tolist() if num_token_types else None,
        )
        for length in LENGTHS
    ]


def _inputs(row: EncodedRow) -> dict[str, Any]:
    types = {} if row.token_type_ids is None else {"token_type_ids": torch.tensor([row.token_type_ids])}
    ids = torch.tensor([row.token_ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types}


def _last_hidden_state(model: Any, row: EncodedRow) -> Array:
    with torch.no_grad():
        state: Array = model.base_model(**_inputs(row)).last_hidden_state[0].numpy()
    return state


def _logits(model: Any, row: EncodedRow) -> Array:
    with torch.no_grad():
        logits: Array = model(**_inputs(row)).logits[0].numpy()
    return logits


def _pooled(x: Array) -> npt.NDArray[np.float32]:
    return np.concatenate([x[0], x.mean(axis=0), x[-1]])
