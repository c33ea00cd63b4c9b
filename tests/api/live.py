"""The application on a scripted model: routing, text model, registry and step loop are real, only the runner is not."""

import asyncio
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from litestar.testing import TestClient
from tests.serving.fakes import Script, Served, loaded

from sardonyx.api.front import Front
from sardonyx.api.server import DrainingServer, bind
from sardonyx.app import create_app
from sardonyx.metrics import Metrics
from sardonyx.repository.index import IndexEntry
from sardonyx.serving.registry import Registry
from sardonyx.serving.served import LoadedModel, ModelOverride
from sardonyx.settings import Settings

BASE_URL = "http://127.0.0.1:8000"


class ScriptSource:
    """A repository of models that all follow one script."""

    def __init__(self, folder: Path, script: Script, names: tuple[str, ...] = ("tiny",), **options: Any) -> None:
        self.names = names
        self.served: dict[str, Served] = {}
        self.error: Exception | None = None
        """Raised by the next loads."""
        self.options = options
        """Of `Served`."""
        self._folder = folder
        self._script = script

    def index(self) -> list[IndexEntry]:
        return [IndexEntry(name=name, versions=[1], family="llm") for name in self.names]

    def load(self, name: str, override: ModelOverride | None = None) -> LoadedModel:
        if self.error is not None:
            raise self.error
        served = Served(self._folder, self._script, **self.options)
        served.model.name = name
        self.served[name] = served
        return loaded(served.model)

    def progress(self, name: str) -> str:
        return ""

    def close(self) -> None:
        for served in self.served.values():
            served.pool.close()


class Api:
    """A client of the application, and its insides."""

    def __init__(self, client: TestClient[Any], source: ScriptSource) -> None:
        self.client = client
        self.source = source

    @property
    def served(self) -> Served:
        return self.source.served["tiny"]

    def post(self, path: str, body: Any, **options: Any) -> Any:
        return self.client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> Any:
        return self.client.get(path, **options)

    def complete(self, **body: Any) -> Any:
        return self.client.post("/v1/completions", json=body)

    def chat(self, **body: Any) -> Any:
        body.setdefault("messages", [{"role": "user", "content": "hello"}])
        return self.client.post("/v1/chat/completions", json=body)


@contextmanager
def application(source: ScriptSource, *, is_loaded: bool = True, **settings: Any) -> Iterator[Api]:
    """Serve the source's models; with every one of them loaded, unless told otherwise."""
    values = Settings(**{"allow_grpc": False} | settings)
    registry = Registry(source, default_model=values.default_model, aliases=values.aliases)
    app = create_app(values, registry, Metrics("test"))
    with TestClient(app, base_url=BASE_URL) as client:
        eventually(lambda: not is_loaded or client.get("/ready").status_code == 200)
        yield Api(client, source)
        for served in source.served.values():
            served.runner.gate.set()


def frames(text: str) -> list[Any]:
    """The data of server-sent events, decoded; ``[DONE]`` as it is."""
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [each if each == "[DONE]" else msgspec.json.decode(each) for each in data]


class Listener:
    """A server on a port of its own, in a thread of this process."""

    def __init__(self, source: ScriptSource, port: int, registry: Registry, server: DrainingServer) -> None:
        self.source = source
        self.port = port
        self.registry = registry
        self._server = server
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def served(self) -> Served:
        return self.source.served["tiny"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """One request on a connection of its own; JSON in and out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        data = None if body is None else msgspec.json.encode(body)
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, msgspec.json.decode(content) if content.startswith(b"{") else content.decode()

    def metric(self, line: str) -> float:
        """A sample of /metrics; 0 where there is none."""
        text = self.request("GET", "/metrics")[1]
        return next((float(each.split()[-1]) for each in text.splitlines() if each.startswith(line)), 0.0)

    def stop(self, *, with_grace: bool = False) -> None:
        """Begin to drain."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(lambda: self._server.request_exit(with_grace=with_grace))

    def run(self, listener: socket.socket) -> None:
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            self._loop = runner.get_loop()
            runner.run(self._server.serve(sockets=[listener]))


@contextmanager
def listening(source: ScriptSource, **settings: Any) -> Iterator[Listener]:
    """Serve the source's models on a free port, as `app.run` does, until the block is left."""
    values = Settings(**{"allow_grpc": False} | settings)
    registry = Registry(source, default_model=values.default_model, aliases=values.aliases)
    app = create_app(values, registry, Metrics("test"))
    front = app.asgi_handler
    assert isinstance(front, Front)

    async def drain(with_grace: bool) -> None:
        front.is_draining = True
        await registry.drain(values.drain_grace_s if with_grace else 0.0, values.drain_timeout_s)

    socket_ = bind("127.0.0.1", 0)
    server = Listener(source, socket_.getsockname()[1], registry, DrainingServer(app, drain))
    thread = threading.Thread(target=server.run, args=[socket_])
    thread.start()
    try:
        eventually(lambda: server.request("GET", "/ready")[0] == 200)
        yield server
    finally:
        for served in source.served.values():
            served.runner.gate.set()
        if thread.is_alive():
            server.stop()
        thread.join(timeout=30)
        assert not thread.is_alive()


def eventually(is_true: Callable[[], Any], within_s: float = 20.0) -> None:
    """Wait for what another thread does."""
    deadline_s = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline_s, "it did not happen"
        threading.Event().wait(0.002)


def post_head(path: str, body: bytes, *more: str) -> bytes:
    """The raw bytes of a POST."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def read_answer(connection: socket.socket) -> tuple[int, Any]:
    """Status and JSON of the next answer; 0 where the connection ends first."""
    answer = http.client.HTTPResponse(connection)
    try:
        answer.begin()
    except (http.client.RemoteDisconnected, ConnectionResetError):
        return 0, None
    content = answer.read()
    return answer.status, msgspec.json.decode(content) if content.startswith(b"{") else content.decode()
