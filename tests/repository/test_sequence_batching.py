import pytest
from tests.repository.configs import TENSORS, read, refusal
from tritonclient.grpc.model_config_pb2 import DataType

from sardonyx.repository.sequence_batching import ControlInput, SequenceBatching, StateTensor

START = 'control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } } '
STATE = 'input_name: "si" output_name: "so" data_type: TYPE_FP32 dims: [ -1, 4 ] '


def sequences(options: str) -> str:
    return TENSORS + f"max_batch_size: 8 sequence_batching {{ {options} }}"


def test_direct_is_the_strategy_of_a_config_that_names_none():
    assert read(sequences("")).sequences == SequenceBatching(strategy="direct", max_idle_s=1.0)


def test_every_option_of_direct_is_read_in_seconds():
    options = """
        max_sequence_idle_microseconds: 5000000
        direct { max_queue_delay_microseconds: 2000 minimum_slot_utilization: 0.5 }
    """
    assert read(sequences(options)).sequences == SequenceBatching(
        strategy="direct", max_idle_s=5.0, max_queue_delay_s=0.002, minimum_slot_utilization=0.5
    )


def test_every_option_of_oldest_is_read_in_seconds():
    options = """
        oldest {
            max_candidate_sequences: 4 preferred_batch_size: [ 4, 2 ] max_queue_delay_microseconds: 2000
            preserve_ordering: true
        }
    """
    assert read(sequences(options)).sequences == SequenceBatching(
        strategy="oldest",
        max_idle_s=1.0,
        max_candidate_sequences=4,
        preferred_batch_sizes=(2, 4),
        max_queue_delay_s=0.002,
        preserve_ordering=True,
    )


def test_controls_are_read_with_the_data_types_of_their_values():
    options = (
        START
        + """
        control_input { name: "READY" control { kind: CONTROL_SEQUENCE_READY fp32_false_true: [ -1, 2.5 ] } }
        control_input { name: "END" control { kind: CONTROL_SEQUENCE_END bool_false_true: [ true, false ] } }
        control_input { name: "ID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } }
        """
    )
    batching = read(sequences(options)).sequences
    assert batching is not None
    assert batching.controls == [
        ControlInput(name="START", kind="start", data_type=DataType.Value("TYPE_INT32"), false_value=0, true_value=1),
        ControlInput(name="READY", kind="ready", data_type=DataType.Value("TYPE_FP32"), false_value=-1, true_value=2.5),
        ControlInput(name="END", kind="end", data_type=DataType.Value("TYPE_BOOL"), false_value=True, true_value=False),
        ControlInput(name="ID", kind="corrid", data_type=DataType.Value("TYPE_STRING")),
    ]


@pytest.mark.parametrize("data_type", ["TYPE_UINT64", "TYPE_INT64", "TYPE_UINT32", "TYPE_INT32", "TYPE_STRING"])
def test_id_may_have_every_integer_type_and_be_a_string(data_type):
    options = f'control_input {{ name: "ID" control {{ kind: CONTROL_SEQUENCE_CORRID data_type: {data_type} }} }}'
    batching = read(sequences(options)).sequences
    assert batching is not None
    assert batching.controls[0].data_type == DataType.Value(data_type)


@pytest.mark.parametrize(
    ("initial", "dims", "file"),
    [
        ("", (1, 4), None),
        ("initial_state { data_type: TYPE_FP32 dims: [ 3, 4 ] zero_data: true }", (3, 4), None),
        ('initial_state { data_type: TYPE_FP32 dims: [ 3, 4 ] data_file: "s0" }', (3, 4), "s0"),
    ],
)
def test_state_begins_with_zeros_or_a_file(initial, dims, file):
    batching = read(sequences(f"state {{ {STATE} {initial} }}")).sequences
    assert batching is not None
    assert batching.states == [
        StateTensor(
            input_name="si",
            output_name="so",
            data_type=DataType.Value("TYPE_FP32"),
            dims=(-1, 4),
            initial_dims=dims,
            initial_file=file,
        )
    ]


def test_hints_on_the_memory_of_states_are_noted():
    options = f"state {{ {STATE} use_same_buffer_for_input_output: true use_growable_memory: true }}"
    notes = read(sequences(options)).notes
    assert [note.split()[0] for note in notes] == [
        "sequence_batching.state[0].use_same_buffer_for_input_output",
        "sequence_batching.state[0].use_growable_memory",
    ]


