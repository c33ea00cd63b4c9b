from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.export.sources.ctranslate2_writer import floats, text, write_model

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.ctranslate2_file import read_ctranslate2


def test_floats_flags_and_aliases_are_read(tmp_path: Path) -> None:
    matrix, half = floats(4, 3), floats(2, 3, 5).astype(np.float16)
    path = tmp_path / "model.bin"
    flag = np.array(1, np.int8)
    write_model(path, {"a/weight": matrix, "b/weight": half, "c/flag": flag}, {"d/weight": "a/weight"})
    file = read_ctranslate2(path)
    assert (file.specification, file.revision) == ("WhisperSpec", 3)
    assert {name: (each.shape, each.storage) for name, each in file.variables.items()} == {
        "a/weight": ((4, 3), "F32"),
        "b/weight": ((2, 3, 5), "F16"),
        "c/flag": ((), "I8"),
        "d/weight": ((4, 3), "F32"),
    }
    np.testing.assert_array_equal(file.variables["a/weight"].read(), matrix)
    np.testing.assert_array_equal(file.variables["b/weight"].read(), half.astype(np.float32))
    np.testing.assert_array_equal(file.variables["d/weight"].read(), matrix)
    assert file.variables["d/weight"].name == "d/weight"
    assert file.variables["c/flag"].scalar() == 1


def test_int8_weights_are_divided_by_the_scale_of_their_row(tmp_path: Path) -> None:
    codes = np.array([[127, -64], [10, 0]], np.int8)
    scales = np.array([127, 20], np.float32)
    write_model(tmp_path / "model.bin", {"a/weight": codes, "a/weight_scale": scales})
    variables = read_ctranslate2(tmp_path / "model.bin").variables
    assert list(variables) == ["a/weight"]
    np.testing.assert_allclose(variables["a/weight"].read(), codes / scales[:, None], rtol=1e-6)


def test_integers_without_a_scale_are_no_weights(tmp_path: Path) -> None:
    write_model(tmp_path / "model.bin", {"a": np.ones((2, 2), np.int8)})
    with pytest.raises(ExportError, match="I8"):
        read_ctranslate2(tmp_path / "model.bin").variables["a"].read()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-1], "cut off"),
        (lambda data: data + b"\0", "belong to no variable"),
        (lambda data: b"\x05" + data[1:], "version 5"),
        (lambda data: data.replace(text("a") + b"\x02", text("a") + b"\x09"), "9 axes"),
        (lambda data: data.replace(b"\x02\x00\x00\x00\x03\x00\x00\x00\x00", b"\x02\0\0\0\x04\0\0\0\0"), "is not 24"),
        (lambda data: data.replace(text("a") + b"\x02", b"\x02\x00\xff\x00\x02"), "no text"),
        (lambda data: b"", "cut off"),
    ],
)
def test_what_does_not_fit_the_file_is_refused(tmp_path: Path, change: object, said: str) -> None:
    path = tmp_path / "model.bin"
    write_model(path, {"a": floats(2, 3)})
    assert callable(change)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ExportError, match=said):
        read_ctranslate2(path)


def test_impossible_scales_and_aliases_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_model(path, {"a": floats(2, 3)}, {"b": "nobody"})
    with pytest.raises(ExportError, match="nobody"):
        read_ctranslate2(path)
    write_model(path, {"a": np.ones((2, 3), np.int8), "a_scale": floats(3)})
    with pytest.raises(ExportError, match="one scale a row"):
        read_ctranslate2(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_is_refused_and_never_reads_beyond_the_file(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.bin"
    write_model(path, {"a": floats(2, 3), "b": floats(4).astype(np.float16)}, {"c": "a"})
    raw = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    try:
        file = read_ctranslate2(path)
    except ExportError:
        return
    for variable in file.variables.values():
        assert 0 <= variable.offset <= variable.offset + variable.num_bytes <= len(raw)
