"""What sentence-transformers' files say, read from folders that the library itself saved, and from broken ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.export.encoder_checkpoints import HIDDEN_SIZE, make_encoder

from sardonyx_export.encoder_spec import Dense, Norm, Normalise
from sardonyx_export.errors import ExportError
from sardonyx_export.families.sentence_transformers import SentenceLayout, read_layout
from sardonyx_export.sources.model_folder import ModelFolder

library = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transformer, mean pooling, Dense with tanh to 12, LayerNorm, Normalize; two prompts."""
    root = tmp_path_factory.mktemp("saved")
    make_encoder(root / "encoder", "BertModel")
    return save(root / "encoder", root / "model", "mean", [dense(HIDDEN_SIZE, 12), norm(12), modules.Normalize()])


def dense(size: int, width: int) -> Any:
    return modules.Dense(size, width)


def norm(size: int) -> Any:
    return modules.LayerNorm(size)


def save(encoder: Path, target: Path, pooling: str, steps: list[Any], **pooling_options: Any) -> Path:
    transformer = modules.Transformer(str(encoder))
    pooled = modules.Pooling(HIDDEN_SIZE, pooling_mode=pooling, **pooling_options)
    prompts = {"query": "ask: ", "document": ""}
    model = library.SentenceTransformer(modules=[transformer, pooled, *steps], device="cpu", prompts=prompts)
    model.save(str(target), create_model_card=False)
    return target


def layout(folder: Path) -> SentenceLayout:
    return read_layout(ModelFolder(folder), json.loads((folder / "config.json").read_text()))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(folder: Path, file: str, **fields: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_modules_become_a_head(saved):
    read = layout(saved)
    assert read.head.poolings == ("mean",)
    first, second, third = read.head.steps
    assert isinstance(first, Dense)
    assert first.weight.shape == (12, HIDDEN_SIZE)
    assert first.activation == "tanh"
    assert isinstance(second, Norm)
    assert isinstance(third, Normalise)
    assert read.embeddings.is_normalized
    assert read.embeddings.pooling == "mean"


def test_prompts_and_similarity_are_read(saved):
    read = layout(saved).embeddings
    assert read.prompts == {"query": "ask: ", "document": ""}
    assert read.default_prompt is None
    assert read.similarity == "cosine"


def test_default_prompt_must_be_a_prompt(folder):
    change(folder, "config_sentence_transformers.json", default_prompt_name="query")
    assert layout(folder).embeddings.default_prompt == "query"
    change(folder, "config_sentence_transformers.json", default_prompt_name="other")
    with pytest.raises(ExportError, match="default_prompt_name: is 'other', which is no prompt"):
        layout(folder)


def test_legacy_flags_put_poolings_side_by_side(folder):
    (folder / "1_Pooling/config.json").write_text(
        json.dumps({"word_embedding_dimension": HIDDEN_SIZE, "pooling_mode_cls_token": True})
    )
    assert layout(folder).head.poolings == ("cls",)
    change(folder, "1_Pooling/config.json", pooling_mode_max_tokens=True, pooling_mode_mean_tokens=False)
    assert layout(folder).head.poolings == ("cls", "max")
    assert layout(folder).embeddings.pooling == "cls+max"


def test_prompt_may_be_left_out_of_pooling(folder):
    change(folder, "1_Pooling/config.json", include_prompt=False)
    read = layout(folder)
    assert not read.head.pools_prompt
    assert not read.embeddings.pools_prompt


def test_matryoshka_sizes_are_read(folder):
    change(folder, "config.json", matryoshka_dimensions=[12, 8])
    assert layout(folder).embeddings.matryoshka_dims == [8, 12]


def test_length_and_small_letters_are_read(folder):
    change(folder, "sentence_bert_config.json", max_seq_length=20, do_lower_case=True)
    read = layout(folder)
    assert read.max_seq_length == 20
    assert read.lowercases


def test_bare_encoder_is_averaged(tmp_path):
    make_encoder(tmp_path, "BertModel")
    read = layout(tmp_path)
    assert read.head.poolings == ("mean",)
    assert read.head.steps == ()
    assert not read.embeddings.is_normalized
    config = json.loads((tmp_path / "config.json").read_text())
    assert read_layout(ModelFolder(tmp_path), config, "cls").head.poolings == ("cls",)


def test_asked_pooling_does_not_override_the_files(saved):
    with pytest.raises(ExportError, match=r"--pooling: applies to an encoder without modules\.json"):
        read_layout(ModelFolder(saved), {}, "cls")


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "pooling_mode: is 'median'; known are cls, mean"),
        ("1_Pooling/config.json", {"pooling_mode": []}, r"pooling_mode: is \[\]"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.Softsign"}, "activation_function: is 'Softsign'"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name"),
        ("config_sentence_transformers.json", {"truncate_dim": 8}, "truncate_dim: cuts every embedding"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "l7"}, "similarity_fn_name: is 'l7'"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length: is 0"),
        ("config.json", {"matryoshka_dims": ["a"]}, "matryoshka_dims"),
    ],
)
def test_what_is_not_implemented_is_refused_by_field(folder, file, fields, message):
    change(folder, file, **fields)
    with pytest.raises(ExportError, match=message):
        layout(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"type": "x.Transformer", "path": "0_Transformer"}, {"type": "x.Pooling", "path": "1_Pooling"}], "0_Transf"),
        ([{"type": "x.Transformer", "path": ""}], "Transformer and Pooling must come first"),
        ([{"type": "x.Transformer", "path": ""}, {"type": "x.CNN", "path": "1_CNN"}], "must come first"),
        (
            [
                {"type": "x.Transformer", "path": ""},
                {"type": "x.Pooling", "path": "1_Pooling"},
                {"type": "x.LSTM", "path": "2_LSTM"},
            ],
            "has a module LSTM, which is not implemented",
        ),
        ([{"path": ""}], "is not a list of modules"),
        ({"type": 1}, "is not a list of modules"),
    ],
)
def test_modules_that_are_not_known_are_refused(folder, entries, message):
    (folder / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(ExportError, match=message):
        layout(folder)


def test_pickled_dense_layer_is_never_opened(folder):
    (folder / "2_Dense/model.safetensors").rename(folder / "2_Dense/pytorch_model.bin")
    with pytest.raises(ExportError, match="pickled weights are never opened"):
        layout(folder)


def test_module_outside_of_the_folder_is_refused(folder):
    entries = json.loads((folder / "modules.json").read_text())
    entries[1]["path"] = "../elsewhere"
    (folder / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(ExportError, match="is no path inside the model's folder"):
        layout(folder)


def test_dense_weights_are_the_saved_ones(saved):
    from safetensors.numpy import load_file

    first = layout(saved).head.steps[0]
    assert isinstance(first, Dense)
    stored = load_file(saved / "2_Dense/model.safetensors")
    np.testing.assert_array_equal(first.weight, stored["linear.weight"])
