from pathlib import Path

import numpy as np
import pytest

from sardonyx_export.errors import ExportError
from sardonyx_export.sources import plain_values
from sardonyx_export.sources.plain_values import read_values


def test_values_are_read_in_parts_from_where_they_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_values, "_CHUNK_BYTES", 6)
    path, values = tmp_path / "values", np.arange(10, dtype="<f2")
    path.write_bytes(b"head" + values.tobytes())
    read = read_values(path, "a", offset=4, shape=(2, 5), dtype="<f2", convert=lambda part: part + 1)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, np.arange(1, 11).reshape(2, 5))


def test_a_file_that_ends_early_is_named_with_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "values"
    path.write_bytes(bytes(7))
    with pytest.raises(ExportError, match="ended early"):
        read_values(path, "a", offset=0, shape=(2,), dtype="<f4")
