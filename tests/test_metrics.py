import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from sardonyx import triton_metrics
from sardonyx.core import FinishReason
from sardonyx.engine.stats import STEP_S_BOUNDS, LoopStats
from sardonyx.metrics import FAMILIES, Histogram, Metrics

README = Path(__file__).parents[1] / "server" / "README.md"


def stats(**changes) -> LoopStats:
    values = {
        "is_alive": True,
        "has_work": False,
        "stalled_s": 0.0,
        "num_steps": 0,
        "num_failed_steps": 0,
        "last_step_s": 0.0,
        "last_step_tokens": 0,
        "last_step_rows": 0,
        "step_tokens": 0,
        "step_s_sum": 0.0,
        "step_s_counts": (0,) * (len(STEP_S_BOUNDS) + 1),
    }
    return LoopStats(**values | changes)


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample by its name and labels, as a reader of the exposition sees it."""
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_both_names_show_the_same_observations():
    metrics = Metrics("1.2.3")
    model = metrics.model("m")
    model.observe_ttft(0.3)
    model.observe_itl(0.02, num_tokens=3)
    model.observe_request(
        FinishReason.STOP, e2e_s=1.3, ttft_s=0.3, queue_s=0.1, num_prompt_tokens=7, num_completion_tokens=11
    )
    found = samples(metrics)
    for prefix in ("sardonyx_", "vllm:"):
        assert found[f"{prefix}time_to_first_token_seconds_count{{model_name=m}}"] == 1
        assert found[f"{prefix}inter_token_latency_seconds_count{{model_name=m}}"] == 3
        assert found[f"{prefix}inter_token_latency_seconds_sum{{model_name=m}}"] == pytest.approx(0.06)
        assert found[f"{prefix}e2e_request_latency_seconds_bucket{{le=1.5,model_name=m}}"] == 1
        assert found[f"{prefix}request_time_per_output_token_seconds_sum{{model_name=m}}"] == pytest.approx(0.1)
        assert found[f"{prefix}request_success_total{{finished_reason=stop,model_name=m}}"] == 1
        assert found[f"{prefix}request_prompt_tokens_sum{{model_name=m}}"] == 7


def test_cancelled_is_shown_as_abort():
    metrics = Metrics("0")
    metrics.model("m").observe_request(FinishReason.CANCELLED, e2e_s=1.0, num_prompt_tokens=1, num_completion_tokens=0)
    assert samples(metrics)["vllm:request_success_total{finished_reason=abort,model_name=m}"] == 1


def test_engine_counts_are_read_at_each_scrape():
    metrics = Metrics("0")
    engine = SimpleNamespace(
        now=stats(num_running=2, num_waiting=1, kv_usage=0.25, prompt_tokens=10, prefix_hit_tokens=4)
    )
    metrics.model("m").attach(lambda: engine.now)
    found = samples(metrics)
    assert found["vllm:num_requests_running{model_name=m}"] == 2
    assert found["vllm:kv_cache_usage_perc{model_name=m}"] == 0.25
    assert found["vllm:prefix_cache_queries_total{model_name=m}"] == 10
    assert found["vllm:prefix_cache_hits_total{model_name=m}"] == 4
    engine.now = stats(num_running=0, prompt_tokens=30)
    found = samples(metrics)
    assert found["vllm:num_requests_running{model_name=m}"] == 0
    assert found["vllm:prompt_tokens_total{model_name=m}"] == 30


def test_counters_go_on_when_a_model_is_swapped():
    metrics = Metrics("0")
    model = metrics.model("m")
    counts = (0, 2) + (0,) * (len(STEP_S_BOUNDS) - 1)

    def old() -> LoopStats:
        return stats(num_running=1, generated_tokens=100, step_s_counts=counts, step_s_sum=0.02)

    def new() -> LoopStats:
        return stats(num_running=1, generated_tokens=5, step_s_counts=counts, step_s_sum=0.02)

    model.attach(old)
    model.attach(new)
    both = samples(metrics)
    assert both["sardonyx_num_requests_running{model_name=m}"] == 2
    model.detach(old)
    after = samples(metrics)
    assert after["sardonyx_num_requests_running{model_name=m}"] == 1
    for name in ("generation_tokens_total{model_name=m}", "step_duration_seconds_bucket{le=0.01,model_name=m}"):
        assert after[f"sardonyx_{name}"] == both[f"sardonyx_{name}"] > 0
    model.detach(new)
    assert samples(metrics)["sardonyx_generation_tokens_total{model_name=m}"] == 105
    assert metrics.model("m") is model


def test_step_buckets_are_the_engines():
    assert next(family.bounds for family in FAMILIES if family.name == "step_duration_seconds") == STEP_S_BOUNDS


def test_http_requests_are_counted_by_route_and_status():
    metrics = Metrics("0")
    metrics.start_http()
    metrics.start_http()
    metrics.finish_http("POST", "/v1/completions", 200, 0.2)
    found = samples(metrics)
    assert found["sardonyx_http_requests_in_flight{}"] == 1
    assert found["sardonyx_http_requests_total{method=POST,route=/v1/completions,status=200}"] == 1
    assert found["sardonyx_http_request_duration_seconds_count{method=POST,route=/v1/completions}"] == 1


def test_invented_methods_share_one_label():
    metrics = Metrics("0")
    for method in ("BREW", "WHEN"):
        metrics.start_http()
        metrics.finish_http(method, "unmatched", 405, 0.0)
    assert samples(metrics)["sardonyx_http_requests_total{method=other,route=unmatched,status=405}"] == 2


def test_rejections_lag_cache_and_version_are_shown():
    metrics = Metrics("1.2.3")
    metrics.reject("tokens")
    metrics.observe_event_loop_lag(0.003)
    metrics.model("m").set_cache_info(block_size=8447, num_blocks=32)
    found = samples(metrics)
    assert found["sardonyx_admission_rejections_total{reason=tokens}"] == 1
    assert found["sardonyx_event_loop_lag_seconds_count{}"] == 1
    assert found["vllm:cache_config_info{block_size=8447,model_name=m,num_gpu_blocks=32}"] == 1
    assert found["sardonyx_build_info{version=1.2.3}"] == 1
    assert any(name.startswith("process_resident_memory_bytes") for name in found)


def test_applications_in_one_process_do_not_meet():
    first, second = Metrics("0"), Metrics("0")
    first.model("m").observe_ttft(1.0)
    assert not any("time_to_first_token" in name for name in samples(second))


@given(st.lists(st.floats(0, 1e4), max_size=50))
def test_buckets_count_what_is_at_most_their_bound(values):
    histogram = Histogram("time_to_first_token_seconds")
    for value in values:
        histogram.observe(value)
    for bound, count in histogram.buckets():
        assert count == sum(value <= float(bound) for value in values)
    assert histogram.sum == pytest.approx(sum(values))


def test_every_family_is_rendered_and_has_its_row_in_the_readme():
    metrics = Metrics("0")
    metrics.render()
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    assert [metric.name for metric in metrics.collect()] == [
        prefix + family.name for family in FAMILIES for prefix in family.prefixes
    ]
    text = README.read_text()
    for family in FAMILIES:
        name = family.name + ("_total" if family.kind == "counter" else "")
        alias = f"`vllm:{name}`" if family.is_shared else ""
        labels = ", ".join(f"`{label}`" for label in family.labels)
        assert f"| `sardonyx_{name}` | {alias} | {family.kind} | {labels} | {family.help} |\n" in text
    assert len(re.findall(r"^\| `sardonyx_", text, re.MULTILINE)) == len(FAMILIES)


def test_inference_statistics_are_made_once_and_shown_under_tritons_names():
    metrics = Metrics("0")
    statistics = metrics.inference("m", 3)
    statistics.success.add(5_000)
    assert metrics.inference("m", 3) is statistics
    assert metrics.inference("m", 4) is not statistics
    assert samples(metrics)["sardonyx_build_info{version=0}"] == 1
    lines = metrics.render()[0].decode().splitlines()
    assert 'nv_inference_request_success{model="m",version="3"} 1' in lines
    assert 'nv_inference_request_success{model="m",version="4"} 0' in lines
    assert 'nv_inference_request_duration_us{model="m",version="3"} 5' in lines


def test_every_triton_metric_has_its_row_in_the_readme():
    rows = [(family.name, family.kind, "`model`, `version`", family.help) for family in triton_metrics.MODEL_FAMILIES]
    rows.append((triton_metrics.FAILURES, "counter", "`model`, `version`, `reason`", triton_metrics.FAILURES_HELP))
    rows += [(family.name, family.kind, "", family.help) for family in triton_metrics.MACHINE_FAMILIES]
    text = README.read_text()
    for name, kind, labels, meaning in rows:
        assert f"| `{name}` | {kind} | {labels} | {meaning} |\n" in text
    assert len(re.findall(r"^\| `nv_", text, re.MULTILINE)) == len(rows)
