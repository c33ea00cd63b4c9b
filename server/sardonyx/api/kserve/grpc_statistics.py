"""Statistics of a model version as ModelStatistics has them.

Floor 5.

Source: Triton, docs/protocol/extension_statistics.md.
"""

from tritonclient.grpc import service_pb2 as pb

from sardonyx.statistics import BatchStatistics, Duration, InferenceStatistics, ResponseStatistics

_TOTALS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
_OF_BATCH = ("compute_input", "compute_infer", "compute_output")
_OF_RESPONSE = ("compute_infer", "compute_output", "success", "fail", "empty_response", "cancel")


def write_statistics(statistics: InferenceStatistics) -> pb.ModelStatistics:
    """The message. All eight durations are there, for clients that read them unasked."""
    message = pb.ModelStatistics(
        name=statistics.name,
        version=str(statistics.version),
        last_inference=statistics.last_inference_ms,
        inference_count=statistics.inference_count,
        execution_count=statistics.execution_count,
        inference_stats=pb.InferStatistics(**_durations(statistics, _TOTALS)),
        batch_stats=[
            pb.InferBatchStatistics(batch_size=size, **_durations(batch, _OF_BATCH))
            for size, batch in sorted(statistics.batches.items())
        ],
    )
    for position, response in sorted(statistics.responses.items()):
        message.response_stats[str(position)].CopyFrom(pb.InferResponseStatistics(**_durations(response, _OF_RESPONSE)))
    return message


def _durations(
    owner: InferenceStatistics | BatchStatistics | ResponseStatistics, names: tuple[str, ...]
) -> dict[str, pb.StatisticDuration]:
    found: dict[str, Duration] = {name: getattr(owner, name) for name in names}
    return {name: pb.StatisticDuration(count=each.count, ns=each.ns) for name, each in found.items()}
