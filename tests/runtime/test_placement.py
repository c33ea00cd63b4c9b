from pathlib import Path

import pytest
from tests import tiny_tensors
from tests.runtime.ort_answers import CPU, CPU_REFUSED, CUDA, TENSORRT, FakeRuntime, assigned

from sardonyx.errors import ConfigError
from sardonyx.runtime.placement import load_failure
from sardonyx.runtime.providers import execution_provider
from sardonyx.runtime.session import SessionConfig, open_session


@pytest.fixture
def path(tmp_path):
    return tiny_tensors.write_model(tmp_path, "m", tiny_tensors.add_sub(), config="") / "1" / "model.onnx"


def config(*names: str, is_strict: bool = True, **options: object) -> SessionConfig:
    return SessionConfig(providers=tuple(map(execution_provider, names)), is_strict=is_strict, **options)


def refusal(path: Path, config: SessionConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        open_session(path, model_name="m", config=config)
    return str(caught.value)


def test_session_that_runs_where_it_was_asked_to_is_taken(path, monkeypatch):
    runtime = FakeRuntime(assignment=[assigned(TENSORRT, "Conv"), assigned(CUDA, "Add")]).install(monkeypatch)
    session = open_session(path, model_name="m", config=config("tensorrt", "cuda", "cpu"))
    assert session.provider == "tensorrt"
    assert [name for name, _ in runtime.opened[0]["providers"]] == [TENSORRT, CUDA, CPU]
    entries = runtime.opened[0]["options"]
    assert entries.get_session_config_entry("session.record_ep_graph_assignment_info") == "1"


def test_provider_that_could_not_be_set_up_is_refused_although_the_session_opened(path, monkeypatch):
    FakeRuntime(missing={CUDA}).install(monkeypatch)
    assert refusal(path, config("cuda", "cpu")) == "model.onnx: the execution provider cuda could not be set up"


def test_tensorrt_that_is_missing_is_not_replaced_by_cuda(path, monkeypatch):
    FakeRuntime(missing={TENSORRT}).install(monkeypatch)
    message = refusal(path, config("tensorrt", "cuda", "cpu", is_strict=False))
    assert message == "model.onnx: the execution provider tensorrt could not be set up"


def test_tensorrt_that_takes_no_node_is_refused(path, monkeypatch):
    FakeRuntime(assignment=[assigned(CUDA, "com.microsoft:GroupQueryAttention")]).install(monkeypatch)
    message = refusal(path, config("tensorrt", "cuda", "cpu", is_strict=False))
    assert message == "model.onnx: TensorRT takes none of its nodes; leave the accelerator out, and CUDA runs them"


def test_work_that_falls_to_the_cpu_is_refused_by_operator(path, monkeypatch):
    nodes = [assigned(CUDA, "Conv"), assigned(CPU, "Shape", "NonMaxSuppression", "com.example:Odd", "Gather")]
    FakeRuntime(assignment=nodes).install(monkeypatch)
    assert refusal(path, config("cuda", "cpu")) == (
        "model.onnx: cuda cannot run NonMaxSuppression, com.example:Odd: export the graph without them, or say "
        "KIND_AUTO in instance_group, and the CPU runs them"
    )


def test_many_operators_are_counted(path, monkeypatch):
    FakeRuntime(assignment=[assigned(CPU, *(f"Odd{n}" for n in range(8)))]).install(monkeypatch)
    assert "Odd0, Odd1, Odd2, Odd3, Odd4 and 3 more kinds of nodes" in refusal(path, config("cuda", "cpu"))


@pytest.mark.parametrize("nodes", [("Shape", "Gather", "Concat", "Cast"), ()])
def test_shapes_are_left_to_the_cpu(path, monkeypatch, nodes):
    FakeRuntime(assignment=[assigned(CUDA, "Conv"), assigned(CPU, *nodes)]).install(monkeypatch)
    open_session(path, model_name="m", config=config("cuda", "cpu"))


def test_cpu_may_take_what_is_left_where_nobody_insists(path, monkeypatch):
    FakeRuntime(assignment=[assigned(CUDA, "Conv"), assigned(CPU, "NonMaxSuppression")]).install(monkeypatch)
    open_session(path, model_name="m", config=config("cuda", "cpu", is_strict=False))


def test_cpu_is_no_provider_of_a_session_that_may_not_fall_back_to_it(path, monkeypatch):
    runtime = FakeRuntime().install(monkeypatch)
    entries = {"session.disable_cpu_ep_fallback": "1"}
    open_session(path, model_name="m", config=config("cuda", "cpu", session_entries=entries))
    assert [name for name, _ in runtime.opened[0]["providers"]] == [CUDA]
    assert runtime.opened[0]["options"].get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_refusal_of_the_cpu_is_told_in_our_words(path, monkeypatch):
    FakeRuntime(error=RuntimeError(CPU_REFUSED)).install(monkeypatch)
    entries = {"session.disable_cpu_ep_fallback": "1"}
    message = refusal(path, config("cuda", "cpu", session_entries=entries))
    assert message.startswith("model.onnx: cuda leaves nodes to the CPU, or could not be set up, and session.disable")


def test_cuda_alone_never_falls_back(path, monkeypatch):
    runtime = FakeRuntime().install(monkeypatch)
    open_session(path, model_name="m", provider="cuda")
    assert runtime.opened[0]["options"].get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert runtime.opened[0]["providers"] == [(CUDA, {"arena_extend_strategy": "kSameAsRequested"})]


def test_session_on_the_cpu_is_not_looked_into(path):
    """The real runtime, which records nothing unless asked."""
    assert open_session(path, model_name="m", config=config("cpu")).provider == "cpu"


def test_loaders_reason_is_told_without_the_folder(tmp_path, monkeypatch):
    for name in ("shared", "tensorrt"):
        (tmp_path / f"libonnxruntime_providers_{name}.so").write_bytes(b"no library")
    FakeRuntime().install(monkeypatch)
    reason = load_failure(execution_provider("tensorrt"), tmp_path)
    assert reason.startswith(": libonnxruntime_providers_shared.so: ")
    assert str(tmp_path) not in reason


def test_provider_without_a_library_of_its_own_has_no_reason(tmp_path):
    assert load_failure(execution_provider("cpu"), tmp_path) == ""
