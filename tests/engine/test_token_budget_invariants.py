"""Whatever comes or is aborted: no item is lost or doubled, steps keep their budgets, and nobody starves."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from tests.engine.token_history import TokenHistory

LENGTHS = st.one_of(st.integers(1, 12), st.integers(1, 90))


class TokenBudget(RuleBasedStateMachine):
    @initialize(
        max_batch_tokens=st.integers(1, 40),
        max_batch_size=st.integers(1, 8),
        max_padding=st.sampled_from([1.0, 1.1, 1.5, 1.5, 4.0]),
        num_instances=st.integers(1, 3),
        num_express=st.integers(0, 2),
        express_tokens=st.integers(1, 30),
        max_queue_delay_s=st.sampled_from([0.0, 0.0, 3.0]),
    )
    def start(self, **options):
        self.history = TokenHistory(**options)
        self.num_instances = options["num_instances"] + options["num_express"]

    @rule(flow=st.integers(1, 6), lengths=st.lists(LENGTHS, min_size=1, max_size=12))
    def submit(self, flow, lengths):
        self.history.submit(flow, *lengths)

    @precondition(lambda self: self.history.num_requests)
    @rule(data=st.data())
    def abort(self, data):
        self.history.abort(data.draw(st.integers(0, self.history.num_requests - 1)))

    @rule(flow=st.integers(1, 6))
    def abort_flow(self, flow):
        """Of a call that is given up some items have run, some run, and some wait."""
        for request in self.history.flows().get(flow, []):
            self.history.abort(request.id)

    @rule(dt_s=st.sampled_from([0.5, 2.0, 4.0]))
    def pass_time(self, dt_s):
        history = self.history
        at_s = history.policy.wake_at_s(history.now_s)
        were_ready = self.are_ready()
        history.now_s += dt_s
        if at_s is None or at_s > history.now_s:
            assert self.are_ready() == were_ready, "nothing happens before the announced time"
        else:
            assert history.policy.is_ready(0, history.now_s)
        history.policy.expire(history.now_s)
        assert history.policy.take_refused() == []

    def are_ready(self):
        return [self.history.policy.is_ready(number, self.history.now_s) for number in range(self.num_instances)]

    @rule(data=st.data())
    def schedule_or_finish(self, data):
        instance = data.draw(st.integers(0, self.num_instances - 1))
        if instance in self.history.running:
            self.history.finish(instance)
        else:
            self.history.schedule(instance)

    @rule(num_steps=st.integers(1, 20))
    def work(self, num_steps):
        """Ordinary instances go on for a while."""
        for number in range(num_steps):
            instance = number % self.history.options.num_instances
            if instance in self.history.running:
                self.history.finish(instance)
            self.history.schedule(instance)

    def teardown(self):
        if not hasattr(self, "history"):
            return
        history = self.history
        history.now_s += 10.0
        for instance in list(history.running):
            history.finish(instance)
        while history.waiting:
            assert history.step(), "everything runs in the end"
        assert len(history.ended) == len(set(history.ended))


def test_token_budget_policy_keeps_its_promises():
    run_state_machine_as_test(TokenBudget, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))


ARRIVALS = st.lists(
    st.tuples(st.sampled_from(["new", "a", "b", "victim"]), st.lists(LENGTHS, min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(
    arrivals=ARRIVALS,
    victim=st.lists(LENGTHS, min_size=1, max_size=6),
    max_batch_tokens=st.integers(1, 30),
    max_batch_size=st.integers(1, 6),
    max_padding=st.sampled_from([1.0, 1.5]),
)
def test_no_flow_waits_longer_than_the_bound_whatever_comes_without_end(
    arrivals, victim, max_batch_tokens, max_batch_size, max_padding
):
    # The history checks the bound at each step.
    history = TokenHistory(
        max_batch_tokens=max_batch_tokens, max_batch_size=max_batch_size, max_padding=max_padding, num_instances=1
    )
    flows = {"a": 1, "b": 2, "victim": 3}
    history.submit(flows["victim"], *victim)
    for number in range(90):
        who, lengths = arrivals[number % len(arrivals)]
        history.submit(flows.get(who, 100 + number), *lengths)
        history.step()


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 80), min_size=2, max_size=2),
    max_batch_tokens=st.integers(1, 40),
    max_batch_size=st.integers(1, 8),
)
def test_flows_of_any_lengths_that_wait_all_the_time_have_equal_shares(lengths, max_batch_tokens, max_batch_size):
    history = TokenHistory(max_batch_tokens=max_batch_tokens, max_batch_size=max_batch_size)
    for flow, length in enumerate(lengths):
        history.submit(flow, *[length] * 100)
    largest = max(max_batch_tokens, *lengths)
    while len(history.flows()) == len(lengths):
        assert max(history.given.values(), default=0) - min(history.given[flow] for flow in (0, 1)) <= 2 * largest
        history.step()


@settings(max_examples=40, deadline=None)
@given(num_flows=st.integers(2, 6), length=st.integers(1, 30), max_batch_size=st.integers(1, 16))
def test_flows_of_the_same_lengths_differ_by_one_item_at_most(num_flows, length, max_batch_size):
    history = TokenHistory(max_batch_tokens=64, max_batch_size=max_batch_size)
    for flow in range(num_flows):
        history.submit(flow, *[length] * 20)
    while len(history.flows()) == num_flows:
        history.step()
        given = [history.given[flow] for flow in range(num_flows)]
        assert max(given) - min(given) <= length
