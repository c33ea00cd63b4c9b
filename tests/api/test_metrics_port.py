import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from sardonyx.api import metrics_port
from sardonyx.api.metrics_port import serve_metrics
from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics


def free_port(host: str = "127.0.0.1") -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def port() -> Iterator[int]:
    """Where the metrics are served."""
    metrics = Metrics("test")
    metrics.inference("m", 1).execution_count = 3
    port = free_port()
    stop = serve_metrics(metrics, "127.0.0.1", port)
    yield port
    stop()


def get(port: int, path: str = "/metrics", host: str = "127.0.0.1") -> tuple[str, str]:
    with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=10) as reply:
        return reply.headers["Content-Type"], reply.read().decode()


@pytest.mark.parametrize("path", ["/metrics", "/metrics?name[]=x"])
def test_metrics_are_those_of_the_main_port(port: int, path: str):
    media_type, text = get(port, path)
    assert media_type.startswith("text/plain")
    assert 'nv_inference_exec_count{model="m",version="1"} 3' in text


@pytest.mark.parametrize("path", ["/", "/metrics/x", "/v2/models"])
def test_there_is_nothing_else(port: int, path: str):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        get(port, path)
    assert refusal.value.code == 404
    refusal.value.close()


def test_stopped_port_is_free_again(port: int):
    other = free_port()
    stop = serve_metrics(Metrics("test"), "127.0.0.1", other)
    stop()
    serve_metrics(Metrics("test"), "127.0.0.1", other)()
    assert get(port)


def test_port_that_is_taken_is_a_config_error_with_the_setting(port: int):
    with pytest.raises(ConfigError, match=f"metrics_port: cannot listen on 127.0.0.1:{port}"):
        serve_metrics(Metrics("test"), "127.0.0.1", port)


def test_address_that_is_not_ours_is_a_config_error():
    with pytest.raises(ConfigError, match="metrics_port: cannot listen on"):
        serve_metrics(Metrics("test"), "192.0.2.1", free_port())


def test_loopback_of_ipv6_is_served():
    try:
        port = free_port("::1")
    except OSError:
        pytest.skip("no IPv6 here")
    stop = serve_metrics(Metrics("test"), "[::1]", port)
    try:
        assert "nv_" in get(port, host="[::1]")[1]
    finally:
        stop()


def test_clients_that_send_nothing_cost_a_bounded_number_of_threads(port: int, monkeypatch: pytest.MonkeyPatch):
    before = set(threading.enumerate())
    clients = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(40)]
    closed = sum(_is_closed(each) for each in clients[metrics_port.MAX_CONNECTIONS :])
    assert closed == 40 - metrics_port.MAX_CONNECTIONS
    threads = set(threading.enumerate()) - before
    assert len(threads) <= metrics_port.MAX_CONNECTIONS
    for each in clients:
        each.close()
    for thread in threads:
        thread.join(timeout=10)
    assert get(port)


def _is_closed(client: socket.socket) -> bool:
    """The other side has hung up."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_client_that_leaves_early_leaves_no_trace_on_the_console(port: int, capfd: pytest.CaptureFixture[str]):
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    assert get(port)
    assert capfd.readouterr() == ("", "")
