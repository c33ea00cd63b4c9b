import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sardonyx.api.kserve import json_tensor
from sardonyx.api.kserve.codec import from_values
from sardonyx.api.kserve.json_tensor import from_json, to_json
from sardonyx.errors import InvalidRequest, PayloadTooLarge
from sardonyx.tensors import Tensor

DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=3), children, max_size=2),
    max_leaves=12,
)


def outcome(read):
    """The array's elements and type, or the class of the refusal."""
    try:
        array = read().array
    except InvalidRequest:
        return InvalidRequest
    return array.dtype, array.tolist()


@settings(deadline=None)
@given(
    DATA, st.sampled_from(["INT32", "UINT64", "FP32", "FP64", "BOOL", "BYTES"]), st.lists(st.integers(0, 4), max_size=2)
)
def test_text_and_lists_are_read_alike(value, datatype, shape):
    text = msgspec.json.encode(value)
    names = {"name": "x", "datatype": datatype, "shape": shape}
    assert outcome(lambda: from_json(text, **names)) == outcome(lambda: from_values(msgspec.json.decode(text), **names))


@pytest.mark.parametrize("datatype", ["INT32", "FP32", "BOOL", "BYTES"])
def test_values_that_are_too_many_are_not_read(monkeypatch, datatype):
    monkeypatch.setattr(json_tensor, "_read_flat", lambda *_: pytest.fail("they were read"))
    with pytest.raises(InvalidRequest, match="Shape does not match true shape of 'data' field"):
        from_json(b"[1,2,3,4]", name="x", datatype=datatype, shape=[1])


def test_lists_without_elements_are_no_elements():
    assert from_json(b"[[],[],[1]]", name="x", datatype="INT32", shape=[1]).array.tolist() == [1]


@pytest.mark.parametrize(
    "text", [b"[1,2,3,4]", b"[[1,2],[3,4]]", b"[ [ 1 , 2 ] ,\n[3,\t4] ]", b"[1,[2,[3]],4]", b"[[],[1,2,3,4]]"]
)
def test_brackets_say_nothing_that_the_shape_does_not(text):
    assert from_json(text, name="x", datatype="INT64", shape=[2, 2]).array.tolist() == [[1, 2], [3, 4]]


def test_strings_may_hold_brackets():
    array = from_json(b'[["a]["], ["{"]]', name="x", datatype="BYTES", shape=[2, 1]).array
    assert array.tolist() == [[b"a]["], [b"{"]]


@pytest.mark.parametrize("text", [b"5", b'"a"', b"null", b"{}", b'["\xff"]', b"[1e999]"])
@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
def test_what_is_no_list_of_elements_is_refused(text, datatype):
    with pytest.raises(InvalidRequest):
        from_json(text, name="x", datatype=datatype, shape=[1])


def test_a_million_nested_numbers_open_no_python_list():
    text = b"[" + b",".join([b"[1]"] * 1_000_000) + b"]"
    assert from_json(text, name="x", datatype="INT8", shape=[1_000_000, 1]).array.sum() == 1_000_000


def test_too_many_lists_of_strings_are_refused():
    text = b"[" + b",".join([b'["a"]'] * 200_000) + b"]"
    with pytest.raises(PayloadTooLarge, match="131,072"):
        from_json(text, name="x", datatype="BYTES", shape=[200_000])


def test_a_flat_list_of_strings_may_be_long():
    text = b"[" + b",".join([b'"[["'] * 200_000) + b"]"
    assert from_json(text, name="x", datatype="BYTES", shape=[200_000]).array[-1] == b"[["


def test_floats_that_json_lacks_are_written_as_triton_does():
    array = np.array([math.nan, math.inf, -math.inf, 1.5], np.float32)
    assert to_json(Tensor("x", "FP32", array)) == b"[NaN,Infinity,-Infinity,1.5]"


def test_data_is_written_flat():
    assert to_json(Tensor("x", "INT8", np.ones((2, 2), np.int8))) == b"[1,1,1,1]"
