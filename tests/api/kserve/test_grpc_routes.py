import grpc
import pytest
from grpc_health.v1 import health_pb2
from tests.api.kserve.grpc_live import integers, numbers, serving
from tritonclient.grpc import service_pb2 as pb

from sardonyx.api.auth import Gatekeeper
from sardonyx.api.kserve.grpc_routes import ADMIN, INFERENCE, PUBLIC, key_of

METHODS = [f"/{INFERENCE}/{method.name}" for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods]
OTHERS = [
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    f"/{INFERENCE}/Nothing",
]
USER = (("authorization", "Bearer sk-one"),)
OPERATOR = (("x-api-key", "sk-root"),)


@pytest.fixture(scope="module")
def locked():
    with serving(Gatekeeper(api_keys=["sk-one"], admin_keys=["sk-root"])) as live:
        yield live


@pytest.fixture
def channel(locked):
    with grpc.insecure_channel(locked.address) as channel:
        yield channel


@pytest.fixture
def stub(locked):
    with locked.stub() as stub:
        yield stub


def code(channel, path, metadata=None):
    """How a call of any method with an empty message begins: with a status, or ``OK`` for an answer."""
    call = channel.stream_stream(path)(iter([b""]), metadata=metadata, timeout=20)
    try:
        next(call)
    except StopIteration:
        pass
    except grpc.RpcError:
        return call.code()
    call.cancel()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("path", METHODS + OTHERS)
def test_every_method_but_the_probes_needs_a_key(channel, path):
    expected = grpc.StatusCode.OK if path in PUBLIC else grpc.StatusCode.UNAUTHENTICATED
    assert code(channel, path) is expected
    assert code(channel, path, (("authorization", "Bearer sk-onE"),)) is expected


def test_the_probes_are_those_of_the_protocols():
    names = {path.rsplit("/", 1)[1] for path in PUBLIC}
    assert names == {"Check", "Watch", "ServerLive", "ServerReady", "ModelReady"}


@pytest.mark.parametrize("path", METHODS)
def test_methods_that_change_the_server_need_an_admin_key(channel, path):
    changes = path.rsplit("/", 1)[1].endswith(("Load", "Unload", "Register", "Unregister"))
    assert (path in ADMIN) is changes
    assert (code(channel, path, USER) is grpc.StatusCode.PERMISSION_DENIED) is changes
    assert code(channel, path, OPERATOR) is not grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    "metadata",
    [
        (("authorization", "Bearer sk-one"),),
        (("authorization", "bearer sk-one"),),
        (("x-api-key", "sk-one"),),
        (("api-key", "sk-one"),),
        (("authorization", "Bearer "), ("x-api-key", "sk-one")),
        OPERATOR,
    ],
)
def test_a_known_key_is_let_in_however_it_is_sent(stub, metadata):
    assert numbers(stub.ModelInfer(integers(1, 2), metadata=metadata)) == [1, 2]
    (answer,) = stub.ModelStreamInfer(iter([integers(3)]), metadata=metadata)
    assert numbers(answer.infer_response) == [3]


def test_a_refusal_says_what_to_do(stub):
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(integers(1))
    assert raised.value.details() == "no API key came with the request: send Authorization: Bearer <key>"


@pytest.mark.parametrize(
    ("method", "request_", "name"),
    [("TraceSetting", pb.TraceSettingRequest(), "trace_rate"), ("LogSettings", pb.LogSettingsRequest(), "log_info")],
)
def test_settings_are_shown_to_users_and_changed_by_operators(method, request_, name):
    change = type(request_)()
    change.settings[name].SetInParent()
    if method == "LogSettings":
        change.settings[name].bool_param = True
    with serving(Gatekeeper(api_keys=["sk-one"], admin_keys=["sk-root"])) as live, live.stub() as stub:
        call = getattr(stub, method)
        assert name in call(request_, metadata=USER).settings
        with pytest.raises(grpc.RpcError) as raised:
            call(change, metadata=USER)
        assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert not live.service.calls
        call(change, metadata=OPERATOR)
        assert len(live.service.calls) == 1


def test_an_api_key_is_an_admins_where_there_are_no_admin_keys():
    with serving(Gatekeeper(api_keys=["sk-one"])) as live, live.stub() as stub:
        stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="m"), metadata=USER)
        assert live.service.calls == [("load", "m", {})]


def test_only_admin_methods_need_a_key_where_there_are_admin_keys_only():
    with serving(Gatekeeper(admin_keys=["sk-root"])) as live, live.stub() as stub:
        assert numbers(stub.ModelInfer(integers(1))) == [1]
        with pytest.raises(grpc.RpcError) as raised:
            stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="m"))
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
        stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="m"), metadata=OPERATOR)


def test_everything_is_open_without_keys():
    with serving() as live, grpc.insecure_channel(live.address) as channel:
        for path in METHODS:
            assert code(channel, path) not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert health_pb2.HealthCheckResponse.FromString(check(b"")).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("metadata", "key"),
    [
        (None, b""),
        ((), b""),
        ((("authorization", "Basic x"),), b""),
        ((("authorization", "Bearer  k "),), b"k"),
        ((("authorization", "Bearer k\xe9"),), b"k\xe9"),
        ((("key-bin", b"x"), ("x-api-key", "k")), b"k"),
    ],
)
def test_the_presented_key_is_found(metadata, key):
    assert key_of(metadata) == key
