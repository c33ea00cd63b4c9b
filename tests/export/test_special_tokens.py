import json
from pathlib import Path
from typing import Any

import pytest
from tests.export.checkpoints import tiny_llama_metadata, tiny_llama_tensors, write_gguf, write_llama_folder

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.gguf_file import GgufFile
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder
from sardonyx_export.special_tokens import SpecialTokens, load_tokenizer, read_special_tokens


def _read(folder: Path) -> SpecialTokens:
    checkpoint = SafetensorsFolder(folder, uri="tiny")
    return read_special_tokens(checkpoint, load_tokenizer(checkpoint), vocab_size=checkpoint.config["vocab_size"])


def _write(folder: Path, file: str, content: dict[str, Any]) -> None:
    (folder / file).write_text(json.dumps(content))


def test_the_generation_config_wins_over_the_config(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "tiny")
    assert _read(folder) == SpecialTokens(bos=1, eos=[2], pad=None, add_bos=False)
    _write(folder, "generation_config.json", {"eos_token_id": [2, 0, 2], "pad_token_id": 0})
    assert _read(folder) == SpecialTokens(bos=1, eos=[2, 0], pad=0, add_bos=False)


def test_the_tokenizers_own_names_are_the_last_resort(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    _write(folder, "config.json", {**config, "eos_token_id": None, "bos_token_id": -1})
    _write(folder, "tokenizer_config.json", {"eos_token": {"content": "<|endoftext|>"}, "pad_token": "<|im_end|>"})
    assert _read(folder) == SpecialTokens(bos=None, eos=[0], pad=2, add_bos=False)


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "tiny")
    _write(folder, "generation_config.json", {"eos_token_id": 10**6})
    with pytest.raises(ExportError, match="eos_token_id: 1000000 is outside the vocabulary"):
        _read(folder)


def test_whether_bos_is_added_is_tried_on_the_tokenizer(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", metadata=tiny_llama_metadata(), tensors=tiny_llama_tensors(), add_bos=True)
    checkpoint = GgufFile(path, uri="a")
    special = read_special_tokens(checkpoint, load_tokenizer(checkpoint), vocab_size=checkpoint.config["vocab_size"])
    assert special == SpecialTokens(bos=1, eos=[2], pad=2, add_bos=True)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "tiny")
    _write(folder, "tokenizer.json", {"model": {}})
    with pytest.raises(ExportError, match=r"tokenizer\.json: cannot be loaded"):
        load_tokenizer(SafetensorsFolder(folder, uri="tiny"))
