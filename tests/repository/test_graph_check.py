import pytest
from tests.repository.configs import HEAD, config_of
from tritonclient.grpc.model_config_pb2 import DataType

from sardonyx.errors import ConfigError
from sardonyx.repository.graph_check import GraphTensor, check_graph

INT32 = DataType.Value("TYPE_INT32")
INT8 = DataType.Value("TYPE_INT8")
FP32 = DataType.Value("TYPE_FP32")


def tensor(side: str, name: str, dims: str = "16", data_type: str = "TYPE_INT32", more: str = "") -> str:
    return f'{side} {{ name: "{name}" data_type: {data_type} dims: [ {dims} ] {more} }} '


X0, X1 = tensor("input", "INPUT0"), tensor("input", "INPUT1")
Y0 = tensor("output", "OUTPUT0", data_type="TYPE_INT8")
Y1 = tensor("output", "OUTPUT1", data_type="TYPE_INT8")
INPUTS = [GraphTensor("INPUT0", INT32, (16,)), GraphTensor("INPUT1", INT32, (16,))]
OUTPUTS = [GraphTensor("OUTPUT0", INT8, (16,)), GraphTensor("OUTPUT1", INT8, (16,))]


def check(text: str, inputs: list[GraphTensor] = INPUTS, outputs: list[GraphTensor] = OUTPUTS) -> list[str]:
    return check_graph(config_of(HEAD + text), inputs, outputs)


def reason(text: str, inputs: list[GraphTensor] = INPUTS, outputs: list[GraphTensor] = OUTPUTS) -> str:
    with pytest.raises(ConfigError) as caught:
        check(text, inputs, outputs)
    return caught.value.reason


def test_config_that_suits_its_graph_has_no_notes():
    assert check(X0 + X1 + Y0 + Y1) == []


def test_outputs_may_be_left_out():
    assert check(X0 + X1 + Y1) == []


@pytest.mark.parametrize(
    ("case", "text", "expected"),
    [
        ("too_few_inputs", X0 + Y0, "unable to load model 'm', configuration expects 1 inputs, model provides 2"),
        (
            "too_many_inputs",
            X0 + X1 + tensor("input", "INPUT_EXTRA") + Y0,
            "unable to load model 'm', configuration expects 3 inputs, model provides 2",
        ),
        (
            "unknown_input",
            X0 + tensor("input", "INPUT_UNKNOWN") + Y0,
            "unexpected inference input 'INPUT_UNKNOWN', allowed inputs are: INPUT0, INPUT1",
        ),
        (
            "unknown_output",
            X0 + X1 + tensor("output", "OUTPUT_UNKNOWN", data_type="TYPE_INT8"),
            "unexpected inference output 'OUTPUT_UNKNOWN', allowed outputs are: OUTPUT0, OUTPUT1",
        ),
        (
            "bad_input_type",
            X0 + tensor("input", "INPUT1", data_type="TYPE_FP32") + Y0,
            "unable to load model 'm', configuration expects datatype TYPE_FP32 for input 'INPUT1', model provides "
            "TYPE_INT32",
        ),
        (
            "bad_output_type",
            X0 + X1 + tensor("output", "OUTPUT0"),
            "unable to load model 'm', configuration expects datatype TYPE_INT32 for output 'OUTPUT0', model provides "
            "TYPE_INT8",
        ),
        (
            "bad_input_dims",
            tensor("input", "INPUT0", "16, 1") + X1 + Y0,
            "model 'm', tensor 'INPUT0': the model expects 1 dimensions (shape [16]) but the model configuration "
            "specifies 2 dimensions (shape [16,1])",
        ),
        (
            "bad_output_dims",
            X0 + X1 + Y0 + tensor("output", "OUTPUT1", "1", "TYPE_INT8"),
            "model 'm', tensor 'OUTPUT1': the model expects 1 dimensions (shape [16]) but the model configuration "
            "specifies 1 dimensions (shape [1])",
        ),
        (
            "bad_max_batch_size",
            "max_batch_size: 8 " + X0 + X1 + Y0,
            "model 'm', tensor 'INPUT0': for the model to support batching the shape should have at least 1 dimension "
            "and the first dimension must be -1; but shape expected by the model is [16]",
        ),
    ],
)
def test_config_that_contradicts_its_graph_is_refused_in_tritons_words(case, text, expected):
    assert reason(text) == expected, case


def test_batch_dimension_is_told_where_shapes_differ():
    inputs = [GraphTensor("INPUT0", INT32, (-1, 16))]
    text = "max_batch_size: 8 " + tensor("input", "INPUT0", "16, 1") + Y0
    assert reason(text, inputs) == (
        "model 'm', tensor 'INPUT0': the model expects 2 dimensions (shape [-1,16]) but the model configuration "
        "specifies 3 dimensions (an initial batch dimension because max_batch_size > 0 followed by the explicit tensor "
        "shape, making complete shape [-1,16,1])"
    )


def test_reshape_is_what_the_graph_sees():
    inputs = [GraphTensor("INPUT0", INT32, (-1,))]
    outputs = [GraphTensor("OUTPUT0", INT8, (-1, 4, 4))]
    text = "max_batch_size: 8 " + tensor("input", "INPUT0", "1", more="reshape { }")
    text += tensor("output", "OUTPUT0", "16", "TYPE_INT8", more="reshape { shape: [ 4, 4 ] }")
    assert check(text, inputs, outputs) == []


