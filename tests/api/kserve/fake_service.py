"""A service of small numpy models, at the seam between the fronts and the real one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
from litestar import Litestar
from litestar.testing import TestClient
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.api.auth import Gatekeeper
from sardonyx.api.front import Front
from sardonyx.api.kserve.calls import (
    IndexRow,
    LogSettings,
    RegionStatus,
    SharedInput,
    SharedOutput,
    TraceSettings,
    WireReply,
    WireRequest,
)
from sardonyx.api.kserve.http import KServeHttp, Shortcut, kserve_http
from sardonyx.api.openai.errors import EXCEPTION_HANDLERS
from sardonyx.errors import EngineError, InvalidRequest, ModelNotFound, UnsupportedFeature
from sardonyx.metrics import Metrics
from sardonyx.runtime.dtypes import DATATYPES
from sardonyx.settings import Settings
from sardonyx.statistics import InferenceStatistics
from sardonyx.tensors import InferenceTimes, Tensor, TensorMetadata


def model(name, inputs, outputs, *, max_batch_size=0, version=1):
    """What the fronts read of a served model."""
    axis = (-1,) if max_batch_size else ()

    def tensors(sides):
        return tuple(TensorMetadata(name=n, datatype=d, shape=(*axis, *s)) for n, d, s in sides)

    config = ModelConfig(name=name, platform="onnxruntime_onnx", max_batch_size=max_batch_size)
    return SimpleNamespace(
        name=name, version=version, inputs=tensors(inputs), outputs=tensors(outputs), config=config, is_decoupled=False
    )


IDENTITY = {
    f"identity_{each.lower()}": model(
        f"identity_{each.lower()}", [("INPUT0", each, (-1,))], [("OUTPUT0", each, (-1,))], max_batch_size=8
    )
    for each in DATATYPES
}
MODELS = {
    **IDENTITY,
    "simple": model(
        "simple",
        [("INPUT0", "INT32", (16,)), ("INPUT1", "INT32", (16,))],
        [("OUTPUT0", "INT32", (16,)), ("OUTPUT1", "INT32", (16,))],
        max_batch_size=8,
    ),
    "one_string": model("one_string", [("INPUT0", "BYTES", (1,))], [("OUTPUT0", "BYTES", (1,))]),
    "image": model("image", [("INPUT0", "FP32", (-1, -1))], [("OUTPUT0", "FP32", (-1, -1))]),
    "llm": model("llm", [("PROMPT", "BYTES", (1,)), ("STREAM", "BOOL", (1,))], [("TEXT", "BYTES", (1,))]),
    "slow": model("slow", [("INPUT0", "FP32", (-1,))], [("OUTPUT0", "FP32", (-1,))]),
}


class FakeService:
    """Identity, sums and echoes. `aborted` is set when a request's work was cancelled."""

    extensions = ("binary_tensor_data", "statistics")
    server_name = "triton"
    server_version = "1.2.3"

    def __init__(self) -> None:
        self.is_well = True
        self.waits_for: dict[str, str] = {}
        self.requests: list[WireRequest] = []
        self.calls: list[Any] = []
        self.error: BaseException | None = None
        self.has_begun = asyncio.Event()
        self.num_aborted = 0

    def is_live(self):
        return self.is_well

    def is_ready(self):
        return self.is_well

    def progress(self, name: str) -> str:
        return self.waits_for.get(name, "")

    def is_model_ready(self, name, version=""):
        return name in MODELS and version in ("", "1")

    def model(self, name, version=""):
        if not self.is_model_ready(name, version):
            raise ModelNotFound(f"Request for unknown model: '{name}' is not found")
        return MODELS[name]

    def ready_versions(self, name):
        return [1, 3]

    def config(self, name, version=""):
        return self.model(name, version).config

    def statistics(self, name="", version=""):
        if name and name not in MODELS:
            raise InvalidRequest(f"requested model '{name}' is not available")
        row = InferenceStatistics(name=name or "simple", version=1)
        row.observe_success(total_ns=9, queue_ns=2, times=InferenceTimes(1, 2, 3), batch_size=4)
        row.observe_execution(4, InferenceTimes(1, 2, 3))
        return [row]

    async def infer(self, request):
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        if request.model_name == "slow":
            self.has_begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.num_aborted += 1
                raise
        return WireReply(
            model_name=request.model_name,
            model_version=request.model_version or "1",
            id=request.id,
            outputs=self._compute(request),
            parameters=request.parameters,
        )

    def _compute(self, request):
        arrays = {each.name: each for each in request.inputs}
        first = arrays["INPUT0"]
        if isinstance(first, SharedInput):
            return [SharedOutput(name="OUTPUT0", datatype=first.datatype, shape=first.shape, data=first.data)]
        results = [Tensor("OUTPUT0", first.datatype, first.array)]
        if "INPUT1" in arrays:
            second = arrays["INPUT1"].array
            results = [
                Tensor("OUTPUT0", "INT32", first.array + second),
                Tensor("OUTPUT1", "INT32", first.array - second),
            ]
        wanted = [each.name for each in request.outputs]
        return [each for each in results if not wanted or each.name in wanted]

    async def stream(self, request) -> AsyncIterator[WireReply]:
        self.requests.append(request)
        try:
            if self.error is not None:
                raise self.error
            tensors = {each.name: each for each in request.inputs}
            if missing := {"PROMPT", "STREAM"} - tensors.keys():
                raise InvalidRequest(f"expected 2 inputs but got {2 - len(missing)} inputs for model 'llm'")
            for _ in range(request.parameters.get("REPETITION", 1)):
                yield WireReply(
                    model_name="llm",
                    model_version="1",
                    id=request.id,
                    outputs=[Tensor("TEXT", "BYTES", tensors["PROMPT"].array)],
                    is_final=False,
                )
                self.has_begun.set()
                await asyncio.sleep(0)
            if request.parameters.get("WAIT"):
                await asyncio.Event().wait()
            if request.parameters.get("FAIL_LAST"):
                raise EngineError("An Error Occurred")
            yield WireReply(model_name="llm", model_version="1", outputs=[])
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise

    async def index(self, *, ready=False):
        rows = [IndexRow(name="simple", version="1", state="READY"), IndexRow(name="never_loaded")]
        return rows[:1] if ready else rows

    async def load(self, name, parameters):
        self.calls.append(("load", name, dict(parameters)))

    async def unload(self, name, *, unload_dependents=False):
        self.calls.append(("unload", name, unload_dependents))

    def trace_settings(self, name=""):
        return TraceSettings()

    def update_trace_settings(self, changes, name=""):
        self.calls.append(("trace", name, dict(changes)))
        return TraceSettings()

    def log_settings(self):
        return LogSettings()

    def update_log_settings(self, changes):
        self.calls.append(("log", dict(changes)))
        return LogSettings()

    def shared_memory_status(self, name=""):
        return [RegionStatus(name=name or "r", key="/r", offset=0, byte_size=64)]

    def register_shared_memory(self, name, *, key, offset, byte_size):
        self.calls.append(("register", name, key, offset, byte_size))

    def unregister_shared_memory(self, name=""):
        self.calls.append(("unregister", name))

    def refuse_cuda_shared_memory(self):
        raise UnsupportedFeature("this server has no CUDA shared memory")


