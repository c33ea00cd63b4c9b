"""Both graphs of a tiny Whisper against transformers, in steps as the scheduler packs them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.export.whisper_checkpoints import SIZES, make_whisper

from sardonyx.runtime.session import Session, open_session
from sardonyx_export.builders.whisper import build_whisper
from sardonyx_export.errors import ExportError
from sardonyx_export.families.whisper import read_whisper_spec
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder
from sardonyx_export.whisper_spec import WhisperSpec

Array = npt.NDArray[np.float32]
CAPACITY = SIZES["max_target_positions"]


class Exported:
    """A tiny model, its graphs, and rows that decode in slots of their own."""

    def __init__(self, folder: Path, precision: Literal["fp32", "int8"], num_slots: int, **changes: Any) -> None:
        source, target = folder / "source", folder / precision
        self.model = make_whisper(source, **changes)
        target.mkdir()
        checkpoint = SafetensorsFolder(source, uri="tiny")
        self.spec = read_whisper_spec(checkpoint.config)
        report = build_whisper(checkpoint, self.spec, target, precision=precision)
        self._sessions = {role: open_session(files[0], model_name=role) for role, files in report.graphs.items()}
        self.weights = report.weights
        self.mel = np.random.default_rng(3).standard_normal((num_slots, self.spec.num_mels, self.spec.num_frames))
        self.mel = self.mel.astype(np.float32)
        self.cross = self.encoder.run({"mel": self.mel})
        self._lengths = [0] * num_slots
        shape = (num_slots, self.spec.num_decoder_heads, CAPACITY, self.spec.head_size)
        names = [f"{i}.{side}" for i in range(self.spec.num_decoder_layers) for side in ("key", "value")]
        self._cache = {name: np.zeros(shape, np.float32) for name in names}

    @property
    def encoder(self) -> Session:
        return self._sessions["encoder"]

    def step(self, chunks: Sequence[Sequence[int]]) -> list[Array]:
        """Logits of every new token of each row, whose tokens go behind those that it has."""
        lengths = np.array([len(chunk) for chunk in chunks])
        before = np.array(self._lengths)
        starts, longest = np.cumsum(lengths) - lengths, max(1, lengths.max())
        offsets = np.concatenate([np.arange(length) for length in lengths])
        tensors: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.concatenate(chunks).astype(np.int64),
            "position_ids": np.repeat(before, lengths) + offsets,
            "row_gather": np.minimum(starts[:, None] + np.arange(longest), lengths.sum() - 1),
            "row_scatter": np.repeat(np.arange(len(chunks)) * longest, lengths) + offsets,
            "seqlens_k": np.maximum(before + lengths - 1, 0).astype(np.int32),
            "query_seqlens": lengths.astype(np.int32),
            "total_sequence_length": np.array(CAPACITY, np.int32),
            "logits_index": np.arange(lengths.sum()),
        }
        tensors |= self.cross | {f"past_key_values.{name}": values for name, values in self._cache.items()}
        given = self._sessions["decoder"].run(tensors)
        self._cache = {name: given[f"present.{name}"].copy() for name in self._cache}
        self._lengths = (before + lengths).tolist()
        return np.split(given["logits"], np.cumsum(lengths)[:-1])

    def reference(self, row: int, ids: Sequence[int]) -> Array:
        with torch.no_grad():
            return (
                self.model(
                    input_features=torch.from_numpy(self.mel[row : row + 1]), decoder_input_ids=torch.tensor([ids])
                )
                .logits[0]
                .numpy()
            )

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    return Exported(tmp_path, "fp32", num_slots=3)


def test_cross_keys_and_values_are_those_of_the_decoders_layers(exported: Exported) -> None:
    with torch.no_grad():
        hidden = exported.model.model.encoder(torch.from_numpy(exported.mel)).last_hidden_state
        for i, layer in enumerate(exported.model.model.decoder.layers):
            for side, project in (("key", layer.encoder_attn.k_proj), ("value", layer.encoder_attn.v_proj)):
                expected = project(hidden).numpy().reshape(3, exported.spec.num_positions, 2, 16).transpose(0, 2, 1, 3)
                actual = exported.cross[f"cross.{i}.{side}"]
                actual = actual.swapaxes(2, 3) if side == "key" else actual
                np.testing.assert_allclose(actual, expected, atol=1e-4)
    exported.close()


def test_rows_of_different_lengths_decode_in_shared_steps(exported: Exported) -> None:
    texts = [[3, 10, 11, 12, 13, 14], [3, 40], [3, 60, 61, 62]]
    expected = [exported.reference(row, ids) for row, ids in enumerate(texts)]
    first = exported.step([texts[0][:4], texts[1][:1], texts[2][:3]])
    second = exported.step([texts[0][4:5], texts[1][1:], texts[2][3:]])
    third = exported.step([texts[0][5:], [], []])
    actual = [np.concatenate([first[0], second[0], third[0]]), *(np.concatenate([first[i], second[i]]) for i in (1, 2))]
    for row in range(3):
        np.testing.assert_allclose(actual[row], expected[row], atol=2e-4)
    exported.close()


def test_int8_keeps_close_to_the_source(tmp_path: Path) -> None:
    exported = Exported(tmp_path, "int8", num_slots=1)
    ids = [3, 10, 11, 12, 13, 14]
    (actual,), expected = exported.step([ids]), exported.reference(0, ids)
    cosines = (actual * expected).sum(-1) / np.linalg.norm(actual, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosines.min() > 0.99
    assert "int8 per channel" in exported.weights
    exported.close()


def test_both_halves_may_have_heads_of_different_sizes_and_more_bands(tmp_path: Path) -> None:
    exported = Exported(tmp_path, "fp32", num_slots=1, num_mel_bins=12, encoder_attention_heads=2, decoder_layers=1)
    (actual,) = exported.step([[3, 5, 7]])
    np.testing.assert_allclose(actual, exported.reference(0, [3, 5, 7]), atol=2e-4)
    exported.close()


def test_the_sizes_are_read(tmp_path: Path) -> None:
    make_whisper(tmp_path)
    assert read_whisper_spec(SafetensorsFolder(tmp_path, uri="tiny").config) == WhisperSpec(
        num_mels=8,
        num_frames=40,
        hidden_size=32,
        num_encoder_layers=2,
        num_encoder_heads=4,
        encoder_ffn_size=64,
        num_decoder_layers=3,
        num_decoder_heads=2,
        decoder_ffn_size=48,
        vocab_size=96,
        max_model_len=24,
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation_function": "relu"}, "activation_function"),
        ({"scale_embedding": True}, "scale_embedding"),
        ({"d_model": None}, "d_model"),
        ({"decoder_attention_heads": 5}, "does not divide d_model"),
        ({"encoder_layers": 0}, "encoder_layers"),
        ({"some_new_field": 3}, "some_new_field"),
    ],
)
def test_what_is_not_built_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    config = {"architectures": ["WhisperForConditionalGeneration"], **SIZES, **changes}
    with pytest.raises(ExportError, match=said):
        read_whisper_spec(config)
