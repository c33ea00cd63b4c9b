import contextlib
import json
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sardonyx.api.kserve.calls import WireReply
from sardonyx.api.kserve.generate import MAX_VALUES, encode_answer, read_request
from sardonyx.errors import InvalidRequest, PayloadTooLarge
from sardonyx.tensors import Tensor, TensorMetadata


def inputs(**shapes):
    """Metadata, by name: a datatype and a shape."""
    return [TensorMetadata(name=name, datatype=kind, shape=shape) for name, (kind, shape) in shapes.items()]


LLM = inputs(PROMPT=("BYTES", (1,)), STREAM=("BOOL", (1,)), IDS=("INT64", (-1, -1)))


def read(body, wanted=LLM):
    text = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return read_request(text, wanted, model_name="llm", model_version="")


def answer(*outputs, **members):
    return encode_answer(WireReply(model_name="m", model_version="1", outputs=list(outputs), **members))


def test_keys_that_name_an_input_become_it_and_all_others_parameters():
    request = read({"id": "7", "PROMPT": "hi", "STREAM": False, "temperature": 0.5, "parameters": {"seed": 3}})
    assert request.id == "7"
    assert {each.name: each.array.tolist() for each in request.inputs} == {"PROMPT": [b"hi"], "STREAM": [False]}
    assert request.parameters == {"temperature": 0.5, "seed": 3}


@pytest.mark.parametrize(
    "body",
    [
        b'{"PROMPT": "a", "\\ud800": 1}',
        b'{"\\ud800": null}',
        b'{"id": "\\udfff"}',
        b'{"x": "a\\uD800b"}',
        b'{"parameters": {"x": "\\ud800"}}',
        b'{"PROMPT": "\\ud800"}',
    ],
)
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(body):
    with pytest.raises(InvalidRequest, match="not Unicode") as caught:
        read(body)
    assert caught.value.message.isascii()


def test_values_are_bounded():
    body = b'{"IDS": [' + b"1," * MAX_VALUES + b"1,1]}"
    with pytest.raises(PayloadTooLarge, match="more than 4,194,304 values"):
        read(body)


def test_a_whole_surrogate_pair_is_a_character():
    assert read(b'{"PROMPT": "\\ud83d\\ude00"}').inputs[0].array.tolist() == ["😀".encode()]


def test_inputs_may_lie_in_the_nested_object():
    assert read({"parameters": {"PROMPT": ["hi"]}}).inputs[0].array.tolist() == [b"hi"]


@pytest.mark.parametrize(
    ("shape", "value", "result"),
    [
        ((1,), 5, (1,)),
        ((-1,), [1, 2, 3], (3,)),
        ((-1, 2), [1, 2, 3, 4], (2, 2)),
        ((-1, 2, -1), [1, 2, 3, 4], (1, 2, 2)),
        ((2, 2), [1, 2, 3, 4], (2, 2)),
        ((), 5, ()),
        ((-1,), [], (0,)),
    ],
)
def test_the_innermost_open_dimension_takes_what_the_fixed_ones_leave(shape, value, result):
    (tensor,) = read({"a": value}, inputs(a=("INT64", shape))).inputs
    assert tensor.array.shape == result


@pytest.mark.parametrize(("shape", "value"), [((1,), [1, 2]), ((-1, 2), [1, 2, 3]), ((0, -1), [1])])
def test_a_value_that_does_not_fill_the_shape_is_refused(shape, value):
    with pytest.raises(InvalidRequest, match="The schema can not convert input 'a' to tensor with proper shape"):
        read({"a": value}, inputs(a=("INT64", shape)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"PROMPT":"a","STREAM":false,"PROMPT":"b"}', "input 'PROMPT' already exists in request"),
        (b'{"PROMPT":"a","parameters":{"PROMPT":"b"}}', "input 'PROMPT' already exists in request"),
        ({"PROMPT": 123}, "attempt to access JSON non-string as string"),
        ({"PROMPT": {"USER": "a", "BOT": "b"}}, "attempt to access JSON non-string as string"),
        ({"STREAM": "false"}, "attempt to access JSON non-boolean as boolean"),
        ({"PARAMS": {"a": 0}}, "parameter 'PARAMS' has invalid type"),
        ({"stop": ["a"]}, "parameter 'stop' has invalid type"),
        ({"id": 5}, "Unable to parse 'id'"),
        ({"parameters": 5}, "Expected JSON object for 'parameters'"),
        ([1], "failed to parse the request JSON buffer: it is no JSON object"),
        (b"", "failed to parse the request JSON buffer"),
        (b'{"a":', "failed to parse the request JSON buffer"),
        (b'\xff{"a":1}', "failed to parse the request JSON buffer"),
        (b'{"a":' + b"9" * 5000 + b"}", "failed to parse the request JSON buffer"),
        (b'{"a":' + b"[" * 101 + b"]" * 101 + b"}", "JSON nesting depth exceeds"),
    ],
)
def test_what_cannot_be_an_input_or_a_parameter_is_refused(body, message):
    with pytest.raises(InvalidRequest, match=message):
        read(body)


def test_outputs_of_one_element_are_that_element():
    text = Tensor("TEXT", "BYTES", np.array(["é".encode()], object))
    ids = Tensor("IDS", "INT32", np.arange(2, dtype=np.int32))
    assert json.loads(answer(text, ids, id="7", parameters={"done": True})) == {
        "id": "7",
        "model_name": "m",
        "model_version": "1",
        "done": True,
        "TEXT": "é",
        "IDS": [0, 1],
    }


def test_an_id_that_is_empty_is_not_shown():
    assert "id" not in json.loads(answer())


def test_a_float_that_json_lacks_is_written_as_triton_does():
    assert math.isnan(json.loads(answer(Tensor("x", "FP32", np.array([math.nan], np.float32))))["x"])


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["PROMPT", "STREAM", "IDS", "id", "parameters", "a"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda children: (
                st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=2), children, max_size=2)
            ),
            max_leaves=5,
        ),
    )
)
def test_any_object_is_read_or_refused(body):
    with contextlib.suppress(InvalidRequest, PayloadTooLarge):
        read(json.dumps(body).encode())
