"""Engines of TensorRT, with ONNX Runtime's answers as recorded: nothing here runs on a card."""

import asyncio
import threading
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from tests import tiny_tensors
from tests.runtime.ort_answers import CUDA, TENSORRT, FakeRuntime, assigned
from tests.serving.tensor_serving import pair, run, tensor_model, values

from sardonyx.errors import ConfigError, ModelNotReady
from sardonyx.metrics import Metrics
from sardonyx.repository.tensorrt_shapes import Bounds, fixed
from sardonyx.runtime.providers import execution_provider
from sardonyx.runtime.session import SessionConfig
from sardonyx.serving import engines as engines_module
from sardonyx.serving import tensor_loader
from sardonyx.serving.engines import EngineFacts, Engines, GraphPlace
from sardonyx.serving.loader import build_registry
from sardonyx.serving.registry import Registry
from sardonyx.serving.status import ModelState
from sardonyx.settings import Settings

FACTS = EngineFacts(tensorrt=(10, 13, 2), compute_capability=90, onnx_runtime="1.31.1")
ROWS = {"INPUT0": (Bounds(1, 4, 8), fixed(16)), "INPUT1": (Bounds(1, 4, 8), fixed(16))}


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Card:
    """A card that is not there, and what is opened on it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, facts: EngineFacts = FACTS) -> None:
        self.runtime = FakeRuntime(on_open=self._build).install(monkeypatch)
        self.clock = Clock()
        self.metrics = Metrics("test")
        self.engines = Engines(root / "engines", self.metrics, facts=lambda _: facts, now_s=self.clock)
        self.told: list[str] = []
        model = tiny_tensors.write_model(root, "m", tiny_tensors.add_sub(), config="")
        self.path = model / "1" / "model.onnx"

    def _build(self, providers: list[tuple[str, dict[str, str]]]) -> None:
        """What the provider does while a session is opened: minutes go by, and an engine is written."""
        self.clock.now_s += 42
        self.told.append(self.engines.progress("m"))
        options = dict(providers).get(TENSORRT, {})
        place = options.get("trt_engine_cache_path") or Path(options.get("trt_ep_context_file_path", "")).parent
        if options.get("trt_engine_cache_enable") == "1" and not list(Path(place).glob("*.engine")):
            (Path(place) / "x.engine").write_bytes(b"engine")

    def open(self, options: dict[str, str] | None = None, **place: object) -> dict[str, str]:
        """Open the model's graph; the options that TensorRT got."""
        providers = (execution_provider("tensorrt", {"device_id": "0", **(options or {})}), execution_provider("cuda"))
        given = {"path": self.path, "model": "m", "role": "unet", "bounds": ROWS, "file": "c.pbtxt"} | place
        self.engines.open(GraphPlace(**given), SessionConfig(providers=providers)).close()  # type: ignore[arg-type]
        opened: dict[str, str] = dict(self.runtime.opened[-1]["providers"])[TENSORRT]
        return opened

    def refusal(self, options: dict[str, str] | None = None, **place: object) -> str:
        with pytest.raises(ConfigError) as caught:
            self.open(options, **place)
        return str(caught.value)

    def counts(self) -> list[str]:
        """The metrics of engines."""
        lines = self.metrics.render()[0].decode().splitlines()
        return [line for line in lines if line.startswith("sardonyx_engine_") and "model_name" in line]


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(tmp_path, monkeypatch)


def test_session_is_opened_with_a_profile_for_every_open_input(card: Card) -> None:
    options = card.open({"trt_fp16_enable": "1"})
    assert options["trt_profile_min_shapes"] == "INPUT0:1x16,INPUT1:1x16"
    assert options["trt_profile_opt_shapes"] == "INPUT0:4x16,INPUT1:4x16"
    assert options["trt_profile_max_shapes"] == "INPUT0:8x16,INPUT1:8x16"
    assert options["trt_fp16_enable"] == "1"


def test_second_load_finds_the_engine_of_the_first(card: Card) -> None:
    first = card.open()["trt_engine_cache_path"]
    second = card.open()["trt_engine_cache_path"]
    assert ".partial-" in first
    assert not Path(first).exists()
    assert [each.name for each in Path(second).iterdir()] == ["x.engine"]
    assert card.counts() == [
        'sardonyx_engine_builds_total{model_name="m"} 1.0',
        'sardonyx_engine_build_seconds_total{model_name="m"} 42.0',
        'sardonyx_engine_cache_hits_total{model_name="m"} 1.0',
    ]


