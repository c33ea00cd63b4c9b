"""API keys on both protocols."""

import queue
from contextlib import suppress

import grpc as grpcio
import pytest
import tritonclient.http.auth
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.conformance.triton import FORBIDDEN, NO_KEY, NOT_READY, Caller, address, check_sums, pair
from tritonclient.utils import InferenceServerException


@pytest.fixture(params=["http", "grpc"])
def stranger(request, guarded):
    """A client without a key."""
    with Caller(request.param, guarded) as caller:
        yield caller


def key(name):
    return {"authorization": f"Bearer {name}"}


def test_nobody_infers_without_a_key(stranger):
    assert stranger.refusal("simple", pair()).status in NO_KEY


@pytest.mark.parametrize("headers", [key("wrong"), key(""), {"authorization": "Basic dXNlci1rZXk="}])
def test_nobody_infers_with_a_wrong_key(stranger, headers):
    assert stranger.refusal("simple", pair(), headers=headers).status in NO_KEY


@pytest.mark.parametrize("headers", [key("user-key"), key("admin-key"), {"x-api-key": "user-key"}])
def test_whoever_has_a_key_infers(stranger, headers):
    check_sums(stranger.infer("simple", pair(), headers=headers), pair())


@pytest.mark.parametrize(
    "method",
    [
        "get_server_metadata",
        "get_model_repository_index",
        "get_inference_statistics",
        "get_trace_settings",
        "get_log_settings",
        "get_system_shared_memory_status",
    ],
)
def test_what_the_server_tells_needs_a_key(stranger, method):
    refusal = stranger.refused(lambda: getattr(stranger.client, method)())
    assert refusal.status in NO_KEY
    getattr(stranger.client, method)(headers=key("user-key"))


def test_health_needs_no_key(stranger):
    assert stranger.client.is_server_live()
    assert stranger.client.is_server_ready()
    assert stranger.client.is_model_ready("simple")


def test_grpcs_own_health_needs_no_key(guarded):
    with grpcio.insecure_channel(address(guarded, "grpc")) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def changes(client, headers):
    """Everything that changes the server."""
    return [
        lambda: client.load_model("simple", headers=headers),
        lambda: client.unload_model("simple", headers=headers),
        lambda: client.update_log_settings({"log_info": False}, headers=headers),
        lambda: client.update_trace_settings(settings={"trace_rate": "1"}, headers=headers),
        lambda: client.register_system_shared_memory("region", "/region", 64, headers=headers),
        lambda: client.unregister_system_shared_memory(headers=headers),
    ]


def test_only_an_admin_changes_the_server(stranger):
    for change in changes(stranger.client, key("user-key")):
        refusal = stranger.refused(change)
        assert refusal.status in FORBIDDEN
        assert refusal.message == "this needs an admin key"


def test_a_stranger_changes_nothing(stranger):
    for change in changes(stranger.client, {}):
        assert stranger.refused(change).status in NO_KEY


def test_an_admin_is_let_through(stranger):
    refusal = stranger.refused(lambda: stranger.client.load_model("simple", headers=key("admin-key")))
    assert refusal.status in NOT_READY
    stranger.client.unregister_system_shared_memory(headers=key("admin-key"))


def test_a_stream_needs_a_key(guarded):
    for headers, is_let in ((None, False), (key("user-key"), True)):
        answers = queue.Queue()
        with Caller("grpc", guarded) as caller:
            caller.client.start_stream(
                lambda result, error, answers=answers: answers.put((result, error)), headers=headers
            )
            with suppress(InferenceServerException):  # it may have been told already
                caller.client.async_stream_infer("simple", caller.inputs(pair()))
            result, error = answers.get(timeout=30)
            caller.client.stop_stream()
        assert (error is None) is is_let
        if is_let:
            check_sums(result, pair())
        else:
            assert error.status() == "StatusCode.UNAUTHENTICATED"


@pytest.mark.parametrize("path", ["/v2/models/simple", "/v2/models/simple/stats", "/v2/models/simple/config", "/v2"])
def test_refusals_over_http_are_in_this_protocols_envelope(guarded, path):
    status, answer = guarded.request("GET", path)
    assert status == 401
    assert set(answer) == {"error"}


def test_the_clients_own_way_to_send_a_password_is_told_apart_from_a_key(guarded):
    """Its plugin for basic authentication is refused, not taken for a key."""
    with Caller("http", guarded) as caller:
        caller.client.register_plugin(tritonclient.http.auth.BasicAuth("user", "user-key"))
        assert caller.refusal("simple", pair()).status in NO_KEY
