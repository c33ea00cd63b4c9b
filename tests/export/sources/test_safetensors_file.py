import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.safetensors_file import read_header


def _write(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def test_floats_of_every_width_are_read_as_float32(tmp_path: Path) -> None:
    values = np.array([[0.5, -1.25], [3.0, 1e-3]], np.float32)
    path = tmp_path / "a.safetensors"
    save_file({"f32": values, "f16": values.astype(np.float16), "f64": values.astype(np.float64)}, path)
    tensors = read_header(path)
    assert tensors["f32"].read().tolist() == values.tolist()
    assert tensors["f16"].read().tolist() == values.astype(np.float16).astype(np.float32).tolist()
    assert tensors["f64"].read().tolist() == values.tolist()
    assert {name: tensor.storage for name, tensor in tensors.items()} == {"f32": "F32", "f16": "F16", "f64": "F64"}


def test_bfloat16_is_the_upper_half_of_float32(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3.0e38, 0.0], np.float32)
    halves = (values.view(np.uint32) >> 16).astype("<u2")
    path = _write(
        tmp_path / "a.safetensors", {"x": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}, halves.tobytes()
    )
    expected = (halves.astype(np.uint32) << 16).view(np.float32)
    assert read_header(path)["x"].read().tolist() == expected.tolist()


def test_reading_gives_a_fresh_array_each_time(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": np.ones(3, np.float32)}, path)
    tensor = read_header(path)["x"]
    tensor.read()[:] = 7
    assert tensor.read().tolist() == [1, 1, 1]


def test_integer_tensors_are_listed_but_not_read_as_weights(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"ids": np.arange(3)}, path)
    with pytest.raises(ExportError, match="stored as I64"):
        read_header(path)["ids"].read()


def test_plain_floats_have_no_blocks(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": np.ones(3, np.float32)}, path)
    with pytest.raises(ValueError, match="no blocks"):
        read_header(path)["x"].blocks()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}, "is not 8 bytes"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}, "impossible shape"),
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**82]}, "end within|not readable|header"),
        ({"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}, "unknown type"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}, "should begin at 0"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "end within 8"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "belong to no tensor"),
        ({"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}, "no readable header"),
        ({"dtype": "F32", "shape": [2]}, "no readable header"),
        ([], "no readable header"),
    ],
)
def test_a_header_that_contradicts_the_file_is_refused(tmp_path: Path, entry: Any, message: str) -> None:
    path = _write(tmp_path / "a.safetensors", {"x": entry}, bytes(8))
    with pytest.raises(ExportError, match=message):
        read_header(path)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path = _write(tmp_path / "a.safetensors", {"x": entry, "y": entry}, bytes(8))
    with pytest.raises(ExportError, match="should begin at 8"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 100) + b"{}"])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ExportError):
        read_header(path)


def test_a_deeply_nested_header_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.safetensors", b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    with pytest.raises(ExportError):
        read_header(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_an_export_error_or_their_own_tensors(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "good.safetensors"
    if not path.exists():
        save_file({"a": np.ones((2, 3), np.float32), "b": np.zeros(5, np.float16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged = tmp_path / "bad.safetensors"
    damaged.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        tensors = read_header(damaged)
        for tensor in tensors.values():
            assert tensor.num_bytes <= len(content)
            assert tensor.read().size == np.prod(tensor.shape)
    except ExportError:
        pass