def test_build_is_told_with_its_graph_and_for_how_long(card: Card) -> None:
    card.open(number=2, total=3)
    assert card.told == ["building the TensorRT engine of unet, 2 of 3, 42 s"]
    assert card.engines.progress("m") == ""


def test_engine_from_the_cache_is_not_told(card: Card) -> None:
    card.open()
    card.open()
    assert card.told[1] == ""


def test_builds_wait_for_each_other(card: Card) -> None:
    with card.engines._building:
        thread = threading.Thread(target=card.open)
        thread.start()
        while not card.engines.progress("m"):
            pass
        assert card.engines.progress("m") == "waiting to build the TensorRT engine of unet, 1 of 1, 0 s"
    thread.join(30)
    assert card.told == ["building the TensorRT engine of unet, 1 of 1, 42 s"]


def test_failed_build_leaves_nothing_and_is_not_told_any_more(card: Card) -> None:
    card.runtime.error = RuntimeError("TensorRT EP failed to create engine from network")
    assert "cannot open it on the execution provider tensorrt" in card.refusal()
    assert list((card.path.parents[2] / "engines" / "m").iterdir()) == []
    assert card.engines.progress("m") == ""
    assert card.counts() == []


def test_session_that_fell_back_to_cuda_keeps_no_engine(card: Card) -> None:
    card.runtime.assignment = [assigned(CUDA, "Add")]
    assert "TensorRT takes none of its nodes" in card.refusal()
    assert list((card.path.parents[2] / "engines" / "m").iterdir()) == []


def test_dumped_model_is_opened_by_the_next_load(card: Card) -> None:
    options = card.open({"trt_dump_ep_context_model": "1"})
    context = Path(options["trt_ep_context_file_path"]).name
    folder = next((card.path.parents[2] / "engines" / "m").iterdir())
    (folder / context).write_bytes(card.path.read_bytes())
    card.open({"trt_dump_ep_context_model": "1"})
    assert card.runtime.opened[-1]["path"] == str(folder / context)


def test_model_that_holds_an_engine_is_opened_as_it_is(card: Card) -> None:
    compiled = card.path.with_name("model_ctx.onnx")
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", embed_mode=1, ep_cache_context=b"engine")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in "xy"]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]), opset_imports=opsets)
    onnx.save_model(model, compiled)
    card.runtime.stand_in = card.path
    options = card.open({"trt_fp16_enable": "1"}, path=compiled)
    assert options == {"device_id": "0", "trt_fp16_enable": "1"}
    assert card.told == ["loading the TensorRT engine of unet, 1 of 1, 42 s"]


def test_cache_that_the_operator_turned_off_is_not_used(card: Card) -> None:
    options = card.open({"trt_engine_cache_enable": "0"})
    assert "trt_engine_cache_path" not in options
    assert not (card.path.parents[2] / "engines").exists()


def test_engines_lie_where_the_operator_says(card: Card, tmp_path: Path) -> None:
    options = card.open({"trt_engine_cache_path": str(tmp_path / "own")})
    assert options["trt_engine_cache_path"].startswith(str(tmp_path / "own" / "m"))


def test_option_that_the_installed_version_lacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = EngineFacts(tensorrt=(11, 4, 1), compute_capability=90, onnx_runtime="1.31.1")
    message = Card(tmp_path, monkeypatch, facts).refusal({"trt_fp16_enable": "1"})
    assert message == (
        "c.pbtxt: optimization.execution_accelerators.gpu_execution_accelerator: unet: precision_mode FP16 is not part "
        "of TensorRT 11.4.1: export the graph in that precision, which both versions take"
    )


def test_axis_without_bounds_is_refused_before_anything_is_opened(card: Card) -> None:
    assert "unet: axis 0 of input 'INPUT0' has no bounds" in card.refusal(bounds={})
    assert card.runtime.opened == []


