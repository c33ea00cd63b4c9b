"""A tiny Whisper in CTranslate2's layout: the same tensors as in transformers' own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.export.sources.ctranslate2_writer import write_model
from tests.export.whisper_checkpoints import make_whisper

from sardonyx_export.errors import ExportError
from sardonyx_export.families.whisper import read_whisper_spec
from sardonyx_export.sources.ctranslate2_folder import CTranslate2Folder
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder


def variables_of(model: Any) -> dict[str, np.ndarray]:
    """The weights under CTranslate2's names, queries, keys and values in one matrix, in float16."""
    state = {name.removeprefix("model."): value.numpy() for name, value in model.state_dict().items()}
    found: dict[str, np.ndarray] = {}

    def linear(name: str, *parts: str) -> None:
        weights = [state[f"{part}.weight"] for part in parts]
        biases = [state.get(f"{part}.bias", np.zeros(len(weight))) for part, weight in zip(parts, weights, strict=True)]
        found[f"{name}/weight"], found[f"{name}/bias"] = np.concatenate(weights), np.concatenate(biases)

    def norm(name: str, part: str) -> None:
        found[f"{name}/gamma"], found[f"{name}/beta"] = state[f"{part}.weight"], state[f"{part}.bias"]

    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            found[f"encoder/{conv}/{kind}"] = state[f"encoder.{conv}.{kind}"]
    found["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    for half, num_layers, num_heads in (("encoder", 2, 4), ("decoder", 3, 2)):
        found[f"{half}/position_encodings/encodings"] = state[f"{half}.embed_positions.weight"]
        norm(f"{half}/layer_norm", f"{half}.layer_norm")
        for i in range(num_layers):
            to, of = f"{half}/layer_{i}", f"{half}.layers.{i}"
            linear(f"{to}/self_attention/linear_0", *(f"{of}.self_attn.{side}_proj" for side in "qkv"))
            linear(f"{to}/self_attention/linear_1", f"{of}.self_attn.out_proj")
            norm(f"{to}/self_attention/layer_norm", f"{of}.self_attn_layer_norm")
            if half == "decoder":
                linear(f"{to}/attention/linear_0", f"{of}.encoder_attn.q_proj")
                linear(f"{to}/attention/linear_1", f"{of}.encoder_attn.k_proj", f"{of}.encoder_attn.v_proj")
                linear(f"{to}/attention/linear_2", f"{of}.encoder_attn.out_proj")
                norm(f"{to}/attention/layer_norm", f"{of}.encoder_attn_layer_norm")
            linear(f"{to}/ffn/linear_0", f"{of}.fc1")
            linear(f"{to}/ffn/linear_1", f"{of}.fc2")
            norm(f"{to}/ffn/layer_norm", f"{of}.final_layer_norm")
        found[f"{half}/num_heads"] = np.array(num_heads, np.int16)
    return {name: each if each.dtype == np.int16 else each.astype(np.float16) for name, each in found.items()}


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
