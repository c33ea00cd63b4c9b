"""KServe-v2 with Triton's extensions, without a transport: what both fronts call.

Floor 5. The fronts translate bytes into `calls` and back; everything that the protocol means is here. Every method is
called on the event loop; errors are classes of `sardonyx.errors`, for which each front has a table of statuses.
"""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.api.kserve.calls import IndexRow, LogSettings, RegionStatus, TraceSettings, WireReply, WireRequest
from sardonyx.serving.served import ServedModel
from sardonyx.statistics import InferenceStatistics


class InferenceService:
    """The data plane and the control plane of one server."""

    extensions: tuple[str, ...]
    """Of the server metadata."""

    @property
    def server_name(self) -> str:
        """The operator's `id`."""
        raise NotImplementedError

    @property
    def server_version(self) -> str:
        raise NotImplementedError

    def is_live(self) -> bool:
        raise NotImplementedError

    def is_ready(self) -> bool:
        raise NotImplementedError

    def is_model_ready(self, name: str, version: str = "") -> bool:
        """Also false where there is no such model or version.

        Raises:
            InvalidRequest: `version` is no number.
        """
        raise NotImplementedError

    def model(self, name: str, version: str = "") -> ServedModel:
        """A ready version, the highest where none is named.

        Raises:
            InvalidRequest: `version` is no number.
            ModelNotFound: ``Request for unknown model: ...``.
            ModelNotReady: it is there and not READY.
        """
        raise NotImplementedError

    def ready_versions(self, name: str) -> list[int]:
        """Ascending. Raises ModelNotFound."""
        raise NotImplementedError

    def config(self, name: str, version: str = "") -> ModelConfig:
        """The completed config. Raises as `model`."""
        raise NotImplementedError

    def statistics(self, name: str = "", version: str = "") -> list[InferenceStatistics]:
        """Of one version, of a model's ready versions, or without a name of every ready model.

        Raises:
            InvalidRequest: ``requested model '...' is not available``.
        """
        raise NotImplementedError

    async def infer(self, request: WireRequest) -> WireReply:
        """One request, one answer. Raises what `ServedModel.infer` raises; cancelling aborts."""
        raise NotImplementedError

    def stream(self, request: WireRequest) -> AsyncIterator[WireReply]:
        """One request, all its answers. An answer without outputs may come last, only to say that it is final.

        Raises what `ServedModel.stream` raises, also before the first answer.
        """
        raise NotImplementedError

    async def index(self, *, ready: bool = False) -> list[IndexRow]:
        """Every model of the repositories, a row for each version; with `ready` only READY ones."""
        raise NotImplementedError

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
        raise NotImplementedError

    async def unload(self, name: str, *, unload_dependents: bool = False) -> None:
        """Unload, after the accepted requests. An unknown model is no error. Raises ModelNotReady as `load`."""
        raise NotImplementedError

    def trace_settings(self, name: str = "") -> TraceSettings:
        """The global ones, or a model's. Raises ModelNotFound."""
        raise NotImplementedError

    def update_trace_settings(self, changes: Mapping[str, list[str] | None], name: str = "") -> TraceSettings:
        """Change some; ``None`` goes back to the global (or the initial) value.

        Raises:
            InvalidRequest: an unknown setting or a value out of range.
            UnsupportedFeature: the trace file; or the operator does not allow changes.
        """
        raise NotImplementedError

    def log_settings(self) -> LogSettings:
        raise NotImplementedError

    def update_log_settings(self, changes: Mapping[str, Any]) -> LogSettings:
        """Change some. Values are checked here. Raises as `update_trace_settings`."""
        raise NotImplementedError

    def shared_memory_status(self, name: str = "") -> list[RegionStatus]:
        """All system shared-memory regions, or one. Raises InvalidRequest where there is none of that name."""
        raise NotImplementedError

    def register_shared_memory(self, name: str, *, key: str, offset: int, byte_size: int) -> None:
        """Raises UnsupportedFeature where the operator does not allow it, InvalidRequest where it cannot be."""
        raise NotImplementedError

    def unregister_shared_memory(self, name: str = "") -> None:
        """One, or all. Requests that use it finish."""
        raise NotImplementedError

    def refuse_cuda_shared_memory(self) -> None:
        """Raises UnsupportedFeature, always: this server has no CUDA shared memory."""
        raise NotImplementedError
