import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sardonyx.api.kserve.codec import MAX_DEPTH, MAX_ELEMENTS, from_raw, from_values, to_raw, to_values
from sardonyx.errors import InvalidRequest
from sardonyx.runtime.dtypes import DATATYPES
from sardonyx.tensors import Tensor

NUMERIC = sorted(DATATYPES.keys() - {"BYTES"})
JSON = sorted(DATATYPES.keys() - {"FP16", "BF16"})
SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def values_of(datatype):
    """A strategy for arrays of any shape, NaN and infinities included."""
    if datatype == "BYTES":
        return SHAPES.flatmap(lambda shape: arrays.arrays(object, shape, elements=st.binary(max_size=9)))
    return SHAPES.flatmap(lambda shape: arrays.arrays(DATATYPES[datatype].array, shape))


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
@settings(deadline=None)
@given(data=st.data())
def test_raw_bytes_come_back_as_they_were(datatype, data):
    array = data.draw(values_of(datatype))
    raw = bytes(to_raw(Tensor("x", datatype, array)))
    again = from_raw(memoryview(raw), name="x", datatype=datatype, shape=array.shape)
    assert again.array.shape == array.shape
    assert again.array.dtype == array.dtype
    assert bytes(to_raw(again)) == raw
    np.testing.assert_array_equal(again.array, array)


@pytest.mark.parametrize("datatype", JSON)
@settings(deadline=None)
@given(data=st.data())
def test_values_come_back_as_they_were(datatype, data):
    array = data.draw(values_of(datatype))
    if datatype == "BYTES":
        array = np.frompyfunc(lambda each: each.hex().encode(), 1, 1)(array)
        array = array if isinstance(array, np.ndarray) else np.array(array, object)
    again = from_values(to_values(Tensor("x", datatype, array)), name="x", datatype=datatype, shape=array.shape)
    assert again.array.dtype == DATATYPES[datatype].array
    np.testing.assert_array_equal(again.array, array)


@pytest.mark.parametrize("datatype", [each for each in NUMERIC if each != "BOOL"])
def test_raw_numbers_are_looked_at_where_they_lie(datatype):
    size = DATATYPES[datatype].array.itemsize
    body = bytes(1 + 3 * size)
    array = from_raw(memoryview(body)[1:], name="x", datatype=datatype, shape=[3]).array
    assert np.shares_memory(array, np.frombuffer(body, np.uint8))
    assert not array.flags.writeable


def test_raw_numbers_are_sent_from_where_they_lie():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.shares_memory(np.frombuffer(to_raw(Tensor("x", "FP32", array)), np.uint8), array)


def test_a_bool_byte_that_is_not_1_is_true_all_the_same():
    array = from_raw(b"\x00\x01\x02\xff", name="x", datatype="BOOL", shape=[2, 2]).array
    assert array.view(np.uint8).tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(("datatype", "size"), [("FP32", 60), ("INT64", 64), ("BF16", 0), ("BOOL", 17)])
def test_a_size_that_is_not_the_shapes_is_refused_with_both(datatype, size):
    expected = 16 * DATATYPES[datatype].array.itemsize
    with pytest.raises(InvalidRequest, match=rf"mismatch for input 'x' for model 'm'. Expected {expected}, got {size}"):
        from_raw(bytes(size), name="x", datatype=datatype, shape=[1, 16], model_name="m")


@pytest.mark.parametrize("read", [from_raw, from_values])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([2, -5], "contains one or more invalid dimensions"),
        ([16, 2**60 + 2], "causes total element count to exceed maximum size of 9223372036854775807"),
        ([4, 2**60 + 2], "byte size overflow for input 'x'"),
        ([0, 2**70], "causes total element count to exceed"),
        ([1] * 65, "dimensions"),
        ([2**62] * 100_000, "has 100000 dimensions"),
    ],
)
def test_a_shape_that_nothing_can_have_is_refused(read, shape, message):
    with pytest.raises(InvalidRequest, match=message):
        read([1.0] if read is from_values else b"abcd", name="x", datatype="FP32", shape=shape)


@pytest.mark.parametrize("read", [from_raw, from_values])
def test_an_unknown_datatype_is_refused(read):
    with pytest.raises(InvalidRequest, match="'FP8' of tensor 'x'"):
        read([], name="x", datatype="FP8", shape=[0])


@pytest.mark.parametrize(
    ("data", "shape", "message"),
    [
        (b"\x01\x00\x00\x00a\x01", [1], "incomplete string length indicator"),
        (b"\x05\x00\x00\x00a", [1], "expecting string of length 5 bytes but only 1 bytes"),
        (b"\xff\xff\xff\xffa", [1], "incomplete string data"),
        (b"\x01\x00\x00\x00a" * 2, [1], "unexpected number of string elements 2 for inference input 'x', expecting 1"),
        (b"\x05\x00\x00\x00abcde", [2], "expected 2 string elements for inference input 'x', got 1"),
        (b"\x01\x00\x00\x00a", [2**40], "expected 1099511627776 string elements"),
        (b"", [1], "expected 1 string elements"),
    ],
)
def test_bytes_whose_lengths_do_not_add_up_are_refused(data, shape, message):
    with pytest.raises(InvalidRequest, match=message):
        from_raw(data, name="x", datatype="BYTES", shape=shape)


