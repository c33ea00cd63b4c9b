"""Sequences: requests that belong together, over every protocol, alone and interleaved."""

import queue

import numpy as np
import pytest
import tritonclient.grpc.aio
from tests.conformance.triton import INVALID, address, inputs, nv, pair, run

VALUES = [11, 7, 5, 3, 2, 0, 1]


def one(value):
    return {"INPUT": np.array([[value]], np.int32)}


def step(caller, model, value, sequence_id, *, start=False, end=False):
    """One request of a sequence, and its answer."""
    options = {"sequence_id": sequence_id, "sequence_start": start, "sequence_end": end}
    return int(caller.infer(model, one(value), **options).as_numpy("OUTPUT")[0, 0])


def steps(values):
    """Every value with its flags."""
    last = len(values) - 1
    return [
        (value, {"sequence_start": index == 0, "sequence_end": index == last}) for index, value in enumerate(values)
    ]


def expected(model, values, sequence_id):
    """What the example models answer."""
    if model in {"simple_accumulate", "simple_string_dyna_sequence"}:
        answers = np.cumsum(values).tolist()
    else:
        answers = [values[0] + 1, *values[1:]]
    if "dyna" in model:
        answers[-1] += int(sequence_id)
    return answers


MODELS = ["simple_sequence", "simple_dyna_sequence", "simple_accumulate"]


@pytest.mark.parametrize("model", MODELS)
def test_a_sequence_is_answered_step_by_step(caller, model):
    answers = [
        step(caller, model, value, 1001, start=flags["sequence_start"], end=flags["sequence_end"])
        for value, flags in steps(VALUES)
    ]
    assert answers == expected(model, VALUES, 1001)


@pytest.mark.parametrize("model", MODELS)
def test_interleaved_sequences_do_not_see_each_other(caller, model):
    first, second = VALUES, [-value for value in VALUES]
    answers = {2001: [], 2002: []}
    for (value, flags), (other, _) in zip(steps(first), steps(second), strict=True):
        start, end = flags["sequence_start"], flags["sequence_end"]
        answers[2001].append(step(caller, model, value, 2001, start=start, end=end))
        answers[2002].append(step(caller, model, other, 2002, start=start, end=end))
    assert answers == {2001: expected(model, first, 2001), 2002: expected(model, second, 2002)}


def test_ids_may_be_text(caller):
    model = "simple_string_dyna_sequence"
    answers = [
        step(caller, model, value, "3001", start=flags["sequence_start"], end=flags["sequence_end"])
        for value, flags in steps(VALUES)
    ]
    assert answers == expected(model, VALUES, "3001")


def test_a_sequence_may_go_on_over_the_other_protocol(http, grpc):
    assert step(http, "simple_accumulate", 5, 4001, start=True) == 5
    assert step(grpc, "simple_accumulate", 6, 4001) == 11
    assert step(http, "simple_accumulate", 7, 4001, end=True) == 18


def test_a_start_begins_anew(caller):
    assert step(caller, "simple_accumulate", 5, 5001, start=True) == 5
    assert step(caller, "simple_accumulate", 6, 5001, start=True) == 6
    assert step(caller, "simple_accumulate", 1, 5001, end=True) == 7


def test_a_sequence_of_one_request_starts_and_ends(caller):
    assert step(caller, "simple_dyna_sequence", 3, 6001, start=True, end=True) == 3 + 1 + 6001


def test_an_id_is_free_after_the_end(caller):
    step(caller, "simple_accumulate", 5, 7001, start=True, end=True)
    refusal = caller.refusal("simple_accumulate", one(1), sequence_id=7001)
    assert refusal.status in INVALID
    told = (
        "inference request for sequence 7001 to model 'simple_accumulate' must specify the START flag on the first "
        "request of the sequence"
    )
    assert told in refusal.message


@pytest.mark.parametrize("model", MODELS)
def test_the_first_request_must_say_that_it_is(caller, model):
    refusal = caller.refusal(model, one(1), sequence_id=8001)
    assert refusal.status in INVALID
    assert "must specify the START flag" in refusal.message


