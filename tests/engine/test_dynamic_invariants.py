"""Whatever arrives, is aborted or waits too long: no request is lost or doubled, and batches are as the rules say."""

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.engine.fake_tensor_runner import make_request

from sardonyx.engine.dynamic import DynamicOptions, DynamicPolicy, QueuePolicy
from sardonyx.errors import Overloaded

POLICIES = st.builds(
    QueuePolicy,
    timeout_action=st.sampled_from(["reject", "delay"]),
    default_timeout_s=st.sampled_from([0.0, 0.0, 2.0, 5.0]),
    allows_timeout_override=st.booleans(),
    max_queue_size=st.sampled_from([0, 0, 3]),
)


class DynamicBatching(RuleBasedStateMachine):
    """Compares the policy with plain lists: `fresh` and `delayed` requests of each level."""

    @initialize(
        max_batch_size=st.integers(1, 8),
        preferred=st.lists(st.integers(1, 8), max_size=2),
        delay_s=st.sampled_from([0.0, 3.0]),
        is_batching=st.sampled_from([True, True, True, False]),
        num_levels=st.sampled_from([0, 1, 3]),
        default_policy=POLICIES,
        policies=st.dictionaries(st.integers(1, 3), POLICIES, max_size=2),
    )
    def start(self, max_batch_size, preferred, delay_s, is_batching, num_levels, default_policy, policies):
        self.options = DynamicOptions(
            max_batch_size=max_batch_size,
            is_batching=is_batching,
            preferred_batch_sizes=tuple(size for size in preferred if size <= max_batch_size),
            max_queue_delay_s=delay_s,
            num_priority_levels=num_levels,
            default_priority=min(num_levels, 2),
            default_queue_policy=default_policy,
            queue_policies=policies,
        )
        self.policy = DynamicPolicy("m", self.options)
        self.now_s = 0.0
        self.num_requests = 0
        self.added_s: dict[int, float] = {}
        self.expires_s: dict[int, float] = {}
        self.fresh: dict[int, list] = {}
        self.delayed: dict[int, list] = {}

    def policy_of(self, level):
        return self.options.queue_policies.get(level, self.options.default_queue_policy)

    def waiting(self):
        levels = sorted({*self.fresh, *self.delayed})
        return [each for level in levels for each in self.fresh.get(level, []) + self.delayed.get(level, [])]

    @rule(
        batch_sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
        key=st.sampled_from("aaab"),
        priority=st.integers(0, 4),
        timeout_s=st.sampled_from([0.0, 0.0, 1.0, 9.0]),
    )
    def submit(self, batch_sizes, key, priority, timeout_s):
        for batch_size in batch_sizes:
            batch_size = min(batch_size, self.options.max_batch_size)
            level = priority if 1 <= priority <= self.options.num_priority_levels else self.options.default_priority
            request = make_request(self.num_requests, batch_size, batch_key=key, priority=priority, timeout_s=timeout_s)
            self.num_requests += 1
            policy = self.policy_of(level)
            num_waiting = len(self.fresh.get(level, []) + self.delayed.get(level, []))
            is_full = 0 < policy.max_queue_size <= num_waiting
            try:
                self.policy.add(request, self.now_s)
            except Overloaded:
                assert is_full
                continue
            assert not is_full
            limits_s = [policy.default_timeout_s or math.inf]
            if policy.allows_timeout_override:
                limits_s.append(timeout_s or math.inf)
            self.added_s[request.id] = self.now_s
            self.expires_s[request.id] = self.now_s + min(limits_s)
            self.fresh.setdefault(level, []).append(request)

    @precondition(lambda self: self.num_requests)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.integers(0, self.num_requests - 1))
        is_waiting = request_id in [each.id for each in self.waiting()]
        removed = self.policy.abort(request_id, self.now_s)
        assert (removed is not None and removed.id == request_id) == is_waiting
        for requests in (*self.fresh.values(), *self.delayed.values()):
            requests[:] = [each for each in requests if each.id != request_id]

    def expire(self):
        """What the lists say about the requests whose time is over; gives the ones that are refused."""
        refused = []
        due = [each for each in self.waiting() if self.expires_s[each.id] <= self.now_s]
        for request in sorted(due, key=lambda each: (self.expires_s[each.id], each.id)):
            level = next(level for level, requests in self.fresh.items() if request in requests)
            self.fresh[level].remove(request)
            if self.policy_of(level).timeout_action == "delay":
                self.expires_s[request.id] = math.inf
                self.delayed.setdefault(level, []).append(request)
            else:
                refused.append(request.id)
        return refused

    @rule(dt_s=st.sampled_from([0.25, 1.0, 4.0]))
    def pass_time(self, dt_s):
        at_s = self.policy.wake_at_s(self.now_s)
        was_ready = self.policy.is_ready(0, self.now_s)
        self.now_s += dt_s
        if at_s is None or at_s > self.now_s:
            assert self.policy.is_ready(0, self.now_s) == was_ready, "nothing happens before the announced time"
            assert not [each for each in self.waiting() if self.expires_s[each.id] <= self.now_s]
        self.policy.expire(self.now_s)
        assert [request.id for request, _ in self.policy.take_refused()] == self.expire()

    @rule()
    def schedule(self):
        self.now_s += 0.125
        is_ready = self.policy.is_ready(0, self.now_s)
        at_s = self.policy.wake_at_s(self.now_s)
        is_due = at_s is not None and at_s <= self.now_s
        batch = self.policy.schedule(0, self.now_s)
        assert [request.id for request, _ in self.policy.take_refused()] == self.expire()
        expected = self.choose()
        assert (batch.requests if batch else []) == expected
        assert is_ready or is_due or not expected, "who asks only when told misses nothing"
        assert expected or not self.policy.is_ready(0, self.now_s), "who asks again when told does not spin"
        for requests in (*self.fresh.values(), *self.delayed.values()):
            requests[:] = [each for each in requests if each not in expected]
        assert self.policy.num_waiting == len(self.waiting())

    def choose(self):
        """The batch that the rules ask for, from all prefixes that could be one."""
        waiting, options = self.waiting(), self.options
        if not waiting or not options.is_batching:
            return waiting[:1]
        prefixes = [
            waiting[:count]
            for count in range(1, len(waiting) + 1)
            if count == 1
            or (
                sum(each.batch_size for each in waiting[:count]) <= options.max_batch_size
                and len({each.batch_key for each in waiting[:count]}) == 1
            )
        ]
        sizes = [sum(each.batch_size for each in prefix) for prefix in prefixes]
        preferred = set(options.preferred_batch_sizes or (options.max_batch_size,))
        is_late = 0 < options.max_queue_delay_s <= self.now_s - min(self.added_s[each.id] for each in prefixes[-1])
        good = [prefix for prefix, size in zip(prefixes, sizes, strict=True) if size in preferred]
        if not is_late and good:
            return good[-1]
        # No preferred size on the way: the last prefix before the largest of them is passed is as good.
        grown = sizes[1:] + [sizes[-1] + each.batch_size for each in waiting[len(prefixes) : len(prefixes) + 1]]
        passing = [prefix for prefix, size in zip(prefixes, grown, strict=False) if size > max(preferred)]
        if not is_late and passing:
            return passing[0]
        can_grow = len(prefixes) == len(waiting) and sizes[-1] < max(preferred)
        return [] if can_grow and options.max_queue_delay_s and not is_late else prefixes[-1]

    def teardown(self):
        if not hasattr(self, "policy"):
            return
        for _ in range(self.num_requests + 1):
            self.now_s += 4.0
            self.schedule()
        assert self.policy.num_waiting == 0, "everything runs in the end"


def test_dynamic_policy_keeps_its_promises():
    run_state_machine_as_test(
        DynamicBatching, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )
