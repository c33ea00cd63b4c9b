"""A gRPC server over a service of ours that computes in numpy, in an event loop of its own thread."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc
import uvloop
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.api.auth import Gatekeeper
from sardonyx.api.kserve.calls import IndexRow, LogSettings, RegionStatus, TraceSettings, WireReply, WireRequest
from sardonyx.api.kserve.grpc_server import GrpcServer
from sardonyx.errors import InvalidRequest, ModelNotFound, Overloaded, UnsupportedFeature
from sardonyx.settings import Settings
from sardonyx.statistics import BatchStatistics, InferenceStatistics, ResponseStatistics
from sardonyx.tensors import Tensor, TensorMetadata

WAIT_S = 20.0


class FakeService:
    """`InferenceService` with three models: ``identity``, ``add_sub`` (INT32), and ``repeat`` (decoupled).

    ``identity`` waits for `gate` where a request has the parameter ``wait``, and raises `error` where there is one.
    ``repeat`` answers once for each element of IN, then with an empty final answer.
    """

    extensions = ("classification", "sequence", "statistics")
    server_name = "sardonyx"
    server_version = "1.2.3"

    def __init__(self) -> None:
        self.ready = True
        self.gate = asyncio.Event()
        self.requests: list[WireRequest] = []
        self.calls: list[Any] = []
        """Control calls, by name and arguments."""
        self.num_waiting = 0
        self.num_cancelled = 0
        self.num_repeated = 0
        self.error: BaseException | None = None

    def is_live(self) -> bool:
        return True

    def is_ready(self) -> bool:
        return self.ready

    def model(self, name: str, version: str = "") -> Any:
        if version and not version.isdigit():
            raise InvalidRequest(f"version {version} is no number")
        if name not in ("identity", "add_sub", "repeat"):
            raise ModelNotFound(f"Request for unknown model: '{name}' is not found")
        return SimpleNamespace(
            name=name,
            version=int(version or 3),
            is_decoupled=name == "repeat",
            config=ModelConfig(name=name, platform="onnxruntime_onnx", max_batch_size=8),
            inputs=(TensorMetadata(name="INPUT0", datatype="INT32", shape=(-1, 16)),),
            outputs=(TensorMetadata(name="OUTPUT0", datatype="BYTES", shape=(-1,)),),
        )

    def is_model_ready(self, name: str, version: str = "") -> bool:
        try:
            return bool(self.model(name, version))
        except ModelNotFound:
            return False

    def ready_versions(self, name: str) -> list[int]:
        return [1, 3]

    def config(self, name: str, version: str = "") -> ModelConfig:
        return self.model(name, version).config

    def statistics(self, name: str = "", version: str = "") -> list[InferenceStatistics]:
        found = InferenceStatistics(name=name or "identity", version=3, last_inference_ms=7, inference_count=5)
        found.execution_count = 2
        found.queue.add(11, 4)
        found.batches[2] = BatchStatistics()
        found.batches[2].compute_infer.add(13)
        found.responses[0] = ResponseStatistics()
        found.responses[0].success.add(17)
        return [found]

    async def infer(self, request: WireRequest) -> WireReply:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        model = self.model(request.model_name, request.model_version)
        if model.is_decoupled:
            raise UnsupportedFeature("ModelInfer RPC doesn't support models with decoupled transaction policy")
        if "wait" in request.parameters:
            await self._wait()
        first = request.inputs[0]
        if request.model_name == "add_sub":
            left, right = (each.array for each in request.inputs)
            outputs = [Tensor("OUTPUT0", "INT32", left + right), Tensor("OUTPUT1", "INT32", left - right)]
        else:
            outputs = [Tensor(each.name.replace("IN", "OUT"), each.datatype, each.array) for each in request.inputs]
        assert first.array.flags.c_contiguous
        return self._reply(request, outputs)

    async def stream(self, request: WireRequest) -> AsyncIterator[WireReply]:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        try:
            for value in request.inputs[0].array.reshape(-1):
                if "wait" in request.parameters:
                    await self._wait()
                self.num_repeated += 1
                yield self._reply(request, [Tensor("OUT", "INT32", np.array([value], np.int32))], is_final=False)
            yield self._reply(request, [])
        except GeneratorExit:
            self.num_cancelled += 1
            raise

    async def _wait(self) -> None:
        self.num_waiting += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_waiting -= 1

    def _reply(self, request: WireRequest, outputs: list[Any], *, is_final: bool = True) -> WireReply:
        return WireReply(
            model_name=request.model_name,
            model_version=request.model_version or "3",
            id=request.id,
            outputs=outputs,
            is_final=is_final,
        )

    async def index(self, *, ready: bool = False) -> list[IndexRow]:
        rows = [IndexRow(name="identity", version="3", state="READY"), IndexRow(name="never")]
        return rows[:1] if ready else rows

    async def load(self, name: str, parameters: Any) -> None:
        self.calls.append(("load", name, dict(parameters)))

    async def unload(self, name: str, *, unload_dependents: bool = False) -> None:
        self.calls.append(("unload", name, unload_dependents))

    def trace_settings(self, name: str = "") -> TraceSettings:
        return TraceSettings(trace_rate="9" if name else "1000")

    def update_trace_settings(self, changes: Any, name: str = "") -> TraceSettings:
        self.calls.append(("trace", name, dict(changes)))
        return TraceSettings()

    def log_settings(self) -> LogSettings:
        return LogSettings(log_verbose_level=2)

    def update_log_settings(self, changes: Any) -> LogSettings:
        self.calls.append(("log", dict(changes)))
        return LogSettings()

    def shared_memory_status(self, name: str = "") -> list[RegionStatus]:
        return [RegionStatus(name=name or "r", key="/k", offset=4, byte_size=64)]

    def register_shared_memory(self, name: str, *, key: str, offset: int, byte_size: int) -> None:
        self.calls.append(("register", name, key, offset, byte_size))

    def unregister_shared_memory(self, name: str = "") -> None:
        self.calls.append(("unregister", name))

    def refuse_cuda_shared_memory(self) -> None:
        raise UnsupportedFeature("this server has no CUDA shared memory")

    def overload(self) -> None:
        """Refuse every request from now on."""
        self.error = Overloaded("Exceeds maximum queue size", retry_after_s=1.5)


class Live:
    """A running server and what a test needs beside it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, service: FakeService, server: GrpcServer) -> None:
        self.loop = loop
        self.service = service
        self.server = server

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """What the coroutine returns in the server's loop."""
        return self.begin(coroutine).result(WAIT_S)

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> "Future[Any]":
        """The same, without waiting for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def open_gate(self) -> None:
        self.loop.call_soon_threadsafe(self.service.gate.set)

    @contextmanager
    def client(self, **options: Any) -> Iterator[tritonclient.grpc.InferenceServerClient]:
        """Triton's own client."""
        client = tritonclient.grpc.InferenceServerClient(self.address, **options)
        try:
            yield client
        finally:
            client.close()

    @contextmanager
    def stub(self) -> Iterator[Any]:
        """The bare protocol."""
        with grpc.insecure_channel(self.address) as channel:
            yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@contextmanager