@pytest.mark.parametrize("model", MODELS)
def test_a_request_without_an_id_is_refused(caller, model):
    refusal = caller.refusal(model, one(1))
    assert refusal.status in INVALID
    assert "must specify a non-zero or non-empty correlation ID" in refusal.message


@pytest.mark.parametrize("model", MODELS)
def test_a_sequence_has_batches_of_one(caller, model):
    two = {"INPUT": np.ones((2, 1), np.int32)}
    refusal = caller.refusal(model, two, sequence_id=9001, sequence_start=True)
    assert refusal.status in INVALID
    assert "must specify batch-size 1 due to requirements of sequence batcher" in refusal.message


def test_a_model_without_sequences_does_not_mind_them(caller):
    caller.infer("simple", pair(), sequence_id=1, sequence_start=True)


@pytest.mark.parametrize("model", MODELS)
def test_sequences_share_a_stream(grpc, model):
    answers: queue.Queue = queue.Queue()
    sequences = {11: VALUES, 12: [100 + value for value in VALUES]}
    grpc.client.start_stream(lambda result, error: answers.put((result, error)))
    for index in range(len(VALUES)):
        for sequence_id, values in sequences.items():
            value, flags = steps(values)[index]
            number = f"{sequence_id}_{index}"
            grpc.client.async_stream_infer(
                model, grpc.inputs(one(value)), request_id=number, sequence_id=sequence_id, **flags
            )
    got = {sequence_id: [] for sequence_id in sequences}
    for _ in range(2 * len(VALUES)):
        result, error = answers.get(timeout=30)
        assert error is None
        sequence_id, index = map(int, result.get_response().id.split("_"))
        assert index == len(got[sequence_id])
        got[sequence_id].append(int(result.as_numpy("OUTPUT")[0, 0]))
    grpc.client.stop_stream()
    assert got == {sequence_id: expected(model, values, sequence_id) for sequence_id, values in sequences.items()}


@pytest.mark.parametrize(
    ("model", "ids"),
    [("simple_sequence", (21, 22)), ("simple_dyna_sequence", (23, 24)), ("simple_string_dyna_sequence", ("25", "26"))],
)
def test_sequences_share_a_stream_with_asyncio(triton, model, ids):
    api = tritonclient.grpc.aio

    async def requests():
        for value, flags in steps(VALUES):
            for sequence_id in ids:
                yield {
                    "model_name": model,
                    "inputs": inputs(api, one(value)),
                    "request_id": str(sequence_id),
                    "sequence_id": sequence_id,
                    **flags,
                }

    async def read():
        got = {sequence_id: [] for sequence_id in ids}
        async with api.InferenceServerClient(address(triton, "grpc")) as client:
            async for result, error in client.stream_infer(requests()):
                assert error is None
                number = result.get_response().id
                got[type(ids[0])(number)].append(int(result.as_numpy("OUTPUT")[0, 0]))
        return got

    assert run(read()) == {sequence_id: expected(model, VALUES, sequence_id) for sequence_id in ids}


def test_a_sequence_waits_for_a_slot_when_all_are_taken(grpc):
    """Direct strategy: a sequence holds its slot until it ends."""
    model = "simple_sequence"
    config = grpc.client.get_model_config(model).config
    num_slots = config.max_batch_size * sum(group.count for group in config.instance_group)
    answers: queue.Queue = queue.Queue()
    for number in range(num_slots):
        step(grpc, model, 1, 100 + number, start=True)
    grpc.client.async_infer(
        model,
        grpc.inputs(one(5)),
        lambda result, error: answers.put((result, error)),
        sequence_id=99,
        sequence_start=True,
        sequence_end=True,
    )
    grpc.server.wait_for(lambda: nv(grpc.server, "nv_inference_pending_request_count", model) == 1)
    assert step(grpc, model, 2, 100) == 2, "those that have a slot go on"
    assert answers.empty()
    step(grpc, model, 1, 100, end=True)
    result, error = answers.get(timeout=30)
    assert error is None
    assert int(result.as_numpy("OUTPUT")[0, 0]) == 6
    for number in range(1, num_slots):
        step(grpc, model, 1, 100 + number, end=True)
