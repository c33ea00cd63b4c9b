"""A live server under what systemd gives its services: a notification socket and a watchdog."""

import queue
import signal
import socket
import threading

import pytest
from tests.conformance.process import serve
from tests.tiny_models import make_language_model


class Manager:
    """Listens all the time, as systemd does: the socket's queue holds ten datagrams."""

    def __init__(self, address):
        self.environment = {"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "200000"}
        self._told = queue.SimpleQueue()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._listener.bind(str(address))
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def until(self, assignment):
        """All that was told since the last call, up to an assignment."""
        told = []
        while assignment not in told:
            told += self._told.get(timeout=30).split("\n")
        return told

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _listen(self):
        while data := self._listener.recv(4096):
            self._told.put(data.decode())


@pytest.fixture
def manager(tmp_path):
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.close()


def test_a_server_tells_its_manager_how_it_goes_from_start_to_end(repository, tmp_path, manager):
    flags = ["--drain-grace-s", "0"]
    with serve(repository, tmp_path / "log", *flags, env=manager.environment, until="/live") as server:
        manager.until("READY=1")
        assert server.request("GET", "/ready")[0] == 200
        manager.until("WATCHDOG=1")
        assert manager.until("WATCHDOG=1") == ["WATCHDOG=1"]
        server.signal(signal.SIGTERM)
        assert "READY=1" not in manager.until("STOPPING=1")
        assert server.wait() == 0
        assert "cannot be told" not in server.log()


def test_a_model_that_fails_does_not_keep_the_service_from_starting(tmp_path, manager):
    make_language_model(tmp_path / "models", "good")
    folder = make_language_model(tmp_path / "models", "bad")
    (folder / "tokenizer.json").write_text("{}")
    with serve(tmp_path / "models", tmp_path / "log", env=manager.environment, until="/live") as server:
        told = manager.until("READY=1")
        if "STATUS=not ready: model bad is unavailable" not in told:
            manager.until("STATUS=not ready: model bad is unavailable")
        assert server.request("GET", "/ready")[0] == 503
        assert server.request("POST", "/v1/completions", {"model": "good", "prompt": "x", "max_tokens": 1})[0] == 200


def test_the_log_says_where_a_server_was_that_its_watchdog_ended(repository, tmp_path, manager):
    with serve(repository, tmp_path / "log", env=manager.environment) as server:
        server.signal(signal.SIGABRT)
        assert server.wait() == -signal.SIGABRT
        assert "Fatal Python error: Aborted" in server.log()
        assert "most recent call first" in server.log()
