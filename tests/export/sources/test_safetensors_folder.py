import json
from pathlib import Path

import numpy as np
import pytest
from tests.export.checkpoints import CHAT_TEMPLATE, write_llama_folder

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder


def _change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_folder_gives_config_weights_texts_and_licence(tmp_path: Path) -> None:
    checkpoint = SafetensorsFolder(write_llama_folder(tmp_path / "tiny"), uri="tiny")
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.licence == "mit"
    assert checkpoint.sha256 is None
    assert checkpoint.texts()["chat_template.jinja"] == CHAT_TEMPLATE.encode()
    assert set(checkpoint.texts()) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    norm = checkpoint.tensor("model.norm.weight")
    assert norm.shape == (64,)
    assert norm.read().tolist() == [1.0] * 64


def test_shards_are_read_like_one_file(tmp_path: Path) -> None:
    whole = SafetensorsFolder(write_llama_folder(tmp_path / "whole"), uri="whole")
    sharded = SafetensorsFolder(write_llama_folder(tmp_path / "sharded", shards=3), uri="sharded")
    assert set(whole.names()) == set(sharded.names())
    for name in whole.names():
        assert np.array_equal(whole.tensor(name).read(), sharded.tensor(name).read())


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = SafetensorsFolder(write_llama_folder(tmp_path / "tiny"), uri="tiny")
    with pytest.raises(ExportError, match=r"no tensor model\.layers\.9"):
        checkpoint.tensor("model.layers.9.mlp.up_proj.weight")


def test_an_index_that_points_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "tiny", shards=2)
    write_llama_folder(tmp_path / "other")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../other/model.safetensors"}}))
    with pytest.raises(ExportError, match="not the name of a safetensors file"):
        SafetensorsFolder(folder, uri="tiny")


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "tiny", shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"ghost": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ExportError, match="does not hold it"):
        SafetensorsFolder(folder, uri="tiny")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "README.md"])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_llama_folder(tmp_path / "tiny")
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(ExportError, match="leaves the model's folder"):
        SafetensorsFolder(folder, uri="tiny")


def test_links_into_the_blobs_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    entry = tmp_path / "models--org--tiny"
    folder = write_llama_folder(entry / "snapshots" / "abc")
    (entry / "blobs").mkdir()
    for path in list(folder.iterdir()):
        path.rename(entry / "blobs" / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    assert SafetensorsFolder(folder, uri="hf:org/tiny@abc").licence == "mit"


def test_a_sentencepiece_model_alone_is_refused_with_a_way_out(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "tiny")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(ExportError, match=r"tokenizer\.model only.*tokenizer\.json"):
        SafetensorsFolder(folder, uri="tiny")


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "tiny")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ExportError, match="never opened"):
        SafetensorsFolder(folder, uri="tiny")


def test_weights_that_are_already_quantised_are_refused(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "tiny")
    _change_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ExportError, match="already quantised \\(gptq\\)"):
        SafetensorsFolder(folder, uri="tiny")


def test_a_config_without_architecture_is_refused(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "tiny")
    _change_config(folder, architectures=[])
    with pytest.raises(ExportError, match=r"config\.json: architectures"):
        SafetensorsFolder(folder, uri="tiny")


def test_a_template_of_its_own_wins_over_the_one_in_the_tokenizer_config(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "tiny")
    (folder / "chat_template.jinja").write_text("own")
    assert SafetensorsFolder(folder, uri="tiny").texts()["chat_template.jinja"] == b"own"


def test_the_default_one_of_several_named_templates_is_taken(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "tiny")
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert SafetensorsFolder(folder, uri="tiny").texts()["chat_template.jinja"] == b"plain"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\ntext", "apache-2.0"),
        ("---\ntags:\n- x\nlicense: 'mit'\n---\n", "mit"),
        ("---\nlicense:\n- mit\n- bsd\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\r\nlicense: gemma\r\n---\r\n", "gemma"),
        ("# no front matter\nlicense: mit\n", None),
        ("---\ntitle: x\n---\nlicense: mit\n", None),
    ],
)
def test_the_licence_is_taken_from_the_card(tmp_path: Path, card: str, licence: str | None) -> None:
    folder = write_llama_folder(tmp_path / "tiny")
    (folder / "README.md").write_bytes(card.encode())
    assert SafetensorsFolder(folder, uri="tiny").licence == licence


def test_the_card_wins_over_what_the_archive_says(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "tiny")
    assert SafetensorsFolder(folder, uri="tiny", licence="Apache-2.0").licence == "mit"
    (folder / "README.md").unlink()
    assert SafetensorsFolder(folder, uri="tiny", licence="Apache-2.0").licence == "Apache-2.0"
