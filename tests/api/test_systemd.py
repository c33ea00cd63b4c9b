import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sardonyx.api.systemd import ServiceManager, report

EXTENSION = "EXTEND_TIMEOUT_USEC=60000000"


@contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + address[1:] if address.startswith("@") else address)
        listener.settimeout(10)
        yield listener


class Server:
    """What `report` asks of a registry, set by a test."""

    def __init__(self) -> None:
        self.unready: list[str] = []
        self.stuck: list[str] = []
        self.is_settled = False

    def unready_reasons(self) -> list[str]:
        return self.unready + self.stuck

    def is_ready(self) -> bool:
        return not self.unready_reasons()

    def stuck_reasons(self) -> list[str]:
        return self.stuck

    def has_settled(self) -> bool:
        return self.is_settled

    def ready_models(self) -> list[str]:
        return ["tiny"]


class Reports:
    """The datagrams of a server that is watched every 10 ms."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener

    async def next(self) -> list[str]:
        data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self._listener, 4096), 10)
        return data.decode().split("\n")

    async def until(self, assignment: str) -> list[str]:
        while assignment not in (lines := await self.next()):
            pass
        return lines


def run_reports(address: Path, server: Server, test) -> None:
    async def main() -> None:
        with listening(str(address)) as listener:
            listener.setblocking(False)
            manager = ServiceManager(str(address), watchdog_s=0.02)
            task = asyncio.create_task(report(manager, server))
            try:
                await test(Reports(listener))
            finally:
                task.cancel()
                manager.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_assignments_arrive_as_lines_of_one_datagram(tmp_path, kind):
    address = str(tmp_path / "notify") if kind == "path" else f"@sardonyx-test-{os.getpid()}"
    with listening(address) as listener:
        manager = ServiceManager.from_environment({"NOTIFY_SOCKET": address})
        assert manager is not None
        assert manager.tell("READY=1", "STATUS=one\ntwo\r\nREADY=0")
        assert listener.recv(4096) == b"READY=1\nSTATUS=one two READY=0"
        manager.close()


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1234"}])
def test_without_a_socket_nobody_is_told(environ):
    assert ServiceManager.from_environment(environ) is None


@pytest.mark.parametrize(
    ("watchdog", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),  # another process of the service is watched
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_ours_where_the_environment_says_so(tmp_path, watchdog, expected):
    manager = ServiceManager.from_environment({"NOTIFY_SOCKET": str(tmp_path / "x")} | watchdog)
    assert manager is not None
    assert manager.watchdog_s == expected
    manager.close()


def test_a_manager_that_does_not_listen_is_logged_and_borne(tmp_path, caplog):
    manager = ServiceManager(str(tmp_path / "nowhere"))
    assert not manager.tell("READY=1")
    assert "cannot be told READY=1" in caplog.text
    manager.close()


def test_a_server_asks_for_time_until_it_is_ready_and_then_says_so_once(tmp_path):
    server = Server()
    server.unready = ["model tiny is loading"]

    async def test(reports: Reports) -> None:
        assert await reports.next() == [EXTENSION, "STATUS=not ready: model tiny is loading", "WATCHDOG=1"]
        assert await reports.next() == [EXTENSION, "WATCHDOG=1"]
        server.unready = []
        assert await reports.until("READY=1") == ["READY=1", "STATUS=ready with 1 model", "WATCHDOG=1"]
        assert [await reports.next() for _ in range(3)] == [["WATCHDOG=1"]] * 3

    run_reports(tmp_path / "notify", server, test)


def test_a_start_that_is_over_counts_as_ready_although_a_model_failed(tmp_path):
    server = Server()
    server.unready, server.is_settled = ["model b is unavailable"], True

    async def test(reports: Reports) -> None:
        assert await reports.next() == ["READY=1", "STATUS=not ready: model b is unavailable", "WATCHDOG=1"]
        assert await reports.next() == ["WATCHDOG=1"]

    run_reports(tmp_path / "notify", server, test)


def test_an_engine_without_progress_gives_no_sign_of_life(tmp_path):
    server = Server()

    async def test(reports: Reports) -> None:
        await reports.until("READY=1")
        server.stuck = ["the engine of model tiny makes no progress"]
        lines = await reports.until("STATUS=not ready: the engine of model tiny makes no progress")
        assert lines[1:] == []
        server.stuck = []
        assert await reports.next() == ["STATUS=ready with 1 model", "WATCHDOG=1"]

    run_reports(tmp_path / "notify", server, test)


def test_ready_is_told_again_where_it_could_not_be_delivered(tmp_path):
    address = tmp_path / "notify"

    async def main() -> None:
        manager = ServiceManager(str(address), watchdog_s=0.02)
        refused = asyncio.Event()
        tell = manager.tell
        manager.tell = lambda *assignments: tell(*assignments) or refused.set()  # type: ignore[method-assign]
        task = asyncio.create_task(report(manager, Server()))
        await asyncio.wait_for(refused.wait(), 10)
        with listening(str(address)) as listener:
            listener.setblocking(False)
            assert await Reports(listener).next() == ["READY=1", "STATUS=ready with 1 model", "WATCHDOG=1"]
        task.cancel()
        manager.close()

    asyncio.run(main())
