"""Batches as runs of real sessions."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from tests import tiny_tensors

from sardonyx.errors import EngineError
from sardonyx.runners.tensors import Control, Reshape, State, TensorGraph, TensorModelRunner
from sardonyx.runtime.dtypes import DATATYPES
from sardonyx.runtime.session import Session, open_session
from sardonyx.tensors import SequenceControl, TensorBatch, TensorRequest, TensorRow, TensorSequence

Opened = Callable[..., TensorModelRunner]


@pytest.fixture
def open_runner(tmp_path: Path):
    """Opens runners on graphs, and closes them."""
    runners: list[TensorModelRunner] = []

    def open_one(model: onnx.ModelProto, graph: TensorGraph | None = None) -> TensorModelRunner:
        path = tmp_path / f"{len(runners)}.onnx"
        path.write_bytes(tiny_tensors.serialize(model))
        session = open_session(path, model_name="m")
        runners.append(TensorModelRunner([session, session], graph or TensorGraph(is_batching=True)))
        return runners[-1]

    yield open_one
    for runner in runners:
        runner.close()


@pytest.fixture(scope="module")
def add_sub(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """One for all of hypothesis's examples."""
    path = tmp_path_factory.mktemp("add_sub") / "model.onnx"
    path.write_bytes(tiny_tensors.serialize(tiny_tensors.add_sub()))
    return open_session(path, model_name="m")


def request(*, outputs: tuple[str, ...] = ("OUTPUT0",), sequence: SequenceControl | None = None, **inputs: Any):
    arrays = {name: value if isinstance(value, np.ndarray) else np.array(value) for name, value in inputs.items()}
    batch_size = next(iter(arrays.values())).shape[0] if arrays else 1
    return TensorRequest(id=0, inputs=arrays, outputs=outputs, batch_size=batch_size, sequence=sequence)


def run(runner: TensorModelRunner, *requests: TensorRequest | None, instance: int = 0):
    return runner.execute(TensorBatch([TensorRow(each) for each in requests]), instance).results


def step(sequence: TensorSequence, *, start: bool = False, end: bool = False, outputs=("OUTPUT0",), **inputs: Any):
    control = SequenceControl(id=sequence.id, is_start=start, is_end=end)
    return TensorRow(request(sequence=control, outputs=outputs, **inputs), sequence)


def ints(*rows: int) -> np.ndarray:
    return np.array(rows, np.int32).reshape(-1, 1)


def test_requests_are_joined_along_the_batch_axis_and_each_gets_its_rows_back(open_runner: Opened):
    runner = open_runner(tiny_tensors.add_sub(shape=(2,)))
    first = request(INPUT0=np.ones((1, 2), np.int32), INPUT1=np.ones((1, 2), np.int32))
    second = request(INPUT0=np.full((3, 2), 5, np.int32), INPUT1=np.full((3, 2), 2, np.int32))
    results = run(runner, first, second)
    np.testing.assert_array_equal(results[0]["OUTPUT0"], np.full((1, 2), 2))
    np.testing.assert_array_equal(results[1]["OUTPUT0"], np.full((3, 2), 7))


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), wanted=st.data())
def test_company_changes_no_answer_whatever_each_asks_for(add_sub: Session, sizes: list[int], wanted: st.DataObject):
    runner = TensorModelRunner([add_sub], TensorGraph(is_batching=True))
    requests, expected = [], []
    for number, size in enumerate(sizes):
        a = np.arange(size * 16, dtype=np.int32).reshape(size, 16) + 100 * number
        b = a[::-1] * 3
        names = wanted.draw(st.sampled_from([("OUTPUT0",), ("OUTPUT1",), ("OUTPUT1", "OUTPUT0")]))
        requests.append(request(outputs=names, INPUT0=a, INPUT1=np.ascontiguousarray(b)))
        expected.append({"OUTPUT0": a + b, "OUTPUT1": a - b})
    for result, each, asked in zip(run(runner, *requests), expected, requests, strict=True):
        assert tuple(result) == asked.outputs
        for name in asked.outputs:
            np.testing.assert_array_equal(result[name], each[name])


def test_outputs_nobody_wants_are_not_computed(open_runner: Opened):
    runner = open_runner(tiny_tensors.add_sub(shape=(1,)))
    (result,) = run(runner, request(outputs=("OUTPUT1",), INPUT0=ints(7), INPUT1=ints(2)))
    assert list(result) == ["OUTPUT1"]
    assert result["OUTPUT1"].tolist() == [[5]]


