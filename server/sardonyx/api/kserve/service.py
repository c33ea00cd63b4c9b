"""KServe-v2 with Triton's extensions, without a transport: what both fronts call.

Floor 5. The fronts translate bytes into `calls` and back; everything that the protocol means is here. Every method is
called on the event loop; errors are classes of `sardonyx.errors`, for which each front has a table of statuses.
"""

import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, cast

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.api.kserve import codec
from sardonyx.api.kserve.calls import (
    IndexRow,
    LogSettings,
    RegionStatus,
    SharedInput,
    SharedOutput,
    TraceSettings,
    WantedOutput,
    WireReply,
    WireRequest,
)
from sardonyx.api.kserve.classification import with_classes
from sardonyx.api.kserve.parameters import read_parameters
from sardonyx.api.kserve.server_settings import ServerLog, ServerTrace
from sardonyx.api.kserve.shared_memory import SharedMemory
from sardonyx.errors import (
    InvalidRequest,
    ModelNotFound,
    ModelNotReady,
    PayloadTooLarge,
    PermissionDenied,
    ServeError,
    UnsupportedFeature,
)
from sardonyx.serving.lifecycle import LoadFailed
from sardonyx.serving.registry import ModelState, Registry
from sardonyx.serving.served import InferAnswer, InferCall, ModelOverride, ServedModel
from sardonyx.settings import Settings
from sardonyx.statistics import InferenceStatistics
from sardonyx.tensors import Tensor
from sardonyx.version import __version__

logger = logging.getLogger(__name__)

_VERSION = re.compile(r"[0-9]{1,18}")
_FILE_PREFIX = "file:"


