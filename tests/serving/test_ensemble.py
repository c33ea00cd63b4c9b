"""Ensembles of real models."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests import tiny_tensors
from tests.serving.fakes import until
from tests.serving.tensor_serving import (
    HOLD,
    assert_idle,
    call,
    ensemble_model,
    of_sequence,
    one,
    pair,
    run,
    running,
    tensor,
    tensor_model,
    turns,
    values,
    waiting,
    write_add_sub,
    write_identity,
    write_slow,
)
from tests.tiny_models import make_language_model

from sardonyx.errors import EngineError, InvalidRequest, ModelNotReady, Overloaded
from sardonyx.serving.registry import Registry

Maps = dict[str, str]


def write_ensemble(
    root: Path,
    steps: list[tuple[str, Maps, Maps]],
    *,
    inputs: dict[str, str],
    outputs: dict[str, str],
    name: str = "e",
    max_batch_size: int = 8,
    more: str = "",
) -> None:
    """An ensemble of tensors of one element. `inputs` and `outputs` are datatypes by name."""

    def maps(field: str, pairs: Maps) -> str:
        return " ".join(f'{field} {{ key: "{key}" value: "{value}" }}' for key, value in pairs.items())

    def ports(field: str, datatypes: dict[str, str]) -> str:
        kinds = {"BYTES": "STRING"}
        return "\n".join(
            f'{field} {{ name: "{each}" data_type: TYPE_{kinds.get(kind, kind)} dims: [ 1 ] }}'
            for each, kind in datatypes.items()
        )

    written = "\n".join(
        f'step {{ model_name: "{model}" {maps("input_map", given)} {maps("output_map", made)} }}'
        for model, given, made in steps
    )
    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(
        f'platform: "ensemble"\nmax_batch_size: {max_batch_size}\n'
        f"{ports('input', inputs)}\n{ports('output', outputs)}\n"
        f"ensemble_scheduling {{ {written} }}\n{more}"
    )


def write_chain(root: Path, *, more: str = "") -> None:
    """TWICE_A = (A + B) + (A - B) and TWICE_B = (A + B) - (A - B); the second step is first in the file."""
    write_add_sub(root, "add")
    write_ensemble(
        root,
        [
            ("add", {"INPUT0": "sum", "INPUT1": "difference"}, {"OUTPUT0": "TWICE_A", "OUTPUT1": "TWICE_B"}),
            ("add", {"INPUT0": "A", "INPUT1": "B"}, {"OUTPUT0": "sum", "OUTPUT1": "difference"}),
        ],
        inputs={"A": "INT32", "B": "INT32"},
        outputs={"TWICE_A": "INT32", "TWICE_B": "INT32"},
        more=more,
    )


def ab(a: Any = ((7,),), b: Any = ((2,),), **options: Any) -> Any:
    return call(tensor("A", a), tensor("B", b), **options)


def test_steps_run_in_the_order_of_their_tensors_and_not_of_the_file(tmp_path: Path) -> None:
    write_chain(tmp_path)

    async def test(registry: Registry) -> None:
        model = ensemble_model(registry)
        assert values(await model.infer(ab())) == {"TWICE_A": [[14]], "TWICE_B": [[4]]}
        assert values(await model.infer(ab([[1], [2]], [[3], [4]]))) == {"TWICE_A": [[2], [4]], "TWICE_B": [[6], [8]]}

    run(tmp_path, test)


def test_outputs_come_in_the_order_in_which_they_are_wanted(tmp_path: Path) -> None:
    write_chain(tmp_path)

    async def test(registry: Registry) -> None:
        model = ensemble_model(registry)
        assert list(values(await model.infer(ab(outputs=["TWICE_B", "TWICE_A"])))) == ["TWICE_B", "TWICE_A"]
        assert values(await model.infer(ab(outputs=["TWICE_B"]))) == {"TWICE_B": [[4]]}

    run(tmp_path, test)


def write_fork(root: Path) -> None:
    """L and R are A, each by way of a model of its own."""
    write_ensemble(
        root,
        [("left", {"INPUT0": "A"}, {"OUTPUT0": "L"}), ("right", {"INPUT0": "A"}, {"OUTPUT0": "R"})],
        inputs={"A": "INT32"},
        outputs={"L": "INT32", "R": "INT32"},
    )


def test_branches_run_at_once(tmp_path: Path) -> None:
    write_identity(tmp_path, "left", shape=(1,), rest=HOLD)
    write_identity(tmp_path, "right", shape=(1,), rest=HOLD)
    write_fork(tmp_path)

    async def test(registry: Registry) -> None:
        asked = asyncio.create_task(ensemble_model(registry).infer(one([[3]], name="A")))
        # Neither would ever begin if it had to wait for the other's end.
        for name in ("left", "right"):
            await waiting(tensor_model(registry, name), 1)
        await asyncio.gather(*(tensor_model(registry, name).infer(one([[0]] * 7)) for name in ("left", "right")))
        assert values(await asked) == {"L": [[3]], "R": [[3]]}

    run(tmp_path, test)


def test_steps_that_nobody_wants_are_not_run(tmp_path: Path) -> None:
    write_identity(tmp_path, "left", shape=(1,))
    write_identity(tmp_path, "right", shape=(1,))
    write_fork(tmp_path)

    async def test(registry: Registry) -> None:
        assert values(await ensemble_model(registry).infer(one([[3]], name="A", outputs=["R"]))) == {"R": [[3]]}
        counts = [tensor_model(registry, name).statistics.execution_count for name in ("left", "right")]
        assert counts == [0, 1]

    run(tmp_path, test)


def test_error_of_a_step_is_the_calls_and_its_neighbours_are_cancelled(tmp_path: Path) -> None:
    write_add_sub(tmp_path, "broken", datatype="BYTES")
    write_identity(tmp_path, "held", datatype="BYTES", shape=(1,), rest=HOLD)
    write_ensemble(
        tmp_path,
        [
            ("held", {"INPUT0": "A"}, {"OUTPUT0": "H"}),
            ("broken", {"INPUT0": "A", "INPUT1": "A"}, {"OUTPUT0": "S", "OUTPUT1": "D"}),
        ],
        inputs={"A": "BYTES"},
        outputs={"H": "BYTES", "S": "BYTES", "D": "BYTES"},
    )

    async def test(registry: Registry) -> None:
        model, held = ensemble_model(registry), tensor_model(registry, "held")
        with pytest.raises(EngineError, match="model broken failed"):
            await model.infer(one([["x"]], "BYTES", "A"))
        await waiting(held, 0)
        assert_idle(held)
        assert held.statistics.failures == {"CANCELED": 1}
        assert model.statistics.failures == {"BACKEND": 1}
        assert model.statistics.success.count == 0

    run(tmp_path, test)


def test_errors_of_several_steps_at_once_are_all_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_add_sub(tmp_path, "broken", datatype="BYTES")
    write_ensemble(
        tmp_path,
        [("broken", {"INPUT0": "A", "INPUT1": "A"}, {"OUTPUT0": f"S{n}", "OUTPUT1": f"D{n}"}) for n in range(4)],
        inputs={"A": "BYTES"},
        outputs={f"{side}{n}": "BYTES" for n in range(4) for side in "SD"},
    )

    async def test(registry: Registry) -> None:
        with pytest.raises(EngineError):
            await ensemble_model(registry).infer(one([["x"]], "BYTES", "A"))

    run(tmp_path, test)
    assert "never retrieved" not in caplog.text


def test_overload_of_a_step_is_the_calls(tmp_path: Path) -> None:
    rest = HOLD.replace("}", "default_queue_policy { max_queue_size: 1 } }")
    write_identity(tmp_path, "left", shape=(1,), rest=rest)
    write_identity(tmp_path, "right", shape=(1,))
    write_fork(tmp_path)

    async def test(registry: Registry) -> None:
        model, left = ensemble_model(registry), tensor_model(registry, "left")
        held = asyncio.create_task(model.infer(one([[1]], name="A")))
        await waiting(left, 1)
        with pytest.raises(Overloaded, match="Exceeds maximum queue size"):
            await model.infer(one([[1]], name="A"))
        assert model.statistics.failures == {"REJECTED": 1}
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)

    run(tmp_path, test)


def test_cancelling_a_call_cancels_its_steps(tmp_path: Path) -> None:
    write_identity(tmp_path, "left", shape=(1,), rest=HOLD)
    write_identity(tmp_path, "right", shape=(1,), rest=HOLD)
    write_fork(tmp_path)

    async def test(registry: Registry) -> None:
        model = ensemble_model(registry)
        asked = asyncio.create_task(model.infer(one([[3]], name="A")))
        parts = [tensor_model(registry, name) for name in ("left", "right")]
        for part in parts:
            await waiting(part, 1)
        asked.cancel()
        (end,) = await asyncio.gather(asked, return_exceptions=True)
        assert isinstance(end, asyncio.CancelledError)
        for part in parts:
            await waiting(part, 0)
            await until(lambda part=part: part.num_active == 0)
        await until(lambda: model.statistics.failures == {"CANCELED": 1})

    run(tmp_path, test)


def test_part_that_is_reloaded_meanwhile_is_used_from_then_on(tmp_path: Path) -> None:
    write_chain(tmp_path)

    async def test(registry: Registry) -> None:
        model, old = ensemble_model(registry), tensor_model(registry, "add")
        is_over = False

        async def ask() -> int:
            count = 0
            while not is_over:
                assert values(await model.infer(ab())) == {"TWICE_A": [[14]], "TWICE_B": [[4]]}
                count += 1
                await asyncio.sleep(0)
            return count

        callers = [asyncio.create_task(ask()) for _ in range(4)]
        await registry.load("add")
        is_over = True
        assert min(await asyncio.gather(*callers)) > 0
        assert tensor_model(registry, "add") is not old

    run(tmp_path, test)


def test_draining_lets_calls_end_and_closing_ends_them(tmp_path: Path) -> None:
    write_slow(tmp_path, "slow")
    write_ensemble(
        tmp_path,
        [("slow", {"INPUT": "A"}, {"OUTPUT": "B"})],
        inputs={"A": "INT64"},
        outputs={"B": "INT64"},
    )

    async def test(registry: Registry) -> None:
        model = ensemble_model(registry)
        asked = asyncio.create_task(model.infer(one([[1_000]], "INT64", "A")))
        await asyncio.sleep(0)
        await model.drain(60)
        assert values(await asked) == {"B": [[1_000]]}
        with pytest.raises(ModelNotReady, match="Server is stopping, scheduler for model 'e' has stopped accepting"):
            await model.infer(one([[1]], "INT64", "A"))

    run(tmp_path, test)

    async def close(registry: Registry) -> None:
        model, slow = ensemble_model(registry), tensor_model(registry, "slow")
        asked = asyncio.create_task(model.infer(one([[50_000]], "INT64", "A")))
        await running(slow)
        await model.close()
        await model.close()
        with pytest.raises(ModelNotReady, match="model 'e' was unloaded before the request was finished"):
            await asked
        await until(lambda: slow.num_active == 0)
        assert values(await slow.infer(turns(1))) == {"OUTPUT": [[1]]}

    run(tmp_path, close)


def test_call_is_checked_before_any_step_runs(tmp_path: Path) -> None:
    write_chain(tmp_path)

    async def test(registry: Registry) -> None:
        model = ensemble_model(registry)
        with pytest.raises(InvalidRequest, match="expected 2 inputs but got 1 inputs for model 'e'"):
            await model.infer(one([[1]], name="A"))
        with pytest.raises(InvalidRequest, match="unexpected inference output 'sum' for model 'e'"):
            await model.infer(ab(outputs=["sum"]))
        with pytest.raises(InvalidRequest, match="inference request batch-size must be <= 8 for 'e'"):
            await model.infer(ab([[1]] * 9, [[1]] * 9))
        assert tensor_model(registry, "add").statistics.execution_count == 0

    run(tmp_path, test)


def test_statistics_count_calls_and_parts_count_their_own(tmp_path: Path) -> None:
    write_chain(tmp_path)

    async def test(registry: Registry) -> None:
        for _ in range(3):
            await ensemble_model(registry).infer(ab([[1], [2]], [[3], [4]]))
        own, part = ensemble_model(registry).statistics, tensor_model(registry, "add").statistics
        assert (own.success.count, own.inference_count, own.execution_count) == (3, 6, 3)
        assert {size: each.compute_infer.count for size, each in own.batches.items()} == {2: 3}
        assert (part.success.count, part.inference_count) == (6, 12)
        assert own.success.ns >= part.compute_infer.ns / 2

    run(tmp_path, test)


def test_sequence_of_a_call_is_that_of_its_steps(tmp_path: Path) -> None:
    rest = """
    sequence_batching {
      control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }
    }"""
    ports = [("INPUT0", "INT32", (1,)), ("START", "INT32", (1,))]
    node = tiny_tensors.helper.make_node("Add", ["INPUT0", "START"], ["OUTPUT0"])
    model = tiny_tensors.graph([node], ports, [("OUTPUT0", "INT32", (1,))])
    config = tiny_tensors.config_text(
        inputs=[("INPUT0", "INT32", (1,))], outputs=[("OUTPUT0", "INT32", (1,))], rest=rest
    )
    tiny_tensors.write_model(tmp_path, "stateful", model, config=config)
    write_ensemble(
        tmp_path,
        [("stateful", {"INPUT0": "INPUT0"}, {"OUTPUT0": "B"})],
        inputs={"INPUT0": "INT32"},
        outputs={"B": "INT32"},
    )

    async def test(registry: Registry) -> None:
        model = ensemble_model(registry)
        assert values(await model.infer(of_sequence([[5]], 3, start=True))) == {"B": [[6]]}
        assert values(await model.infer(of_sequence([[5]], 3))) == {"B": [[5]]}
        with pytest.raises(InvalidRequest, match="non-zero or non-empty correlation ID"):
            await model.infer(one([[5]]))

    run(tmp_path, test)


def test_language_model_can_be_a_step(tmp_path: Path) -> None:
    make_language_model(tmp_path, "llm")
    write_ensemble(
        tmp_path,
        [("llm", {"text_input": "PROMPT"}, {"text_output": "TEXT"})],
        inputs={"PROMPT": "BYTES"},
        outputs={"TEXT": "BYTES"},
        max_batch_size=0,
    )

    async def test(registry: Registry) -> None:
        greedy = {"temperature": 0.0, "max_tokens": 8}
        alone = await registry.served("llm").infer(one(["the cat"], "BYTES", "text_input", parameters=greedy))
        answer = await ensemble_model(registry).infer(one(["the cat"], "BYTES", "PROMPT", parameters=greedy))
        assert values(answer)["TEXT"] == values(alone)["text_output"]

    run(tmp_path, test, kv_cache_bytes=1 << 24)


def test_input_that_callers_may_leave_out_is_left_out_of_the_step(tmp_path: Path) -> None:
    config = tiny_tensors.config_text(
        max_batch_size=0,
        inputs=[("INPUT0", "FP32", (1,))],
        outputs=[("OUTPUT0", "FP32", (1,))],
        rest='input { name: "BIAS" data_type: TYPE_FP32 dims: [ 1 ] optional: true }',
    )
    tiny_tensors.write_model(tmp_path, "part", tiny_tensors.overridable(), config=config)
    write_ensemble(
        tmp_path,
        [("part", {"INPUT0": "A", "BIAS": "B"}, {"OUTPUT0": "C"})],
        inputs={"A": "FP32"},
        outputs={"C": "FP32"},
        max_batch_size=0,
        more='input { name: "B" data_type: TYPE_FP32 dims: [ 1 ] optional: true }',
    )

    async def test(registry: Registry) -> None:
        model = ensemble_model(registry)
        assert values(await model.infer(one([1], "FP32", "A"))) == {"C": [6.0]}
        both = call(tensor("A", [1], "FP32"), tensor("B", [2], "FP32"))
        assert values(await model.infer(both)) == {"C": [3.0]}

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("steps", "inputs", "outputs", "reason"),
    [
        ([("gone", {"X": "A"}, {"Y": "B"})], "INT32", "INT32", "depends on 'gone' which has no loaded version"),
        ([("add", {"NO": "A"}, {"OUTPUT0": "B"})], "INT32", "INT32", "model 'add' has no input 'NO'"),
        (
            [("add", {"INPUT0": "A", "INPUT1": "A"}, {"NO": "B"})],
            "INT32",
            "INT32",
            "model 'add' has no output 'NO'",
        ),
        ([("add", {"INPUT0": "A"}, {"OUTPUT0": "B"})], "INT32", "INT32", "maps nothing to input 'INPUT1' of 'add'"),
        (
            [("add", {"INPUT0": "A", "INPUT1": "A"}, {"OUTPUT0": "B"})],
            "FP32",
            "INT32",
            "tensor 'A' is FP32 in the ensemble and INT32 in 'add'",
        ),
        (
            [("add", {"INPUT0": "A", "INPUT1": "A"}, {"OUTPUT0": "B"})],
            "INT32",
            "FP32",
            "tensor 'B' is FP32 in the ensemble and INT32 in 'add'",
        ),
        (
            [
                ("add", {"INPUT0": "A", "INPUT1": "A"}, {"OUTPUT0": "middle"}),
                ("text", {"INPUT0": "middle"}, {"OUTPUT0": "B"}),
            ],
            "INT32",
            "BYTES",
            "tensor 'middle' is INT32 in add and BYTES in 'text'",
        ),
    ],
)
def test_ensemble_that_does_not_suit_its_models_is_unavailable_with_the_reason(
    tmp_path: Path, steps: list[tuple[str, Maps, Maps]], inputs: str, outputs: str, reason: str
) -> None:
    write_add_sub(tmp_path, "add")
    write_identity(tmp_path, "text", datatype="BYTES", shape=(1,))
    write_ensemble(tmp_path, steps, inputs={"A": inputs}, outputs={"B": outputs})

    async def test(registry: Registry) -> None:
        with pytest.raises(ModelNotReady) as refusal:
            registry.served("e")
        assert reason in refusal.value.message
        assert str(tmp_path) not in refusal.value.message
        assert values(await registry.served("add").infer(pair(outputs=["OUTPUT0"]))) == {"OUTPUT0": [[3]]}

    run(tmp_path, test)
