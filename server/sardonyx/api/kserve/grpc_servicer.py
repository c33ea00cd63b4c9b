"""The methods of ``inference.GRPCInferenceService``.

Floor 5. Translates messages and asks the service; inference works on bytes, see `grpc_wire`. Methods have the names
that the generated code of tritonclient registers them under.

Source: service.proto of KServe V2 with Triton's extensions; Triton, server/src/grpc/grpc_server.cc.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from tritonclient.grpc import service_pb2 as pb

from sardonyx.api.auth import Gatekeeper
from sardonyx.api.kserve.grpc_lingering import Lingering
from sardonyx.api.kserve.grpc_messages import (
    MAX_INLINE_BYTES,
    read_request,
    reads_slowly,
    write_reply,
    writes_slowly,
)
from sardonyx.api.kserve.grpc_routes import key_of
from sardonyx.api.kserve.grpc_statistics import write_statistics
from sardonyx.api.kserve.grpc_status import abort
from sardonyx.api.kserve.grpc_stream import InferStream
from sardonyx.api.kserve.grpc_wire import join_reply, split_request
from sardonyx.api.kserve.service import InferenceService
from sardonyx.errors import InvalidRequest, ModelNotFound, PayloadTooLarge, UnsupportedFeature
from sardonyx.tensors import TensorMetadata

# ruff: noqa: N802 - methods have the protocol's names


class InferenceServicer:
    """One server's methods. Each takes its request message and grpc's context, and raises a `ServeError`.

    Args:
        service: answers.
        keeper: knows whose keys may change settings.
        lingering: where streams wait for requests.
        max_message_bytes: of an answer.
    """

    def __init__(
        self, service: InferenceService, keeper: Gatekeeper, lingering: Lingering, max_message_bytes: int
    ) -> None:
        self._service = service
        self._keeper = keeper
        self._lingering = lingering
        self._max_message_bytes = max_message_bytes

    async def ModelInfer(self, data: bytes, context: Any) -> bytes:
        """Takes and gives serialized messages (`grpc_routes.RAW`)."""
        parts = split_request(data)
        try:
            if len(data) > MAX_INLINE_BYTES and reads_slowly(parts):
                request, _ = await asyncio.to_thread(read_request, parts)
            else:
                request, _ = read_request(parts)
            reply = await self._service.infer(request)
            if writes_slowly(reply):
                head, raw_contents = await asyncio.to_thread(write_reply, reply)
            else:
                head, raw_contents = write_reply(reply)
            answer = join_reply(head, raw_contents)
            if len(answer) > self._max_message_bytes:
                raise PayloadTooLarge(f"the answer is larger than {self._max_message_bytes:,} bytes")
        except Exception as error:
            await abort(context, error, parts.message.id)
        return answer

    async def ModelStreamInfer(self, _: Any, context: Any) -> None:
        """Reads and writes serialized messages through the context (`grpc_routes.RAW`)."""
        await InferStream(self._service, context, self._lingering, self._max_message_bytes).run()

    async def ServerLive(self, _: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=self._service.is_live())

    async def ServerReady(self, _: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._service.is_ready())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        return pb.ModelReadyResponse(ready=self._service.is_model_ready(request.name, request.version))

    async def ServerMetadata(self, _: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        service = self._service
        return pb.ServerMetadataResponse(
            name=service.server_name, version=service.server_version, extensions=service.extensions
        )

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        model = self._service.model(request.name, request.version)
        versions = [model.version] if request.version else self._service.ready_versions(request.name)
        return pb.ModelMetadataResponse(
            name=model.name,
            versions=map(str, versions),
            platform=model.config.platform,
            inputs=map(_write_metadata, model.inputs),
            outputs=map(_write_metadata, model.outputs),
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:
        return pb.ModelConfigResponse(config=self._service.config(request.name, request.version))

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Any) -> pb.ModelStatisticsResponse:
        found = self._service.statistics(request.name, request.version)
        return pb.ModelStatisticsResponse(model_stats=map(write_statistics, found))

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> pb.RepositoryIndexResponse:
        _refuse_repository_name(request)
        rows = await self._service.index(ready=request.ready)
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=row.name, version=row.version, state=row.state, reason=row.reason
                )
                for row in rows
            ]
        )

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Any
    ) -> pb.RepositoryModelLoadResponse:
        _refuse_repository_name(request)
        parameters: dict[str, str | bytes] = {}
        for name, value in request.parameters.items():
            wanted = "bytes_param" if name.startswith("file:") else "string_param"
            if value.WhichOneof("parameter_choice") != wanted:
                raise InvalidRequest(f"invalid value type for load parameter '{name}', expected {wanted}.")
            parameters[name] = getattr(value, wanted)
        await self._service.load(request.model_name, parameters)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Any
    ) -> pb.RepositoryModelUnloadResponse:
        _refuse_repository_name(request)
        unload_dependents = False
        for name, value in request.parameters.items():
            if name != "unload_dependents":
                raise InvalidRequest(f"unrecognized unload parameter '{name}'; there is 'unload_dependents'")
            if value.WhichOneof("parameter_choice") != "bool_param":
                raise InvalidRequest(f"invalid value type for unload parameter '{name}', expected bool_param.")
            unload_dependents = value.bool_param
        await self._service.unload(request.model_name, unload_dependents=unload_dependents)
        return pb.RepositoryModelUnloadResponse()

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: Any
    ) -> pb.SystemSharedMemoryStatusResponse:
        reply = pb.SystemSharedMemoryStatusResponse()
        for region in self._service.shared_memory_status(request.name):
            field = reply.regions[region.name]
            field.name, field.key = region.name, region.key
            field.offset, field.byte_size = region.offset, region.byte_size
        return reply

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Any
    ) -> pb.SystemSharedMemoryRegisterResponse:
        self._service.register_shared_memory(
            request.name, key=request.key, offset=request.offset, byte_size=request.byte_size
        )
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Any
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        self._service.unregister_shared_memory(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, context: Any
    ) -> pb.CudaSharedMemoryStatusResponse:
        """There are none, which is no error, as with a Triton that was built without CUDA."""
        if request.name:
            raise ModelNotFound(f"Unable to find cuda shared memory region: '{request.name}'")
        return pb.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(
        self, _: pb.CudaSharedMemoryRegisterRequest, context: Any
    ) -> pb.CudaSharedMemoryRegisterResponse:
        self._service.refuse_cuda_shared_memory()
        return pb.CudaSharedMemoryRegisterResponse()

    async def CudaSharedMemoryUnregister(
        self, _: pb.CudaSharedMemoryUnregisterRequest, context: Any
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        """Clients of system shared memory begin with it, to be sure; there is nothing to do."""
        return pb.CudaSharedMemoryUnregisterResponse()

    async def TraceSetting(self, request: pb.TraceSettingRequest, context: Any) -> pb.TraceSettingResponse:
        if request.settings:
            self._require_admin(context)
            changes = {name: list(setting.value) or None for name, setting in request.settings.items()}
            settings = self._service.update_trace_settings(changes, request.model_name)
        else:
            settings = self._service.trace_settings(request.model_name)
        reply = pb.TraceSettingResponse()
        for name, value in msgspec.structs.asdict(settings).items():
            reply.settings[name].value.extend([value] if isinstance(value, str) else value)
        return reply

    async def LogSettings(self, request: pb.LogSettingsRequest, context: Any) -> pb.LogSettingsResponse:
        if request.settings:
            self._require_admin(context)
            settings = self._service.update_log_settings(_read_log_settings(request.settings))
        else:
            settings = self._service.log_settings()
        reply = pb.LogSettingsResponse()
        for name, value in msgspec.structs.asdict(settings).items():
            field = reply.settings[name]
            if isinstance(value, bool):
                field.bool_param = value
            elif isinstance(value, int):
                field.uint32_param = value
            else:
                field.string_param = value
        return reply

    def _require_admin(self, context: Any) -> None:
        self._keeper.check_key(key_of(context.invocation_metadata()), "admin")


def _write_metadata(tensor: TensorMetadata) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)


def _read_log_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    changes = {}
    for name, setting in settings.items():
        kind = setting.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequest(f"log setting '{name}' has no value")
        changes[name] = getattr(setting, kind)
    return changes


def _refuse_repository_name(request: Any) -> None:
    if request.repository_name:
        raise UnsupportedFeature("'repository_name' specification is not supported")
