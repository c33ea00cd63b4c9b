from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from sardonyx import triton_metrics
from sardonyx.statistics import InferenceStatistics
from sardonyx.tensors import InferenceTimes
from sardonyx.triton_metrics import FAILURES, MACHINE_FAMILIES, MODEL_FAMILIES, REASONS, Machine

LABELS = '{model="m",version="2"}'


def render(*statistics: InferenceStatistics) -> dict[str, str]:
    """Values by name and labels, as they stand in the text."""
    text = triton_metrics.render(statistics, Machine())
    assert text.endswith("\n")
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


def served(version: int = 2) -> InferenceStatistics:
    statistics = InferenceStatistics("m", version, num_pending=3, load_s=1.25)
    times = InferenceTimes(compute_input_ns=4_000, compute_infer_ns=50_999, compute_output_ns=6_000)
    statistics.observe_execution(5, times)
    statistics.observe_success(total_ns=70_000, queue_ns=8_000, times=times, batch_size=5)
    return statistics


def test_counts_and_microseconds_of_a_version_are_shown():
    found = render(served())
    expected = {
        "nv_inference_request_success": "1",
        "nv_inference_count": "5",
        "nv_inference_exec_count": "1",
        "nv_inference_request_duration_us": "70",
        "nv_inference_queue_duration_us": "8",
        "nv_inference_compute_input_duration_us": "4",
        "nv_inference_compute_infer_duration_us": "50",
        "nv_inference_compute_output_duration_us": "6",
        "nv_inference_pending_request_count": "3",
        "nv_model_load_duration_secs": "1.25",
    }
    assert {name: found[name + LABELS] for name in expected} == expected


def test_cache_is_shown_by_model():
    statistics = InferenceStatistics("m", 2)
    statistics.observe_cache_hit(total_ns=9_000, lookup_ns=2_000)
    statistics.cache_miss.add(3_000)
    found = render(statistics)
    names = ["num_hits", "num_misses", "hit_duration", "miss_duration"]
    assert [found[f"nv_cache_{name}_per_model{LABELS}"] for name in names] == ["1", "1", "2", "3"]
    assert found[f"nv_inference_request_success{LABELS}"] == "1"
    assert found[f"nv_inference_count{LABELS}"] == "0"


def test_failures_are_shown_for_every_reason():
    statistics = InferenceStatistics("m", 2)
    statistics.observe_failure("REJECTED", 1)
    statistics.observe_failure("REJECTED", 1)
    statistics.observe_failure("BACKEND", 1)
    found = render(statistics)
    counts = {reason: found[f'{FAILURES}{{model="m",version="2",reason="{reason}"}}'] for reason in REASONS}
    assert counts == {"REJECTED": "2", "CANCELED": "0", "BACKEND": "1", "OTHER": "0"}


def test_every_family_has_its_type_and_triton_s_name_once():
    lines = triton_metrics.render([served(1), served(2)], Machine()).splitlines()
    types = [line.split()[2:] for line in lines if line.startswith("# TYPE ")]
    families = [*MODEL_FAMILIES, *MACHINE_FAMILIES]
    assert sorted(types) == sorted([[family.name, family.kind] for family in families] + [[FAILURES, "counter"]])
    assert not any(name.endswith("_total") for name, _ in types)


def test_families_have_headers_before_any_model_is_loaded():
    lines = triton_metrics.render([], Machine()).splitlines()
    assert "# TYPE nv_inference_count counter" in lines
    assert [line.split()[0] for line in lines if line[0] != "#"] == [family.name for family in MACHINE_FAMILIES]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")))
def test_any_name_survives_as_a_label(name):
    text = triton_metrics.render([InferenceStatistics(name, 1)], Machine())
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.get("model", name) == name


@pytest.fixture
def clock(monkeypatch):
    """CPU times of the machine, to be set."""
    times = {"user": 10.0, "system": 5.0, "idle": 80.0, "iowait": 5.0, "guest": 1.0}
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(_asdict=lambda: dict(times)))
    return times


def test_utilization_is_of_the_time_since_the_last_scrape(clock):
    machine = Machine()
    clock.update(user=13.0, idle=86.0, iowait=6.0)
    assert machine.utilization() == pytest.approx(0.3)
    clock.update(user=14.0)
    assert machine.utilization() == pytest.approx(1.0)


def test_utilization_stays_while_the_clock_stands(clock):
    machine = Machine()
    assert machine.utilization() == 0.0
    clock.update(user=11.0, idle=81.0)
    assert [machine.utilization() for _ in range(2)] == [pytest.approx(0.5)] * 2


def test_guests_are_not_counted_twice(clock):
    machine = Machine()
    clock.update(user=11.0, guest=2.0, idle=81.0)
    assert machine.utilization() == pytest.approx(0.5)


def test_memory_in_use_is_what_is_not_available(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=100, available=30))
    found = render()
    assert (found["nv_cpu_memory_total_bytes"], found["nv_cpu_memory_used_bytes"]) == ("100", "70")
