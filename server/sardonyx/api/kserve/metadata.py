"""What the server and its models say about themselves: health, metadata, configs, statistics.

Floor 5.

Source: KServe V2 protocol, "Health" and "Metadata"; Triton, docs/protocol/extension_statistics.md and
extension_model_configuration.md.
"""

import msgspec

from sardonyx.api.kserve.config_json import config_to_json
from sardonyx.api.kserve.errors import ErrorBody
from sardonyx.api.kserve.exchange import JSON_TYPE, Exchange, Reply, json_reply
from sardonyx.api.kserve.service import InferenceService
from sardonyx.statistics import Duration, InferenceStatistics, ResponseStatistics
from sardonyx.tensors import TensorMetadata


class TensorJson(msgspec.Struct, frozen=True):
    """One input or output."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelJson(msgspec.Struct, frozen=True):
    """A model's metadata."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorJson]
    outputs: list[TensorJson]


class ServerJson(msgspec.Struct, frozen=True):
    """The server's metadata."""

    name: str
    version: str
    extensions: tuple[str, ...]


class InferenceJson(msgspec.Struct, frozen=True):
    """``inference_stats``. All members are always there: perf_analyzer does not ask whether they are."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class BatchJson(msgspec.Struct, frozen=True):
    """A member of ``batch_stats``."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class StatisticsJson(msgspec.Struct, frozen=True):
    """Statistics of one version."""

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferenceJson
    response_stats: dict[str, ResponseStatistics]
    batch_stats: list[BatchJson]
    memory_usage: list[None] = []


class AllStatistics(msgspec.Struct, frozen=True):
    """Statistics of several versions."""

    model_stats: list[StatisticsJson]


class Metadata:
    """The endpoints that only look."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def live(self, exchange: Exchange) -> Reply:
        """200 as long as the process need not be restarted; no body."""
        return _health(self._service.is_live())

    async def ready(self, exchange: Exchange) -> Reply:
        """200 if requests can be served now; no body."""
        return _health(self._service.is_ready())

    async def model_ready(self, exchange: Exchange) -> Reply:
        """200 if that model, or that version of it, can be used now."""
        if self._service.is_model_ready(exchange.model, exchange.version):
            return Reply()
        progress = self._service.progress(exchange.model)
        error = f"Model version not ready: {progress}" if progress else "Model version not ready"
        return Reply(msgspec.json.encode(ErrorBody(error=error)), 400, (JSON_TYPE,))

    async def server_metadata(self, exchange: Exchange) -> Reply:
        """Name, version and extensions."""
        service = self._service
        return json_reply(ServerJson(service.server_name, service.server_version, tuple(service.extensions)))

    async def model_metadata(self, exchange: Exchange) -> Reply:
        """Inputs and outputs."""
        model = self._service.model(exchange.model, exchange.version)
        versions = [model.version] if exchange.version else self._service.ready_versions(exchange.model)
        return json_reply(
            ModelJson(
                exchange.model,
                [str(version) for version in versions],
                model.config.platform,
                [_tensor(each) for each in model.inputs],
                [_tensor(each) for each in model.outputs],
            )
        )

    async def config(self, exchange: Exchange) -> Reply:
        """The completed config, as protobuf's JSON with numbers for dimensions."""
        return json_reply(config_to_json(self._service.config(exchange.model, exchange.version)))

    async def statistics(self, exchange: Exchange) -> Reply:
        """What inference has cost so far."""
        rows = self._service.statistics(exchange.model, exchange.version)
        return json_reply(AllStatistics([_statistics(row) for row in rows]))


def _health(is_well: bool) -> Reply:
    return Reply(status=200 if is_well else 400)


def _tensor(metadata: TensorMetadata) -> TensorJson:
    return TensorJson(metadata.name, metadata.datatype, metadata.shape)


def _statistics(row: InferenceStatistics) -> StatisticsJson:
    return StatisticsJson(
        row.name,
        str(row.version),
        row.last_inference_ms,
        row.inference_count,
        row.execution_count,
        InferenceJson(
            row.success,
            row.fail,
            row.queue,
            row.compute_input,
            row.compute_infer,
            row.compute_output,
            row.cache_hit,
            row.cache_miss,
        ),
        {str(position): responses for position, responses in row.responses.items()},
        [
            BatchJson(size, batch.compute_input, batch.compute_infer, batch.compute_output)
            for size, batch in sorted(row.batches.items())
        ],
    )
