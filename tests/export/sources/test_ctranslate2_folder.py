"""A tiny Whisper in CTranslate2's layout: the same tensors as in transformers' own."""

import json
from pathlib import Path

import numpy as np
import pytest
from tests.export.sources.ctranslate2_writer import variables_of, write_model
from tests.export.whisper_checkpoints import make_whisper

from sardonyx_export.errors import ExportError
from sardonyx_export.families.whisper import read_whisper_spec
from sardonyx_export.sources.ctranslate2_folder import CTranslate2Folder
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The model in transformers' layout and in CTranslate2's."""
    ours, theirs = tmp_path / "safetensors", tmp_path / "ctranslate2"
    model = make_whisper(ours)
    theirs.mkdir()
    write_model(theirs / "model.bin", variables_of(model), {"decoder/projection/weight": "decoder/embeddings/weight"})
    (theirs / "tokenizer.json").write_text("{}")
    (theirs / "config.json").write_text(json.dumps({"alignment_heads": [[1, 0]]}))
    return ours, theirs


def test_sizes_and_tensors_are_those_of_the_original(folders: tuple[Path, Path]) -> None:
    original, converted = SafetensorsFolder(folders[0], uri="a"), CTranslate2Folder(folders[1], uri="b")
    assert read_whisper_spec(converted.config) == read_whisper_spec(original.config)
    assert sorted(converted.names()) == sorted(name for name in original.names() if name != "proj_out.weight")
    for name in converted.names():
        expected = original.tensor(name).read()
        assert converted.tensor(name).shape == expected.shape
        np.testing.assert_array_equal(converted.tensor(name).read(), expected.astype(np.float16).astype(np.float32))
    assert json.loads(converted.texts()["generation_config.json"]) == {"alignment_heads": [[1, 0]]}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("encoder/conv1/weight", "conv1"),
        ("decoder/num_heads", "num_heads"),
        ("decoder/layer_0/ffn/linear_0/weight", "fc1"),
        ("decoder/embeddings/weight", "embed_tokens"),
    ],
)
def test_what_is_missing_is_named(folders: tuple[Path, Path], tmp_path: Path, name: str, said: str) -> None:
    from transformers import WhisperForConditionalGeneration

    variables = variables_of(WhisperForConditionalGeneration.from_pretrained(folders[0]))
    del variables[name]
    write_model(folders[1] / "model.bin", variables)
    with pytest.raises(ExportError, match=said):
        CTranslate2Folder(folders[1], uri="b")


def test_other_models_and_unknown_variables_are_refused(folders: tuple[Path, Path]) -> None:
    path = folders[1] / "model.bin"
    write_model(path, {}, specification="TransformerSpec")
    with pytest.raises(ExportError, match="TransformerSpec"):
        CTranslate2Folder(folders[1], uri="b")
    write_model(path, {"encoder/strange/weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ExportError, match="strange"):
        CTranslate2Folder(folders[1], uri="b")


def test_keys_with_a_bias_are_refused(folders: tuple[Path, Path]) -> None:
    from transformers import WhisperForConditionalGeneration

    variables = variables_of(WhisperForConditionalGeneration.from_pretrained(folders[0]))
    variables["encoder/layer_0/self_attention/linear_0/bias"][:] = 1
    write_model(folders[1] / "model.bin", variables)
    with pytest.raises(ExportError, match="keys"):
        CTranslate2Folder(folders[1], uri="b")
