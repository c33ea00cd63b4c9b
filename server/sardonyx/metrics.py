"""Every metric of the server, named once in `FAMILIES`, rendered for Prometheus.

Floor 0. What a model's requests cost is shown under our prefix and, from the same numbers, under vLLM's names, which
dashboards and routers (llm-d, Gateway API inference extension) already read; what inference on tensors costs, under
Triton's names (`triton_metrics`). Observations are made in one thread, the event loop's, so none takes a lock;
`Metrics.render` may run in any thread and sees each number whole.
"""

import copy
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from sardonyx import triton_metrics
from sardonyx.statistics import InferenceStatistics

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
# What `engine.stats` counts steps by; a test holds the two together.
_STEP_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
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
    Family("step_duration_seconds", "histogram", "Length of the engine's steps.", bounds=_STEP_S, is_shared=False),
    Family("step_tokens", "counter", "Tokens that the engine's steps computed.", is_shared=False),
    Family("failed_steps", "counter", "Steps that ended in an error.", is_shared=False),
    Family("engine_builds", "counter", "Engines of TensorRT that loads have built.", is_shared=False),
    Family("engine_build_seconds", "counter", "Seconds that these builds took.", is_shared=False),
    Family("engine_cache_hits", "counter", "Engines that loads found in the engine cache.", is_shared=False),
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

