"""How the instances of a model share sessions and threads."""

from pathlib import Path

import pytest
from tests import tiny_tensors
from tests.serving.tensor_serving import pair, run, tensor_model, values, write_add_sub

from sardonyx.metrics import Metrics
from sardonyx.repository.autocomplete import complete_config
from sardonyx.repository.config import load_config
from sardonyx.repository.tensor_config import read_placement
from sardonyx.runtime.session import Session
from sardonyx.serving import quick_models, tensor_sessions
from sardonyx.serving.engines import Engines, GraphPlace
from sardonyx.serving.registry import Registry
from sardonyx.serving.tensor_sessions import SessionOpener


def opener(root: Path, config: str, *, num_threads: int = 4) -> SessionOpener:
    folder = tiny_tensors.write_model(root, "m", tiny_tensors.add_sub(), config=config)
    parsed = complete_config(load_config(folder), [], [], num_gpus=0, auto_complete=False)
    engines = Engines(root / "engines", Metrics("test"))
    place = GraphPlace(path=folder / "1" / "model.onnx", model="m")
    return SessionOpener(engines, place, folder, read_placement(parsed), num_threads)


def num_threads(session: Session | None) -> int:
    assert session is not None
    threads: int = session._open().get_session_options().intra_op_num_threads
    return threads


def test_instances_on_the_cpu_share_a_session_and_divide_the_threads(tmp_path: Path) -> None:
    made = opener(tmp_path, "instance_group [ { count: 2 kind: KIND_CPU } ]")
    first, second = made.open_all()
    assert first is second
    assert num_threads(first) == 2
    assert num_threads(made.open_wide()) == 4


def test_more_instances_than_threads_have_one_each(tmp_path: Path) -> None:
    made = opener(tmp_path, "instance_group [ { count: 8 kind: KIND_CPU } ]")
    assert num_threads(made.open_all()[0]) == 1


def test_one_instance_has_all_threads_and_no_second_session(tmp_path: Path) -> None:
    made = opener(tmp_path, "instance_group [ { count: 1 kind: KIND_CPU } ]")
    assert num_threads(made.open_all()[0]) == 4
    assert made.open_wide() is None


def test_the_operators_thread_count_is_each_instances_own(tmp_path: Path) -> None:
    config = "instance_group [ { count: 2 kind: KIND_CPU } ]"
    config += ' parameters { key: "intra_op_thread_count" value { string_value: "3" } }'
    made = opener(tmp_path, config)
    assert num_threads(made.open_all()[0]) == 3
    assert made.open_wide() is None


def test_a_large_graph_is_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_sessions, "MAX_WIDE_BYTES", 10)
    assert opener(tmp_path, "instance_group [ { count: 2 kind: KIND_CPU } ]").open_wide() is None


def test_answers_are_the_same_whichever_session_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_models, "MAX_RUN_S", 0.0)
    write_add_sub(tmp_path, rest="instance_group [ { count: 2 kind: KIND_CPU } ]")

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        runner = model._engine._runner  # type: ignore[attr-defined]
        assert runner._wide is not None
        assert values(await model.infer(pair([[3]], [[4]]))) == {"OUTPUT0": [[7]], "OUTPUT1": [[-1]]}
        with runner._lone.run():  # as if another instance were at it
            assert values(await model.infer(pair([[3]], [[4]]))) == {"OUTPUT0": [[7]], "OUTPUT1": [[-1]]}

    run(tmp_path, test, num_threads=2)
