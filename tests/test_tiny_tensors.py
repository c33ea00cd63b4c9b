import threading

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from tests import tiny_tensors
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.runtime.dtypes import DATATYPES

NUMBERS = sorted(set(DATATYPES) - {"BOOL", "BYTES", "BF16"})


def open_session(model) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(tiny_tensors.serialize(model), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("datatype", NUMBERS)
def test_add_sub_computes_in_every_number_type(datatype):
    first, second = (np.array(values, DATATYPES[datatype].array) for values in ([[9, 8]], [[1, 2]]))
    outputs = open_session(tiny_tensors.add_sub(datatype, shape=(2,))).run(None, {"INPUT0": first, "INPUT1": second})
    assert [output.dtype for output in outputs] == [first.dtype] * 2
    assert [output.tolist() for output in outputs] == [[[10, 10]], [[8, 6]]]


def test_add_sub_of_texts_fails_on_what_is_no_number():
    session = open_session(tiny_tensors.add_sub("BYTES", shape=(1,)))
    with pytest.raises(Exception, match="Cast"):
        session.run(None, {name: np.array([["one"]], object) for name in ("INPUT0", "INPUT1")})


@pytest.mark.parametrize("datatype", DATATYPES)
def test_identity_loads_with_every_datatype(datatype):
    session = open_session(tiny_tensors.identity(datatype, shape=(-1, 3), num_tensors=2))
    assert [port.type for port in session.get_inputs()] == [DATATYPES[datatype].ort_name] * 2
    assert session.get_outputs()[1].shape == ["batch", None, 3]


def test_graph_without_batch_axis_has_the_shape_itself():
    assert open_session(tiny_tensors.identity(shape=(4,), is_batched=False)).get_inputs()[0].shape == [4]


def test_slow_model_gives_back_its_numbers():
    (output,) = open_session(tiny_tensors.slow()).run(None, {"INPUT": np.array([[7], [0], [1000]], np.int64)})
    assert output.tolist() == [[7], [0], [1000]]


def test_slow_model_runs_until_it_is_ended():
    session, options, errors = open_session(tiny_tensors.slow(is_batched=False)), onnxruntime.RunOptions(), []

    def work() -> None:
        try:
            session.run(None, {"INPUT": np.array([1 << 62], np.int64)}, options)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    options.terminate = True
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert len(errors) == 1


@pytest.mark.parametrize("data", [tiny_tensors.truncated(tiny_tensors.add_sub()), b"not a graph"])
def test_broken_files_do_not_load(data):
    with pytest.raises(Exception, match=r"Load model|protobuf|INVALID"):
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


def test_unknown_operator_does_not_load():
    with pytest.raises(Exception, match="Levitate"):
        open_session(tiny_tensors.unknown_operator())


def test_written_model_has_graph_config_and_files(tmp_path):
    config = tiny_tensors.config_text(
        inputs=[("INPUT0", "BYTES", (-1, 2))], outputs=[("OUTPUT0", "FP32", (3,))], rest="dynamic_batching { }"
    )
    model = tiny_tensors.identity()
    folder = tiny_tensors.write_model(tmp_path, "m", model, version=3, config=config, files={"labels.txt": "a\nb\n"})
    parsed = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
    assert parsed.max_batch_size == 8
    assert list(parsed.input[0].dims) == [-1, 2]
    assert parsed.HasField("dynamic_batching")
    assert (folder / "3/model.onnx").read_bytes() == tiny_tensors.serialize(model)
    assert (folder / "labels.txt").read_text() == "a\nb\n"