# Counters that the engine keeps by itself: the attribute of `EngineStats` by family.
_ENGINE_COUNTERS = {
    "prompt_tokens": "prompt_tokens",
    "generation_tokens": "generated_tokens",
    "prefix_cache_queries": "prompt_tokens",
    "prefix_cache_hits": "prefix_hit_tokens",
    "num_preemptions": "num_preemptions",
    "step_tokens": "step_tokens",
    "failed_steps": "num_failed_steps",
}
_REQUEST_HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
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
    @property
    def num_failed_steps(self) -> int: ...
    @property
    def step_tokens(self) -> int: ...
    @property
    def step_s_sum(self) -> float: ...
    @property
    def step_s_counts(self) -> tuple[int, ...]:
        """By the bounds of ``step_duration_seconds``, not cumulative; the last one is of the longer steps."""
        ...


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

    def plus(self, counts: tuple[int, ...], total: float) -> "Histogram":
        """A new one with counts per bucket, and the sum of their values, that were made elsewhere."""
        result = copy.copy(self)
        result._counts = [own + new for own, new in zip(self._counts, counts, strict=True)]
        result._sum = self._sum + total
        return result

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, the last one ``+Inf``."""
        bounds = [*map(str, self._bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True))

    @property
    def sum(self) -> float:
        return self._sum


class _Engine(NamedTuple):
    sources: tuple[Callable[[], EngineStats], ...]
    counters: dict[str, int]
    """Of loops that are gone, by family."""
    steps: Histogram
    """Theirs as well."""


class ModelMetrics:
    """The metrics of one model. They outlive its unloading: a counter never goes back."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._engine = _Engine((), dict.fromkeys(_ENGINE_COUNTERS, 0), Histogram("step_duration_seconds"))
        self._cache_info: tuple[int, int] | None = None
        self._finished: dict[str, int] = {}
        self._engine_builds: tuple[int, float, int] | None = None
        self._histograms = {name: Histogram(name) for name in _REQUEST_HISTOGRAMS}

    def attach(self, stats: Callable[[], EngineStats]) -> None:
        """Read a step loop's own counts at every scrape, from any thread. While a model is swapped there are two."""
        self._engine = self._engine._replace(sources=(*self._engine.sources, stats))

    def detach(self, stats: Callable[[], EngineStats]) -> None:
        """The loop has closed: keep what it counted."""
        _, counters, steps = self._engine
        last = stats()
        # One assignment, so that a scrape in between sees no counter go back.
        self._engine = _Engine(
            tuple(source for source in self._engine.sources if source != stats),
            {name: kept + getattr(last, _ENGINE_COUNTERS[name]) for name, kept in counters.items()},
            steps.plus(last.step_s_counts, last.step_s_sum),
        )

    def set_cache_info(self, *, block_size: int, num_blocks: int) -> None:
        """How large the KV cache is. On the CPU: the slot's capacity in tokens, and the number of slots."""
        self._cache_info = (block_size, num_blocks)

    def count_engine_build(self, seconds: float) -> None:
        """A load has built an engine. Called by the thread that loads the model."""
        builds, total_s, hits = self._engine_builds or (0, 0.0, 0)
        self._engine_builds = (builds + 1, total_s + seconds, hits)

    def count_engine_hit(self) -> None:
        """A load has found an engine in the cache. As `count_engine_build`."""
        builds, total_s, hits = self._engine_builds or (0, 0.0, 0)
        self._engine_builds = (builds, total_s, hits + 1)

    def observe_ttft(self, seconds: float) -> None:
        """A sequence got its first token, so long after its request arrived."""
        self._histograms["time_to_first_token_seconds"].observe(seconds)

    def observe_itl(self, seconds: float, num_tokens: int = 1) -> None:
        """A sequence got `num_tokens` more, each `seconds` after the one before."""
        self._histograms["inter_token_latency_seconds"].observe(seconds, num_tokens)

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

        `finish_reason` is a `core.FinishReason`; ``cancelled`` is shown as vLLM's ``abort``. Times count from the
        request's arrival: `ttft_s` is what `observe_ttft` was told, ``None`` without a token; `queue_s` is ``None``
        where no step saw the sequence.
        """
        reason = "abort" if finish_reason == "cancelled" else str(finish_reason)
        self._finished[reason] = self._finished.get(reason, 0) + 1
        self._histograms["e2e_request_latency_seconds"].observe(e2e_s)
        self._histograms["request_prompt_tokens"].observe(num_prompt_tokens)
        self._histograms["request_generation_tokens"].observe(num_completion_tokens)
        if queue_s is not None:
            self._histograms["request_queue_time_seconds"].observe(queue_s)
        if ttft_s is not None and num_completion_tokens > 1:
            mean_s = (e2e_s - ttft_s) / (num_completion_tokens - 1)
            self._histograms["request_time_per_output_token_seconds"].observe(mean_s)

    def rows(self) -> Iterator[tuple[str, tuple[str, ...], "float | Histogram"]]:
        """Family, label values after the model's name, value."""
        sources, counters, steps = self._engine
        stats = [source() for source in sources]
        yield "num_requests_running", (), sum(each.num_running for each in stats)
        yield "num_requests_waiting", (), sum(each.num_waiting for each in stats)
        yield "kv_cache_usage_perc", (), max((each.kv_usage for each in stats), default=0.0)
        if self._cache_info is not None:
            yield "cache_config_info", tuple(map(str, self._cache_info)), 1.0
        for name, kept in counters.items():
            yield name, (), kept + sum(getattr(each, _ENGINE_COUNTERS[name]) for each in stats)
        for each in stats:
            steps = steps.plus(each.step_s_counts, each.step_s_sum)
        yield "step_duration_seconds", (), steps
        if (engines := self._engine_builds) is not None:
            yield "engine_builds", (), engines[0]
            yield "engine_build_seconds", (), engines[1]
            yield "engine_cache_hits", (), engines[2]
        for reason, count in list(self._finished.items()):
            yield "request_success", (reason,), count
        for name, histogram in self._histograms.items():
            yield name, (), histogram


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
        self._inference: dict[tuple[str, int], InferenceStatistics] = {}
        self._machine = triton_metrics.Machine()
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

    def inference(self, name: str, version: int) -> InferenceStatistics:
        """What inference on a version of a model has cost. Made at first use, kept for ever: as with `model`."""
        if (name, version) not in self._inference:
            self._inference[name, version] = InferenceStatistics(name, version)
        return self._inference[name, version]

    def reject(self, reason: str) -> None:
        """Admission said no. `reason` is one of a few words of ours, such as ``requests`` or ``tokens``."""
        self._rejections[reason] = self._rejections.get(reason, 0) + 1

    def start_http(self) -> None:
        """A request's head came in; `finish_http` follows exactly once."""
        self._num_in_flight += 1

    def finish_http(self, method: str, route: str, status: int, seconds: float) -> None:
        """Its answer is complete, or its client gone (499).

        `route` is the route's template, never the path: every distinct value is kept for ever.
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
        nv = triton_metrics.render(list(self._inference.values()), self._machine)
        return generate_latest(self.registry) + nv.encode(), CONTENT_TYPE_PLAIN_0_0_4

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
