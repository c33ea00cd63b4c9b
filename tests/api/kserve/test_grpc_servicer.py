import asyncio

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from tests.api.kserve.grpc_live import Live, integers, numbers, serving
from tests.api.live import eventually
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

from sardonyx.errors import EngineError


@pytest.fixture(scope="module")
def shared():
    """A server that no test changes."""
    with serving(id="other") as live:
        yield live


@pytest.fixture
def live():
    with serving() as live:
        yield live


def tensor(name, array, datatype):
    wanted = tritonclient.grpc.InferInput(name, array.shape, datatype)
    wanted.set_data_from_numpy(array)
    return wanted


def refusal(call, *arguments, **options):
    with pytest.raises(grpc.RpcError) as raised:
        call(*arguments, **options)
    return raised.value.code(), raised.value.details()


def test_tritons_client_infers(shared: Live):
    left, right = np.arange(16, dtype=np.int32), np.ones(16, np.int32)
    with shared.client() as client:
        inputs = [tensor("INPUT0", left, "INT32"), tensor("INPUT1", right, "INT32")]
        result = client.infer("add_sub", inputs, request_id="7")
    assert result.as_numpy("OUTPUT0").tolist() == (left + right).tolist()
    assert result.as_numpy("OUTPUT1").tolist() == (left - right).tolist()
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("7", "add_sub", "3")
    assert "triton_final_response" not in response.parameters


def test_tritons_client_infers_strings(shared: Live):
    words = np.array([["a", "bc"], ["", "ü"]], object)
    with shared.client() as client:
        result = client.infer("identity", [tensor("INPUT0", words, "BYTES")])
    assert result.as_numpy("OUTPUT0").tolist() == [[b"a", b"bc"], [b"", "ü".encode()]]


def test_tritons_asynchronous_client_infers(live: Live):
    async def main():
        async with tritonclient.grpc.aio.InferenceServerClient(live.address) as client:
            arrays = [np.full((1, 4), number, np.float32) for number in range(20)]
            results = await asyncio.gather(
                *(client.infer("identity", [tensor("INPUT0", each, "FP32")]) for each in arrays)
            )
            return [each.as_numpy("OUTPUT0")[0, 0] for each in results]

    assert live.run(main()) == list(range(20))


@pytest.mark.parametrize("size", [1 << 10, 4 << 20])
@pytest.mark.parametrize("algorithm", [None, "gzip", "deflate"])
def test_large_and_small_tensors_come_back_however_they_are_compressed(shared: Live, size, algorithm):
    array = np.random.default_rng(1).integers(0, 200, size, np.uint8)
    with shared.client() as client:
        result = client.infer("identity", [tensor("INPUT0", array, "UINT8")], compression_algorithm=algorithm)
    assert np.array_equal(result.as_numpy("OUTPUT0"), array)


def test_many_strings_come_back(shared: Live):
    words = np.array([b"word"] * 100_000, object)
    with shared.client() as client:
        result = client.infer("identity", [tensor("INPUT0", words, "BYTES")])
    assert result.as_numpy("OUTPUT0").tolist() == words.tolist()


def test_parameters_reach_the_service(live: Live):
    array = np.zeros(1, np.int32)
    with live.client() as client:
        client.infer(
            "identity",
            [tensor("INPUT0", array, "INT32")],
            sequence_id=5,
            sequence_start=True,
            priority=2,
            timeout=1000,
            parameters={"mine": "x"},
        )
    assert live.service.requests[0].parameters == {
        "sequence_id": 5,
        "sequence_start": True,
        "sequence_end": False,
        "priority": 2,
        "timeout": 1000,
        "mine": "x",
    }


def test_refusals_carry_code_and_message(shared: Live):
    with shared.stub() as stub:
        assert refusal(stub.ModelInfer, integers(1, model="none")) == (
            grpc.StatusCode.NOT_FOUND,
            "Request for unknown model: 'none' is not found",
        )
        assert refusal(stub.ModelInfer, integers(1, model="repeat"))[0] is grpc.StatusCode.UNIMPLEMENTED


