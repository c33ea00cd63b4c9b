import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.repository.configs import INPUT, OUTPUT, read, refusal
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.tensor_spec import TensorSpec, read_inputs


def test_inputs_and_outputs_are_read():
    config = read(
        """
        max_batch_size: 2
        input { name: "x" data_type: TYPE_BF16 dims: [ -1, 4 ] optional: true }
        input { name: "z" data_type: TYPE_STRING dims: [ 1 ] reshape { } }
        output { name: "y" data_type: TYPE_FP32 dims: [ 3 ] label_filename: "labels.txt" }
        """
    )
    assert config.inputs == (
        TensorSpec(name="x", data_type=DataType.Value("TYPE_BF16"), dims=(-1, 4), is_optional=True),
        TensorSpec(name="z", data_type=DataType.Value("TYPE_STRING"), dims=(1,), reshape=()),
    )
    assert config.outputs == (
        TensorSpec(name="y", data_type=DataType.Value("TYPE_FP32"), dims=(3,), label_filename="labels.txt"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input { data_type: TYPE_FP32 dims: 4 } ", "input[0].name: model input must specify 'name' for m"),
        ('input { name: "x" dims: 4 } ', "input[0].data_type: model input 'x' must specify 'data_type' for m"),
        ('input { name: "x" data_type: TYPE_FP32 } ', "input[0].dims: model input 'x' must specify 'dims' for m"),
        (
            'input { name: "x" data_type: TYPE_FP32 dims: [ 4, 0 ] } ',
            "input[0].dims: model input 'x' dimension must be integer >= 1, or -1 to indicate a variable-size",
        ),
        (
            'input { name: "x" data_type: TYPE_FP32 dims: 1 reshape { } } ',
            "input[0].reshape: model input 'x' cannot have empty reshape for non-batching model",
        ),
        (
            'input { name: "x" data_type: TYPE_FP32 dims: 4 reshape { shape: [ -2 ] } } ',
            "input[0].reshape: model input 'x' reshape dimensions must be integer >= 1",
        ),
        (
            'input { name: "x" data_type: TYPE_FP32 dims: 4 reshape { shape: [ 2, 3 ] } } ',
            "input[0].reshape: model input 'x' has different size for dims and reshape for m",
        ),
        (
            'input { name: "x" data_type: TYPE_FP32 dims: [ -1, 4 ] reshape { shape: [ 4 ] } } ',
            "input[0].reshape: model input 'x' has different number of variable-size dimensions",
        ),
        (
            'input { name: "x" data_type: TYPE_FP32 dims: [ 2, -1, 6 ] reshape { shape: [ -1, 12 ] } } ',
            "input[0].reshape: model input 'x' has different size for dims and reshape for m",
        ),
        (
            'input { name: "x" data_type: TYPE_FP32 dims: [ 3, 4 ] format: FORMAT_NCHW } ',
            "input[0].format: model input NHWC/NCHW require 3 dims for m",
        ),
        (INPUT + INPUT, "input[1].name: 'x' is there twice"),
    ],
)
def test_wrong_input_is_refused_by_field(text, message):
    assert refusal(text + OUTPUT).startswith(f"c.pbtxt: {message}")


@pytest.mark.parametrize("name", ["../labels.txt", "..", "a/b", "/etc/passwd", "a\\\\b"])
def test_label_file_elsewhere_is_refused(name):
    text = INPUT + f'output {{ name: "y" data_type: TYPE_FP32 dims: 4 label_filename: "{name}" }}'
    assert refusal(text) == "c.pbtxt: output[0].label_filename: is not a plain file name"


def test_model_without_outputs_is_refused():
    assert refusal(INPUT) == "c.pbtxt: output: must specify 'output' for m"


def test_pieces_between_variable_sizes_may_be_reshaped():
    text = 'input { name: "x" data_type: TYPE_FP32 dims: [ 2, 4, -1, 6 ] reshape { shape: [ 8, -1, 1, 6 ] } } '
    assert read(text + OUTPUT).inputs[0].reshape == (8, -1, 1, 6)


@given(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4), st.randoms())
def test_reshape_to_the_same_sizes_in_any_order_is_accepted(dims, random):
    shuffled = random.sample(dims, len(dims))
    config = ModelConfig(name="m", max_batch_size=1)
    config.input.add(name="x", data_type="TYPE_FP32", dims=dims).reshape.shape.extend(shuffled)
    assert read_inputs(config)[0].reshape == tuple(shuffled)
    config.input[0].reshape.shape.append(2)
    with pytest.raises(ConfigError, match="has different size"):
        read_inputs(config)
