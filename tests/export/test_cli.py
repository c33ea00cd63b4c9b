"""``sardonyx export`` as it is typed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.export.checkpoints import write_llama_folder

from sardonyx.cli import main
from sardonyx.repository.layout import Repository
from sardonyx_export.cli import parse_lora
from sardonyx_export.request import Lora


def _run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in ("export", *arguments)])
    return int(caught.value.code or 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama_folder(tmp_path / "Tiny-Llama")


def test_an_export_says_what_it_does_and_prints_where_it_went(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "repository"
    assert _run(folder, "--repository", root, "--name", "demo", "--precision", "fp32", "--max-model-len", "64") == 0
    shown = capsys.readouterr()
    assert shown.out == f"{root / 'demo' / '1'}\n"
    assert "demo: LlamaForCausalLM" in shown.err
    assert "Building the graph" in shown.err
    assert "Agrees with the source: 100.0%" in shown.err


def test_if_missing_does_nothing_the_second_time(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (folder, "--repository", tmp_path / "repository", "--if-missing")
    assert _run(*arguments) == 0
    first = capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "repository").rglob("*")}
    assert _run(*arguments) == 0
    shown = capsys.readouterr()
    assert shown.out == first
    assert "is there already" in shown.err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "repository").rglob("*")} == before


def test_if_missing_needs_neither_onnx_nor_onnx_runtime(tmp_path: Path, folder: Path) -> None:
    """It is what ``make serve`` runs each time."""
    assert _run(folder, "--repository", tmp_path / "repository", "--if-missing") == 0
    script = (
        "import sys; sys.modules['onnx'] = sys.modules['onnxruntime'] = None\n"
        "from sardonyx.cli import main; main(sys.argv[1:])"
    )
    arguments = ["export", str(folder), "--repository", str(tmp_path / "repository"), "--if-missing"]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)


def test_force_adds_a_version(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "repository"
    assert _run(folder, "--repository", root) == 0
    assert _run(folder, "--repository", root) == 2
    assert "--force adds a version" in capsys.readouterr().err
    assert _run(folder, "--repository", root, "--force") == 0
    assert Repository(root).entry("tiny-llama").versions == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "there is no folder or file nothing"),
        (("hf:nothing",), "hf:organisation/name"),
        (("x.gguf", "--force", "--if-missing"), "exclude each other"),
        (("x.gguf", "--name", "../x"), "is not a model name"),
        (("x.gguf", "--sha256", "12"), "64 hexadecimal digits"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(*arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("sardonyx: ")
    assert message in last


def test_a_folder_without_permission_is_told_in_one_line(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.getuid() == 0:
        (tmp_path / "file").write_text("")
        root = tmp_path / "file" / "repository"  # a folder cannot be made inside a file, not even by root
    else:
        (tmp_path / "closed").mkdir(mode=0o500)
        root = tmp_path / "closed" / "repository"
    assert _run(folder, "--repository", root) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("sardonyx: ")


def test_a_model_for_cuda_says_where_it_was_verified(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(folder, "--repository", tmp_path / "repository", "--target", "cuda") == 0
    assert "(run in numpy, not on CUDA)" in capsys.readouterr().err


def test_an_option_that_does_not_exist_is_refused(folder: Path) -> None:
    assert _run(folder, "--precision", "int3") != 0
    assert _run(folder, "--target", "tpu") != 0
    assert _run(folder, "--kv-cache-dtype", "int4") != 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "fp16"), "precision: is fp16; for the target cpu"),
        (("--kv-cache-dtype", "fp8"), "kv_cache_dtype: is fp8; for the target cpu the cache is float32"),
        (("--lora", "style.safetensors"), "--lora: is for diffusion models"),
        (("--lora", "style.safetensors:nan"), "nan is no scale"),
    ],
)
def test_options_that_do_not_suit_a_model_are_refused(
    tmp_path: Path, folder: Path, arguments: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(folder, "--repository", tmp_path / "repository", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("a/style.safetensors:0.8", "a/style.safetensors", 0.8),
        ("c:/style.safetensors", "c:/style.safetensors", 1.0),
    ],
)
def test_a_style_may_have_a_scale_behind_it(text: str, path: str, scale: float) -> None:
    assert parse_lora(text) == Lora(path=Path(path), scale=scale)