class InferenceService:
    """The data plane and the control plane of one server."""

    def __init__(self, registry: Registry, settings: Settings, shared_memory: SharedMemory | None = None) -> None:
        self._registry = registry
        self._settings = settings
        self._shared_memory = shared_memory or SharedMemory()
        self._trace = ServerTrace()
        self._log = ServerLog()

    @property
    def extensions(self) -> tuple[str, ...]:
        """Of the server metadata."""
        return (
            "classification",
            "sequence",
            "sequence(string_id)",
            "model_repository",
            "model_repository(unload_dependents)",
            "schedule_policy",
            "model_configuration",
            *(["system_shared_memory"] if self._settings.allow_client_shm else []),
            "binary_tensor_data",
            "parameters",
            "statistics",
            "trace",
            "logging",
        )

    @property
    def server_name(self) -> str:
        """The operator's `id`."""
        return self._settings.id

    @property
    def server_version(self) -> str:
        """Ours."""
        return __version__

    def is_live(self) -> bool:
        """Requests are answered."""
        return self._registry.is_live

    def is_ready(self) -> bool:
        """Requests can be served."""
        return self._registry.is_ready()

    def is_model_ready(self, name: str, version: str = "") -> bool:
        """Also false where there is no such model or version.

        Raises:
            InvalidRequest: `version` is no number.
        """
        try:
            return self.model(name, version).is_alive
        except (ModelNotFound, ModelNotReady):
            return False

    def progress(self, name: str) -> str:
        """What a load of the model is waiting for; empty where it is not loaded, or it takes no time."""
        return self._registry.progress(name)

    def model(self, name: str, version: str = "") -> ServedModel:
        """A ready version, the highest where none is named.

        Raises:
            InvalidRequest: `version` is no number.
            ModelNotFound: ``Request for unknown model: ...``.
            ModelNotReady: it is there and not READY.
        """
        return self._registry.served(name, _version(name, version))

    def ready_versions(self, name: str) -> list[int]:
        """Ascending. Raises as `model`."""
        return self._registry.versions(name)

    def config(self, name: str, version: str = "") -> ModelConfig:
        """The completed config. Raises as `model`."""
        return self.model(name, version).config

    def statistics(self, name: str = "", version: str = "") -> list[InferenceStatistics]:
        """Of one version, of a model's ready versions, or without a name of every ready model.

        Raises:
            InvalidRequest: ``requested model '...' is not available``, or `version` is no number.
        """
        if not name:
            models = self._registry.ready_models()
            return [each.statistics for model in models for _, each in sorted(model.versions.items())]
        try:
            if version:
                return [self.model(name, version).statistics]
            return [self._registry.served(name, each).statistics for each in self._registry.versions(name)]
        except (ModelNotFound, ModelNotReady):
            shown = f"{name[:160]}', version: '{version}" if version else name[:160]
            raise InvalidRequest(f"requested model '{shown}' is not available", param="model") from None

    async def infer(self, request: WireRequest) -> WireReply:
        """One request, one answer. Raises what `ServedModel.infer` raises; cancelling aborts."""
        model = self.model(request.model_name, request.model_version)
        answer = await model.infer(self._call(request))
        return await self._reply(request, model, answer)

    async def stream(self, request: WireRequest) -> AsyncIterator[WireReply]:
        """One request, all its answers. An answer without outputs may come last, only to say that it is final.

        Raises what `ServedModel.stream` raises, also before the first answer.
        """
        model = self.model(request.model_name, request.model_version)
        # A generator: closing it aborts, and nobody else would at once.
        answers = cast("AsyncGenerator[InferAnswer, None]", model.stream(self._call(request)))
        async with aclosing(answers):
            async for answer in answers:
                yield await self._reply(request, model, answer)

    async def index(self, *, ready: bool = False) -> list[IndexRow]:
        """Every model of the repositories, a row for each version; with `ready` only READY ones."""
        try:
            await self._registry.refresh()
        except ServeError as error:
            logger.warning("the repositories could not be read: %s", error)
        return [
            IndexRow(
                name=row.name,
                version="" if row.version is None else str(row.version),
                state="" if row.state is None else row.state,
                reason=row.reason,
            )
            for row in self._registry.version_index()
            if not ready or row.state is ModelState.READY
        ]

    async def load(self, name: str, parameters: Mapping[str, str | bytes]) -> None:
        """Load or reload.

        Args:
            name: of the model.
            parameters: ``config`` (JSON text) and ``file:<version>/<path>`` (bytes). Other keys are refused.

        Raises:
            InvalidRequest: a parameter is wrong, or the load failed (``load failed for model ...``).
            ModelNotReady: ``explicit model load / unload is not allowed ...``.
            PermissionDenied: file override, which the operator has not allowed.
        """
        self._check_control()
        override = self._override(name, parameters)
        try:
            await self._registry.load(name, override, only_if_changed=True)
        except ModelNotFound:
            raise _failed_poll(name) from None
        except InvalidRequest as error:
            raise _failed_poll(name, error.message) from None
        except LoadFailed as error:
            raise _failed_load(name, error) from None

    async def unload(self, name: str, *, unload_dependents: bool = False) -> None:
        """Unload, after the accepted requests. An unknown model is no error. Raises ModelNotReady as `load`."""
        self._check_control()
        try:
            await self._registry.unload(name, unload_dependents=unload_dependents)
        except ModelNotFound:
            return

    def trace_settings(self, name: str = "") -> TraceSettings:
        """The global ones, or a model's. Raises ModelNotFound."""
        self._check_known(name)
        return self._trace.settings(name)

    def update_trace_settings(self, changes: Mapping[str, list[str] | None], name: str = "") -> TraceSettings:
        """Change some; ``None`` goes back to the global (or the initial) value.

        Raises:
            InvalidRequest: an unknown setting or a value out of range.
            UnsupportedFeature: the trace file.
            PermissionDenied: the operator does not allow changes.
        """
        self._check_known(name)
        if changes:
            self._check_updates()
        return self._trace.update(changes, name)

    def log_settings(self) -> LogSettings:
        """What is logged."""
        return self._log.settings()

    def update_log_settings(self, changes: Mapping[str, Any]) -> LogSettings:
        """Change some. Values are checked here. Raises as `update_trace_settings`."""
        if changes:
            self._check_updates()
        return self._log.update(changes)

    def shared_memory_status(self, name: str = "") -> list[RegionStatus]:
        """All system shared-memory regions, or one. Raises InvalidRequest where there is none of that name."""
        return self._shared_memory.status(name)

    def register_shared_memory(self, name: str, *, key: str, offset: int, byte_size: int) -> None:
        """Raises UnsupportedFeature where the operator does not allow it, InvalidRequest where it cannot be."""
        self._check_shared_memory()
        self._shared_memory.register(name, key=key, offset=offset, byte_size=byte_size)

    def unregister_shared_memory(self, name: str = "") -> None:
        """One, or all. Requests that use it finish."""
        self._shared_memory.unregister(name)

    def refuse_cuda_shared_memory(self) -> None:
        """Raises UnsupportedFeature, always: this server has no CUDA shared memory."""
        raise UnsupportedFeature("CUDA shared memory is not supported by this server; use system shared memory")

    def close(self) -> None:
        """Let go of what clients registered."""
        self._shared_memory.unregister()

    def _call(self, request: WireRequest) -> InferCall:
        self._check_slices(request)
        inputs = [
            self._tensor(each, request.model_name) if isinstance(each, SharedInput) else each for each in request.inputs
        ]
        outputs = [each.name for each in request.outputs]
        if not request.parameters:
            return InferCall(inputs=inputs, outputs=outputs, id=request.id)
        known = read_parameters(request.parameters)
        return InferCall(
            inputs=inputs,
            outputs=outputs,
            id=request.id,
            priority=known.priority,
            timeout_us=known.timeout_us,
            sequence=known.sequence,
            parameters=known.others,
        )

    def _check_slices(self, request: WireRequest) -> None:
        """See that shared memory has the inputs and can take the outputs, before anything is read or computed."""
        inputs = [each for each in request.inputs if isinstance(each, SharedInput)]
        slices = [each.data for each in inputs] + [each.data for each in request.outputs if each.data is not None]
        if not slices:
            return
        self._check_shared_memory()
        # A file of any size costs the client that registered it nothing, and each input may be all of it.
        most, num_bytes = self._settings.max_inflight_tensor_bytes, 0
        for shared in inputs:
            num_bytes += shared.data.size_bytes
            if num_bytes > most:
                raise PayloadTooLarge(
                    f"input '{shared.name}' in shared memory is larger than {most:,} bytes, alone or with those before "
                    "it; that is max_inflight_tensor_bytes",
                    param="inputs",
                )
        for data in slices:
            with self._shared_memory.hold(data.region) as region:
                region.check(data.offset, data.size_bytes)

    def _tensor(self, shared: SharedInput, model_name: str) -> Tensor:
        data = self._shared_memory.read(shared.data.region, shared.data.offset, shared.data.size_bytes)
        return codec.from_raw(
            data, name=shared.name, datatype=shared.datatype, shape=shared.shape, model_name=model_name
        )

    async def _reply(self, request: WireRequest, model: ServedModel, answer: InferAnswer) -> WireReply:
        outputs: list[Tensor | SharedOutput] = list(answer.outputs)
        if request.outputs and outputs:
            num_classes = {each.name: each.num_classes for each in request.outputs if each.num_classes}
            tensors = answer.outputs
            if num_classes:
                is_batching = model.config.max_batch_size > 0
                tensors = await with_classes(tensors, num_classes, model.labels, is_batching=is_batching)
            wanted = {each.name: each for each in request.outputs}
            outputs = [self._output(each, wanted[each.name]) for each in tensors]
        return WireReply(
            model_name=model.name,
            model_version=str(model.version),
            id=request.id,
            outputs=outputs,
            parameters=answer.parameters,
            is_final=answer.is_final,
        )

    def _output(self, tensor: Tensor, wanted: WantedOutput) -> Tensor | SharedOutput:
        if wanted.data is None:
            return tensor
        data = codec.to_raw(tensor)
        if len(data) > wanted.data.size_bytes:
            raise InvalidRequest(
                f"shared memory size specified with the request for output '{tensor.name}' ({wanted.data.size_bytes} "
                f"bytes) should be at least {len(data)} bytes to hold the results",
                param="outputs",
            )
        self._shared_memory.write(wanted.data.region, wanted.data.offset, data)
        return SharedOutput(
            name=tensor.name,
            datatype=tensor.datatype,
            shape=tensor.array.shape,
            data=msgspec.structs.replace(wanted.data, size_bytes=len(data)),
        )

    def _override(self, name: str, parameters: Mapping[str, str | bytes]) -> ModelOverride | None:
        files: dict[str, bytes] = {}
        config: str | None = None
        for key, value in parameters.items():
            if key == "config" and isinstance(value, str):
                config = value
            elif key.startswith(_FILE_PREFIX) and isinstance(value, bytes):
                files[key.removeprefix(_FILE_PREFIX)] = value
            else:
                kind = "string" if isinstance(value, str) else "bytes"
                raise InvalidRequest(f"Unrecognized load parameter '{key[:160]}' with type '{kind}'", param=key[:160])
        if files and not self._settings.allow_file_override:
            raise PermissionDenied("the operator has not set allow_file_override")
        if files and config is None:
            raise _failed_poll(name, "files need a config beside them")
        return None if config is None else ModelOverride(config=config, files=files)

    def _check_control(self) -> None:
        if self._settings.model_control_mode != "explicit":
            raise ModelNotReady("explicit model load / unload is not allowed if polling is enabled")

    def _check_updates(self) -> None:
        if not self._settings.allow_setting_updates:
            raise PermissionDenied("the operator has not set allow_setting_updates")

    def _check_shared_memory(self) -> None:
        if not self._settings.allow_client_shm:
            raise UnsupportedFeature(
                "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
            )

    def _check_known(self, name: str) -> None:
        if name and not any(row.name == name for row in self._registry.version_index()):
            raise ModelNotFound(f"Request for unknown model : {name[:160]}")


def _failed_poll(name: str, reason: str = "") -> InvalidRequest:
    """What was asked to be loaded is not there, or is wrong in itself."""
    message = f"failed to load '{name[:160]}', failed to poll from model repository"
    return InvalidRequest(f"{message}: {reason}" if reason else message, param="model")


def _failed_load(name: str, error: LoadFailed) -> InvalidRequest:
    """As Triton tells it: each version with the reason."""
    told = "".join(
        f"version {version} is at {ModelState.UNAVAILABLE} state: {error.reason};" for version in error.versions or [1]
    )
    return InvalidRequest(f"load failed for model '{name[:160]}': {told}", param="model")


def _version(model_name: str, text: str) -> int | None:
    if not text:
        return None
    if not _VERSION.fullmatch(text) or int(text) < 1:
        raise InvalidRequest(
            f"failed to get model version from specified version string '{text[:40]}' for model '{model_name[:160]}': "
            "it is a number from 1",
            param="model_version",
        )
    return int(text)
