"""Triton's own metrics, ``nv_*``: the numbers of `statistics` under the names that its dashboards read.

Floor 0. Written by hand, since prometheus_client ends a counter's name in ``_total`` and Triton does not. Left out are
what Triton shows only when asked (summaries, histograms), and everything about GPUs and pinned memory.

Source: Triton, docs/user_guide/metrics.md; Prometheus, text exposition format 0.0.4.
"""

import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import msgspec
import psutil

from sardonyx.statistics import FailureReason, InferenceStatistics

Kind = Literal["counter", "gauge"]


class ModelFamily(msgspec.Struct, frozen=True):
    """A metric with a value for each version of each model."""

    name: str
    kind: Kind
    help: str
    read: Callable[[InferenceStatistics], float]


class MachineFamily(msgspec.Struct, frozen=True):
    """A metric with one value."""

    name: str
    kind: Kind
    help: str
    read: Callable[["Machine"], float]


class Machine:
    """What the machine does, whatever process does it."""

    def __init__(self) -> None:
        self._busy_s, self._total_s = _cpu_seconds()
        self._utilization = 0.0

    def utilization(self) -> float:
        """Share of CPU time in use since the call before, or since the construction: 0 to 1."""
        # psutil.cpu_percent remembers its last call by thread; scrapes come from any.
        busy_s, total_s = _cpu_seconds()
        if total_s > self._total_s:
            self._utilization = min(max((busy_s - self._busy_s) / (total_s - self._total_s), 0.0), 1.0)
            self._busy_s, self._total_s = busy_s, total_s
        return self._utilization

    def memory_total_bytes(self) -> int:
        return int(psutil.virtual_memory().total)

    def memory_used_bytes(self) -> int:
        """What is not available to a new process."""
        memory = psutil.virtual_memory()
        return int(memory.total - memory.available)


FAILURES = "nv_inference_request_failure"
FAILURES_HELP = "Requests that ended in an error, by reason: REJECTED, CANCELED, BACKEND or OTHER."
REASONS: tuple[FailureReason, ...] = typing.get_args(FailureReason)

# Durations are Triton's: microseconds in all, over the requests that succeeded.
# fmt: off
MODEL_FAMILIES: tuple[ModelFamily, ...] = (
    ModelFamily("nv_inference_request_success", "counter", "Requests that were answered.", lambda s: s.success.count),
    ModelFamily("nv_inference_count", "counter", "Batch elements that were computed.", lambda s: s.inference_count),
    ModelFamily("nv_inference_exec_count", "counter", "Runs of the model.", lambda s: s.execution_count),
    ModelFamily(
        "nv_inference_request_duration_us", "counter", "Microseconds from arrival to answer.",
        lambda s: _us(s.success.ns),
    ),
    ModelFamily(
        "nv_inference_queue_duration_us", "counter", "Microseconds that requests waited.", lambda s: _us(s.queue.ns)
    ),
    ModelFamily(
        "nv_inference_compute_input_duration_us", "counter", "Microseconds spent on putting batches together.",
        lambda s: _us(s.compute_input.ns),
    ),
    ModelFamily(
        "nv_inference_compute_infer_duration_us", "counter", "Microseconds spent in the model.",
        lambda s: _us(s.compute_infer.ns),
    ),
    ModelFamily(
        "nv_inference_compute_output_duration_us", "counter", "Microseconds spent on taking batches apart.",
        lambda s: _us(s.compute_output.ns),
    ),
    ModelFamily(
        "nv_cache_num_hits_per_model", "counter", "Requests that were answered from the response cache.",
        lambda s: s.cache_hit.count,
    ),
    ModelFamily(
        "nv_cache_num_misses_per_model", "counter", "Requests whose answer was put into the response cache.",
        lambda s: s.cache_miss.count,
    ),
    ModelFamily(
        "nv_cache_hit_duration_per_model", "counter", "Microseconds that answers from the response cache took.",
        lambda s: _us(s.cache_hit.ns),
    ),
    ModelFamily(
        "nv_cache_miss_duration_per_model", "counter", "Microseconds spent on looking up and keeping those answers.",
        lambda s: _us(s.cache_miss.ns),
    ),
    ModelFamily(
        "nv_inference_pending_request_count", "gauge", "Requests that were accepted and have no answer.",
        lambda s: s.num_pending,
    ),
    ModelFamily("nv_model_load_duration_secs", "gauge", "Seconds that the last load took.", lambda s: s.load_s),
)
MACHINE_FAMILIES: tuple[MachineFamily, ...] = (
    MachineFamily("nv_cpu_utilization", "gauge", "Share of the CPU time that is in use, 0 to 1.", Machine.utilization),
    MachineFamily("nv_cpu_memory_total_bytes", "gauge", "Memory of the machine.", Machine.memory_total_bytes),
    MachineFamily("nv_cpu_memory_used_bytes", "gauge", "What is not available of it.", Machine.memory_used_bytes),
)
# fmt: on


def render(statistics: Iterable[InferenceStatistics], machine: Machine) -> str:
    """The exposition of all families, in any thread."""
    return "".join(f"{line}\n" for line in _lines(list(statistics), machine))


def _lines(statistics: list[InferenceStatistics], machine: Machine) -> Iterator[str]:
    labels = [f'model="{_escape(each.name)}",version="{each.version}"' for each in statistics]
    for family in MODEL_FAMILIES:
        yield from _header(family.name, family.kind, family.help)
        for label, each in zip(labels, statistics, strict=True):
            yield f"{family.name}{{{label}}} {family.read(each)}"
    yield from _header(FAILURES, "counter", FAILURES_HELP)
    for label, each in zip(labels, statistics, strict=True):
        for reason in REASONS:
            yield f'{FAILURES}{{{label},reason="{reason}"}} {each.failures.get(reason, 0)}'
    for gauge in MACHINE_FAMILIES:
        yield from _header(gauge.name, gauge.kind, gauge.help)
        yield f"{gauge.name} {gauge.read(machine)}"


def _header(name: str, kind: Kind, help_text: str) -> tuple[str, str]:
    return f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"


def _escape(value: str) -> str:
    """A label's value as it stands between quotes."""
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _us(nanoseconds: int) -> int:
    return nanoseconds // 1000


def _cpu_seconds() -> tuple[float, float]:
    """CPU time of all processors since the start of the machine: in use, and in all."""
    times = psutil.cpu_times()._asdict()
    # Linux counts guests' time within user and nice.
    total = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)
    return total - times["idle"] - times.get("iowait", 0.0), total
