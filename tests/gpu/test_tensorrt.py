"""TensorRT on a card: what the tests without one take from documentation and source."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from sardonyx.errors import EngineError
from sardonyx.metrics import Metrics
from sardonyx.repository.tensorrt_shapes import Bounds, OpenBounds, fixed
from sardonyx.runtime.providers import execution_provider, num_gpus
from sardonyx.runtime.session import Session, SessionConfig
from sardonyx.serving.engines import Engines, GraphPlace, read_facts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        num_gpus() == 0 or "TensorrtExecutionProvider" not in ort.get_available_providers(),
        reason="needs a card, onnxruntime-gpu and TensorRT",
    ),
]

SIZE = Bounds(32, 64, 96)
BOUNDS: OpenBounds = {"x": (Bounds(1, 2, 4), fixed(8), SIZE, SIZE)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two convolutions and what lies between, over pictures of any size."""
    draw = np.random.default_rng(0)
    weights = [draw.standard_normal((8, 8, 3, 3), dtype=np.float32) / 9 for _ in range(2)]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w0"], ["a"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Conv", ["b", "w1"], ["y"], pads=[1, 1, 1, 1]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 8, "Y", "X"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 8, "Y", "X"])],
        [numpy_helper.from_array(each, f"w{index}") for index, each in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save_model(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def open_on_card(path: Path, metrics: Metrics, **options: str) -> Session:
    engines = Engines(path.parent / "engines", metrics)
    providers = tuple(
        execution_provider(name, {"device_id": "0", **(options if name == "tensorrt" else {})})
        for name in ("tensorrt", "cuda")
    )
    place = GraphPlace(path=path, model="m", bounds=BOUNDS)
    return engines.open(place, SessionConfig(providers=providers, is_strict=True))


def counts(metrics: Metrics) -> tuple[float, float]:
    """Engines that were built, and that were found."""
    lines = dict(line.rsplit(" ", 1) for line in metrics.render()[0].decode().splitlines() if not line.startswith("#"))
    names = ("sardonyx_engine_builds_total", "sardonyx_engine_cache_hits_total")
    built, found = (float(lines[f'{name}{{model_name="m"}}']) for name in names)
    return built, found


def picture(rows: int, side: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((rows, 8, side, side), dtype=np.float32)


def test_versions_of_card_and_library_are_found() -> None:
    facts = read_facts(0)
    assert facts.tensorrt >= (10, 0, 0)
    assert facts.compute_capability >= 50


@pytest.mark.parametrize(("rows", "side"), [(1, 32), (2, 64), (4, 96), (3, 40)])
def test_results_are_those_of_the_cpu_all_over_the_profile(path: Path, rows: int, side: int) -> None:
    x = picture(rows, side)
    session = open_on_card(path, Metrics("test"))
    expected = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    # TF32 keeps ten bits of a number.
    np.testing.assert_allclose(session.run({"x": x})["y"], expected, rtol=1e-2, atol=1e-2)


def test_shape_outside_of_the_profile_fails_and_builds_nothing(path: Path) -> None:
    session = open_on_card(path, Metrics("test"))
    with pytest.raises(EngineError):
        session.run({"x": picture(1, 128)})


def test_second_start_finds_the_engine(path: Path) -> None:
    metrics = Metrics("test")
    open_on_card(path, metrics).close()
    engines = sorted(path.parent.glob("engines/m/*/*.engine"))
    assert engines
    written_ns = [each.stat().st_mtime_ns for each in engines]
    session = open_on_card(path, metrics)
    assert counts(metrics) == (1, 1)
    assert sorted(path.parent.glob("engines/m/*/*.engine")) == engines
    assert [each.stat().st_mtime_ns for each in engines] == written_ns
    assert session.run({"x": picture(2, 64)})["y"].shape == (2, 8, 64, 64)


def test_dumped_model_opens_in_place_of_the_graph(path: Path) -> None:
    metrics = Metrics("test")
    open_on_card(path, metrics, trt_dump_ep_context_model="1").close()
    assert list(path.parent.glob("engines/m/*/model_ctx.onnx"))
    session = open_on_card(path, metrics, trt_dump_ep_context_model="1")
    assert counts(metrics) == (1, 1)
    x = picture(2, 64)
    expected = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    np.testing.assert_allclose(session.run({"x": x})["y"], expected, rtol=1e-2, atol=1e-2)
