import pytest
from tests.repository.configs import TENSORS, read, refusal

from sardonyx.repository.session_parameters import SessionParameters


def parameters(**values: str) -> str:
    pairs = [f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in values.items()]
    return TENSORS + " ".join(pairs)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, SessionParameters()),
        ({"execution_mode": "1"}, SessionParameters(is_parallel=True)),
        ({"execution_mode": "0"}, SessionParameters()),
        ({"intra_op_thread_count": "4"}, SessionParameters(num_intra_op_threads=4)),
        ({"inter_op_thread_count": "3"}, SessionParameters(num_inter_op_threads=3)),
        ({"intra_op_thread_count": "0"}, SessionParameters()),
        ({"enable_mem_arena": "0"}, SessionParameters(enable_arena=False)),
        ({"enable_mem_pattern": "true"}, SessionParameters(enable_mem_pattern=True)),
        (
            {"session.use_device_allocator_for_initializers": "1"},
            SessionParameters(session_entries={"session.use_device_allocator_for_initializers": "1"}),
        ),
        (
            {"memory.enable_memory_arena_shrinkage": "cpu:0;gpu:1"},
            SessionParameters(run_entries={"memory.enable_memory_arena_shrinkage": "cpu:0;gpu:1"}),
        ),
        ({"cudnn_conv_algo_search": "2"}, SessionParameters(cuda_options={"cudnn_conv_algo_search": "DEFAULT"})),
        ({"gpu_mem_limit": "1073741824"}, SessionParameters(cuda_options={"gpu_mem_limit": "1073741824"})),
        (
            {"arena_extend_strategy": "1"},
            SessionParameters(cuda_options={"arena_extend_strategy": "kSameAsRequested"}),
        ),
        ({"do_copy_in_default_stream": "0"}, SessionParameters(cuda_options={"do_copy_in_default_stream": "0"})),
    ],
)
def test_parameter_is_read(values, expected):
    assert read(parameters(**values)).session == expected


def test_shared_sessions_are_noted_and_no_choice():
    notes = read(parameters(share_session_between_instances="false")).notes
    assert notes == ["share_session_between_instances changes nothing: instances on one device always share a session"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("intra_op_threads", "1", "is not a parameter of an ONNX model; did you mean intra_op_thread_count?"),
        ("zzz", "1", "is not a parameter of an ONNX model; there are execution_mode,"),
        ("execution_mode", "2", "Invalid configuration value provided. Expected values for execution_mode are 0 or 1"),
        ("intra_op_thread_count", "-1", "failed to convert '-1' to integral number from 0 to 4,096"),
        ("intra_op_thread_count", "5000", "failed to convert '5000' to integral number"),
        ("inter_op_thread_count", "²", "failed to convert '²' to integral number"),
        ("enable_mem_arena", "yes", "failed to convert 'yes' to boolean value"),
        ("memory.enable_memory_arena_shrinkage", "gpu", "is a list of devices such as 'cpu:0;gpu:0', not 'gpu'"),
        ("cudnn_conv_algo_search", "3", "unsupported cudnn_conv_algo_search value '3' is requested"),
        ("arena_extend_strategy", "", "unsupported arena_extend_strategy value '' is requested"),
        ("gpu_mem_limit", "1GB", "failed to convert '1GB' to integral number"),
    ],
)
def test_wrong_parameter_is_refused_by_name(key, value, message):
    assert refusal(parameters(**{key: value})).startswith(f"c.pbtxt: parameters[{key!r}]: {message}")