def test_shape_of_an_input_that_is_not_there_is_refused(card: Card) -> None:
    shapes = {f"trt_profile_{side}_shapes": "other:1x16" for side in ("min", "opt", "max")}
    assert "the graph has no input 'other'" in card.refusal(shapes)
    card.open(shapes, is_alone=False)


def test_graph_without_tensorrt_is_just_opened(card: Card) -> None:
    place = GraphPlace(path=card.path, model="m")
    assert card.engines.open(place, SessionConfig()).provider == "cpu"
    assert not (card.path.parents[2] / "engines").exists()


def test_missing_library_fails_the_load_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(tmp_path, monkeypatch)
    card.engines = Engines(tmp_path / "engines", card.metrics)
    assert "has no execution provider tensorrt" in card.refusal()


CONFIG = """
max_batch_size: 8
dynamic_batching { preferred_batch_size: [ 4 ] }
instance_group [ { kind: KIND_GPU } ]
optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt"
  parameters [ { key: "precision_mode" value: "FP16" }, { key: "max_workspace_size_bytes" value: "1073741824" } ] } } }
"""


def test_tensor_model_is_served_from_its_config_to_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime(assignment=[assigned(TENSORRT, "Add", "Sub")]).install(monkeypatch)
    monkeypatch.setattr(tensor_loader, "num_gpus", lambda: 1)
    monkeypatch.setattr(engines_module, "read_facts", lambda _: FACTS)
    tiny_tensors.write_model(tmp_path, "m", tiny_tensors.add_sub(shape=(1,)), config=CONFIG)

    async def test(registry: Registry) -> None:
        answer = await tensor_model(registry).infer(pair([[3]], [[4]]))
        assert values(answer) == {"OUTPUT0": [[7]], "OUTPUT1": [[-1]]}

    run(tmp_path, test, engine_cache=tmp_path / "engines")
    tensorrt, cuda, cpu = runtime.opened[0]["providers"]
    assert tensorrt[0] == TENSORRT
    options = tensorrt[1]
    assert options.pop("trt_engine_cache_path").startswith(str(tmp_path / "engines/m/model-"))
    assert options == {
        "device_id": "0",
        "trt_fp16_enable": "1",
        "trt_max_workspace_size": "1073741824",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_prefix": "m_model",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(tmp_path / "engines/timing-trt10.13.2"),
        "trt_profile_min_shapes": "INPUT0:1x1,INPUT1:1x1",
        "trt_profile_opt_shapes": "INPUT0:4x1,INPUT1:4x1",
        "trt_profile_max_shapes": "INPUT0:8x1,INPUT1:8x1",
    }
    assert cuda[1] == {
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "device_id": "0",
    }
    assert cpu[1] == {}


def test_repository_index_says_what_a_load_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry is asked while the thread that loads is in ONNX Runtime's hands."""
    opening, done = threading.Event(), threading.Event()

    def build(_: object) -> None:
        opening.set()
        assert done.wait(30)

    FakeRuntime(assignment=[assigned(TENSORRT, "Add", "Sub")], on_open=build).install(monkeypatch)
    monkeypatch.setattr(tensor_loader, "num_gpus", lambda: 1)
    monkeypatch.setattr(engines_module, "read_facts", lambda _: FACTS)
    tiny_tensors.write_model(tmp_path, "m", tiny_tensors.add_sub(shape=(1,)), config=CONFIG)
    settings = Settings(repository=tmp_path, num_threads=1, engine_cache=tmp_path / "engines")

    async def main() -> None:
        registry = build_registry(settings, Metrics("test"))
        start = asyncio.ensure_future(registry.start())
        await asyncio.to_thread(opening.wait, 30)
        doing = "building the TensorRT engine of model, 1 of 1, 0 s"
        row = registry.version_index()[0]
        assert (row.state, row.reason) == (ModelState.LOADING, doing)
        assert registry.list()[0].reason == doing
        assert registry.progress("m") == doing
        assert registry.unready_reasons() == [f"model m is loading: {doing}"]
        with pytest.raises(ModelNotReady, match=doing):
            registry.served("m")
        done.set()
        await start
        assert (registry.version_index()[0].state, registry.version_index()[0].reason) == (ModelState.READY, "")
        assert registry.is_ready()
        await registry.close()

    asyncio.run(main())