def test_config_that_says_less_than_the_graph_is_noted():
    text = tensor("input", "INPUT0", "-1") + X1 + tensor("output", "OUTPUT0", "-1", "TYPE_INT8")
    assert check(text) == [
        "input 'INPUT0': the graph takes [16] only",
        "output 'OUTPUT0': the graph takes [16] only",
    ]


def test_config_that_promises_more_than_the_graph_is_noted():
    inputs = [GraphTensor("INPUT0", INT32, (-1,))]
    outputs = [GraphTensor("OUTPUT0", INT8, (-1,))]
    assert check(X0 + Y0, inputs, outputs) == ["output 'OUTPUT0': the graph promises no more than [-1]"]


@pytest.mark.parametrize("dims", ["1", "1, 1"])
def test_scalar_is_given_as_ones(dims):
    assert check(tensor("input", "INPUT0", dims) + Y0, [GraphTensor("INPUT0", INT32, ())]) == []


def test_scalar_of_another_size_is_refused():
    assert reason(X0 + Y0, [GraphTensor("INPUT0", INT32, ())]).startswith(
        "unable to load model 'm', scalar tensor 'INPUT0', should only provide 1 in the model configuration"
    )


def test_initializer_may_be_offered_as_an_optional_input_or_not_at_all():
    inputs = [INPUTS[0], GraphTensor("INPUT1", INT32, (16,), is_optional=True)]
    assert check(X0 + tensor("input", "INPUT1", more="optional: true") + Y0, inputs) == []
    assert check(X0 + Y0, inputs) == []


def test_input_that_the_graph_needs_is_not_optional():
    text = X0 + tensor("input", "INPUT1", more="optional: true") + Y0
    assert reason(text) == "unable to load model 'm', configuration expects 1 inputs, model provides 2"


def test_optional_input_of_a_batching_model_is_refused():
    inputs = [GraphTensor("INPUT0", INT32, (-1, 16)), GraphTensor("INPUT1", INT32, (-1, 16), is_optional=True)]
    text = "max_batch_size: 8 " + X0 + tensor("input", "INPUT1", more="optional: true") + Y0
    assert reason(text, inputs) == (
        "unable to load model 'm', optional input 'INPUT1' is not supported for models that support batching"
    )


SEQUENCE = (
    "max_batch_size: 8 "
    + X0
    + Y0
    + """
    sequence_batching {
        control_input { name: "START" control { fp32_false_true: [ 0, 1 ] } }
        state { input_name: "si" output_name: "so" data_type: TYPE_FP32 dims: [ -1, 2 ] }
    }
    """
)
START = GraphTensor("START", FP32, (-1, 1))
STATE_IN = GraphTensor("si", FP32, (-1, -1, 2))
STATE_OUT = GraphTensor("so", FP32, (-1, -1, 2))
ROWS_IN = GraphTensor("INPUT0", INT32, (-1, 16))
ROWS_OUT = GraphTensor("OUTPUT0", INT8, (-1, 16))


def test_controls_and_states_are_inputs_of_the_graph():
    assert check(SEQUENCE, [ROWS_IN, START, STATE_IN], [ROWS_OUT, STATE_OUT]) == []


@pytest.mark.parametrize(
    ("start", "state_in", "state_out", "expected"),
    [
        (
            GraphTensor("BEGIN", FP32, (-1, 1)),
            STATE_IN,
            STATE_OUT,
            "configuration specified sequence control 'START', but model does not provide that input",
        ),
        (
            GraphTensor("START", FP32, (-1, 2)),
            STATE_IN,
            STATE_OUT,
            "unable to load model 'm', sequence control 'START' in model has dims [2] but dims [1] is expected",
        ),
        (
            GraphTensor("START", INT32, (-1, 1)),
            STATE_IN,
            STATE_OUT,
            "unable to load model 'm', sequence control 'START', the model expects data-type TYPE_INT32 but the model "
            "configuration specifies data-type TYPE_FP32",
        ),
        (
            START,
            GraphTensor("s", FP32, (-1, -1, 2)),
            STATE_OUT,
            "unexpected inference input 'si', allowed inputs are: INPUT0, START, s",
        ),
        (
            START,
            STATE_IN,
            GraphTensor("s", FP32, (-1, -1, 2)),
            "unexpected inference output 'so', allowed outputs are: OUTPUT0, s",
        ),
        (
            START,
            STATE_IN,
            GraphTensor("so", INT8, (-1, -1, 2)),
            "unable to load model 'm', configuration expects datatype TYPE_FP32 for output state 'so', model provides "
            "TYPE_INT8",
        ),
        (
            START,
            GraphTensor("si", FP32, (-1, -1, 3)),
            STATE_OUT,
            "model 'm', tensor 'si': the model expects 3 dimensions (shape [-1,-1,3]) but the model configuration "
            "specifies 3 dimensions (an initial batch dimension because max_batch_size > 0 followed by the explicit "
            "tensor shape, making complete shape [-1,-1,2])",
        ),
    ],
)
def test_control_or_state_that_is_not_the_graphs_is_refused(start, state_in, state_out, expected):
    assert reason(SEQUENCE, [ROWS_IN, start, state_in], [ROWS_OUT, state_out]) == expected


def test_graph_type_without_a_data_type_is_named_invalid():
    assert reason(X0 + Y0, [GraphTensor("INPUT0", 0, (16,))]).endswith("model provides TYPE_INVALID")
