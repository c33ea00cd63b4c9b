import pytest
from tests.engine.fake_tensor_runner import ids, make_request

from sardonyx.engine.dynamic import DynamicOptions, DynamicPolicy, QueuePolicy
from sardonyx.errors import InvalidRequest, Overloaded


def make_policy(**options):
    return DynamicPolicy("m", DynamicOptions(**({"max_batch_size": 8, "is_batching": True} | options)))


def add(policy, *request_ids, now_s=0.0, **fields):
    for request_id in request_ids:
        request = make_request(request_id, **fields)
        policy.check(request)
        policy.add(request, now_s)


def schedule(policy, now_s=0.0):
    return ids(policy.schedule(0, now_s))


def refused(policy):
    return [(request.id, error.message) for request, error in policy.take_refused()]


def test_waiting_requests_run_together_up_to_the_batch_size():
    policy = make_policy(max_batch_size=4)
    add(policy, 1, 2, 3, 4, 5)
    assert schedule(policy) == [1, 2, 3, 4]
    assert schedule(policy) == [5]


def test_each_request_runs_alone_when_the_model_does_not_batch():
    policy = make_policy(is_batching=False, max_queue_delay_s=1.0)
    add(policy, 1, 2)
    assert [schedule(policy), schedule(policy), schedule(policy)] == [[1], [2], []]


def test_request_with_too_many_rows_is_refused():
    policy = make_policy(max_batch_size=4)
    with pytest.raises(InvalidRequest, match=r"^inference request batch-size must be <= 4 for 'm'$"):
        policy.check(make_request(1, batch_size=5))


def test_batch_ends_before_a_request_that_does_not_fit():
    policy = make_policy(max_batch_size=4)
    add(policy, 1, batch_size=3)
    add(policy, 2, batch_size=2)
    add(policy, 3)
    assert schedule(policy) == [1]
    assert schedule(policy) == [2, 3]


def test_batch_ends_before_another_shape():
    policy = make_policy(max_queue_delay_s=1.0)
    add(policy, 1, 2, batch_key="a")
    add(policy, 3, batch_key="b")
    add(policy, 4, batch_key="a")
    assert schedule(policy) == [1, 2]
    assert schedule(policy) == [3]
    assert schedule(policy) == []


def test_batch_waits_for_company_until_the_delay_is_over():
    policy = make_policy(max_queue_delay_s=1.0)
    add(policy, 1, now_s=10.0)
    add(policy, 2, now_s=10.5)
    assert schedule(policy, 10.9) == []
    assert policy.wake_at_s(10.9) == 11.0
    assert not policy.is_ready(0, 10.9)
    assert policy.is_ready(0, 11.0)
    assert schedule(policy, 11.0) == [1, 2]


def test_full_batch_does_not_wait():
    policy = make_policy(max_batch_size=2, max_queue_delay_s=1.0)
    add(policy, 1, 2, 3)
    assert schedule(policy) == [1, 2]
    assert schedule(policy) == []


def test_preferred_size_goes_at_once():
    policy = make_policy(preferred_batch_sizes=(2, 4), max_queue_delay_s=1.0)
    add(policy, 1, 2, 3)
    assert schedule(policy) == [1, 2]
    assert schedule(policy) == []
    add(policy, 4, 5, 6, 7)
    assert schedule(policy) == [3, 4, 5, 6]


def test_batch_is_ready_when_another_shape_comes():
    policy = make_policy(max_queue_delay_s=1.0)
    add(policy, 1, batch_key="a")
    assert schedule(policy) == []
    add(policy, 2, batch_key="b")
    assert policy.is_ready(0, 0.0)
    assert schedule(policy) == [1]


def test_nobody_is_woken_for_a_batch_that_only_lacks_an_instance():
    policy = make_policy(max_queue_delay_s=1.0)
    add(policy, 1)
    assert policy.wake_at_s(0.5) == 1.0
    assert policy.wake_at_s(1.0) is None


def test_batch_is_not_ready_when_a_request_comes_that_does_not_fill_it():
    policy = make_policy(max_queue_delay_s=1.0)
    add(policy, 1)
    assert schedule(policy) == []
    add(policy, 2)
    assert not policy.is_ready(0, 0.0)


def test_late_batch_goes_beyond_the_preferred_size():
    policy = make_policy(preferred_batch_sizes=(4,), max_queue_delay_s=1.0)
    add(policy, *range(6))
    assert schedule(policy, 1.0) == [0, 1, 2, 3, 4, 5]


def test_preferred_size_bounds_the_batch_when_there_is_no_delay():
    policy = make_policy(preferred_batch_sizes=(4,))
    add(policy, *range(6))
    assert schedule(policy) == [0, 1, 2, 3]
    assert schedule(policy) == [4, 5]


def test_batch_does_not_wait_when_the_next_request_skips_the_preferred_size():
    policy = make_policy(preferred_batch_sizes=(4,), max_queue_delay_s=1.0)
    add(policy, 1, batch_size=3)
    add(policy, 2, batch_size=2)
    assert schedule(policy) == [1]
    assert schedule(policy) == []


def test_aborted_request_does_not_run():
    policy = make_policy()
    add(policy, 1, 2, 3)
    request = policy.abort(2, 0.0)
    assert request is not None
    assert request.id == 2
    assert policy.abort(2, 0.0) is None
    assert schedule(policy) == [1, 3]


