"""Every metric of the server, named once in `FAMILIES`, rendered for Prometheus.

Floor 0. What a model's requests cost is shown under our prefix and, from the same numbers, under vLLM's names, which
dashboards and routers (llm-d, Gateway API inference extension) already read. Observations are made in one thread, the
event loop's, so none takes a lock; `Metrics.render` may run in any thread and sees each number whole.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Literal, Protocol

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

# vLLM's own bounds (vllm/v1/metrics/loggers.py), so that its dashboards' quantiles keep their resolution.
# fmt: off
_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
)
# fmt: on
_TOKENS = tuple(float(mantissa * 10**exponent) for exponent in range(6) for mantissa in (1, 2, 5))
_HTTP_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_LAG_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Family(msgspec.Struct, frozen=True):
    """One metric: its only name, and how it is shown."""

    name: str
    """Without prefix; a counter's without ``_total``."""
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ("model_name",)
    bounds: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, without infinity."""
    is_shared: bool = True
    """Also shown as ``vllm:<name>``."""

    @property
    def prefixes(self) -> tuple[str, ...]:
        return ("sardonyx_", "vllm:") if self.is_shared else ("sardonyx_",)


FAMILIES: tuple[Family, ...] = (
    Family("num_requests_running", "gauge", "Sequences that hold a slot."),
    Family("num_requests_waiting", "gauge", "Sequences that wait for a slot, preempted ones among them."),
    Family("kv_cache_usage_perc", "gauge", "Share of the KV cache that running sequences use, 0 to 1."),
    Family(
        "cache_config_info",
        "gauge",
        "Always 1. num_gpu_blocks x block_size is the KV cache in tokens; on the CPU a block is a slot.",
        labels=("model_name", "block_size", "num_gpu_blocks"),
    ),
    Family("prompt_tokens", "counter", "Prompt tokens of admitted sequences, cached ones among them."),
    Family("generation_tokens", "counter", "Completion tokens."),
    Family("prefix_cache_queries", "counter", "Prompt tokens that were looked up in the prefix cache."),
    Family("prefix_cache_hits", "counter", "Prompt tokens that were found there and not computed again."),
    Family("num_preemptions", "counter", "Running sequences that lost their slot and were recomputed."),
    Family(
        "request_success",
        "counter",
        "Finished sequences by reason: stop, length, abort (client left or deadline), error.",
        labels=("model_name", "finished_reason"),
    ),
    Family(
        "time_to_first_token_seconds",
        "histogram",
        "From a request's arrival to the first token of a sequence.",
        bounds=_TTFT_S,
    ),
    Family(
        "inter_token_latency_seconds",
        "histogram",
        "Time between one token of a sequence and the next.",
        bounds=_TOKEN_S,
    ),
    Family(
        "request_time_per_output_token_seconds",
        "histogram",
        "Mean time per token after the first, one observation a sequence.",
        bounds=_TOKEN_S,
    ),
    Family(
        "e2e_request_latency_seconds", "histogram", "From a request's arrival to its sequence's end.", bounds=_REQUEST_S
    ),
    Family("request_queue_time_seconds", "histogram", "From a request's arrival to its first step.", bounds=_REQUEST_S),
    Family("request_prompt_tokens", "histogram", "Prompt tokens of a sequence.", bounds=_TOKENS),
    Family("request_generation_tokens", "histogram", "Completion tokens of a sequence.", bounds=_TOKENS),
    Family(
        "admission_rejections",
        "counter",
        "Requests refused before any work, by reason.",
        labels=("reason",),
        is_shared=False,
    ),
    Family(
        "http_requests",
        "counter",
        "HTTP requests by route template and status.",
        labels=("method", "route", "status"),
        is_shared=False,
    ),
    Family(
        "http_request_duration_seconds",
        "histogram",
        "From a request's head to the end of its answer.",
        labels=("method", "route"),
        bounds=_HTTP_S,
        is_shared=False,
    ),
    Family(
        "http_requests_in_flight", "gauge", "HTTP requests whose answer is not complete.", labels=(), is_shared=False
    ),
    Family(
        "event_loop_lag_seconds",
        "histogram",
        "How late the event loop wakes a sleeping task.",
        labels=(),
        bounds=_LAG_S,
        is_shared=False,
    ),
    Family("build_info", "gauge", "Always 1.", labels=("version",), is_shared=False),
)

_BOUNDS = {family.name: family.bounds for family in FAMILIES}


class EngineStats(Protocol):
    """What a step loop counts by itself; read when Prometheus asks, so that it costs a step nothing."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def kv_usage(self) -> float: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def generated_tokens(self) -> int: ...
    @property
    def prefix_hit_tokens(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...


class Histogram:
    """Counts per bucket. Written by one thread."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, name: str) -> None:
        self._bounds = _BOUNDS[name]
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Note `value`, `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, the last one ``+Inf``."""
        bounds = [*map(str, self._bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True))

    @property
    def sum(self) -> float:
        return self._sum


class ModelMetrics:
    """The metrics of one model. They outlive its unloading: a counter never goes back."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._sources: list[Callable[[], EngineStats]] = []
        self._retired = [0] * 4
        self._cache_info: tuple[int, int] | None = None
        self._finished: dict[str, int] = {}
        self._ttft = Histogram("time_to_first_token_seconds")
        self._itl = Histogram("inter_token_latency_seconds")
        self._tpot = Histogram("request_time_per_output_token_seconds")
        self._e2e = Histogram("e2e_request_latency_seconds")
        self._queue = Histogram("request_queue_time_seconds")
        self._prompt = Histogram("request_prompt_tokens")
        self._generation = Histogram("request_generation_tokens")

    def attach(self, stats: Callable[[], EngineStats]) -> None:
        """Read a step loop's own counts at every scrape, from any thread. While a model is swapped there are two."""
        self._sources.append(stats)

    def detach(self, stats: Callable[[], EngineStats]) -> None:
        """The loop is about to close: keep what it counted."""
        self._sources.remove(stats)
        self._retired = [kept + new for kept, new in zip(self._retired, _counts(stats()), strict=True)]

    def set_cache_info(self, *, block_size: int, num_blocks: int) -> None:
        """How large the KV cache is. On the CPU: the slot's capacity in tokens, and the number of slots."""
        self._cache_info = (block_size, num_blocks)

    def observe_ttft(self, seconds: float) -> None:
        """A sequence got its first token, so long after its request arrived."""
        self._ttft.observe(seconds)

    def observe_itl(self, seconds: float, num_tokens: int = 1) -> None:
        """A sequence got `num_tokens` more, each `seconds` after the one before."""
        self._itl.observe(seconds, num_tokens)

    def observe_request(
        self,
        finish_reason: str,
        *,
        e2e_s: float,
        num_prompt_tokens: int,
        num_completion_tokens: int,
        ttft_s: float | None = None,
        queue_s: float | None = None,
    ) -> None:
        """A sequence ended; called once for each.

        Args:
            finish_reason: a `core.FinishReason`; cancelled is shown as vLLM's ``abort``.
            e2e_s: since the request's arrival.
            ttft_s: as `observe_ttft` was told; ``None`` where there was no token.
            queue_s: ``None`` where no step saw the sequence.
        """
        reason = "abort" if finish_reason == "cancelled" else str(finish_reason)
        self._finished[reason] = self._finished.get(reason, 0) + 1
        self._e2e.observe(e2e_s)
        self._prompt.observe(num_prompt_tokens)
        self._generation.observe(num_completion_tokens)
        if queue_s is not None:
            self._queue.observe(queue_s)
        if ttft_s is not None and num_completion_tokens > 1:
            self._tpot.observe((e2e_s - ttft_s) / (num_completion_tokens - 1))

    def rows(self) -> Iterator[tuple[str, tuple[str, ...], "float | Histogram"]]:
        """Family, label values after the model's name, value."""
        stats = [source() for source in list(self._sources)]
        yield "num_requests_running", (), sum(each.num_running for each in stats)
        yield "num_requests_waiting", (), sum(each.num_waiting for each in stats)
        yield "kv_cache_usage_perc", (), max((each.kv_usage for each in stats), default=0.0)
        if self._cache_info is not None:
            yield "cache_config_info", tuple(map(str, self._cache_info)), 1.0
        columns = zip(self._retired, *map(_counts, stats), strict=True)
        prompt, generation, hits, preemptions = (sum(column) for column in columns)
        yield "prompt_tokens", (), prompt
        yield "generation_tokens", (), generation
        yield "prefix_cache_queries", (), prompt
        yield "prefix_cache_hits", (), hits
        yield "num_preemptions", (), preemptions
        for reason, count in list(self._finished.items()):
            yield "request_success", (reason,), count
        yield "time_to_first_token_seconds", (), self._ttft
        yield "inter_token_latency_seconds", (), self._itl
        yield "request_time_per_output_token_seconds", (), self._tpot
        yield "e2e_request_latency_seconds", (), self._e2e
        yield "request_queue_time_seconds", (), self._queue
        yield "request_prompt_tokens", (), self._prompt
        yield "request_generation_tokens", (), self._generation


class Metrics(Collector):
    """All metrics of one application.

    Args:
        version: shown in ``build_info``.
        registry: where to register; a fresh one by default, so that two applications in a process do not meet.
    """

    def __init__(self, version: str, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._version = version
        self._models: dict[str, ModelMetrics] = {}
        self._rejections: dict[str, int] = {}
        self._http_requests: dict[tuple[str, str, str], int] = {}
        self._http_durations: dict[tuple[str, str], Histogram] = {}
        self._num_in_flight = 0
        self._lag = Histogram("event_loop_lag_seconds")
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def model(self, name: str) -> ModelMetrics:
        """The metrics of a model of the repository, made at first use. Never call it with a name from a request."""
        return self._models.setdefault(name, ModelMetrics(name))

    def reject(self, reason: str) -> None:
        """Admission said no. `reason` is one of a few words of ours, such as ``requests`` or ``tokens``."""
        self._rejections[reason] = self._rejections.get(reason, 0) + 1

    def start_http(self) -> None:
        """A request's head came in; `finish_http` follows exactly once."""
        self._num_in_flight += 1

    def finish_http(self, method: str, route: str, status: int, seconds: float) -> None:
        """Its answer is complete, or its client gone.

        Args:
            route: the route's template, never the path: every distinct value is kept for ever.
            status: as sent; 499 where the client left before an answer.
        """
        method = method if method in _METHODS else "other"
        key = (method, route, str(status))
        self._num_in_flight -= 1
        self._http_requests[key] = self._http_requests.get(key, 0) + 1
        if (method, route) not in self._http_durations:
            self._http_durations[method, route] = Histogram("http_request_duration_seconds")
        self._http_durations[method, route].observe(seconds)

    def observe_event_loop_lag(self, seconds: float) -> None:
        """A task that slept was woken so late."""
        self._lag.observe(seconds)

    def render(self) -> tuple[bytes, str]:
        """The exposition and its content type. Takes milliseconds: not for the event loop."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterable[Metric]:
        """Called by the registry."""
        rows: dict[str, list[tuple[tuple[str, ...], float | Histogram]]] = {family.name: [] for family in FAMILIES}
        for model in list(self._models.values()):
            for name, labels, value in model.rows():
                rows[name].append(((model.name, *labels), value))
        rows["admission_rejections"] += [((reason,), count) for reason, count in list(self._rejections.items())]
        rows["http_requests"] += list(self._http_requests.items())
        rows["http_request_duration_seconds"] += list(self._http_durations.items())
        rows["http_requests_in_flight"].append(((), self._num_in_flight))
        rows["event_loop_lag_seconds"].append(((), self._lag))
        rows["build_info"].append(((self._version,), 1.0))
        for family in FAMILIES:
            for prefix in family.prefixes:
                yield _family(prefix, family, rows[family.name])


def _counts(stats: EngineStats) -> tuple[int, int, int, int]:
    return stats.prompt_tokens, stats.generated_tokens, stats.prefix_hit_tokens, stats.num_preemptions


def _family(prefix: str, family: Family, rows: list[tuple[tuple[str, ...], float | Histogram]]) -> Metric:
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(prefix + family.name, family.help, labels=family.labels)
        for labels, value in rows:
            assert isinstance(value, Histogram)
            histogram.add_metric(labels, value.buckets(), value.sum)
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    plain = kind(prefix + family.name, family.help, labels=family.labels)
    for labels, value in rows:
        assert not isinstance(value, Histogram)
        plain.add_metric(labels, value)
    return plain