@pytest.mark.parametrize("elements", [[b"ab", b"cd"], [b"a\x00", b"\x00\x00"], [b"", b""], [b"abc", b"", b"d" * 300]])
def test_bytes_elements_keep_their_zeros_and_lengths(elements):
    array = np.empty(len(elements), object)
    array[:] = elements
    raw = to_raw(Tensor("x", "BYTES", array))
    assert from_raw(raw, name="x", datatype="BYTES", shape=[len(elements)]).array.tolist() == elements


def test_only_elements_and_their_order_count_however_lists_are_nested():
    for values in ([1, 2, 3, 4], [[1, 2], [3, 4]], [1, [2, [3]], 4], ((1, 2), (3, 4))):
        assert from_values(values, name="x", datatype="UINT8", shape=[2, 2]).array.tolist() == [[1, 2], [3, 4]]


def test_lists_may_be_nested_to_the_limit_and_no_deeper():
    def nested(depth):
        value = 5
        for _ in range(depth):
            value = [value]
        return value

    assert from_values(nested(MAX_DEPTH), name="x", datatype="INT8", shape=[1]).array.tolist() == [5]
    with pytest.raises(InvalidRequest, match=r"JSON nesting depth exceeds maximum allowed limit \(100\)"):
        from_values(nested(MAX_DEPTH + 1), name="x", datatype="INT8", shape=[1])


@pytest.mark.parametrize(
    ("datatype", "value", "message"),
    [
        ("INT32", True, "non-signed-integer as signed-integer"),
        ("INT32", 1.5, "non-signed-integer as signed-integer"),
        ("INT32", 1.0, "non-signed-integer as signed-integer"),
        ("UINT8", "1", "non-unsigned-integer as unsigned-integer"),
        ("FP32", True, "non-double as double"),
        ("FP64", "1.0", "non-double as double"),
        ("FP32", None, "non-double as double"),
        ("BOOL", 1, "non-boolean as boolean"),
        ("BYTES", 1, "non-string as string"),
        ("BYTES", {}, "non-string as string"),
    ],
)
def test_a_value_of_another_type_is_refused(datatype, value, message):
    with pytest.raises(InvalidRequest, match=f"attempt to access JSON {message}"):
        from_values([value], name="x", datatype=datatype, shape=[1])


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("INT8", 128),
        ("INT8", -129),
        ("UINT8", -1),
        ("UINT64", 2**64),
        ("INT64", 2**63),
        ("INT64", 10**400),
        ("FP32", 1e39),
        ("FP64", 10**400),
    ],
)
def test_a_value_out_of_range_is_refused(datatype, value):
    with pytest.raises(InvalidRequest, match=f"out of range for {datatype}"):
        from_values([value], name="x", datatype=datatype, shape=[1])


def test_integers_pass_for_floats():
    assert from_values([1, 2.0, 0], name="x", datatype="FP32", shape=[3]).array.tolist() == [1.0, 2.0, 0.0]


def test_floats_without_a_json_number_are_strings():
    array = from_values(["NaN", "Infinity", "-Infinity", 1], name="x", datatype="FP32", shape=[4]).array
    assert math.isnan(array[0])
    assert array[1:].tolist() == [math.inf, -math.inf, 1.0]


@pytest.mark.parametrize("values", [[1], [1, 2, 3], [], [[], []]])
def test_more_or_fewer_values_than_the_shape_says_are_refused(values):
    with pytest.raises(InvalidRequest, match="Shape does not match true shape of 'data' field"):
        from_values(values, name="x", datatype="INT32", shape=[2])


@pytest.mark.parametrize("values", [5, "abc", b"abc", None])
def test_values_that_are_no_list_are_refused(values):
    with pytest.raises(InvalidRequest, match="non-array as array"):
        from_values(values, name="x", datatype="BYTES", shape=[1])


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_are_no_json(datatype):
    with pytest.raises(InvalidRequest, match=f"receiving {datatype} data via JSON is not supported"):
        from_values([1.0], name="x", datatype=datatype, shape=[1])
    with pytest.raises(InvalidRequest, match=f"sending {datatype} data via JSON is not supported"):
        to_values(Tensor("x", datatype, np.zeros(1, DATATYPES[datatype].array)))


def test_bytes_that_are_no_utf_8_are_no_json():
    with pytest.raises(InvalidRequest, match="'x' holds bytes that are no UTF-8"):
        to_values(Tensor("x", "BYTES", np.array([b"\xff"], object)))


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(InvalidRequest, match="not Unicode"):
        from_values(["\ud800"], name="x", datatype="BYTES", shape=[1])


@settings(deadline=None)
@given(st.binary(max_size=64), st.lists(st.integers(-1, 5), max_size=3))
def test_any_bytes_are_elements_or_refused(data, shape):
    try:
        tensor = from_raw(data, name="x", datatype="BYTES", shape=shape)
    except InvalidRequest:
        return
    assert tensor.array.shape == tuple(shape)
    assert to_raw(tensor) == data
    assert tensor.array.size <= MAX_ELEMENTS