def serving(keeper: Gatekeeper | None = None, **settings: Any) -> Iterator[Live]:
    """Serve a `FakeService` on a free port; it is stopped at the end."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[FakeService, GrpcServer]:
        service = FakeService()
        values = Settings(**{"grpc_port": 0, **settings})
        return service, await GrpcServer.start(service, values, keeper or Gatekeeper())  # type: ignore[arg-type]  # a fake

    try:
        live = Live(loop, *asyncio.run_coroutine_threadsafe(start(), loop).result(WAIT_S))
        try:
            yield live
        finally:
            live.run(live.server.stop(0.0))
            live.run(_settle())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()


async def _settle() -> None:
    """Until every task but this one has ended, so that none dies with the loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=WAIT_S)


def integers(*values: int, model: str = "identity", id: str = "", **parameters: Any) -> service_pb2.ModelInferRequest:
    """A request of one INT32 tensor."""
    request = service_pb2.ModelInferRequest(model_name=model, id=id)
    request.inputs.add(name="IN", datatype="INT32", shape=[len(values)])
    request.raw_input_contents.append(np.array(values, np.int32).tobytes())
    for name, value in parameters.items():
        if isinstance(value, bool):
            request.parameters[name].bool_param = value
        else:
            request.parameters[name].int64_param = value
    return request


def numbers(response: service_pb2.ModelInferResponse) -> list[int]:
    """The values of its first output, as INT32."""
    return np.frombuffer(response.raw_output_contents[0], np.int32).tolist()
