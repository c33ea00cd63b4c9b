"""``/metrics`` under Triton's names, and their values after requests."""

import re
import socket

import numpy as np
import pytest
from tests.conformance.process import serve
from tests.conformance.triton import copy_examples, nv, pair, texts

COUNTERS = (
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
    "nv_cache_num_hits_per_model",
    "nv_cache_num_misses_per_model",
    "nv_cache_hit_duration_per_model",
    "nv_cache_miss_duration_per_model",
)
GAUGES = (
    "nv_inference_pending_request_count",
    "nv_model_load_duration_secs",
    "nv_cpu_utilization",
    "nv_cpu_memory_total_bytes",
    "nv_cpu_memory_used_bytes",
)


def exposition(server):
    """The lines of /metrics."""
    status, text = server.request("GET", "/metrics")
    assert status == 200
    return text.splitlines()


@pytest.mark.parametrize("name", [*COUNTERS, *GAUGES])
def test_a_metric_has_tritons_name_and_kind(triton, caller, name):
    caller.infer("simple", pair())
    caller.infer("cached", {"INPUT0": np.array([[1]], np.int32)})
    lines = exposition(triton)
    kind = "counter" if name in COUNTERS else "gauge"
    assert f"# TYPE {name} {kind}" in lines
    assert any(re.match(rf"{name}[ {{]", line) for line in lines), "it has no sample"


def test_no_name_of_tritons_ends_in_total(triton):
    assert not [line for line in exposition(triton) if re.match(r"(# \w+ )?nv_\w+_(total|created)\b", line)]


def test_every_metric_is_described_once(triton):
    described = [line.split()[2] for line in exposition(triton) if line.startswith("# TYPE ")]
    assert len(described) == len(set(described))


def test_model_and_version_are_the_labels(triton, caller):
    caller.infer("simple", pair())
    lines = [line for line in exposition(triton) if line.startswith("nv_inference_count{")]
    labels = [dict(re.findall(r'(\w+)="([^"]*)"', line)) for line in lines]
    assert {"model": "simple", "version": "1"} in labels
    assert all(set(each) == {"model", "version"} for each in labels)


def test_requests_are_counted_with_their_rows_and_runs(triton, caller):
    names = ("nv_inference_request_success", "nv_inference_count", "nv_inference_exec_count")
    before = [nv(triton, name, "simple") for name in names]
    for _ in range(3):
        caller.infer("simple", pair(rows=4))
    after = [nv(triton, name, "simple") for name in names]
    assert [later - earlier for later, earlier in zip(after, before, strict=True)] == [3, 12, 3]


def test_durations_grow_and_agree_with_the_statistics(triton, caller):
    caller.infer("simple", pair())
    shown = caller.statistics("simple")["inference_stats"]
    for metric, name in (
        ("nv_inference_request_duration_us", "success"),
        ("nv_inference_queue_duration_us", "queue"),
        ("nv_inference_compute_input_duration_us", "compute_input"),
        ("nv_inference_compute_infer_duration_us", "compute_infer"),
        ("nv_inference_compute_output_duration_us", "compute_output"),
    ):
        assert nv(triton, metric, "simple") == pytest.approx(shown[name]["ns"] / 1000, abs=1), metric


def test_failures_are_counted_by_reason(triton, caller):
    bad = {"INPUT0": texts(["no number"] * 16, 1, 16), "INPUT1": texts(["1"] * 16, 1, 16)}
    before = nv(triton, "nv_inference_request_failure", "simple_string", reason="BACKEND")
    success = nv(triton, "nv_inference_request_success", "simple_string")
    caller.refusal("simple_string", bad)
    assert nv(triton, "nv_inference_request_failure", "simple_string", reason="BACKEND") == before + 1
    assert nv(triton, "nv_inference_request_success", "simple_string") == success


def test_cache_hits_and_misses_are_counted(triton, caller):
    value = {"http": 27, "grpc": 28}[caller.protocol]
    names = ("nv_cache_num_hits_per_model", "nv_cache_num_misses_per_model")
    before = [nv(triton, name, "cached") for name in names]
    for _ in range(3):
        caller.infer("cached", {"INPUT0": np.array([[value]], np.int32)})
    assert [nv(triton, name, "cached") - earlier for name, earlier in zip(names, before, strict=True)] == [2, 1]


def test_nothing_is_pending_when_nobody_waits(triton, caller):
    caller.infer("simple", pair())
    triton.wait_for(lambda: nv(triton, "nv_inference_pending_request_count", "simple") == 0)


def test_requests_over_http_are_told_by_their_route(triton, http):
    http.infer("simple", pair())
    assert any("/v2/models/{model}/infer" in line for line in exposition(triton))
    assert not any("/v2/models/simple/infer" in line for line in exposition(triton))


def test_metrics_may_have_a_port_of_their_own(tmp_path, free_port):
    copy_examples(tmp_path, "simple")
    with serve(tmp_path, tmp_path / "server.log", "--metrics-port", str(free_port)) as server:
        main = server.port
        server.port = free_port
        assert any(line.startswith("nv_cpu_utilization") for line in exposition(server))
        assert server.request("GET", "/v2/models/simple")[0] == 404
        server.port = main
        assert server.request("GET", "/v2/models/simple")[0] == 200


@pytest.fixture
def free_port():
    """One that nobody listened on a moment ago; 0 would mean none here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
