"""The port over real sockets: silent, broken and leaving clients, encryption, the stop."""

import contextlib
import socket
import ssl
import subprocess

import pytest
from tests.api.kserve.grpc_live import WAIT_S, integers, serving
from tests.api.kserve.h2.peer import STREAM, Requests, goaway_code, message, read_answers, read_frames
from tests.api.live import eventually

from sardonyx.api.kserve.h2 import frames
from sardonyx.api.kserve.h2.frames import ErrorCode

R = Requests


@pytest.fixture
def live():
    with serving() as live:
        yield live


def connect(live):
    return socket.create_connection(("127.0.0.1", live.server.port), timeout=WAIT_S)


def read_to_end(connection):
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return read_frames(b"".join(parts))


def infer(made, stream_id=1):
    return made.headers(stream_id) + R.data(stream_id, message(integers(7).SerializeToString()), ends=True)


def test_a_call_is_answered_over_a_bare_socket(live):
    made = Requests()
    with connect(live) as connection:
        connection.sendall(made.greeting() + infer(made) + frames.frame(frames.GOAWAY, 0, 0, bytes(8)))
        answer = read_answers(read_to_end(connection))[1]
    assert answer.status == 0
    assert len(answer.messages) == 1


@pytest.mark.parametrize(
    ("last", "status", "details"),
    [
        (message(bytes(5000)), 8, "the message is larger than 4,096 bytes: it has 5,000"),
        (message(b"x", is_compressed=True), 3, "the message is compressed, and grpc-encoding is missing"),
        (message(b"abc")[:-1], 3, "the last message is cut off"),
    ],
)
def test_a_broken_message_ends_a_stream_with_its_status(last, status, details, caplog):
    made = Requests()
    first = message(integers(7).SerializeToString())
    with serving(grpc_max_message_bytes=4096) as live, connect(live) as connection:
        connection.sendall(made.greeting() + made.headers(1, STREAM) + R.data(1, first + last, ends=True))
        connection.sendall(frames.frame(frames.GOAWAY, 0, 0, bytes(8)))
        answer = read_answers(read_to_end(connection))[1]
    assert answer.status == status
    assert {**answer.headers, **answer.trailers}["grpc-message"] == details
    assert not caplog.records


def test_a_watch_that_is_no_message_is_refused(live, caplog):
    made = Requests()
    with connect(live) as connection:
        path = "/grpc.health.v1.Health/Watch"
        connection.sendall(made.greeting() + made.headers(1, path) + R.data(1, message(b"\xff"), ends=True))
        connection.sendall(frames.frame(frames.GOAWAY, 0, 0, bytes(8)))
        assert read_answers(read_to_end(connection))[1].status == 3
    assert not caplog.records


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", frames.PREFACE + bytes(9), b"\x16\x03\x01"])
def test_other_protocols_are_sent_away(live, data):
    with connect(live) as connection:
        connection.sendall(data)
        assert goaway_code(read_to_end(connection)) == ErrorCode.PROTOCOL_ERROR
    eventually(lambda: not live.server._server._connections)


def test_a_client_that_vanishes_leaves_nothing_behind(live):
    made = Requests()
    with connect(live) as connection:
        request = integers(1, wait=True).SerializeToString()
        connection.sendall(made.greeting() + made.headers(1) + R.data(1, message(request), ends=True))
        eventually(lambda: live.service.num_waiting == 1)
    eventually(lambda: live.service.num_cancelled == 1)
    eventually(lambda: not live.server._server._connections)


def test_a_client_that_reads_nothing_is_cut_off(live, monkeypatch):
    monkeypatch.setattr("sardonyx.api.kserve.h2.link.CHOKED_TIMEOUT_S", 0.05)
    made = Requests()
    request = message(integers(*range(1 << 20), model="repeat").SerializeToString())
    greeting = made.greeting(initial_window_size=frames.MAX_WINDOW_BYTES)
    window = frames.frame(frames.WINDOW_UPDATE, 0, 0, (1 << 30).to_bytes(4, "big"))
    body = [R.data(1, request[at : at + 16_384]) for at in range(0, len(request), 16_384)]
    with connect(live) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(greeting + window + made.headers(1, STREAM) + b"".join(body))
        eventually(lambda: live.service.num_cancelled == 1)
        eventually(lambda: not live.server._server._connections)
    # It stopped when the system took no more.
    assert live.service.num_repeated < 1 << 19


def test_the_stop_waits_for_no_one_who_is_silent(live):
    with connect(live), connect(live) as greeted:
        greeted.sendall(Requests().greeting())
        eventually(lambda: len(live.server._server._connections) == 2)
        live.run(live.server.stop(10.0))
        assert goaway_code(read_to_end(greeted)) == ErrorCode.NO_ERROR


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    return {"grpc_certificate": folder / "cert.pem", "grpc_private_key": folder / "key.pem"}


def encrypted(live, connection, protocols):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(protocols)
    return context.wrap_socket(connection)


def test_encrypted_clients_negotiate_http2(certificate):
    made = Requests()
    with serving(**certificate) as live, connect(live) as connection, encrypted(live, connection, ["h2"]) as secret:
        assert secret.selected_alpn_protocol() == "h2"
        secret.sendall(made.greeting() + infer(made) + frames.frame(frames.GOAWAY, 0, 0, bytes(8)))
        assert read_answers(read_to_end(secret))[1].status == 0


def test_encrypted_clients_that_do_not_are_sent_away(certificate):
    with serving(**certificate) as live, connect(live) as connection, encrypted(live, connection, []) as secret:
        assert goaway_code(read_to_end(secret)) == ErrorCode.INADEQUATE_SECURITY


def test_the_stop_does_not_wait_for_a_handshake(certificate):
    with serving(**certificate) as live, connect(live):
        live.run(live.server.stop(10.0))
