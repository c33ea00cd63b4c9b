"""Without a network: a cache is laid out as the hub's client does, and its offline switch is on."""

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from tests.export.checkpoints import write_llama_folder

from sardonyx_export.sources.hub import ALLOW_PATTERNS, IGNORE_PATTERNS, PIPELINE_IGNORED, PIPELINE_PATTERNS

_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_SCRIPT = """
import sys
from sardonyx_export.errors import ExportError
from sardonyx_export.sources.resolve import open_source, parse_source
try:
    opened = open_source(parse_source(sys.argv[1]), sha256=None, progress=lambda *_: None)
    checkpoint = opened.checkpoint
    print(opened.name, checkpoint.uri, opened.revision, checkpoint.licence, len(list(checkpoint.names())))
except ExportError as error:
    print("refused:", error)
"""


def _cache(home: Path) -> Path:
    """``HF_HOME`` with one downloaded model: snapshots are links to blobs."""
    entry = home / "hub" / "models--org--Tiny-Llama"
    snapshot = write_llama_folder(entry / "snapshots" / _COMMIT)
    (entry / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(entry / "blobs" / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(_COMMIT)
    return home


def _open(source: str, home: Path, cwd: Path) -> str:
    # A process of its own: the client reads its environment when it is imported.
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HOME": str(cwd)}
    command = [sys.executable, "-c", _SCRIPT, source]
    return subprocess.run(command, env=environment, cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_a_cached_model_is_opened_offline_and_nothing_else_is_written(tmp_path: Path) -> None:
    home = _cache(tmp_path / "hf")
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    before = sorted(path for path in home.rglob("*") if ".locks" not in path.parts)
    assert _open("hf:org/Tiny-Llama", home, cwd) == f"tiny-llama hf:org/Tiny-Llama {_COMMIT} mit 20\n"
    assert list(cwd.iterdir()) == []
    assert sorted(path for path in home.rglob("*") if ".locks" not in path.parts) == before


def test_a_model_that_is_not_cached_is_refused_offline(tmp_path: Path) -> None:
    answer = _open("hf:org/other@main", _cache(tmp_path / "hf"), tmp_path)
    assert answer.startswith("refused: hf:org/other@main is not in the local cache")


@pytest.mark.parametrize(
    ("file", "is_wanted"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("config.json", True),
        ("tokenizer.model", True),
        ("chat_template.jinja", True),
        ("README.md", True),
        ("model.bin", True),
        ("pytorch_model.bin", False),
        ("model.pt", False),
        ("model.pth", False),
        ("modeling_custom.py", False),
        ("flax_model.msgpack", False),
        ("model.gguf", False),
        ("consolidated.safetensors", False),
        ("onnx/config.json", False),
        ("original/model.safetensors", False),
    ],
)
def test_only_weights_and_texts_are_asked_for(file: str, is_wanted: bool) -> None:
    allowed = any(fnmatch(file, pattern) for pattern in ALLOW_PATTERNS)
    ignored = any(fnmatch(file, pattern) for pattern in IGNORE_PATTERNS)
    assert (allowed and not ignored) is is_wanted


@pytest.mark.parametrize(
    ("file", "is_wanted"),
    [
        ("model_index.json", True),
        ("unet/config.json", True),
        ("unet/diffusion_pytorch_model.safetensors", True),
        ("unet/diffusion_pytorch_model-00001-of-00002.safetensors", True),
        ("unet/diffusion_pytorch_model.safetensors.index.json", True),
        ("text_encoder_2/model.safetensors", True),
        ("tokenizer_2/merges.txt", True),
        ("README.md", True),
        ("v1-5-pruned-emaonly.safetensors", False),
        ("unet/diffusion_pytorch_model.fp16.safetensors", False),
        ("unet/diffusion_pytorch_model.non_ema.safetensors", False),
        ("unet/diffusion_pytorch_model.bin", False),
        ("safety_checker/model.safetensors", False),
        ("text_encoder/pytorch_model.bin", False),
        ("unet/onnx/config.json", False),
    ],
)
def test_of_a_pipeline_only_its_parts_are_asked_for(file: str, is_wanted: bool) -> None:
    allowed = any(fnmatch(file, pattern) for pattern in PIPELINE_PATTERNS)
    ignored = any(fnmatch(file, pattern) for pattern in PIPELINE_IGNORED)
    assert (allowed and not ignored) is is_wanted