def create_app(service: FakeService, *, is_short: bool = False, **settings: Any) -> Litestar:
    """The application that mounts the protocol, as the composition root makes it."""
    values = Settings(**settings)
    keeper = Gatekeeper(
        api_keys=values.api_keys,
        admin_keys=values.admin_keys,
        local_hosts=("127.0.0.1", "localhost"),
        origins=values.cors_origins,
    )
    app = Litestar(
        [kserve_http(service, values, keeper)],
        guards=[keeper.guard],
        exception_handlers=EXCEPTION_HANDLERS,
        openapi_config=None,
        logging_config=None,
    )
    app.state.metrics = Metrics("test")
    inner = Shortcut(KServeHttp(service, values, keeper), app.asgi_handler) if is_short else app.asgi_handler
    app.asgi_handler = Front(inner, app.state.metrics)
    return app


class Api:
    """A client of it."""

    def __init__(self, client: TestClient[Any], service: FakeService) -> None:
        self.client = client
        self.service = service
        self.get = client.get
        self.post = client.post

    def infer(self, body: Any, name: str = "simple", **options: Any) -> Any:
        return self.client.post(f"/v2/models/{name}/infer", json=body, **options)


@contextmanager
def serving(**options: Any):
    service = FakeService()
    with TestClient(create_app(service, **options), base_url="http://127.0.0.1:8000") as client:
        yield Api(client, service)


def int32s(name: str, *values: int, **members: Any) -> dict[str, Any]:
    """An input of the model "simple", repeated to its 16 elements."""
    data = list(values) * (16 // max(len(values), 1))
    return {"name": name, "datatype": "INT32", "shape": [1, 16], "data": data, **members}


SUM = {"inputs": [int32s("INPUT0", 1), int32s("INPUT1", 2)]}
ZEROS = np.zeros(16, np.int32)
