"""What only gRPC has: typed contents, channel options, plain stubs, health."""

import grpc as grpcio
import numpy as np
import pytest
import tritonclient.grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.conformance.triton import address, check_sums, inputs, pair
from tritonclient.grpc import service_pb2, service_pb2_grpc


@pytest.fixture(scope="module")
def channel(triton):
    with grpcio.insecure_channel(address(triton, "grpc")) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel):
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


def typed_request(model, datatype, field, first, second):
    request = service_pb2.ModelInferRequest(model_name=model, id="typed")
    for name, values in (("INPUT0", first), ("INPUT1", second)):
        tensor = request.inputs.add(name=name, datatype=datatype, shape=[1, len(values)])
        getattr(tensor.contents, field).extend(values)
    for name in ("OUTPUT0", "OUTPUT1"):
        request.outputs.add(name=name)
    return request


@pytest.mark.parametrize(
    ("model", "datatype", "kind"), [("simple", "INT32", np.int32), ("simple_int8", "INT8", np.int8)]
)
def test_integers_may_come_as_typed_contents(stub, model, datatype, kind):
    answer = stub.ModelInfer(typed_request(model, datatype, "int_contents", range(16), [1] * 16), timeout=30)
    assert answer.id == "typed"
    total, difference = (np.frombuffer(each, kind) for each in answer.raw_output_contents)
    np.testing.assert_array_equal(total, np.arange(16) + 1)
    np.testing.assert_array_equal(difference, np.arange(16) - 1)


def test_byte_strings_may_come_as_typed_contents(stub):
    first, second = [str(number).encode() for number in range(16)], [b"1"] * 16
    answer = stub.ModelInfer(typed_request("simple_string", "BYTES", "bytes_contents", first, second), timeout=30)
    total = tritonclient.grpc.InferResult(answer).as_numpy("OUTPUT0")
    assert [int(each) for each in total[0]] == list(range(1, 17))


def test_answers_are_always_raw(stub):
    answer = stub.ModelInfer(typed_request("simple", "INT32", "int_contents", range(16), [1] * 16), timeout=30)
    assert len(answer.raw_output_contents) == len(answer.outputs) == 2
    assert not any(output.HasField("contents") for output in answer.outputs)


def test_typed_and_raw_contents_exclude_each_other(stub):
    request = typed_request("simple", "INT32", "int_contents", range(16), [1] * 16)
    request.raw_input_contents.extend([bytes(64)] * 2)
    with pytest.raises(grpcio.RpcError) as refusal:
        stub.ModelInfer(request, timeout=30)
    assert refusal.value.code() is grpcio.StatusCode.INVALID_ARGUMENT
    told = "contents field must not be specified when using raw_input_contents for 'INPUT0' for model 'simple'"
    assert told in refusal.value.details()


def test_contents_of_the_wrong_kind_are_refused(stub):
    with pytest.raises(grpcio.RpcError) as refusal:
        stub.ModelInfer(typed_request("simple", "INT32", "fp32_contents", range(16), [1] * 16), timeout=30)
    assert refusal.value.code() is grpcio.StatusCode.INVALID_ARGUMENT
    assert "INPUT0" in refusal.value.details()


@pytest.mark.parametrize("name", ["triton_final_response", "triton_anything"])
def test_parameters_of_tritons_own_are_refused(stub, name):
    request = typed_request("simple", "INT32", "int_contents", range(16), [1] * 16)
    request.parameters[name].bool_param = True
    with pytest.raises(grpcio.RpcError) as refusal:
        stub.ModelInfer(request, timeout=30)
    assert refusal.value.code() is grpcio.StatusCode.INVALID_ARGUMENT
    assert "parameter keys starting with 'triton_' are reserved for Triton usage" in refusal.value.details()


def test_an_input_without_contents_is_refused(stub):
    request = typed_request("simple", "INT32", "int_contents", range(16), [1] * 16)
    request.inputs[1].ClearField("contents")
    with pytest.raises(grpcio.RpcError) as refusal:
        stub.ModelInfer(request, timeout=30)
    assert refusal.value.code() is grpcio.StatusCode.INVALID_ARGUMENT
    assert "INPUT1" in refusal.value.details()


@pytest.mark.parametrize(
    "options",
    [
        {"keepalive_options": tritonclient.grpc.KeepAliveOptions(keepalive_time_ms=10_000, keepalive_timeout_ms=5_000)},
        {
            "keepalive_options": tritonclient.grpc.KeepAliveOptions(
                keepalive_time_ms=10_000, keepalive_permit_without_calls=True, http2_max_pings_without_data=0
            )
        },
        {"channel_args": [("grpc.primary_user_agent", "conformance"), ("grpc.lb_policy_name", "pick_first")]},
        {"verbose": False, "channel_args": [("grpc.max_receive_message_length", -1)]},
    ],
    ids=["keepalive", "pings", "user-agent", "limits"],
)
def test_channels_may_have_options_of_their_own(triton, options):
    tensors = pair()
    with tritonclient.grpc.InferenceServerClient(address(triton, "grpc"), **options) as client:
        check_sums(client.infer("simple", inputs(tritonclient.grpc, tensors)), tensors)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_messages_may_be_compressed(grpc, algorithm):
    tensors = pair(rows=8)
    check_sums(grpc.infer("simple", tensors, compression_algorithm=algorithm), tensors)


def test_a_tensor_larger_than_grpcs_own_limit_passes(grpc):
    """gRPC's default is 4 MiB; the clients of Triton lift theirs, and so does the server."""
    array = np.arange(1 << 21, dtype=np.float32).reshape(2, -1)
    result = grpc.infer("identity_fp32", {"INPUT0": array})
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), array)


@pytest.mark.parametrize("service", ["", "inference.GRPCInferenceService"])
def test_health_is_told_in_grpcs_own_protocol(channel, service):
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_an_unknown_method_is_unimplemented(channel):
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelLevitate")
    with pytest.raises(grpcio.RpcError) as refusal:
        call(b"", timeout=30)
    assert refusal.value.code() is grpcio.StatusCode.UNIMPLEMENTED


def test_a_message_that_is_none_is_refused(channel):
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    with pytest.raises(grpcio.RpcError) as refusal:
        call(b"\xff\xff\xff\xff", timeout=30)
    assert refusal.value.code() in {grpcio.StatusCode.INVALID_ARGUMENT, grpcio.StatusCode.INTERNAL}
