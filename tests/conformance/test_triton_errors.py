"""Requests that cannot be served, and what both protocols say to them."""

import numpy as np
import pytest
from tests.conformance.triton import INVALID, NOT_FOUND, UNSUPPORTED, Caller, pair, texts

MODEL = "simple"


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


def test_an_unknown_model_is_not_found(caller):
    refusal = caller.refusal("no_such", pair())
    assert refusal.status in NOT_FOUND
    assert refusal.message == "Request for unknown model: 'no_such' is not found"


def test_an_unknown_version_is_not_found(caller):
    refusal = caller.refusal(MODEL, pair(), model_version="3")
    assert refusal.status in NOT_FOUND
    assert refusal.message == "Request for unknown model: 'simple' version 3 is not found"


@pytest.mark.parametrize("name", ["../simple", "simple/../simple", "..", " ", "a" * 300, "simple\n"])
def test_names_that_are_none_are_no_failure_of_the_server(caller, name):
    assert caller.refusal(name, pair()).status in (*INVALID, *NOT_FOUND, "405")


def test_a_missing_input_is_named(caller):
    refusal = caller.refusal(MODEL, without(pair(), "INPUT1"), request_id="mine")
    assert refusal.status in INVALID
    assert refusal.message.startswith(
        "[request id: mine] expected 2 inputs but got 1 inputs for model 'simple'. Got input(s) ['INPUT0'], but "
        "missing required input(s) ['INPUT1']. Please provide all required input(s)."
    )


def test_an_unknown_input_is_named(caller):
    tensors = {"INPUT0": pair()["INPUT0"], "INPUT7": pair()["INPUT1"]}
    refusal = caller.refusal(MODEL, tensors)
    assert refusal.status in INVALID
    assert "INPUT" in refusal.message
    extra = {**pair(), "INPUT7": pair()["INPUT1"]}
    refusal = caller.refusal(MODEL, extra)
    assert refusal.status in INVALID
    assert "'INPUT7'" in refusal.message or "expected 2 inputs but got 3" in refusal.message


def test_an_unknown_output_is_named(caller):
    refusal = caller.refusal(MODEL, pair(), outputs=caller.outputs("OUTPUT7"))
    assert refusal.status in INVALID
    assert "unexpected inference output 'OUTPUT7' for model 'simple'" in refusal.message


def test_an_input_that_comes_twice_is_refused(caller):
    made = caller.inputs(pair())
    refusal = caller.refused(lambda: caller.client.infer(MODEL, [*made, made[0]]))
    assert refusal.status in INVALID
    assert "input 'INPUT0' already exists in request" in refusal.message


def test_an_output_that_comes_twice_is_refused(caller):
    wanted = caller.outputs("OUTPUT0", "OUTPUT0")
    refusal = caller.refusal(MODEL, pair(), outputs=wanted)
    assert refusal.status in INVALID
    assert "output 'OUTPUT0' already exists in request" in refusal.message


def test_another_datatype_is_refused(caller):
    refusal = caller.refusal(MODEL, pair(dtype=np.float32))
    assert refusal.status in INVALID
    assert "inference input 'INPUT0' data-type is 'FP32', but model 'simple' expects 'INT32'" in refusal.message


@pytest.mark.parametrize("shape", [(1, 15), (1, 17), (16,), (1, 1, 16), (1, 0)])
def test_another_shape_is_refused(caller, shape):
    array = np.ones(shape, np.int32)
    refusal = caller.refusal(MODEL, {"INPUT0": array, "INPUT1": array})
    assert refusal.status in INVALID
    shown = ",".join(map(str, shape))
    assert f"unexpected shape for input 'INPUT0' for model 'simple'. Expected [-1,16], got [{shown}]" in refusal.message


def test_a_batch_over_the_models_is_refused(caller):
    refusal = caller.refusal(MODEL, pair(rows=9))
    assert refusal.status in INVALID
    assert "inference request batch-size must be <= 8 for 'simple'" in refusal.message


def test_batches_of_two_sizes_are_refused(caller):
    tensors = {"INPUT0": pair(rows=2)["INPUT0"], "INPUT1": pair(rows=3)["INPUT1"]}
    refusal = caller.refusal(MODEL, tensors)
    assert refusal.status in INVALID
    assert "batch size does not match other inputs for 'simple'" in refusal.message


def test_a_batch_of_none_is_refused(caller):
    array = np.ones((0, 16), np.int32)
    assert caller.refusal(MODEL, {"INPUT0": array, "INPUT1": array}).status in INVALID


def test_text_that_is_no_number_fails_in_the_model_and_tells_no_paths(caller):
    bad = {"INPUT0": texts(["no number"] * 16, 1, 16), "INPUT1": texts(["1"] * 16, 1, 16)}
    refusal = caller.refusal("simple_string", bad)
    assert refusal.status in (*INVALID, "500", "INTERNAL")
    assert "/" not in refusal.message
    good = {"INPUT0": texts(["2"] * 16, 1, 16), "INPUT1": texts(["1"] * 16, 1, 16)}
    assert caller.infer("simple_string", good).as_numpy("OUTPUT0")[0, 0] == b"3"


def test_a_sampling_parameter_that_there_is_not_is_refused(caller):
    refusal = caller.refusal("tiny", {"text_input": texts(["x"])}, parameters={"temprature": 0.5})
    assert refusal.status in INVALID
    assert "temprature" in refusal.message


def test_a_stream_of_text_is_refused_to_unary_calls(caller):
    tensors = {"text_input": texts(["x"]), "stream": np.array([True])}
    assert caller.refusal("tiny", tensors).status in UNSUPPORTED


@pytest.mark.parametrize("size", [70_000, 1 << 20])
def test_messages_over_the_limit_are_refused(guarded, size):
    """Both ways over gRPC, and the same size over HTTP."""
    tensors = {"INPUT0": texts(["a" * size], 1, 1)}
    for protocol, statuses in (("grpc", {"RESOURCE_EXHAUSTED"}), ("http", {"400"})):
        with Caller(protocol, guarded) as caller:
            refusal = caller.refusal("simple_identity", tensors, headers={"authorization": "Bearer user-key"})
            assert refusal.status in statuses
            assert caller.client.is_server_live()


def test_a_message_just_under_the_limit_is_read(guarded):
    tensors = {"INPUT0": texts(["a" * 60_000], 1, 1)}
    with Caller("grpc", guarded) as caller:
        result = caller.infer("simple_identity", tensors, headers={"authorization": "Bearer user-key"})
        assert len(result.as_numpy("OUTPUT0")[0, 0]) == 60_000
