"""The likeliest classes in place of an output's values."""

import numpy as np
import pytest
from tests.conformance.triton import pair
from tests.conformance.triton import texts as as_texts

LABELS = ("rising", "level", "falling")
READINGS = np.array([[1, 2, 5, 6], [9, 8, 1, 0]], np.float32)


def classes(caller, model, tensors, output, count, **options):
    """The strings of an answer by row."""
    wanted = caller.outputs(output, class_count=count, **options)
    array = caller.infer(model, tensors, outputs=wanted).as_numpy(output)
    return [[each.decode() if isinstance(each, bytes) else each for each in row] for row in array]


def scores(caller):
    return caller.infer("simple_classes", {"READINGS": READINGS}).as_numpy("SCORES")


def test_classes_are_value_index_and_label_likeliest_first(caller):
    (first, second) = classes(caller, "simple_classes", {"READINGS": READINGS}, "SCORES", 3)
    for row, values in ((first, scores(caller)[0]), (second, scores(caller)[1])):
        order = np.argsort(-values, kind="stable")
        assert [each.split(":")[1:] for each in row] == [[str(index), LABELS[index]] for index in order]
        np.testing.assert_allclose([float(each.split(":")[0]) for each in row], values[order], atol=1e-6)


def test_the_label_says_what_the_readings_do(caller):
    best = classes(caller, "simple_classes", {"READINGS": READINGS}, "SCORES", 1)
    assert [row[0].split(":")[2] for row in best] == ["rising", "falling"]


def test_values_have_six_decimals(caller):
    (row,) = classes(caller, "simple_classes", {"READINGS": READINGS[:1]}, "SCORES", 1)
    assert len(row[0].split(":")[0].partition(".")[2]) == 6


def test_more_classes_than_there_are_give_all(caller):
    (row,) = classes(caller, "simple_classes", {"READINGS": READINGS[:1]}, "SCORES", 100)
    assert len(row) == 3


def test_an_output_without_labels_has_value_and_index(caller):
    (row,) = classes(caller, "simple", pair(), "OUTPUT0", 2)
    assert row == ["16:15", "15:14"]


def test_classes_may_come_as_json(http):
    (row,) = classes(http, "simple", pair(), "OUTPUT0", 1, binary_data=False)
    assert row == ["16:15"]


def test_one_output_may_be_classes_and_the_other_values(caller):
    wanted = caller.outputs("OUTPUT0", class_count=1) + caller.outputs("OUTPUT1")
    result = caller.infer("simple", pair(), outputs=wanted)
    assert result.as_numpy("OUTPUT0").tolist() == [[b"16:15"]]
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), np.arange(16)[None] - 1)


def test_text_has_no_classes(caller):
    tensors = {"INPUT0": as_texts(["a"], 1, 1)}
    wanted = caller.outputs("OUTPUT0", class_count=1)
    assert caller.refusal("simple_identity", tensors, outputs=wanted).status in ("400", "INVALID_ARGUMENT", "501")


@pytest.mark.parametrize("count", [-1, 1 << 40])
def test_a_count_of_classes_out_of_range_is_no_failure_of_the_server(http, count):
    output = {"name": "OUTPUT0", "parameters": {"classification": count}}
    inputs = [
        {"name": name, "datatype": "INT32", "shape": [1, 16], "data": array.ravel().tolist()}
        for name, array in pair().items()
    ]
    status, _ = http.server.request("POST", "/v2/models/simple/infer", {"inputs": inputs, "outputs": [output]})
    assert status == (400 if count < 0 else 200)
