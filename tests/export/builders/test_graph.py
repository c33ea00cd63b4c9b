from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from sardonyx_export.builders.graph import GraphWriter


def test_weights_are_on_disk_before_the_next_piece_is_asked_for(tmp_path: Path) -> None:
    sizes = []

    with GraphWriter(tmp_path) as graph:

        def pieces():  # type: ignore[no-untyped-def]
            for _ in range(3):
                yield np.ones((1 << 16,), np.float32)
                sizes.append((tmp_path / "model.onnx.data").stat().st_size)

        graph.weight("w", np.float32, (3 << 16,), pieces())
    # The last few kilobytes may still be in the file's buffer.
    assert [size >> 18 for size in sizes] == [1, 2, 3]


def test_a_shared_weight_has_the_same_bytes_under_another_shape(tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.float32).reshape(4, 16)
    with GraphWriter(tmp_path) as graph:
        graph.weight("w", np.float32, (4, 16), [values[:1], values[1:]])
        graph.share("flat", "w", (64,))
        graph.output("a", np.float32, [4, 16])
        graph.output("b", np.float32, [64])
        graph.node("Identity", ["w"], "a")
        graph.node("Identity", ["flat"], "b")
        model, data = graph.save("shared")
    assert data.stat().st_size == 256
    a, b = ort.InferenceSession(model).run(["a", "b"], {})
    assert (a == values).all()
    assert (b == values.reshape(-1)).all()


def test_a_weight_takes_another_shape_over_the_same_bytes(tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.float32).reshape(4, 16)
    with GraphWriter(tmp_path) as graph:
        graph.reshape(graph.weight("w", np.float32, (4, 16), [values]), (8, 8))
        graph.output("y", np.float32, [8, 8])
        graph.node("Identity", ["w"], "y")
        model, _ = graph.save("reshaped")
    (y,) = ort.InferenceSession(model).run(["y"], {})
    np.testing.assert_array_equal(y, values.reshape(8, 8))


def test_large_weights_begin_on_a_page_and_small_ones_are_packed(tmp_path: Path) -> None:
    with GraphWriter(tmp_path) as graph:
        for name, size in (("small", 3), ("other", 5), ("large", 1 << 15), ("last", 2)):
            graph.weight(name, np.float32, (size,), [np.zeros(size, np.float32)])
        model, _ = graph.save("aligned")
    tensors = onnx.load(model, load_external_data=False).graph.initializer
    offsets = {
        tensor.name: int({entry.key: entry.value for entry in tensor.external_data}["offset"]) for tensor in tensors
    }
    assert offsets == {"small": 0, "other": 64, "large": 4096, "last": 4096 + (4 << 15)}


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        GraphWriter(tmp_path)
    assert (tmp_path / "model.onnx.data").read_bytes() == b"old"