def test_refusals_name_the_request(shared: Live):
    request = integers(1, id="abc")
    request.inputs[0].shape[0] = 2
    with shared.stub() as stub:
        code, details = refusal(stub.ModelInfer, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("[request id: abc] ")


def test_a_full_queue_says_when_to_come_again(live: Live):
    live.service.overload()
    with live.stub() as stub, pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(integers(1))
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert ("grpc-retry-pushback-ms", "1500") in raised.value.trailing_metadata()


def test_what_was_not_foreseen_is_logged_and_not_told(live: Live, caplog):
    live.service.error = RuntimeError("secret")
    with live.stub() as stub:
        assert refusal(stub.ModelInfer, integers(1)) == (grpc.StatusCode.INTERNAL, "internal error")
    assert "secret" in caplog.text


def test_a_long_message_is_cut_to_what_clients_take(live: Live):
    live.service.error = EngineError("ü" * 100_000)
    with live.stub() as stub:
        code, details = refusal(stub.ModelInfer, integers(1))
    assert code is grpc.StatusCode.INTERNAL
    assert details == "ü" * 1024


@pytest.mark.parametrize("method", ["ModelInfer", "ModelConfig"])
def test_bytes_that_are_no_message_are_refused(shared: Live, method):
    with grpc.insecure_channel(shared.address) as channel:
        call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        for data in (b"\xff\xff\xff", b"\x0a\x05a", b"\x0a\xff" * 40_000):
            assert refusal(call, data)[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_an_unknown_method_is_unimplemented(shared: Live):
    with grpc.insecure_channel(shared.address) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/Nothing")
        assert refusal(call, b"")[0] is grpc.StatusCode.UNIMPLEMENTED


def test_a_client_that_cancels_cancels_the_inference(live: Live):
    with live.stub() as stub:
        call = stub.ModelInfer.future(integers(1, wait=True))
        eventually(lambda: live.service.num_waiting == 1)
        call.cancel()
        eventually(lambda: live.service.num_cancelled == 1)


def test_a_deadline_cancels_the_inference(live: Live):
    with live.stub() as stub:
        assert refusal(stub.ModelInfer, integers(1, wait=True), timeout=0.2)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: live.service.num_cancelled == 1)


def test_an_inference_that_was_cancelled_from_inside_ends_its_call(live: Live):
    live.service.error = asyncio.CancelledError()
    with live.stub() as stub:
        assert refusal(stub.ModelInfer, integers(1), timeout=10)[0] is grpc.StatusCode.CANCELLED


def test_messages_over_the_limit_are_refused_each_way():
    with serving(grpc_max_message_bytes=4096) as live, live.stub() as stub:
        assert numbers(stub.ModelInfer(integers(*range(900)))) == list(range(900))
        assert refusal(stub.ModelInfer, integers(*range(1100)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        request = integers(*range(600), model="add_sub")
        request.inputs.add(name="B", datatype="INT32", shape=[1])
        request.raw_input_contents.append(bytes(4))
        assert refusal(stub.ModelInfer, request) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "the answer is larger than 4,096 bytes",
        )


def test_probes_and_metadata(shared: Live):
    with shared.client() as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("identity", "3")
        server = client.get_server_metadata()
        assert (server.name, server.version) == ("sardonyx", "1.2.3")
        assert list(server.extensions) == ["classification", "sequence", "statistics"]
        assert client.get_model_config("identity").config.max_batch_size == 8


def test_an_unknown_model_is_not_ready_and_no_error(shared: Live):
    with shared.stub() as stub:
        assert not stub.ModelReady(pb.ModelReadyRequest(name="none")).ready
        code, _ = refusal(stub.ModelReady, pb.ModelReadyRequest(name="identity", version="x"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(("version", "versions"), [("", ["1", "3"]), ("1", ["1"])])
def test_model_metadata_has_the_ready_versions_or_the_wanted_one(shared: Live, version, versions):
    with shared.client() as client:
        model = client.get_model_metadata("identity", version)
    assert (model.name, model.platform) == ("identity", "onnxruntime_onnx")
    assert list(model.versions) == versions
    assert [(each.name, each.datatype, list(each.shape)) for each in model.inputs] == [("INPUT0", "INT32", [-1, 16])]
    assert [(each.name, each.datatype, list(each.shape)) for each in model.outputs] == [("OUTPUT0", "BYTES", [-1])]


def test_statistics_have_all_durations(shared: Live):
    with shared.client() as client:
        (found,) = client.get_inference_statistics("identity").model_stats
    assert (found.name, found.version, found.last_inference) == ("identity", "3", 7)
    assert (found.inference_count, found.execution_count) == (5, 2)
    assert (found.inference_stats.queue.count, found.inference_stats.queue.ns) == (4, 11)
    assert len(found.inference_stats.ListFields()) == 8
    assert found.batch_stats[0].batch_size == 2
    assert found.batch_stats[0].compute_infer.ns == 13
    assert found.response_stats["0"].success.ns == 17


def test_the_index_lists_models(shared: Live):
    with shared.stub() as stub:
        rows = stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
        assert [(row.name, row.version, row.state) for row in rows] == [("identity", "3", "READY"), ("never", "", "")]
        assert len(stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True)).models) == 1


def test_models_are_loaded_with_config_and_files_and_unloaded(live: Live):
    with live.client() as client:
        client.load_model("m", config='{"backend": "onnxruntime"}', files={"file:1/model.onnx": b"\0\1"})
        client.unload_model("m", unload_dependents=True)
    assert live.service.calls == [
        ("load", "m", {"config": '{"backend": "onnxruntime"}', "file:1/model.onnx": b"\0\1"}),
        ("unload", "m", True),
    ]


def test_load_and_unload_parameters_of_the_wrong_type_are_refused(live: Live):
    load = pb.RepositoryModelLoadRequest(model_name="m")
    load.parameters["config"].bool_param = True
    unload = pb.RepositoryModelUnloadRequest(model_name="m")
    unload.parameters["unload_dependents"].string_param = "yes"
    other = pb.RepositoryModelUnloadRequest(model_name="m")
    other.parameters["force"].bool_param = True
    with live.stub() as stub:
        code, details = refusal(stub.RepositoryModelLoad, load)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details == "invalid value type for load parameter 'config', expected string_param."
        for request in (unload, other):
            assert refusal(stub.RepositoryModelUnload, request)[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert not live.service.calls


@pytest.mark.parametrize("method", ["Index", "ModelLoad", "ModelUnload"])
def test_a_repository_cannot_be_named(shared: Live, method):
    request = getattr(pb, f"Repository{method}Request")(repository_name="x")
    with shared.stub() as stub:
        assert refusal(getattr(stub, f"Repository{method}"), request) == (
            grpc.StatusCode.UNIMPLEMENTED,
            "'repository_name' specification is not supported",
        )


def test_system_shared_memory_is_registered_shown_and_unregistered(live: Live):
    with live.client() as client:
        client.register_system_shared_memory("r", "/k", 64, offset=4)
        client.unregister_system_shared_memory("r")
        region = client.get_system_shared_memory_status("r").regions["r"]
    assert live.service.calls == [("register", "r", "/k", 4, 64), ("unregister", "r")]
    assert (region.name, region.key, region.offset, region.byte_size) == ("r", "/k", 4, 64)


def test_cuda_shared_memory_is_empty_and_cannot_be_filled(shared: Live):
    with shared.client() as client:
        client.unregister_cuda_shared_memory()
        assert not client.get_cuda_shared_memory_status().regions
        with pytest.raises(InferenceServerException, match="Unable to find cuda shared memory region: 'r'"):
            client.get_cuda_shared_memory_status("r")
        with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
            client.register_cuda_shared_memory("r", b"", 0, 64)


def test_trace_settings_are_shown_and_changed(live: Live):
    with live.client() as client:
        shown = client.get_trace_settings("identity").settings
        client.update_trace_settings("identity", {"trace_level": ["OFF"], "trace_rate": "5", "log_frequency": None})
    assert list(shown["trace_level"].value) == ["OFF"]
    assert list(shown["trace_rate"].value) == ["9"]
    changes = {"trace_level": ["OFF"], "trace_rate": ["5"], "log_frequency": None}
    assert live.service.calls == [("trace", "identity", changes)]


def test_log_settings_are_shown_and_changed(live: Live):
    with live.client() as client:
        shown = client.get_log_settings().settings
        client.update_log_settings({"log_info": False, "log_verbose_level": 3, "log_format": "ISO8601"})
    assert shown["log_info"].bool_param is True
    assert shown["log_verbose_level"].uint32_param == 2
    assert shown["log_format"].string_param == "default"
    assert live.service.calls == [("log", {"log_info": False, "log_verbose_level": 3, "log_format": "ISO8601"})]


def test_a_log_setting_without_a_value_is_refused(shared: Live):
    request = pb.LogSettingsRequest()
    request.settings["log_info"].SetInParent()
    with shared.stub() as stub:
        assert refusal(stub.LogSettings, request)[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_every_method_of_the_protocol_is_served(shared: Live):
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    with grpc.insecure_channel(shared.address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert {method.name for method in service.methods} <= set(vars(stub))
        for method in service.methods:
            path = f"/inference.GRPCInferenceService/{method.name}"
            call = channel.stream_stream(path)(iter([b"\xff"]), timeout=20)
            with pytest.raises(grpc.RpcError) as raised:
                list(call)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT, method.name
