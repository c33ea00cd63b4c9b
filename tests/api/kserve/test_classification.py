import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.api.kserve.classification import MAX_INLINE_VALUES, classify, with_classes
from sardonyx.errors import InvalidRequest
from sardonyx.runtime.dtypes import DATATYPES
from sardonyx.tensors import Tensor


def scores(values, datatype="FP32"):
    return Tensor("OUT", datatype, np.array(values, DATATYPES[datatype].array))


def texts(tensor):
    assert (tensor.name, tensor.datatype) == ("OUT", "BYTES")
    return [[each.decode() for each in row] for row in np.atleast_2d(tensor.array)]


def test_classes_come_highest_first_with_their_index():
    result = classify(scores([0.25, 0.5, -1.0]), 2, [], is_batching=False)
    assert result.array.shape == (2,)
    assert texts(result) == [["0.500000:1", "0.250000:0"]]


def test_labels_follow_where_there_are_any():
    result = classify(scores([1, 2, 3]), 3, ["cat", "dög"], is_batching=False)
    assert texts(result) == [["3.000000:2", "2.000000:1:dög", "1.000000:0:cat"]]


def test_each_row_of_a_batch_is_ranked_by_itself():
    result = classify(scores([[1, 2], [4, 3], [5, 6]]), 1, [], is_batching=True)
    assert result.array.shape == (3, 1)
    assert texts(result) == [["2.000000:1"], ["4.000000:0"], ["6.000000:1"]]


def test_of_equal_values_the_lowest_index_comes_first():
    assert texts(classify(scores([1, 3, 3, 1, 3]), 5, [], is_batching=False)) == [
        ["3.000000:1", "3.000000:2", "3.000000:4", "1.000000:0", "1.000000:3"]
    ]


def test_there_are_never_more_classes_than_values():
    assert classify(scores([[1, 2]]), 10, [], is_batching=True).array.shape == (1, 2)
    assert classify(scores([[]]), 10, [], is_batching=True).array.shape == (1, 0)


def test_further_dimensions_are_counted_through():
    assert texts(classify(scores([[[1, 2], [4, 3]]]), 2, [], is_batching=True)) == [["4.000000:2", "3.000000:3"]]


def test_single_number_is_one_class():
    assert texts(classify(scores(5), 3, ["only"], is_batching=False)) == [["5.000000:0:only"]]


@pytest.mark.parametrize(
    "datatype", ["INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP16", "FP32", "FP64"]
)
def test_numbers_of_every_datatype_can_be_ranked(datatype):
    dtype = DATATYPES[datatype].array
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    ranked = texts(classify(scores([0, limits.max, limits.min, 1], datatype), 4, [], is_batching=False))[0]
    # The lowest unsigned number is 0 itself, whose index is lower.
    assert [each.split(":")[1] for each in ranked] == ["1", "3", "0", "2"]
    assert all(("." in each) == (dtype.kind == "f") for each in ranked)


@pytest.mark.parametrize("datatype", ["BYTES", "BF16", "BOOL"])
def test_what_is_no_number_cannot_be_ranked(datatype):
    message = f"class result not available for output 'OUT' due to unsupported type '{datatype}'"
    with pytest.raises(InvalidRequest, match=message):
        classify(scores([[1]], datatype), 1, [], is_batching=True)


@given(st.lists(st.lists(st.integers(0, 5), min_size=7, max_size=7), min_size=1, max_size=4), st.integers(1, 9))
def test_ranking_is_pythons_sort(rows, count):
    result = texts(classify(scores(rows, "INT32"), count, [], is_batching=True))
    expected = [[f"{row[index]}:{index}" for index in sorted(range(7), key=lambda i: -row[i])[:count]] for row in rows]
    assert result == expected


@pytest.mark.parametrize(("size", "is_inline"), [(MAX_INLINE_VALUES, True), (MAX_INLINE_VALUES + 1, False)])
def test_many_values_are_ranked_off_the_event_loop(size, is_inline):
    loops = []

    def labels(output):
        assert output == "x"
        return Labels()

    class Labels(list):
        def __len__(self):
            loops.append(asyncio._get_running_loop())
            return 0

    async def rank():
        values = np.arange(size, dtype=np.int32)
        tensors = [Tensor("x", "INT32", values), Tensor("y", "INT32", values)]
        first, second = await with_classes(tensors, {"x": 1}, labels, is_batching=False)
        assert first.array.tolist() == [b"%d:%d" % (size - 1, size - 1)]
        assert second is tensors[1]

    asyncio.run(rank())
    assert [loop is not None for loop in loops] == [is_inline]
