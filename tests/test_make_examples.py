import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from tests import tiny_tensors
from tests.make_examples import EXAMPLES, REPOSITORY
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from sardonyx.runtime.dtypes import from_ort_name

ENSEMBLE = "simple_ensemble"


def read_config(name: str) -> ModelConfig:
    return text_format.Parse((REPOSITORY / name / "config.pbtxt").read_text(), ModelConfig())


def run(name: str, **inputs) -> dict:
    session = onnxruntime.InferenceSession(REPOSITORY / name / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def column(*values, dtype=np.int32):
    return np.array(values, dtype).reshape(-1, 1)


def texts(values) -> np.ndarray:
    return np.array([str(value) for value in values], object).reshape(1, -1)


@pytest.mark.parametrize("name", EXAMPLES)
def test_committed_graph_is_what_the_script_makes(name):
    path = REPOSITORY / name / "1" / "model.onnx"
    assert path.read_bytes() == tiny_tensors.serialize(EXAMPLES[name]())
    assert path.stat().st_size < 1024


def test_every_example_is_tracked_by_git_and_in_the_readme():
    names = sorted(path.parent.name for path in REPOSITORY.glob("simple*/config.pbtxt"))
    assert names == sorted([*EXAMPLES, ENSEMBLE])
    ignore = (REPOSITORY.parent / ".gitignore").read_text()
    assert sorted(re.findall(r"^!model_repository/(\w+)/$", ignore, re.MULTILINE)) == names
    section = (REPOSITORY / "README.md").read_text().partition("## Examples")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == names


@pytest.mark.parametrize("name", EXAMPLES)
def test_config_names_every_tensor_of_the_graph(name):
    config = read_config(name)
    assert (config.name, config.platform, config.max_batch_size) == (name, "onnxruntime_onnx", 8)
    batching = config.sequence_batching
    inputs = {port.name: (DataType.Name(port.data_type), list(port.dims)) for port in config.input}
    outputs = {port.name: (DataType.Name(port.data_type), list(port.dims)) for port in config.output}
    for entry in batching.control_input:
        kind = DataType.Name(entry.control[0].data_type) if entry.name == "CORRID" else "TYPE_INT32"
        inputs[entry.name] = (kind, [1])
    for state in batching.state:
        inputs[state.input_name] = outputs[state.output_name] = (DataType.Name(state.data_type), list(state.dims))
    session = onnxruntime.InferenceSession(REPOSITORY / name / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    for ports, values in ((inputs, session.get_inputs()), (outputs, session.get_outputs())):
        of_graph = {}
        for value in values:
            datatype = from_ort_name(value.type).name.replace("BYTES", "STRING")
            assert value.shape[0] == "batch"
            of_graph[value.name] = (f"TYPE_{datatype}", [-1 if size is None else size for size in value.shape[1:]])
        assert ports == of_graph


def test_simple_adds_and_subtracts():
    first, second = np.arange(32, dtype=np.int32).reshape(2, 16), np.full((2, 16), 5, np.int32)
    outputs = run("simple", INPUT0=first, INPUT1=second)
    np.testing.assert_array_equal(outputs["OUTPUT0"], first + second)
    np.testing.assert_array_equal(outputs["OUTPUT1"], first - second)


def test_simple_int8_wraps_around():
    first, second = np.full((1, 16), 100, np.int8), np.full((1, 16), 100, np.int8)
    outputs = run("simple_int8", INPUT0=first, INPUT1=second)
    assert outputs["OUTPUT0"].dtype == np.int8
    assert set(outputs["OUTPUT0"].ravel()) == {-56}
    assert set(outputs["OUTPUT1"].ravel()) == {0}


def test_simple_string_computes_with_decimal_texts():
    outputs = run("simple_string", INPUT0=texts(range(16)), INPUT1=texts([7] * 16))
    assert outputs["OUTPUT0"].tolist() == [[str(number + 7) for number in range(16)]]
    assert outputs["OUTPUT1"].tolist() == [[str(number - 7) for number in range(16)]]


def test_simple_identity_takes_any_number_of_texts():
    values = np.array([["a", "", "grün"], ["x", "he\0llo", "z"]], object)
    np.testing.assert_array_equal(run("simple_identity", INPUT0=values)["OUTPUT0"], values)


def test_simple_sequence_adds_the_start_in_slots_that_are_ready():
    outputs = run("simple_sequence", INPUT=column(20, 7, 9), START=column(1, 0, 1), READY=column(1, 1, 0))
    assert outputs["OUTPUT"].ravel().tolist() == [21, 7, 0]


def test_simple_dyna_sequence_adds_the_id_at_the_end():
    outputs = run(
        "simple_dyna_sequence",
        INPUT=column(100, 1, 5, 5),
        START=column(1, 0, 0, 0),
        END=column(0, 1, 0, 1),
        READY=column(1, 1, 1, 0),
        CORRID=column(1001, 1000, 7, 7, dtype=np.uint64),
    )
    assert outputs["OUTPUT"].ravel().tolist() == [101, 1001, 5, 0]


def test_simple_accumulate_starts_afresh_at_a_start():
    outputs = run("simple_accumulate", INPUT=column(5, 5), STATE_IN=column(37, 37), START=column(1, 0))
    assert outputs["OUTPUT"].ravel().tolist() == [5, 42]
    np.testing.assert_array_equal(outputs["OUTPUT"], outputs["STATE_OUT"])


def test_simple_string_dyna_sequence_keeps_the_id_out_of_its_state():
    outputs = run(
        "simple_string_dyna_sequence",
        INPUT=column(20, -1),
        STATE_IN=column(9, -9),
        START=column(1, 0),
        END=column(0, 1),
        CORRID=texts([1002, 1002]).reshape(2, 1),
    )
    assert outputs["OUTPUT"].ravel().tolist() == [20, 992]
    assert outputs["STATE_OUT"].ravel().tolist() == [20, -10]


def test_simple_classes_tell_the_direction():
    readings = np.array([[0, 0, 3, 4], [1, 1, 1, 1], [5, 5, 0, 0]], np.float32)
    scores = run("simple_classes", READINGS=readings)["SCORES"]
    labels = (REPOSITORY / "simple_classes/labels.txt").read_text().splitlines()
    assert [labels[index] for index in scores.argmax(axis=1)] == ["rising", "level", "falling"]
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-6)


def test_ensemble_maps_only_tensors_that_its_models_have():
    config = read_config(ENSEMBLE)
    assert config.platform == "ensemble"
    assert config.max_batch_size == 8
    known = {port.name for port in config.input}
    for step in config.ensemble_scheduling.step:
        model = read_config(step.model_name)
        assert set(step.input_map) == {port.name for port in model.input}
        assert set(step.output_map) <= {port.name for port in model.output}
        assert set(step.input_map.values()) <= known
        known |= set(step.output_map.values())
    assert {port.name for port in config.output} <= known
    assert Path(REPOSITORY / ENSEMBLE / "1").is_dir()