def test_request_of_a_model_without_batch_axis_keeps_its_shapes(open_runner: Opened):
    runner = open_runner(tiny_tensors.add_sub(shape=(2, 2), is_batched=False), TensorGraph(is_batching=False))
    a = np.arange(4, dtype=np.int32).reshape(2, 2)
    (result,) = run(runner, request(INPUT0=a, INPUT1=a))
    np.testing.assert_array_equal(result["OUTPUT0"], 2 * a)


@pytest.mark.parametrize(
    ("outside", "inside", "given_shape", "inner_shape"),
    [
        ((1,), (), (3, 1), (3,)),
        ((4,), (2, 2), (3, 4), (3, 2, 2)),
        ((-1,), (-1, 1), (2, 5), (2, 5, 1)),
        ((-1, 4, -1), (-1, 2, 2, -1), (2, 3, 4, 5), (2, 3, 2, 2, 5)),
        ((-1, -1), (1, -1, 1, -1), (2, 3, 5), (2, 1, 3, 1, 5)),
        ((2, -1), (2, -1), (2, 2, 0), (2, 2, 0)),
    ],
)
def test_tensors_are_reshaped_on_the_way_in_and_back_on_the_way_out(
    open_runner: Opened,
    outside: tuple[int, ...],
    inside: tuple[int, ...],
    given_shape: tuple[int, ...],
    inner_shape: tuple[int, ...],
):
    nodes = [helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"]), helper.make_node("Shape", ["INPUT0"], ["inner"])]
    # The second output tells the shape that the graph saw, once for each row of the batch.
    nodes += [
        helper.make_node("Shape", ["INPUT0"], ["size"], start=0, end=1),
        helper.make_node("Unsqueeze", ["inner", "zero"], ["row"]),
        helper.make_node("Concat", ["size", "one"], ["target"], axis=0),
        helper.make_node("Expand", ["row", "target"], ["OUTPUT1"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([value], np.int64), name) for name, value in (("zero", 0), ("one", 1))
    ]
    model = tiny_tensors.graph(
        nodes,
        [("INPUT0", "FP32", [None] * len(inside))],
        [("OUTPUT0", "FP32", [None] * len(inside)), ("OUTPUT1", "INT64", (None,))],
        constants=constants,
    )
    reshape = Reshape(outside, inside)
    runner = open_runner(model, TensorGraph(is_batching=True, reshapes={"INPUT0": reshape, "OUTPUT0": reshape}))
    array = np.arange(np.prod(given_shape), dtype=np.float32).reshape(given_shape)
    (result,) = run(runner, request(outputs=("OUTPUT0", "OUTPUT1"), INPUT0=array))
    np.testing.assert_array_equal(result["OUTPUT0"], array)
    assert result["OUTPUT1"][0].tolist() == list(inner_shape)
    alone, _ = run(runner, request(INPUT0=array), request(INPUT0=array))
    np.testing.assert_array_equal(alone["OUTPUT0"], array)


def test_output_that_its_reshape_does_not_fit_fails_the_step_by_name(open_runner: Opened):
    graph = TensorGraph(is_batching=True, reshapes={"OUTPUT0": Reshape((4,), (2, 2))})
    runner = open_runner(tiny_tensors.identity(shape=(-1, -1)), graph)
    with pytest.raises(EngineError, match=r"output 'OUTPUT0' of model 'm' has the shape \[1, 3, 3\]"):
        run(runner, request(INPUT0=np.zeros((1, 3, 3), np.float32)))


@pytest.mark.parametrize("num_requests", [1, 2])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_output_without_the_batch_axis_fails_the_step(open_runner: Opened, num_requests: int, keepdims: int):
    node = helper.make_node("ReduceSum", ["INPUT0"], ["OUTPUT0"], keepdims=keepdims)
    model = tiny_tensors.graph([node], [("INPUT0", "FP32", (1,))], [("OUTPUT0", "FP32", (1,))])
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    if keepdims:
        for _ in range(2):
            model.graph.output[0].type.tensor_type.shape.dim.add()
    runner = open_runner(model)
    with pytest.raises(EngineError, match="output 'OUTPUT0' of model 'm' has no batch axis of"):
        run(runner, *[request(INPUT0=np.ones((2, 1), np.float32)) for _ in range(num_requests)])


def test_request_that_its_values_make_fail_fails_alone(open_runner: Opened):
    runner = open_runner(tiny_tensors.add_sub("BYTES", shape=(1,)))

    def adding(text: str) -> TensorRequest:
        return request(INPUT0=np.array([[text]], object), INPUT1=np.array([["1"]], object))

    first, bad, last = run(runner, adding("2"), adding("x"), adding("3"))
    assert [first["OUTPUT0"].tolist(), last["OUTPUT0"].tolist()] == [[["3"]], [["4"]]]
    assert isinstance(bad, EngineError)
    with pytest.raises(EngineError):
        run(runner, adding("x"), adding("y"))


def test_failing_session_is_an_engine_error(open_runner: Opened):
    runner = open_runner(tiny_tensors.add_sub("BYTES", shape=(1,)))
    text = np.array([["x"]], object)
    with pytest.raises(EngineError, match="model m failed"):
        run(runner, request(INPUT0=text, INPUT1=text))


def test_arrays_at_odd_addresses_are_taken(open_runner: Opened):
    runner = open_runner(tiny_tensors.identity("FP64"))
    array = np.ndarray((1, 3), np.float64, bytes(1) + np.arange(3.0).tobytes(), offset=1)
    assert not array.flags.aligned
    (result,) = run(runner, request(INPUT0=array))
    assert result["OUTPUT0"].tolist() == [[0.0, 1.0, 2.0]]


def test_times_are_those_of_the_step(open_runner: Opened):
    runner = open_runner(tiny_tensors.add_sub(shape=(1,)))
    times = runner.execute(TensorBatch([TensorRow(request(INPUT0=ints(1), INPUT1=ints(1)))]), 1).times
    assert min(times.compute_input_ns, times.compute_infer_ns, times.compute_output_ns) > 0


# Controls -------------------------------------------------------------------------------------------------------------


def controls_graph(*controls: Control, is_batched: bool = True) -> onnx.ModelProto:
    """Tells its controls: OUTPUT0 = INPUT0, and an output for each."""
    nodes = [helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"])]
    nodes += [helper.make_node("Identity", [each.name], [f"{each.name}_OUT"]) for each in controls]
    inputs = [("INPUT0", "INT32", (1,)), *((each.name, each.datatype, (1,)) for each in controls)]
    outputs = [("OUTPUT0", "INT32", (1,)), *((f"{each.name}_OUT", each.datatype, (1,)) for each in controls)]
    return tiny_tensors.graph(nodes, inputs, outputs, is_batched=is_batched)


@pytest.mark.parametrize("datatype", ["INT32", "FP32", "BOOL"])
def test_controls_say_where_each_row_stands_in_its_sequence(open_runner: Opened, datatype: str):
    values = (False, True) if datatype == "BOOL" else (-1, 3)
    controls = tuple(
        Control(kind.upper(), kind, datatype, false_value=values[0], true_value=values[1])
        for kind in ("start", "end", "ready")
    )
    runner = open_runner(controls_graph(*controls), TensorGraph(is_batching=True, controls=controls))
    wanted = ("START_OUT", "END_OUT", "READY_OUT")
    rows = [
        step(TensorSequence(1), start=True, outputs=wanted, INPUT0=ints(0)),
        TensorRow(None),
        step(TensorSequence(2), outputs=wanted, INPUT0=ints(0)),
        step(TensorSequence(3), end=True, outputs=wanted, INPUT0=ints(0)),
        step(TensorSequence(4), start=True, end=True, outputs=wanted, INPUT0=ints(0)),
    ]
    results = runner.execute(TensorBatch(rows), 0).results
    no, yes = values
    told = [[each[name].item() for name in wanted] if each else None for each in results]
    assert told == [[yes, no, yes], None, [no, no, yes], [no, yes, yes], [yes, yes, yes]]
    assert results[0]["START_OUT"].dtype == DATATYPES[datatype].array
    assert results[0]["START_OUT"].shape == (1, 1)


def test_idle_slots_are_zeros_and_never_ready(open_runner: Opened):
    ready = Control("READY", "ready", "INT32")
    nodes = [
        # Every row gets the sum over the batch, so that what idle rows hold can be seen.
        helper.make_node("ReduceSum", ["INPUT0", "axis"], ["sum"], keepdims=1),
        helper.make_node("ReduceSum", ["READY", "axis"], ["ready"], keepdims=1),
        helper.make_node("Mul", ["INPUT0", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "sum"], ["OUTPUT0"]),
        helper.make_node("Add", ["nothing", "ready"], ["OUTPUT1"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([0], np.int64), "axis"),
        numpy_helper.from_array(np.array(0, np.int32), "zero"),
    ]
    ports = [("INPUT0", "INT32", (1,)), ("READY", "INT32", (1,))]
    model = tiny_tensors.graph(
        nodes, ports, [(f"OUTPUT{index}", "INT32", (1,)) for index in range(2)], constants=constants
    )
    runner = open_runner(model, TensorGraph(is_batching=True, controls=(ready,)))
    busy = step(TensorSequence(1), outputs=("OUTPUT0", "OUTPUT1"), INPUT0=ints(5))
    results = runner.execute(TensorBatch([TensorRow(None), TensorRow(None), busy]), 0).results
    assert results[:2] == [{}, {}]
    assert (results[2]["OUTPUT0"].item(), results[2]["OUTPUT1"].item()) == (5, 1)


def test_idle_slots_of_strings_are_empty_texts(open_runner: Opened):
    runner = open_runner(tiny_tensors.identity("BYTES", shape=(1,)))
    idle, busy = run(runner, None, request(INPUT0=np.array([["a"]], object)))
    assert idle == {}
    assert busy["OUTPUT0"].tolist() == [["a"]]


@pytest.mark.parametrize(
    ("datatype", "sequence_id", "told"),
    [
        ("UINT64", (1 << 64) - 1, (1 << 64) - 1),
        ("INT64", 7, 7),
        ("UINT32", (1 << 32) - 1, (1 << 32) - 1),
        ("INT32", 9, 9),
        ("BYTES", "user-1", "user-1"),
    ],
)
def test_correlation_id_comes_in_the_datatype_of_its_input(
    open_runner: Opened, datatype: str, sequence_id: int | str, told: int | str
):
    control = Control("ID", "corrid", datatype)
    runner = open_runner(controls_graph(control), TensorGraph(is_batching=True, controls=(control,)))
    rows = [TensorRow(None), step(TensorSequence(sequence_id), outputs=("ID_OUT",), INPUT0=ints(0))]
    assert runner.execute(TensorBatch(rows), 0).results[1]["ID_OUT"].tolist() == [[told]]


def test_controls_of_a_model_without_batch_axis_are_one_number(open_runner: Opened):
    control = Control("START", "start", "INT32")
    runner = open_runner(controls_graph(control, is_batched=False), TensorGraph(is_batching=False, controls=(control,)))
    row = step(TensorSequence(1), start=True, outputs=("START_OUT",), INPUT0=np.array([1], np.int32))
    (result,) = runner.execute(TensorBatch([row]), 0).results
    assert result["START_OUT"].tolist() == [1]


# Implicit state -------------------------------------------------------------------------------------------------------


def counter(*, is_batched: bool = True) -> onnx.ModelProto:
    """OUTPUT0 = STATE_OUT = INPUT0 + STATE."""
    nodes = [
        helper.make_node("Add", ["INPUT0", "STATE"], ["OUTPUT0"]),
        helper.make_node("Add", ["INPUT0", "STATE"], ["STATE_OUT"]),
    ]
    names = ("INPUT0", "STATE"), ("OUTPUT0", "STATE_OUT")
    inputs, outputs = ([(name, "INT32", (1,)) for name in side] for side in names)
    return tiny_tensors.graph(nodes, inputs, outputs, is_batched=is_batched)


def growing() -> onnx.ModelProto:
    """STATE_OUT = STATE with INPUT0 behind it; OUTPUT0 = its sum. INPUT0 below 0 makes the run fail."""
    nodes = [
        helper.make_node("Concat", ["STATE", "INPUT0"], ["STATE_OUT"], axis=1),
        helper.make_node("ReduceSum", ["STATE_OUT", "axis"], ["sum"], keepdims=1),
        helper.make_node("Cast", ["INPUT0"], ["index"], to=onnx.TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["zero"]),
        helper.make_node("Add", ["sum", "zero"], ["OUTPUT0"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([1], np.int64), "axis"),
        numpy_helper.from_array(np.zeros(100, np.int32), "table"),
    ]
    inputs = [("INPUT0", "INT32", (1,)), ("STATE", "INT32", (None,))]
    outputs = [("OUTPUT0", "INT32", (1,)), ("STATE_OUT", "INT32", (None,))]
    return tiny_tensors.graph(nodes, inputs, outputs, constants=constants)


STATES = (State("STATE", "STATE_OUT", np.array([10], np.int32)),)


def test_state_of_a_sequence_goes_from_step_to_step(open_runner: Opened):
    runner = open_runner(counter(), TensorGraph(is_batching=True, states=STATES))
    one, two = TensorSequence(1), TensorSequence(2)
    told = []
    for start, rows in ((True, [(one, 1), (two, 100)]), (False, [(two, 200), (one, 2)]), (False, [(one, 3)])):
        batch = TensorBatch([step(sequence, start=start, INPUT0=ints(value)) for sequence, value in rows])
        told.append([result["OUTPUT0"].item() for result in runner.execute(batch, 0).results])
    assert told == [[11, 110], [310, 13], [16]]


def test_start_begins_with_the_initial_state_again(open_runner: Opened):
    runner = open_runner(counter(), TensorGraph(is_batching=True, states=STATES))
    sequence = TensorSequence(1)
    told = [
        runner.execute(TensorBatch([step(sequence, start=start, INPUT0=ints(1))]), 0).results[0]["OUTPUT0"].item()
        for start in (True, False, True)
    ]
    assert told == [11, 12, 11]


def test_state_of_a_model_without_batch_axis_has_none_either(open_runner: Opened):
    runner = open_runner(counter(is_batched=False), TensorGraph(is_batching=False, states=STATES))
    sequence = TensorSequence(1)
    for start, expected in ((True, 15), (False, 20)):
        row = step(sequence, start=start, INPUT0=np.array([5], np.int32))
        assert runner.execute(TensorBatch([row]), 0).results[0]["OUTPUT0"].tolist() == [expected]
    assert sequence.state["STATE"].shape == (1,)


def test_idle_slots_between_sequences_change_no_state(open_runner: Opened):
    runner = open_runner(counter(), TensorGraph(is_batching=True, states=STATES))
    one, two = TensorSequence(1), TensorSequence(2)
    rows = [step(one, start=True, INPUT0=ints(1)), TensorRow(None), step(two, start=True, INPUT0=ints(2))]
    runner.execute(TensorBatch(rows), 0)
    assert (one.state["STATE"].tolist(), two.state["STATE"].tolist()) == ([[11]], [[12]])


def test_kept_state_does_not_keep_the_batch_in_memory(open_runner: Opened):
    runner = open_runner(counter(), TensorGraph(is_batching=True, states=STATES))
    sequences = [TensorSequence(number) for number in range(1, 4)]
    runner.execute(TensorBatch([step(each, start=True, INPUT0=ints(1)) for each in sequences]), 0)
    assert all(each.state["STATE"].base is None for each in sequences)


def test_states_are_kept_although_nobody_asks_for_their_output_and_given_to_who_does(open_runner: Opened):
    runner = open_runner(counter(), TensorGraph(is_batching=True, states=STATES))
    sequence = TensorSequence(1)
    (first,) = runner.execute(TensorBatch([step(sequence, start=True, INPUT0=ints(1))]), 0).results
    assert list(first) == ["OUTPUT0"]
    (second,) = runner.execute(TensorBatch([step(sequence, outputs=("STATE_OUT",), INPUT0=ints(1))]), 0).results
    assert second["STATE_OUT"].tolist() == [[12]]


def test_sequences_whose_states_have_grown_to_different_sizes_share_a_step(open_runner: Opened):
    runner = open_runner(growing(), TensorGraph(is_batching=True, states=STATES))
    old, new = TensorSequence(1), TensorSequence(2)
    for number in range(3):
        runner.execute(TensorBatch([step(old, start=number == 0, INPUT0=ints(1))]), 0)
    rows = [step(old, INPUT0=ints(5)), TensorRow(None), step(new, start=True, INPUT0=ints(7))]
    output = runner.execute(TensorBatch(rows), 0)
    assert [result["OUTPUT0"].item() if result else None for result in output.results] == [18, None, 17]
    assert (old.state["STATE"].shape, new.state["STATE"].shape) == ((1, 5), (1, 2))
    assert output.times.compute_infer_ns > 0


def test_failure_of_one_size_of_state_leaves_the_other_alone(open_runner: Opened):
    runner = open_runner(growing(), TensorGraph(is_batching=True, states=STATES))
    old, new = TensorSequence(1), TensorSequence(2)
    runner.execute(TensorBatch([step(old, start=True, INPUT0=ints(1))]), 0)
    rows = [step(old, INPUT0=ints(99_999)), step(new, start=True, INPUT0=ints(7))]
    failed, fine = runner.execute(TensorBatch(rows), 0).results
    assert isinstance(failed, EngineError)
    assert fine["OUTPUT0"].item() == 17
    assert old.state["STATE"].tolist() == [[10, 1]]


def test_state_without_the_batch_axis_fails_the_step_and_is_not_kept(open_runner: Opened):
    nodes = [
        helper.make_node("Add", ["INPUT0", "STATE"], ["OUTPUT0"]),
        helper.make_node("ReduceSum", ["OUTPUT0"], ["STATE_OUT"], keepdims=1),
    ]
    inputs = [(name, "INT32", (1,)) for name in ("INPUT0", "STATE")]
    outputs = [(name, "INT32", (1,)) for name in ("OUTPUT0", "STATE_OUT")]
    runner = open_runner(tiny_tensors.graph(nodes, inputs, outputs), TensorGraph(is_batching=True, states=STATES))
    sequences = [TensorSequence(1), TensorSequence(2)]
    with pytest.raises(EngineError, match="output 'STATE_OUT' of model 'm' has no batch axis of 2"):
        runner.execute(TensorBatch([step(each, start=True, INPUT0=ints(1)) for each in sequences]), 0)
    assert [each.state for each in sequences] == [{}, {}]


# Datatypes ------------------------------------------------------------------------------------------------------------


def sample(datatype: str) -> np.ndarray:
    """Values at both ends of each datatype, three rows of four."""
    if datatype == "BYTES":
        return np.array([["", "a", "é€😀", "a\0b"]] * 3, object)
    if datatype == "BF16":
        return np.array([[0x3F80, 0x8000, 0x7F80, 0x0001]] * 3, np.uint16)
    dtype = DATATYPES[datatype].array
    if datatype == "BOOL":
        return np.array([[True, False, True, True]] * 3)
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return np.array([[limits.min, limits.max, 0, 1]] * 3, dtype)


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("num_requests", [1, 3])
def test_every_datatype_passes_unchanged_alone_and_in_company(open_runner: Opened, datatype: str, num_requests: int):
    runner = open_runner(tiny_tensors.identity(datatype))
    array = sample(datatype)
    for result in run(runner, *[request(INPUT0=array) for _ in range(num_requests)]):
        assert result["OUTPUT0"].dtype == DATATYPES[datatype].array
        np.testing.assert_array_equal(result["OUTPUT0"], array)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_may_be_empty(open_runner: Opened, datatype: str):
    runner = open_runner(tiny_tensors.identity(datatype))
    (result,) = run(runner, request(INPUT0=np.empty((2, 0), DATATYPES[datatype].array)))
    assert result["OUTPUT0"].shape == (2, 0)


class NotedSession:
    """A session that says when it is entered, and leaves when it may."""

    model_name = "noted"

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.leave = threading.Semaphore(0)
        self.num_runs = 0
        self.is_closed = False

    def run(self, inputs: Any, wanted: Any) -> Any:
        self.num_runs += 1
        self.entered.release()
        assert self.leave.acquire(timeout=20)
        return {name: np.zeros((1, 1), np.int32) for name in wanted}

    def close(self) -> None:
        self.is_closed = True


def test_a_step_that_is_alone_runs_on_the_session_with_all_threads() -> None:
    narrow, wide = NotedSession(), NotedSession()
    runner = TensorModelRunner([narrow, narrow], TensorGraph(is_batching=True))  # type: ignore[list-item]
    runner.use_alone(wide)  # type: ignore[arg-type]
    batch = TensorBatch([TensorRow(TensorRequest(id=1, inputs={}, outputs=("y",)))])
    first = threading.Thread(target=runner.execute, args=(batch, 0))
    first.start()
    assert wide.entered.acquire(timeout=20)
    second = threading.Thread(target=runner.execute, args=(batch, 1))
    second.start()
    assert narrow.entered.acquire(timeout=20)
    wide.leave.release()
    first.join()
    narrow.leave.release()
    second.join()
    narrow.leave.release()
    runner.execute(batch, 1)  # the step before had company, so this one may have some, too
    wide.leave.release()
    runner.execute(batch, 1)
    assert (wide.num_runs, narrow.num_runs) == (2, 2)
    runner.close()
    assert wide.is_closed
    assert narrow.is_closed
