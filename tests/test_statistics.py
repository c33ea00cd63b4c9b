import pytest
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineDead,
    EngineError,
    InvalidRequest,
    ModelNotReady,
    Overloaded,
    RequestAborted,
    ServeError,
)
from sardonyx.statistics import Duration, InferenceStatistics, failure_reason
from sardonyx.tensors import InferenceTimes

TIMES = InferenceTimes(compute_input_ns=1, compute_infer_ns=20, compute_output_ns=3)


@pytest.fixture
def statistics() -> InferenceStatistics:
    return InferenceStatistics("m", 1)


def test_new_model_has_cost_nothing(statistics: InferenceStatistics):
    assert (statistics.last_inference_ms, statistics.inference_count, statistics.execution_count) == (0, 0, 0)
    assert statistics.success == statistics.fail == statistics.queue == Duration()


def test_success_counts_its_own_rows_and_parts(statistics: InferenceStatistics):
    statistics.observe_success(total_ns=100, queue_ns=50, times=TIMES, batch_size=4)
    assert statistics.inference_count == 4
    assert statistics.success == Duration(1, 100)
    assert statistics.queue == Duration(1, 50)
    assert (statistics.compute_input, statistics.compute_infer) == (Duration(1, 1), Duration(1, 20))
    assert statistics.compute_output == Duration(1, 3)
    assert statistics.last_inference_ms > 1_600_000_000_000
    assert statistics.execution_count == 0


def test_cache_hit_is_a_success_that_was_not_computed(statistics: InferenceStatistics):
    statistics.observe_cache_hit(total_ns=9, lookup_ns=4)
    assert (statistics.success, statistics.cache_hit, statistics.queue) == (
        Duration(1, 9),
        Duration(1, 4),
        Duration(1, 0),
    )
    assert statistics.inference_count == statistics.compute_infer.count == 0
    assert statistics.last_inference_ms > 0


def test_failure_is_kept_by_reason_and_adds_no_success(statistics: InferenceStatistics):
    for reason in ("REJECTED", "REJECTED", "BACKEND"):
        statistics.observe_failure(reason, 5)
    assert statistics.failures == {"REJECTED": 2, "BACKEND": 1}
    assert statistics.fail == Duration(3, 15)
    assert statistics.success.count == statistics.queue.count == 0


def test_answers_of_a_stream_are_kept_by_position(statistics: InferenceStatistics):
    for position in (0, 1, 0):
        statistics.observe_response(position, 7)
    assert {key: each.success.count for key, each in statistics.responses.items()} == {0: 2, 1: 1}
    assert statistics.responses[0].compute_infer == Duration(2, 14)


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), max_size=10))
def test_batches_add_up_to_executions_and_rows(batches: list[list[int]]):
    statistics = InferenceStatistics("m", 1)
    for requests in batches:
        statistics.observe_execution(sum(requests), TIMES)
        for rows in requests:
            statistics.observe_success(total_ns=30, queue_ns=1, times=TIMES, batch_size=rows)
    counts = {size: each.compute_infer.count for size, each in statistics.batches.items()}
    assert sum(counts.values()) == statistics.execution_count == len(batches)
    assert sum(size * count for size, count in counts.items()) == statistics.inference_count
    assert statistics.success.count == statistics.queue.count == statistics.compute_input.count
    assert statistics.compute_infer.ns == TIMES.compute_infer_ns * sum(map(len, batches))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Overloaded("full", retry_after_s=1), "REJECTED"),
        (ModelNotReady("gone"), "REJECTED"),
        (RequestAborted("left"), "CANCELED"),
        (DeadlineExceeded("late"), "CANCELED"),
        (EngineError("broken"), "BACKEND"),
        (EngineDead("dead"), "BACKEND"),
        (InvalidRequest("wrong"), "OTHER"),
        (ConfigError("wrong"), "OTHER"),
    ],
)
def test_errors_have_tritons_reasons(error: ServeError, reason: str):
    assert failure_reason(error) == reason
