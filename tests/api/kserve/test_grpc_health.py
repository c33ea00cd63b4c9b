import queue

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tests.api.kserve.grpc_live import WAIT_S, serving

from sardonyx.api.kserve import grpc_health

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
INFERENCE = "inference.GRPCInferenceService"


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setattr(grpc_health, "WATCH_INTERVAL_S", 0.01)
    with serving() as live:
        yield live


@pytest.fixture
def channel(live):
    with grpc.insecure_channel(live.address) as channel:
        yield channel


@pytest.fixture
def health(channel):
    return health_pb2_grpc.HealthStub(channel)


@pytest.mark.parametrize("service", ["", INFERENCE])
def test_health_is_the_readiness_of_the_moment(live, health, service):
    request = health_pb2.HealthCheckRequest(service=service)
    assert health.Check(request).status == SERVING
    live.service.ready = False
    assert health.Check(request).status == NOT_SERVING
    live.service.ready = True
    assert health.Check(request).status == SERVING


def test_the_health_of_another_service_is_not_found(health):
    with pytest.raises(grpc.RpcError) as raised:
        health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("service", ["", INFERENCE])
def test_a_watcher_is_told_of_changes_only(live, health, service):
    watch = health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
    assert next(watch).status == SERVING
    for ready, status in [(False, NOT_SERVING), (True, SERVING)]:
        live.service.ready = ready
        assert next(watch).status == status
    watch.cancel()


def test_a_watcher_of_another_service_is_told_that_there_is_none(health):
    watch = health.Watch(health_pb2.HealthCheckRequest(service="other"), timeout=WAIT_S)
    assert next(watch).status == SERVICE_UNKNOWN
    watch.cancel()


def test_a_watch_ends_with_the_server(live, health):
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
    other = health.Watch(health_pb2.HealthCheckRequest(service="other"), timeout=WAIT_S)
    assert next(watch).status == SERVING
    assert next(other).status == SERVICE_UNKNOWN
    live.run(live.server.stop(WAIT_S / 2))
    assert [each.status for each in watch] == [NOT_SERVING]
    assert list(other) == []


def test_reflection_lists_the_services(channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) == {
        INFERENCE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_reflection_describes_the_methods(channel):
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    service = pool.FindServiceByName(INFERENCE)
    assert len(service.methods) == 20
    assert service.FindMethodByName("ModelInfer").input_type.fields_by_name["raw_input_contents"].number == 7


def test_a_question_that_is_no_message_is_refused(channel):
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    with pytest.raises(grpc.RpcError) as raised:
        list(channel.stream_stream(path)(iter([b"\xff"]), timeout=WAIT_S))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_open_reflection_ends_with_the_server(live, channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    questions = iter([question])

    def asked_and_waiting():
        yield next(questions)
        yield from iter(held.get, None)

    held = queue.SimpleQueue()
    call = stub.ServerReflectionInfo(asked_and_waiting(), timeout=WAIT_S)
    assert next(call).HasField("list_services_response")
    live.run(live.server.stop(WAIT_S / 2))
    assert list(call) == []
    held.put(None)
