import subprocess

import grpc
import pytest
from tests.api.kserve.grpc_live import WAIT_S, integers, numbers, serving
from tests.api.kserve.test_grpc_stream import Requests
from tests.api.live import eventually
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from sardonyx.errors import ConfigError


@pytest.fixture
def live():
    with serving() as live:
        yield live


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """Two self-signed certificates with their keys, and a key with a password."""
    folder = tmp_path_factory.mktemp("pki")
    for name in ("server", "client"):
        openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem",
        )  # fmt: skip
    openssl("ec", "-aes128", "-passout", "pass:secret", "-in", folder / "server.key", "-out", folder / "locked.key")
    (folder / "text.pem").write_text("not a certificate")
    return folder


def tls(pki, **changes):
    return {"grpc_certificate": pki / "server.pem", "grpc_private_key": pki / "server.key", **changes}


def infer(live, pki, **client):
    credentials = grpc.ssl_channel_credentials((pki / "server.pem").read_bytes(), **client)
    with grpc.secure_channel(live.address, credentials) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return numbers(stub.ModelInfer(integers(1, 2), timeout=WAIT_S))


def test_calls_are_encrypted_with_the_operators_certificate(pki):
    with serving(**tls(pki)) as live:
        assert infer(live, pki) == [1, 2]
        with live.stub() as stub, pytest.raises(grpc.RpcError) as raised:
            stub.ModelInfer(integers(1), timeout=WAIT_S)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_tritons_client_speaks_tls(pki):
    with (
        serving(**tls(pki)) as live,
        live.client(ssl=True, root_certificates=str(pki / "server.pem")) as client,
    ):
        assert client.is_server_ready()


def test_clients_without_a_certificate_are_refused_where_one_is_demanded(pki):
    with serving(**tls(pki, grpc_client_certificates=pki / "client.pem")) as live:
        client = {
            "private_key": (pki / "client.key").read_bytes(),
            "certificate_chain": (pki / "client.pem").read_bytes(),
        }
        assert infer(live, pki, **client) == [1, 2]
        with pytest.raises(grpc.RpcError) as raised:
            infer(live, pki)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"grpc_private_key": None}, "grpc_private_key", "is missing"),
        ({"grpc_certificate": None}, "grpc_private_key", "without grpc_certificate"),
        (
            {"grpc_certificate": None, "grpc_private_key": None, "grpc_client_certificates": "client.pem"},
            "grpc_client_certificates",
            "without grpc_certificate",
        ),
        ({"grpc_certificate": "none.pem"}, "grpc_certificate", "cannot be read: No such file"),
        ({"grpc_private_key": "none.key"}, "grpc_private_key", "cannot be read: No such file"),
        ({"grpc_client_certificates": "none.pem"}, "grpc_client_certificates", "cannot be read: No such file"),
        ({"grpc_certificate": "text.pem"}, "grpc_certificate", "PEM certificate and its unencrypted key"),
        ({"grpc_certificate": "client.pem"}, "grpc_certificate", "PEM certificate and its unencrypted key"),
        ({"grpc_private_key": "locked.key"}, "grpc_certificate", "PEM certificate and its unencrypted key"),
        ({"grpc_client_certificates": "text.pem"}, "grpc_client_certificates", "holds no PEM certificate"),
    ],
)
def test_certificates_that_cannot_be_used_are_the_operators_to_mend(pki, changes, field, message):
    files = {name: value and pki / value for name, value in changes.items()}
    with pytest.raises(ConfigError, match=message) as raised, serving(**tls(pki, **files)):
        pass
    assert raised.value.field == field


def test_a_port_that_is_taken_is_the_operators_to_mend(live):
    with pytest.raises(ConfigError, match="port is taken") as raised, serving(grpc_port=live.server.port):
        pass
    assert raised.value.field == "grpc_port"


def test_a_host_that_is_not_ours_is_the_operators_to_mend():
    with pytest.raises(ConfigError, match="not an address of this machine"), serving(host="192.0.2.1"):
        pass


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_the_host_may_be_an_ipv6_address(host):
    with serving(host=host) as live, grpc.insecure_channel(f"[::1]:{live.server.port}") as channel:
        assert service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive(pb.ServerLiveRequest()).live


def test_running_calls_are_finished_and_new_ones_refused_when_the_server_stops(live):
    with live.stub() as stub:
        running = stub.ModelInfer.future(integers(5, wait=True), timeout=WAIT_S)
        eventually(lambda: live.service.num_waiting == 1)
        stopping = live.begin(live.server.stop(WAIT_S / 2))
        eventually(lambda: is_refused(live))
        assert not stopping.done()
        live.open_gate()
        assert numbers(running.result(WAIT_S)) == [5]
        stopping.result(WAIT_S)


def is_refused(live):
    with live.stub() as stub:
        try:
            stub.ServerLive(pb.ServerLiveRequest(), timeout=WAIT_S)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAVAILABLE
    return False


def test_calls_that_do_not_end_in_time_are_cancelled(live):
    with live.stub() as stub:
        running = stub.ModelInfer.future(integers(5, wait=True), timeout=WAIT_S)
        eventually(lambda: live.service.num_waiting == 1)
        live.run(live.server.stop(0.01))
        assert running.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        eventually(lambda: live.service.num_cancelled == 1)


def test_streams_answer_what_they_have_and_end_when_the_server_stops(live):
    requests = Requests(integers(1, id="a"), integers(2, id="b", wait=True))
    with live.stub() as stub:
        call = stub.ModelStreamInfer(requests, timeout=WAIT_S)
        assert next(call).infer_response.id == "a"
        eventually(lambda: live.service.num_waiting == 1)
        stopping = live.begin(live.server.stop(WAIT_S / 2))
        eventually(lambda: is_refused(live))
        live.open_gate()
        assert next(call).infer_response.id == "b"
        with pytest.raises(grpc.RpcError) as raised:
            next(call)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert raised.value.details() == "the server is shutting down"
        stopping.result(WAIT_S)
        requests.half_close()


def test_an_idle_stream_does_not_hold_up_the_stop(live):
    requests = Requests(integers(1))
    with live.stub() as stub:
        call = stub.ModelStreamInfer(requests, timeout=WAIT_S)
        next(call)
        live.run(live.server.stop(WAIT_S * 10))
        with pytest.raises(grpc.RpcError) as raised:
            next(call)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        requests.half_close()