def test_nothing_is_ready_when_the_only_request_was_aborted():
    policy = make_policy(max_queue_delay_s=1.0)
    add(policy, 1)
    policy.abort(1, 0.0)
    assert (policy.is_ready(0, 9.0), policy.wake_at_s(0.0), policy.num_waiting) == (False, None, 0)


def test_max_queue_size():
    policy = make_policy(default_queue_policy=QueuePolicy(max_queue_size=2))
    add(policy, 1, 2)
    with pytest.raises(Overloaded, match=r"^Exceeds maximum queue size$"):
        add(policy, 3)
    assert schedule(policy) == [1, 2]
    add(policy, 3)
    assert schedule(policy) == [3]


def test_policy_reject():
    policy = make_policy(default_queue_policy=QueuePolicy(default_timeout_s=1.0))
    add(policy, 1, now_s=0.0)
    add(policy, 2, now_s=0.5)
    assert policy.wake_at_s(0.5) == 1.0
    assert schedule(policy, 1.0) == [2]
    assert refused(policy) == [(1, "Request timeout expired")]
    assert refused(policy) == []


def test_policy_reject_without_a_free_instance():
    policy = make_policy(default_queue_policy=QueuePolicy(default_timeout_s=1.0))
    add(policy, 1)
    policy.expire(1.0)
    assert refused(policy) == [(1, "Request timeout expired")]
    assert policy.num_waiting == 0


def test_policy_delay():
    policy = make_policy(
        max_batch_size=1, default_queue_policy=QueuePolicy(timeout_action="delay", default_timeout_s=1.0)
    )
    add(policy, 1, 2, now_s=0.0)
    add(policy, 3, now_s=0.5)
    assert [schedule(policy, 1.0) for _ in range(3)] == [[3], [1], [2]]
    assert refused(policy) == []


def test_delayed_request_runs_before_the_next_level():
    delay = QueuePolicy(timeout_action="delay", default_timeout_s=1.0)
    policy = make_policy(max_batch_size=1, num_priority_levels=2, default_priority=2, default_queue_policy=delay)
    add(policy, 1, priority=1, now_s=0.0)
    add(policy, 2, priority=2, now_s=0.9)
    add(policy, 3, priority=1, now_s=0.9)
    assert [schedule(policy, 1.0) for _ in range(3)] == [[3], [1], [2]]


def test_timeout_override():
    policy = make_policy(default_queue_policy=QueuePolicy(default_timeout_s=1.0, allows_timeout_override=True))
    add(policy, 1, timeout_s=0.1)
    add(policy, 2, timeout_s=5.0)
    assert policy.wake_at_s(0.0) == 0.1
    policy.expire(0.1)
    assert [request_id for request_id, _ in refused(policy)] == [1]
    policy.expire(1.0)
    assert [request_id for request_id, _ in refused(policy)] == [2]


def test_timeout_override_is_ignored_when_it_is_not_allowed():
    policy = make_policy(default_queue_policy=QueuePolicy(default_timeout_s=1.0))
    add(policy, 1, timeout_s=0.1)
    assert policy.wake_at_s(0.0) == 1.0


def test_timeout_override_limits_what_has_no_limit():
    policy = make_policy(default_queue_policy=QueuePolicy(allows_timeout_override=True))
    add(policy, 1, timeout_s=0.1)
    add(policy, 2)
    policy.expire(100.0)
    assert [request_id for request_id, _ in refused(policy)] == [1]


def test_priority_levels():
    policy = make_policy(max_batch_size=1, num_priority_levels=3, default_priority=2)
    for request_id, priority in enumerate([3, 0, 1, 2, 9]):
        add(policy, request_id, priority=priority)
    assert [schedule(policy) for _ in range(5)] == [[2], [1], [3], [4], [0]]


def test_levels_have_their_own_queue_policies():
    policy = make_policy(
        num_priority_levels=2,
        default_priority=1,
        default_queue_policy=QueuePolicy(max_queue_size=1),
        queue_policies={2: QueuePolicy(default_timeout_s=1.0)},
    )
    add(policy, 1)
    add(policy, 2, 3, priority=2)
    with pytest.raises(Overloaded):
        add(policy, 4, priority=1)
    assert schedule(policy, 1.0) == [1]
    assert [request_id for request_id, _ in refused(policy)] == [2, 3]


def test_time_limits_of_requests_that_are_gone_take_no_space():
    policy = make_policy(default_queue_policy=QueuePolicy(default_timeout_s=1e6))
    for request_id in range(1000):
        add(policy, request_id)
        policy.abort(request_id, 0.0)
    assert len(policy._queue._expiries) < 100


def test_delayed_request_stays_delayed_when_old_time_limits_are_dropped():
    delay = QueuePolicy(timeout_action="delay", default_timeout_s=1.0)
    policy = make_policy(default_queue_policy=delay)
    add(policy, 0)
    policy.expire(1.0)
    for request_id in range(1, 100):
        add(policy, request_id, now_s=2.0)
        policy.abort(request_id, 2.0)
    policy.expire(9.0)
    assert schedule(policy, 9.0) == [0]
