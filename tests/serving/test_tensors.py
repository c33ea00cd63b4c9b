"""Tensor models from the repository to the answer: real graphs, instances and event loop."""

import asyncio
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from tests import tiny_tensors
from tests.serving.fakes import until
from tests.serving.tensor_serving import (
    HOLD,
    ONE_INSTANCE,
    assert_idle,
    call,
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

from sardonyx.errors import (
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    ModelNotReady,
    Overloaded,
    UnsupportedFeature,
)
from sardonyx.runtime.dtypes import DATATYPES
from sardonyx.serving import tensor_checks, tensors
from sardonyx.serving.registry import Registry
from sardonyx.serving.response_cache import ResponseCache
from sardonyx.serving.served import InferAnswer, InferCall
from sardonyx.serving.tensors import TensorModel
from sardonyx.statistics import Duration
from sardonyx.tensors import Tensor

BUSY = 50_000
"""Turns of `tiny_tensors.slow`: about half a second, in which a test can see that it runs."""


async def infer(registry: Registry, asked: InferCall, name: str = "m") -> dict[str, Any]:
    return values(await registry.served(name).infer(asked))


def outcome(result: InferAnswer | BaseException) -> str:
    return type(result).__name__


async def end_of(task: "asyncio.Task[InferAnswer]") -> str:
    (result,) = await asyncio.gather(task, return_exceptions=True)
    return outcome(result)


def many_strings(count: int = 20_000) -> InferCall:
    return call(Tensor("INPUT0", "BYTES", np.array([[b"a"] * count], object)))


# Answers --------------------------------------------------------------------------------------------------------------


def test_outputs_come_in_the_order_in_which_they_are_wanted(tmp_path: Path) -> None:
    write_add_sub(tmp_path)

    async def test(registry: Registry) -> None:
        assert await infer(registry, pair()) == {"OUTPUT0": [[3]], "OUTPUT1": [[-1]]}
        swapped = await infer(registry, pair(outputs=["OUTPUT1", "OUTPUT0"]))
        assert list(swapped) == ["OUTPUT1", "OUTPUT0"]
        assert await infer(registry, pair(outputs=["OUTPUT1"])) == {"OUTPUT1": [[-1]]}

    run(tmp_path, test)


def samples(datatype: str) -> tuple[np.ndarray, np.ndarray]:
    """Two operands of each datatype that can be added."""
    generator = np.random.default_rng(0)
    if datatype == "BYTES":
        numbers = generator.integers(-1000, 1000, (2, 3, 4))
        return tuple(np.array([[str(each).encode() for each in row] for row in side], object) for side in numbers)
    dtype = DATATYPES[datatype].array
    if datatype == "BF16":
        return tuple(
            (generator.integers(-99, 99, (2, 3, 4)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        )
    if dtype.kind == "f":
        return tuple(generator.standard_normal((2, 3, 4)).astype(dtype))
    limits = np.iinfo(dtype)
    return tuple(generator.integers(limits.min, limits.max, (2, 3, 4), dtype, endpoint=True))


def added(datatype: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if datatype == "BYTES":
        total = np.vectorize(int, otypes=[int])(a) + np.vectorize(int, otypes=[int])(b)
        return np.vectorize(lambda number: str(number).encode(), otypes=[object])(total)
    if datatype == "BF16":
        total = sum((each.astype(np.uint32) << 16).view(np.float32) for each in (a, b))
        return (total.view(np.uint32) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return (a.astype(np.float32) + b.astype(np.float32)).astype(a.dtype) if datatype == "FP16" else a + b


@pytest.mark.parametrize("datatype", [each for each in DATATYPES if each != "BOOL"])
def test_sums_of_every_datatype_are_numpys(tmp_path: Path, datatype: str) -> None:
    write_add_sub(tmp_path, datatype=datatype, shape=(4,))
    a, b = samples(datatype)

    async def test(registry: Registry) -> None:
        answer = await registry.served("m").infer(call(*_pair(datatype, a, b), outputs=["OUTPUT0"]))
        (output,) = answer.outputs
        assert (output.name, output.datatype) == ("OUTPUT0", datatype)
        np.testing.assert_array_equal(output.array, added(datatype, a, b))
        assert output.array.flags.c_contiguous

    def _pair(datatype: str, a: np.ndarray, b: np.ndarray) -> list[Any]:
        return [tensor("INPUT0", a, datatype), tensor("INPUT1", b, datatype)]

    run(tmp_path, test)


def test_truth_values_pass(tmp_path: Path) -> None:
    write_identity(tmp_path, datatype="BOOL")

    async def test(registry: Registry) -> None:
        assert await infer(registry, one([[True, False, True]], "BOOL")) == {"OUTPUT0": [[True, False, True]]}

    run(tmp_path, test)


def test_many_strings_are_converted_off_the_event_loop(tmp_path: Path, monkeypatch: Any) -> None:
    write_identity(tmp_path, datatype="BYTES")
    loops = []

    def noting(original: Any) -> Any:
        def convert(tensor: Tensor) -> Any:
            loops.append(asyncio._get_running_loop())
            return original(tensor)

        return convert

    monkeypatch.setattr(tensor_checks, "to_text", noting(tensor_checks.to_text))
    monkeypatch.setattr(tensors, "with_bytes", noting(tensors.with_bytes))

    async def test(registry: Registry) -> None:
        answer = await registry.served("m").infer(many_strings())
        assert answer.outputs[0].array.tolist() == [[b"a"] * 20_000]
        assert loops == [None, None]

    run(tmp_path, test)


def test_callers_whose_values_fail_do_not_end_the_model(tmp_path: Path) -> None:
    write_add_sub(tmp_path, datatype="BYTES")

    async def test(registry: Registry) -> None:
        for _ in range(10):
            with pytest.raises(EngineError):
                await infer(registry, pair([["x"]], [["1"]], "BYTES"))
        assert registry.is_ready()
        assert await infer(registry, pair([["2"]], [["1"]], "BYTES", outputs=["OUTPUT0"])) == {"OUTPUT0": [[b"3"]]}

    run(tmp_path, test)


def test_strings_come_back_as_bytes_and_must_be_utf8(tmp_path: Path) -> None:
    write_identity(tmp_path, datatype="BYTES")

    async def test(registry: Registry) -> None:
        assert await infer(registry, one([["é€😀", "", "a\0b"]], "BYTES")) == {
            "OUTPUT0": [["é€😀".encode(), b"", b"a\0b"]]
        }
        with pytest.raises(InvalidRequest, match="element 0 of input 'INPUT0' is not UTF-8"):
            await infer(registry, one([[b"\xff"]], "BYTES"))

    run(tmp_path, test)


@pytest.mark.parametrize("rest", ["", "dynamic_batching { }", "instance_group [ { kind: KIND_CPU count: 3 } ]"])
def test_many_calls_at_once_get_their_own_answers(tmp_path: Path, rest: str) -> None:
    write_add_sub(tmp_path, rest=rest)

    async def test(registry: Registry) -> None:
        calls = [pair([[n]] * (n % 4 + 1), [[2 * n]] * (n % 4 + 1)) for n in range(200)]
        answers = await asyncio.gather(*(infer(registry, each) for each in calls))
        assert answers == [{"OUTPUT0": [[3 * n]] * (n % 4 + 1), "OUTPUT1": [[-n]] * (n % 4 + 1)} for n in range(200)]

    run(tmp_path, test)


def test_calls_of_different_shapes_never_share_a_batch(tmp_path: Path) -> None:
    write_identity(tmp_path, rest="dynamic_batching { }")

    async def test(registry: Registry) -> None:
        calls = [one([list(range(n % 5 + 1))]) for n in range(60)]
        answers = await asyncio.gather(*(infer(registry, each) for each in calls))
        assert answers == [{"OUTPUT0": [list(range(n % 5 + 1))]} for n in range(60)]

    run(tmp_path, test)


def test_configs_reshape_is_undone_for_callers(tmp_path: Path) -> None:
    config = tiny_tensors.config_text(
        rest=(
            'input { name: "INPUT0" data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] } }\n'
            'output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] } }'
        )
    )
    tiny_tensors.write_model(tmp_path, "m", tiny_tensors.identity(shape=()), config=config)

    async def test(registry: Registry) -> None:
        assert await infer(registry, one([[1.5], [2.5]], "FP32")) == {"OUTPUT0": [[1.5], [2.5]]}

    run(tmp_path, test)


def test_optional_input_is_the_graphs_own_value_where_it_is_left_out(tmp_path: Path) -> None:
    config = tiny_tensors.config_text(
        max_batch_size=0,
        inputs=[("INPUT0", "FP32", (1,))],
        outputs=[("OUTPUT0", "FP32", (1,))],
        rest='input { name: "BIAS" data_type: TYPE_FP32 dims: [ 1 ] optional: true }',
    )
    tiny_tensors.write_model(tmp_path, "m", tiny_tensors.overridable(), config=config)

    async def test(registry: Registry) -> None:
        assert [each.is_optional for each in registry.served("m").inputs] == [False, True]
        assert await infer(registry, one([1], "FP32")) == {"OUTPUT0": [6.0]}
        bias = tensor("BIAS", [1], "FP32")
        assert await infer(registry, call(tensor("INPUT0", [1], "FP32"), bias)) == {"OUTPUT0": [2.0]}
        with pytest.raises(InvalidRequest, match="expected number of inputs between 1 and 2 but got 1"):
            await infer(registry, call(bias))

    run(tmp_path, test)


def test_stream_of_a_tensor_model_is_one_answer(tmp_path: Path) -> None:
    write_identity(tmp_path)

    async def test(registry: Registry) -> None:
        answers = [each async for each in registry.served("m").stream(one())]
        assert [(values(each), each.is_final) for each in answers] == [({"OUTPUT0": [[1]]}, True)]

    run(tmp_path, test)


def test_decoupled_model_is_for_streams_only(tmp_path: Path) -> None:
    write_identity(tmp_path, rest="model_transaction_policy { decoupled: true }")

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        assert model.is_decoupled
        with pytest.raises(UnsupportedFeature, match="doesn't support models with decoupled transaction policy"):
            await model.infer(one())
        assert [values(each) async for each in model.stream(one())] == [{"OUTPUT0": [[1]]}]

    run(tmp_path, test)


def test_model_without_the_batch_axis_that_its_config_promises_fails_its_calls(tmp_path: Path) -> None:
    node = helper.make_node("Unique", ["INPUT0"], ["OUTPUT0"], axis=0)  # of equal rows one is left
    model = tiny_tensors.graph([node], [("INPUT0", "FP32", (1,))], [("OUTPUT0", "FP32", (1,))])
    port = ("FP32", (1,))
    config = tiny_tensors.config_text(inputs=[("INPUT0", *port)], outputs=[("OUTPUT0", *port)])
    tiny_tensors.write_model(tmp_path, "m", model, config=config)

    async def test(registry: Registry) -> None:
        with pytest.raises(
            EngineError, match="output 'OUTPUT0' of model 'm' has no batch axis of 2: the model does not"
        ):
            await infer(registry, one([[1], [1]], "FP32"))
        assert tensor_model(registry).statistics.failures == {"BACKEND": 1}

    run(tmp_path, test)


# Ends -----------------------------------------------------------------------------------------------------------------


def test_failing_run_fails_its_call_and_no_other(tmp_path: Path) -> None:
    write_add_sub(tmp_path, datatype="BYTES")

    async def test(registry: Registry) -> None:
        with pytest.raises(EngineError, match="model m failed"):
            await infer(registry, pair([["x"]], [["1"]], "BYTES"))
        assert await infer(registry, pair([["2"]], [["1"]], "BYTES")) == {"OUTPUT0": [[b"3"]], "OUTPUT1": [[b"1"]]}
        statistics = tensor_model(registry).statistics
        assert (statistics.success.count, statistics.fail.count, statistics.failures) == (1, 1, {"BACKEND": 1})

    run(tmp_path, test)


def test_calls_beyond_the_limit_of_calls_are_refused_until_one_ends(tmp_path: Path) -> None:
    write_identity(tmp_path, rest=HOLD)

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        held = [asyncio.create_task(model.infer(one([[n]]))) for n in range(2)]
        await waiting(model, 2)
        with pytest.raises(Overloaded, match="limit of 2 requests"):
            await model.infer(one())
        assert model.statistics.failures == {"REJECTED": 1}
        held[0].cancel()
        assert await end_of(held[0]) == "CancelledError"
        rows = asyncio.create_task(model.infer(one([[9]] * 7)))
        assert values(await held[1]) == {"OUTPUT0": [[1]]}
        assert values(await rows) == {"OUTPUT0": [[9]] * 7}

    run(tmp_path, test, max_inflight_inferences=2)


def test_calls_beyond_the_limit_of_bytes_are_refused_over_all_models(tmp_path: Path) -> None:
    write_identity(tmp_path, rest=HOLD)
    write_identity(tmp_path, "other")

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        held = asyncio.create_task(model.infer(one([[0] * 200])))
        await waiting(model, 1)
        with pytest.raises(Overloaded, match="limit of 1,000 bytes of input tensors"):
            await infer(registry, one([[0] * 51]), "other")
        await infer(registry, one([[0] * 50]), "other")
        held.cancel()
        assert await end_of(held) == "CancelledError"
        # What alone is over the limit is served alone: it would be refused for ever otherwise.
        await infer(registry, one([[0] * 500]), "other")

    run(tmp_path, test, max_inflight_tensor_bytes=1000)


def test_cancelling_takes_a_waiting_call_out_of_the_queue(tmp_path: Path) -> None:
    write_identity(tmp_path, rest=HOLD)

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        leaver = asyncio.create_task(model.infer(one([[1]] * 4)))
        await waiting(model, 1)
        leaver.cancel()
        assert await end_of(leaver) == "CancelledError"
        await waiting(model, 0)
        assert_idle(model)
        assert model.statistics.failures == {"CANCELED": 1}
        assert values(await model.infer(one([[2]] * 8))) == {"OUTPUT0": [[2]] * 8}
        assert model.statistics.batches.keys() == {8}

    run(tmp_path, test)


def test_cancelling_a_running_call_lets_the_run_end_and_counts_it(tmp_path: Path) -> None:
    write_slow(tmp_path)

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        leaver = asyncio.create_task(model.infer(turns(BUSY)))
        await running(model)
        leaver.cancel()
        assert await end_of(leaver) == "CancelledError"
        assert_idle(model)
        assert values(await model.infer(turns(1))) == {"OUTPUT": [[1]]}
        statistics = model.statistics
        assert (statistics.execution_count, statistics.success.count, statistics.failures) == (2, 1, {"CANCELED": 1})

    run(tmp_path, test)


def test_call_whose_time_is_over_ends_whether_it_waits_or_runs(tmp_path: Path) -> None:
    write_identity(tmp_path, rest=HOLD)

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        with pytest.raises(DeadlineExceeded):
            await model.infer(one())
        await waiting(model, 0)
        assert model.statistics.failures == {"CANCELED": 1}

    run(tmp_path, test, request_timeout_s=0.05)


def test_full_queue_of_the_policy_is_told_in_tritons_words(tmp_path: Path) -> None:
    rest = HOLD.replace("}", "default_queue_policy { max_queue_size: 1 } }")
    write_identity(tmp_path, rest=rest)

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        held = asyncio.create_task(model.infer(one()))
        await waiting(model, 1)
        with pytest.raises(Overloaded, match=r"^Exceeds maximum queue size$"):
            await model.infer(one())
        assert model.num_active == 1
        held.cancel()
        assert await end_of(held) == "CancelledError"

    run(tmp_path, test)


def test_callers_timeout_ends_its_waiting_where_the_policy_lets_it(tmp_path: Path) -> None:
    rest = HOLD.replace("}", "default_queue_policy { allow_timeout_override: true } }")
    write_identity(tmp_path, rest=rest)

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        with pytest.raises(Overloaded, match=r"^Request timeout expired$"):
            await model.infer(one(timeout_us=1000))
        assert model.statistics.failures == {"REJECTED": 1}

    run(tmp_path, test)


def test_priorities_decide_who_goes_first(tmp_path: Path) -> None:
    write_slow(tmp_path, rest=f"{ONE_INSTANCE} dynamic_batching {{ priority_levels: 2 default_priority_level: 2 }}")

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        ended: list[str] = []

        async def ask(name: str, **options: Any) -> None:
            # Eight rows are a batch of their own.
            await model.infer(one([[1]] * 8, "INT64", "INPUT", **options))
            ended.append(name)

        busy = asyncio.create_task(model.infer(turns(BUSY)))
        await running(model)
        tasks = [asyncio.create_task(ask("late"))]
        await waiting(model, 1)
        tasks.append(asyncio.create_task(ask("urgent", priority=1)))
        await waiting(model, 2)
        await asyncio.gather(busy, *tasks)
        assert ended == ["urgent", "late"]

    run(tmp_path, test)


def test_draining_lets_what_was_accepted_end_and_takes_nothing_more(tmp_path: Path) -> None:
    write_slow(tmp_path)

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        held = [asyncio.create_task(model.infer(turns(5_000))) for _ in range(3)]
        await asyncio.sleep(0)
        assert model.num_active == 3
        drain = asyncio.create_task(model.drain(60))
        await asyncio.sleep(0)  # it begins
        with pytest.raises(ModelNotReady, match="Server is stopping, scheduler for model 'm' has stopped accepting"):
            await model.infer(turns(1))
        await drain
        assert [outcome(each) for each in await asyncio.gather(*held)] == ["InferAnswer"] * 3

    run(tmp_path, test)


def test_draining_waits_for_a_call_whose_strings_are_still_read(tmp_path: Path, monkeypatch: Any) -> None:
    write_identity(tmp_path, datatype="BYTES")
    is_reading, go_on = threading.Event(), threading.Event()
    read = tensor_checks.to_text

    def read_when_told(tensor: Tensor) -> Any:
        is_reading.set()
        assert go_on.wait(20)
        return read(tensor)

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        monkeypatch.setattr(tensor_checks, "to_text", read_when_told)
        held = asyncio.create_task(model.infer(many_strings()))
        await until(is_reading.is_set)
        drain = asyncio.create_task(model.drain(60))
        await asyncio.sleep(0)  # it begins
        go_on.set()
        await drain
        assert await end_of(held) == "InferAnswer"

    run(tmp_path, test)


def test_drain_gives_up_when_its_time_is_over(tmp_path: Path) -> None:
    write_identity(tmp_path, rest=HOLD)

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        held = asyncio.create_task(model.infer(one()))
        await waiting(model, 1)
        await model.drain(0.01)
        assert not held.done()
        held.cancel()
        assert await end_of(held) == "CancelledError"

    run(tmp_path, test)


def test_closing_ends_each_call_once_whether_it_waits_or_runs(tmp_path: Path) -> None:
    write_slow(tmp_path)

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        held = [asyncio.create_task(model.infer(turns(BUSY))) for _ in range(4)]
        await running(model)
        await model.close()
        await model.close()
        ends = await asyncio.gather(*held, return_exceptions=True)
        assert [outcome(each) for each in ends] == ["ModelNotReady"] * 4
        assert {str(each) for each in ends} == {"model 'm' was unloaded before the request was finished"}
        assert not model.is_alive
        statistics = model.statistics
        assert (statistics.success.count, statistics.fail.count, statistics.failures) == (0, 4, {"REJECTED": 4})
        with pytest.raises(ModelNotReady):
            await model.infer(turns(1))

    run(tmp_path, test)


def test_unloading_while_callers_come_and_go_leaves_nobody_without_an_end(tmp_path: Path) -> None:
    write_add_sub(tmp_path)

    async def test(registry: Registry) -> None:
        answered = itertools.count()
        refusals: list[str] = []

        async def ask() -> None:
            while True:
                try:
                    assert await infer(registry, pair()) == {"OUTPUT0": [[3]], "OUTPUT1": [[-1]]}
                    next(answered)
                    await asyncio.sleep(0)  # an answer may come without a turn of the event loop
                except ModelNotReady as error:
                    refusals.append(error.message)
                    return

        callers = [asyncio.create_task(ask()) for _ in range(20)]
        await until(lambda: next(answered) > 100)
        await registry.unload("m")
        await asyncio.gather(*callers)
        assert len(refusals) == 20

    run(tmp_path, test)


def test_reloading_under_load_fails_no_call(tmp_path: Path) -> None:
    write_add_sub(tmp_path)

    async def test(registry: Registry) -> None:
        is_over = False

        async def ask() -> int:
            count = 0
            while not is_over:
                assert await infer(registry, pair()) == {"OUTPUT0": [[3]], "OUTPUT1": [[-1]]}
                count += 1
                await asyncio.sleep(0)  # an answer may come without a turn of the event loop
            return count

        callers = [asyncio.create_task(ask()) for _ in range(8)]
        for _ in range(5):
            await registry.load("m")
        is_over = True
        assert min(await asyncio.gather(*callers)) > 0

    run(tmp_path, test)


# Sessions -------------------------------------------------------------------------------------------------------------


def test_instances_of_a_device_share_a_session_and_run_at_once(tmp_path: Path) -> None:
    write_slow(tmp_path, rest="instance_group [ { kind: KIND_CPU count: 2 }, { kind: KIND_CPU count: 1 } ]")

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        sessions = model._engine._runner._sessions  # type: ignore[attr-defined]
        assert len(sessions) == 3
        assert len(set(sessions)) == 1
        tasks = [asyncio.create_task(model.infer(one([[n]] * 8, "INT64", "INPUT"))) for n in (BUSY, BUSY + 1, BUSY + 2)]
        await running(model, 3)
        ends = await asyncio.gather(*tasks)
        assert [values(each)["OUTPUT"][0] for each in ends] == [[BUSY], [BUSY + 1], [BUSY + 2]]

    run(tmp_path, test)


# Sequences ------------------------------------------------------------------------------------------------------------


def counter() -> Any:
    """OUTPUT0 = STATE_OUT = INPUT0 + STATE, and START and ID as they came."""
    nodes = [
        helper.make_node("Add", ["INPUT0", "STATE"], ["OUTPUT0"]),
        helper.make_node("Identity", ["OUTPUT0"], ["STATE_OUT"]),
        helper.make_node("Identity", ["START"], ["STARTED"]),
        helper.make_node("Identity", ["ID"], ["TOLD"]),
    ]
    inputs = [("INPUT0", "INT32", (1,)), ("STATE", "INT32", (1,)), ("START", "INT32", (1,)), ("ID", "UINT32", (1,))]
    outputs = [(name, "INT32", (1,)) for name in ("OUTPUT0", "STATE_OUT", "STARTED")]
    return tiny_tensors.graph(nodes, inputs, [*outputs, ("TOLD", "UINT32", (1,))])


def write_counter(
    root: Path, *, strategy: str = "direct { }", initial: str = "", files: Any = None, more: str = ""
) -> None:
    rest = f"""
    sequence_batching {{
      {strategy}
      max_sequence_idle_microseconds: 600000000
      control_input {{ name: "START" control {{ kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] }} }}
      control_input {{ name: "ID" control {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT32 }} }}
      state {{ input_name: "STATE" output_name: "STATE_OUT" data_type: TYPE_INT32 dims: [ 1 ] {initial} }}
    }}
    {ONE_INSTANCE} {more}"""
    config = tiny_tensors.config_text(
        max_batch_size=4,
        inputs=[("INPUT0", "INT32", (1,))],
        outputs=[("OUTPUT0", "INT32", (1,)), ("STARTED", "INT32", (1,)), ("TOLD", "UINT32", (1,))],
        rest=rest,
    )
    tiny_tensors.write_model(root, "m", counter(), config=config, files=files)


@pytest.mark.parametrize("strategy", ["direct { }", "oldest { max_candidate_sequences: 4 }"])
def test_sequences_go_on_side_by_side_with_states_of_their_own(tmp_path: Path, strategy: str) -> None:
    write_counter(tmp_path, strategy=strategy)

    async def test(registry: Registry) -> None:
        async def follow(sequence_id: int) -> list[Any]:
            told = []
            for number in range(5):
                asked = of_sequence([[sequence_id]], sequence_id, start=number == 0, end=number == 4)
                told.append(await infer(registry, asked))
            return told

        for sequence_id, told in zip(range(1, 9), await asyncio.gather(*map(follow, range(1, 9))), strict=True):
            assert [each["OUTPUT0"] for each in told] == [[[sequence_id * n]] for n in range(1, 6)]
            assert [each["STARTED"] for each in told] == [[[1]], *[[[0]]] * 4]
            assert {each["TOLD"][0][0] for each in told} == {sequence_id}

    run(tmp_path, test)


def test_requests_of_no_or_an_unknown_sequence_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    write_counter(tmp_path)

    async def test(registry: Registry) -> None:
        with pytest.raises(InvalidRequest, match="must specify a non-zero or non-empty correlation ID"):
            await infer(registry, one())
        with pytest.raises(InvalidRequest, match="must specify the START flag on the first request of the sequence"):
            await infer(registry, of_sequence([[1]], 5))
        with pytest.raises(InvalidRequest, match="must specify batch-size 1 due to requirements of sequence batcher"):
            await infer(registry, of_sequence([[1], [2]], 5, start=True))
        assert_idle(registry.served("m"))

    run(tmp_path, test)


def test_ids_that_the_models_id_input_cannot_hold_are_refused(tmp_path: Path) -> None:
    write_counter(tmp_path)

    async def test(registry: Registry) -> None:
        with pytest.raises(InvalidRequest, match="sequence_id of model 'm' must be a number"):
            await infer(registry, of_sequence([[1]], "name", start=True))
        with pytest.raises(InvalidRequest, match="sequence_id 4294967296 of model 'm' does not fit UINT32"):
            await infer(registry, of_sequence([[1]], 1 << 32, start=True))
        last = (1 << 32) - 1
        assert (await infer(registry, of_sequence([[1]], last, start=True)))["TOLD"] == [[last]]

    run(tmp_path, test)


def test_cancelled_request_breaks_its_sequence(tmp_path: Path) -> None:
    write_counter(tmp_path, strategy="direct { minimum_slot_utilization: 1 max_queue_delay_microseconds: 600000000 }")

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        steps = [asyncio.create_task(model.infer(of_sequence([[1]], 5, start=n == 0))) for n in range(2)]
        await waiting(model, 2)
        steps[0].cancel()
        assert [await end_of(each) for each in steps] == ["CancelledError", "RequestAborted"]
        with pytest.raises(InvalidRequest, match="START"):
            await model.infer(of_sequence([[1]], 5))
        assert model.statistics.failures == {"CANCELED": 2, "OTHER": 1}

    run(tmp_path, test)


# Response cache -------------------------------------------------------------------------------------------------------

CACHED = "response_cache { enable: true }"


def test_equal_calls_are_computed_once(tmp_path: Path) -> None:
    write_add_sub(tmp_path, rest=CACHED)

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        first = await infer(registry, pair())
        assert await infer(registry, pair()) == first
        assert list(await infer(registry, pair(outputs=["OUTPUT1"]))) == ["OUTPUT1"]
        await infer(registry, pair([[4]]))
        statistics = model.statistics
        assert (statistics.execution_count, statistics.inference_count) == (3, 3)
        assert (statistics.cache_hit.count, statistics.cache_miss.count) == (1, 3)
        assert min(statistics.cache_hit.ns, statistics.cache_miss.ns) > 0
        assert statistics.success.count == statistics.queue.count == 4
        assert statistics.compute_infer.count == 3

    run(tmp_path, test, response_cache_bytes=1 << 20)


def test_wanted_order_is_kept_whoever_asked_first(tmp_path: Path) -> None:
    write_add_sub(tmp_path, rest=CACHED)

    async def test(registry: Registry) -> None:
        assert list(await infer(registry, pair())) == ["OUTPUT0", "OUTPUT1"]
        assert list(await infer(registry, pair(outputs=["OUTPUT1", "OUTPUT0"]))) == ["OUTPUT1", "OUTPUT0"]
        assert tensor_model(registry).statistics.cache_hit.count == 1

    run(tmp_path, test, response_cache_bytes=1 << 20)


def test_large_inputs_are_hashed_off_the_event_loop(tmp_path: Path, monkeypatch: Any) -> None:
    write_identity(tmp_path, datatype="UINT8", rest=CACHED)
    loops = []
    make_key = ResponseCache.key

    def noting(*args: Any, **options: Any) -> Any:
        loops.append(asyncio._get_running_loop())
        return make_key(*args, **options)

    monkeypatch.setattr(ResponseCache, "key", noting)

    async def test(registry: Registry) -> None:
        asked = call(Tensor("INPUT0", "UINT8", np.ones((1, 2 << 20), np.uint8)))
        assert await infer(registry, asked) == await infer(registry, asked)
        assert loops == [None, None]
        assert tensor_model(registry).statistics.cache_hit.count == 1

    run(tmp_path, test, response_cache_bytes=8 << 20)


def test_cached_strings_are_the_same_bytes(tmp_path: Path) -> None:
    write_identity(tmp_path, datatype="BYTES", rest=CACHED)

    async def test(registry: Registry) -> None:
        asked = one([["é", ""]], "BYTES")
        assert await infer(registry, asked) == await infer(registry, asked) == {"OUTPUT0": [["é".encode(), b""]]}
        assert tensor_model(registry).statistics.cache_hit.count == 1

    run(tmp_path, test, response_cache_bytes=1 << 20)


def test_failures_are_not_kept(tmp_path: Path) -> None:
    write_add_sub(tmp_path, datatype="BYTES", rest=CACHED)

    async def test(registry: Registry) -> None:
        for _ in range(2):
            with pytest.raises(EngineError):
                await infer(registry, pair([["x"]], [["1"]], "BYTES"))
        statistics = tensor_model(registry).statistics
        assert (statistics.fail.count, statistics.cache_hit.count, statistics.cache_miss.count) == (2, 0, 0)

    run(tmp_path, test, response_cache_bytes=1 << 20)


def test_reload_forgets_the_answers(tmp_path: Path) -> None:
    write_add_sub(tmp_path, rest=CACHED)

    async def test(registry: Registry) -> None:
        await infer(registry, pair())
        old = tensor_model(registry)
        await registry.load("m")
        assert tensor_model(registry) is not old
        await infer(registry, pair())
        statistics = tensor_model(registry).statistics
        assert statistics is old.statistics
        assert (statistics.execution_count, statistics.cache_hit.count) == (2, 0)
        cache = old._cache
        assert cache is not None
        await until(lambda: cache.num_entries <= 1)

    run(tmp_path, test, response_cache_bytes=1 << 20)


@pytest.mark.parametrize(("rest", "size"), [(CACHED, 0), ("", 1 << 20)])
def test_nothing_is_kept_unless_server_and_model_want_it(tmp_path: Path, rest: str, size: int) -> None:
    write_add_sub(tmp_path, rest=rest)

    async def test(registry: Registry) -> None:
        for _ in range(2):
            await infer(registry, pair())
        statistics = tensor_model(registry).statistics
        assert (statistics.execution_count, statistics.cache_hit, statistics.cache_miss) == (2, Duration(), Duration())

    run(tmp_path, test, response_cache_bytes=size)


# Statistics -----------------------------------------------------------------------------------------------------------


def test_statistics_of_a_batch_count_one_execution_and_every_request(tmp_path: Path) -> None:
    write_identity(tmp_path, rest=HOLD)

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        await asyncio.gather(*(model.infer(one([[n]] * rows)) for n, rows in enumerate((1, 2, 5))))
        statistics = model.statistics
        assert (statistics.inference_count, statistics.execution_count) == (8, 1)
        assert statistics.batches.keys() == {8}
        batch = statistics.batches[8]
        assert [each.count for each in (batch.compute_input, batch.compute_infer, batch.compute_output)] == [1, 1, 1]
        parts = (statistics.queue, statistics.compute_input, statistics.compute_infer, statistics.compute_output)
        assert [each.count for each in (statistics.success, *parts)] == [3] * 5
        assert statistics.compute_infer.ns == 3 * batch.compute_infer.ns
        assert statistics.success.ns >= sum(each.ns for each in parts)
        assert statistics.last_inference_ms > 0
        assert statistics.fail == Duration()

    run(tmp_path, test)


def test_batch_statistics_add_up_whatever_batches_were_made(tmp_path: Path) -> None:
    write_identity(tmp_path, rest="dynamic_batching { }")

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        await asyncio.gather(*(model.infer(one([[n]] * (n % 3 + 1))) for n in range(99)))
        statistics = model.statistics
        counts = {size: batch.compute_infer.count for size, batch in statistics.batches.items()}
        assert sum(counts.values()) == statistics.execution_count
        assert sum(size * count for size, count in counts.items()) == statistics.inference_count == 198
        assert statistics.success.count == 99

    run(tmp_path, test)


def test_pending_calls_are_counted_while_they_wait(tmp_path: Path) -> None:
    write_identity(tmp_path, rest=HOLD)

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        held = [asyncio.create_task(model.infer(one())) for _ in range(3)]
        await waiting(model, 3)
        assert model.statistics.num_pending == model.num_active == 3
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)

    run(tmp_path, test)


def test_calls_that_do_not_suit_the_model_cost_nothing(tmp_path: Path) -> None:
    write_identity(tmp_path)

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        for asked in (one(name="X"), one([1]), one(datatype="FP32"), one([[1]] * 9), one(outputs=["X"])):
            with pytest.raises(InvalidRequest):
                await model.infer(asked)
        assert_idle(model)
        assert (model.statistics.success.count, model.statistics.execution_count) == (0, 0)

    run(tmp_path, test)


def test_model_tells_what_it_is(tmp_path: Path) -> None:
    folder = write_identity(tmp_path, max_batch_size=0, shape=(-1, 3))

    async def test(registry: Registry) -> None:
        model: TensorModel = tensor_model(registry)
        assert (model.name, model.version, model.is_decoupled, model.stop_generation()) == ("m", 1, False, 0)
        assert [(each.name, each.datatype, each.shape) for each in model.inputs] == [("INPUT0", "INT32", (-1, 3))]
        assert model.size_bytes == (folder / "1/model.onnx").stat().st_size
        assert model.created == int((folder / "1/model.onnx").stat().st_mtime)
        assert model.config.instance_group[0].count == 2
        assert model.stalled_s == 0

    run(tmp_path, test)
