"""Statistics as perf_analyzer takes them: before and after a window, the difference."""

from itertools import pairwise

import numpy as np
import pytest
from tests.conformance.triton import INVALID, as_numbers, pair, pending, texts

DURATIONS = (
    "success",
    "fail",
    "queue",
    "compute_input",
    "compute_infer",
    "compute_output",
    "cache_hit",
    "cache_miss",
)


def durations(statistics):
    """Count and nanoseconds of all eight; protobuf's JSON leaves out what is zero."""
    shown = statistics.get("inference_stats", {})
    return {name: (shown.get(name, {}).get("count", 0), shown.get(name, {}).get("ns", 0)) for name in DURATIONS}


class Window:
    """What happens to a model's statistics inside of a block."""

    def __init__(self, caller, model):
        self.caller, self.model = caller, model

    def __enter__(self):
        self.before = self.caller.statistics(self.model)
        return self

    def __exit__(self, *_):
        self.after = self.caller.statistics(self.model)

    def count(self, name):
        return self.after.get(name, 0) - self.before.get(name, 0)

    def duration(self, name):
        """Count and nanoseconds."""
        (count, ns), (earlier, ns_before) = durations(self.after)[name], durations(self.before)[name]
        return count - earlier, ns - ns_before


@pytest.mark.parametrize("rows", [1, 4])
def test_requests_show_in_the_difference(caller, rows):
    with Window(caller, "simple") as window:
        for index in range(5):
            caller.infer("simple", pair(index, rows=rows))
    assert window.count("inference_count") == 5 * rows
    assert window.count("execution_count") == 5
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        count, ns = window.duration(name)
        assert count == 5, name
        assert ns > 0, name
    parts = sum(window.duration(name)[1] for name in ("queue", "compute_input", "compute_infer", "compute_output"))
    assert parts <= window.duration("success")[1]
    for name in ("fail", "cache_hit", "cache_miss"):
        assert window.duration(name) == (0, 0)


def test_all_eight_durations_are_always_there_over_http(triton):
    status, answer = triton.request("GET", "/v2/models/two_open/stats")
    assert status == 200
    (model,) = answer["model_stats"]
    assert model["version"] == "1"
    assert model["last_inference"] == model["inference_count"] == model["execution_count"] == 0
    assert set(model["inference_stats"]) == set(DURATIONS)
    assert all(each == {"count": 0, "ns": 0} for each in model["inference_stats"].values())
    assert model["batch_stats"] == []


def test_no_number_ever_goes_down(caller):
    seen = [caller.statistics("simple")]
    for index in range(4):
        caller.infer("simple", pair(index))
        caller.refusal("simple", {"INPUT0": pair()["INPUT0"]})
        seen.append(caller.statistics("simple"))
    for earlier, later in pairwise(seen):
        assert later["inference_count"] > earlier["inference_count"]
        assert later["last_inference"] >= earlier["last_inference"]
        for name in DURATIONS:
            assert durations(later)[name] >= durations(earlier)[name]


def test_a_failed_run_counts_as_a_failure(caller):
    bad = {"INPUT0": texts(["no number"] * 16, 1, 16), "INPUT1": texts(["1"] * 16, 1, 16)}
    with Window(caller, "simple_string") as window:
        caller.refusal("simple_string", bad)
    assert window.duration("fail")[0] == 1
    assert window.duration("success") == (0, 0)
    assert window.count("inference_count") == 0


def test_executions_are_told_by_batch_size(caller):
    def executions():
        return {
            row["batch_size"]: row["compute_infer"]["count"]
            for row in caller.statistics("three_inputs").get("batch_stats", [])
        }

    before = executions()
    for rows in (2, 3, 3):
        caller.infer("three_inputs", {f"INPUT{index}": np.ones((rows, 2), np.float32) for index in range(3)})
    after = executions()
    assert after[2] - before.get(2, 0) == 1
    assert after[3] - before.get(3, 0) == 2


def test_cached_answers_are_no_executions(caller):
    value = {"http": 17, "grpc": 18}[caller.protocol]
    with Window(caller, "cached") as window:
        for _ in range(3):
            result = caller.infer("cached", {"INPUT0": np.array([[value, 1]], np.int32)})
            assert result.as_numpy("OUTPUT0").tolist() == [[value, 1]]
    assert window.count("execution_count") == 1
    assert window.duration("success")[0] == 3
    assert window.duration("cache_miss")[0] == 1
    assert window.duration("cache_hit")[0] == 2
    assert window.duration("compute_infer")[0] == 1


def test_parts_of_an_ensemble_have_statistics_of_their_own(caller):
    with Window(caller, "simple_ensemble") as whole, Window(caller, "simple") as part:
        caller.infer("simple_ensemble", pair())
    assert whole.count("inference_count") == 1
    assert whole.duration("success")[0] == 1
    assert part.count("inference_count") == 2


def test_a_language_model_counts_its_texts(caller):
    with Window(caller, "tiny") as window:
        options = {"parameters": {"max_tokens": 3, "ignore_eos": True}}
        caller.infer("tiny", {"text_input": texts(["the cat"])}, **options)
    assert window.count("inference_count") == 1
    assert window.duration("success")[0] == 1
    assert window.duration("success")[1] > 0


def test_statistics_are_of_all_models_where_none_is_named(caller):
    rows = caller.show("get_inference_statistics")["model_stats"]
    assert {"simple", "simple_ensemble", "tiny"} <= {row["name"] for row in rows}
    assert {row["version"] for row in rows} == {"1"}


def test_a_model_called_stats_is_no_way_round_the_list(triton):
    status, answer = triton.request("GET", "/v2/models/stats")
    assert status == 200
    assert len(answer["model_stats"]) > 10


def test_statistics_of_a_version(caller):
    (row,) = caller.show("get_inference_statistics", "simple", "1")["model_stats"]
    assert row["version"] == "1"


@pytest.mark.parametrize(("model", "version"), [("no_such", ""), ("simple", "7")])
def test_statistics_of_what_is_not_there_are_refused(caller, model, version):
    refusal = caller.refused(lambda: caller.client.get_inference_statistics(model, version))
    assert refusal.status in INVALID
    assert f"requested model '{model}" in refusal.message
    assert "is not available" in refusal.message


def test_both_protocols_tell_the_same_numbers(http, grpc):
    http.infer("simple", pair())
    assert durations(http.statistics("simple")) == durations(grpc.statistics("simple"))
    assert http.statistics("simple")["batch_stats"] == [
        as_numbers(row) for row in grpc.statistics("simple")["batch_stats"]
    ]


@pytest.mark.usefixtures("idle_slow")
def test_a_cancelled_request_is_a_failure(triton, http, grpc, long_run):
    with Window(http, "slow") as window:
        call = grpc.client.async_infer("slow", grpc.inputs(long_run), lambda result, error: None)
        triton.wait_for(lambda: pending(triton, "slow"))
        call.cancel()
        triton.wait_for(lambda: not pending(triton, "slow"))
    assert window.count("inference_count") == 0
    assert window.duration("success") == (0, 0)
    assert window.duration("fail")[0] == 1
