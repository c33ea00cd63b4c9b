from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.api.kserve.parameters import read_parameters
from sardonyx.errors import InvalidRequest
from sardonyx.tensors import SequenceControl


def test_parameters_are_sorted_by_who_they_are_for():
    given = {"priority": 2, "timeout": 1500, "sequence_id": 7, "sequence_start": True, "sequence_end": False}
    known = read_parameters(given | {"temperature": 0.5, "binary_data_output": True})
    assert (known.priority, known.timeout_us) == (2, 1500)
    assert known.sequence == SequenceControl(id=7, is_start=True, is_end=False)
    assert known.others == {"temperature": 0.5}


def test_parameters_are_not_changed():
    given = {"priority": 1, "mine": "x"}
    read_parameters(given)
    assert given == {"priority": 1, "mine": "x"}


@pytest.mark.parametrize("sequence_id", [0, ""])
def test_empty_sequence_ids_mean_none(sequence_id: int | str):
    assert read_parameters({"sequence_id": sequence_id, "sequence_start": True}).sequence is None


@pytest.mark.parametrize("sequence_id", [1, (1 << 64) - 1, "a", "0", "x" * 128])
def test_sequence_ids_are_numbers_or_texts(sequence_id: int | str):
    known = read_parameters({"sequence_id": sequence_id, "sequence_end": True})
    assert known.sequence == SequenceControl(id=sequence_id, is_end=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("priority", -1),
        ("priority", True),
        ("priority", 1.0),
        ("priority", "1"),
        ("priority", 1 << 63),
        ("timeout", -1),
        ("timeout", "soon"),
        ("sequence_id", -1),
        ("sequence_id", 1 << 64),
        ("sequence_id", True),
        ("sequence_id", 1.5),
        ("sequence_id", "x" * 129),
        ("sequence_start", 1),
        ("sequence_end", "true"),
    ],
)
def test_wrong_values_are_refused_by_their_name(name: str, value: Any):
    with pytest.raises(InvalidRequest, match=f"^{name}: ") as refusal:
        read_parameters({name: value})
    assert refusal.value.param == name


def test_names_that_are_reserved_are_refused():
    message = "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified"
    with pytest.raises(InvalidRequest, match=message) as refusal:
        read_parameters({"triton_final_response": True})
    assert "'triton_final_response'" in refusal.value.message


def test_wish_for_an_empty_final_response_is_not_refused():
    assert read_parameters({"triton_enable_empty_final_response": True}).others == {}


@given(st.dictionaries(st.text(max_size=20), st.booleans() | st.integers() | st.floats() | st.text(max_size=5)))
def test_any_parameters_are_read_or_refused(parameters: dict[str, Any]):
    try:
        known = read_parameters(parameters)
    except InvalidRequest:
        return
    assert known.others.keys() <= parameters.keys()