def control(text: str) -> str:
    return f'control_input {{ name: "C" control {{ {text} }} }}'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "oldest { max_candidate_sequences: 1 preferred_batch_size: 9 }",
            "oldest.preferred_batch_size: sequence batching preferred batch size must be <= max batch size for m",
        ),
        (
            "oldest { max_candidate_sequences: 1 preferred_batch_size: -1 }",
            "oldest.preferred_batch_size: sequence batching preferred batch size must be positive for m",
        ),
        ("oldest { }", "oldest.max_candidate_sequences: must be at least 1"),
        (
            "direct { minimum_slot_utilization: 1.5 }",
            "direct.minimum_slot_utilization: sequence batching minimum slot utilization must be in range (0.0, 1.0]",
        ),
        ("direct { minimum_slot_utilization: nan }", "direct.minimum_slot_utilization: sequence batching minimum"),
        (
            "control_input { control { int32_false_true: [ 0, 1 ] } }",
            "control_input[0].name: sequence batching control tensor must have a name for m",
        ),
        (
            START + START,
            "control_input[1].name: sequence batching control tensor 'START' is specified for multiple control kinds",
        ),
        (
            START + control("int32_false_true: [ 0, 1 ]"),
            "control_input[1].control[0].kind: sequence batching specifies multiple CONTROL_SEQUENCE_START tensors",
        ),
        ('control_input { name: "C" }', "control_input[0].control: says nothing"),
        (
            control("kind: CONTROL_SEQUENCE_END"),
            "control_input[0].control[0]: sequence batching must specify either 'int32_false_true', "
            "'fp32_false_true' or 'bool_false_true' for CONTROL_SEQUENCE_END for m",
        ),
        (
            control("int32_false_true: [ 0, 1 ] fp32_false_true: [ 0, 1 ]"),
            "control_input[0].control[0]: sequence batching specifies more than one from",
        ),
        (
            control("int32_false_true: [ 0 ]"),
            "control_input[0].control[0]: sequence batching control 'int32_false_true' must have exactly 2 entries",
        ),
        (
            control("int32_false_true: [ 0, 1 ] data_type: TYPE_FP32"),
            "control_input[0].control[0]: data_type contradicts int32_false_true",
        ),
        (
            control("kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_FP32"),
            "control_input[0].control[0]: unexpected data type",
        ),
        (
            control("kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_INT32 int32_false_true: [ 0, 1 ]"),
            "control_input[0].control[0]: sequence batching must not specify either",
        ),
        ('state { output_name: "so" data_type: TYPE_FP32 dims: 1 }', "state[0].input_name: must be given"),
        ('state { input_name: "si" output_name: "so" dims: 1 }', "state[0].data_type: must be given"),
        ('state { input_name: "a" output_name: "b" data_type: TYPE_FP32 dims: 0 }', "state[0].dims: dimension must"),
        (
            f"state {{ {STATE} initial_state {{ data_type: TYPE_INT8 dims: [ 1, 4 ] zero_data: true }} }}",
            "state[0].initial_state[0].data_type: must be the state's own",
        ),
        (
            f"state {{ {STATE} initial_state {{ data_type: TYPE_FP32 dims: [ -1, 4 ] zero_data: true }} }}",
            "state[0].initial_state[0].dims: is [-1, 4]; it must be the state's dims [-1, 4] with every size fixed",
        ),
        (
            f"state {{ {STATE} initial_state {{ data_type: TYPE_FP32 dims: [ 1, 5 ] zero_data: true }} }}",
            "state[0].initial_state[0].dims: is [1, 5]",
        ),
        (
            f"state {{ {STATE} initial_state {{ data_type: TYPE_FP32 dims: [ 1, 4 ] }} }}",
            "state[0].initial_state[0]: needs zero_data or data_file",
        ),
        (
            f'state {{ {STATE} initial_state {{ data_type: TYPE_FP32 dims: [ 1, 4 ] data_file: "../x" }} }}',
            "state[0].initial_state[0].data_file: is not a plain file name",
        ),
        (
            f"state {{ {STATE} initial_state {{ }} initial_state {{ }} }}",
            "state[0].initial_state: must be one at most",
        ),
    ],
)
def test_contradiction_is_refused_by_field(options, message):
    assert refusal(sequences(options)).startswith(f"c.pbtxt: sequence_batching.{message}")
