import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.serving.tensor_serving import call, tensor

from sardonyx.errors import InvalidRequest
from sardonyx.serving.tensor_checks import TensorSignature
from sardonyx.tensors import Tensor, TensorMetadata


def port(name: str, datatype: str = "FP32", shape: tuple[int, ...] = (-1, 16), *, is_optional: bool = False):
    return TensorMetadata(name=name, datatype=datatype, shape=shape, is_optional=is_optional)


def signature(
    *inputs: TensorMetadata, max_batch_size: int = 8, outputs: tuple[str, ...] = ("X", "Y")
) -> TensorSignature:
    ports = tuple(port(name) for name in outputs)
    return TensorSignature("m", inputs or (port("A"), port("B")), ports, max_batch_size)


def zeros(name: str, *shape: int, datatype: str = "FP32") -> Tensor:
    return tensor(name, np.zeros(shape), datatype)


def refuse(checked: TensorSignature, *inputs: Tensor, message: str, param: str = "inputs", **options: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{re.escape(message)}") as refusal:
        checked.bind(call(*inputs, **options))
    assert refusal.value.param == param


def test_call_becomes_arrays_by_name():
    inputs = zeros("B", 2, 16), zeros("A", 2, 16)
    bound = signature().bind(call(*inputs))
    assert {
        name: array is each.array for each in inputs for name, array in bound.inputs.items() if each.name == name
    } == {
        "A": True,
        "B": True,
    }
    assert bound.batch_size == 2
    assert bound.num_bytes == 2 * 2 * 16 * 4


def test_outputs_are_those_that_are_wanted_in_their_order_or_all():
    inputs = zeros("A", 1, 16), zeros("B", 1, 16)
    assert signature().bind(call(*inputs)).outputs == ("X", "Y")
    assert signature().bind(call(*inputs, outputs=["Y", "X"])).outputs == ("Y", "X")
    assert signature().bind(call(*inputs, outputs=["Y"])).outputs == ("Y",)


def test_unknown_output_is_refused_by_name():
    inputs = zeros("A", 1, 16), zeros("B", 1, 16)
    message = "unexpected inference output 'Z' for model 'm'"
    refuse(signature(), *inputs, outputs=["X", "Z"], message=message, param="outputs")


def test_unknown_input_is_refused_by_name():
    refuse(signature(), zeros("C", 1, 16), message="unexpected inference input 'C' for model 'm'")


def test_input_that_comes_twice_is_refused():
    refuse(signature(), zeros("A", 1, 16), zeros("A", 1, 16), message="input 'A' already exists in request")


def test_other_datatype_than_the_models_is_refused():
    message = "inference input 'A' data-type is 'INT32', but model 'm' expects 'FP32'"
    refuse(signature(), zeros("A", 1, 16, datatype="INT32"), message=message)


def test_other_shape_is_refused_with_both_and_a_hint():
    message = (
        "unexpected shape for input 'A' for model 'm'. Expected [-1,16], got [1,15]. NOTE: Setting a non-zero "
        "max_batch_size in the model config requires a batch dimension to be prepended to each input shape."
    )
    refuse(signature(), zeros("A", 1, 15), message=message)


@pytest.mark.parametrize("shape", [(), (16,), (1, 16, 1)])
def test_other_number_of_dimensions_is_refused(shape: tuple[int, ...]):
    refuse(signature(), zeros("A", *shape), message="unexpected shape for input 'A' for model 'm'.")


def test_any_size_goes_where_the_model_says_so():
    checked = signature(port("A", shape=(-1, -1, 3)))
    assert checked.bind(call(zeros("A", 2, 0, 3))).batch_size == 2
    refuse(checked, zeros("A", 2, 5, 4), message="unexpected shape for input 'A'")


def test_missing_inputs_are_named():
    message = (
        "expected 2 inputs but got 1 inputs for model 'm'. Got input(s) ['A'], but missing required input(s) ['B']. "
        "Please provide all required input(s)."
    )
    refuse(signature(), zeros("A", 1, 16), message=message)
    refuse(signature(), message="expected 2 inputs but got 0 inputs for model 'm'. Got input(s) [], but missing")


def test_message_about_missing_inputs_counts_optional_ones_apart():
    checked = signature(port("A"), port("B"), port("C", is_optional=True))
    message = "expected number of inputs between 2 and 3 but got 1 inputs for model 'm'. Got input(s) ['C']"
    refuse(checked, zeros("C", 1, 16), message=message)


def test_optional_input_may_be_left_out_and_separates_batches():
    checked = signature(port("A"), port("C", is_optional=True))
    without = checked.bind(call(zeros("A", 1, 16)))
    with_it = checked.bind(call(zeros("A", 1, 16), zeros("C", 1, 16)))
    assert (list(without.inputs), list(with_it.inputs)) == (["A"], ["A", "C"])
    assert without.batch_key != with_it.batch_key


def test_batch_sizes_of_the_inputs_must_agree():
    message = "input 'B' batch size does not match other inputs for 'm'"
    refuse(signature(), zeros("A", 1, 16), zeros("B", 2, 16), message=message)


@pytest.mark.parametrize(("size", "word"), [(9, "<= 8"), (0, ">= 1")])
def test_batch_beyond_the_models_or_empty_is_refused(size: int, word: str):
    message = f"inference request batch-size must be {word} for 'm'"
    refuse(signature(), zeros("A", size, 16), zeros("B", size, 16), message=message)


def test_model_without_batches_counts_as_one_whatever_its_first_size():
    checked = signature(port("A", shape=(-1,)), max_batch_size=0)
    assert checked.bind(call(zeros("A", 100))).batch_size == 1
    assert checked.bind(call(zeros("A", 0))).batch_size == 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_keys_are_equal_just_where_shapes_behind_the_batch_axis_are(first: list[int], second: list[int]):
    checked = {n: signature(port("A", shape=(-1,) * (n + 1))) for n in range(1, 4)}
    keys = [
        checked[len(dims)].bind(call(zeros("A", rows, *dims))).batch_key for rows, dims in ((1, first), (2, second))
    ]
    assert (keys[0] == keys[1]) == (first == second)


def test_key_does_not_depend_on_the_order_of_the_inputs():
    checked = signature(port("A", shape=(-1, -1)), port("B", shape=(-1, -1)))
    one, other = zeros("A", 1, 2), zeros("B", 1, 3)
    assert checked.bind(call(one, other)).batch_key == checked.bind(call(other, one)).batch_key


def test_strings_become_text_and_count_by_their_bytes():
    bound = signature(port("A", "BYTES", (-1, -1))).bind(call(tensor("A", [["é", "", "a\0b"]], "BYTES")))
    assert bound.inputs["A"].tolist() == [["é", "", "a\0b"]]
    assert bound.num_bytes == 5


def test_strings_may_stay_bytes():
    checked = signature(port("A", "BYTES", (-1, -1)))
    bound = checked.bind(call(tensor("A", [[b"\xff"]], "BYTES")), as_text=False)
    assert bound.inputs["A"].tolist() == [[b"\xff"]]


@pytest.mark.parametrize("data", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80"])
def test_strings_that_are_not_utf8_are_refused_by_their_place(data: bytes):
    checked = signature(port("A", "BYTES", (-1, -1)))
    message = "element 1 of input 'A' is not UTF-8; string tensors of ONNX models must be"
    refuse(checked, tensor("A", [["fine", data, "fine"]], "BYTES"), message=message)
