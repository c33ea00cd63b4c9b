"""Histories of the token budget policy, held against plain lists and against what its docstrings promise."""

from collections import defaultdict
from dataclasses import dataclass

from tests.engine.fake_tensor_runner import make_request

from sardonyx.engine.token_budget import TokenBudgetOptions, TokenBudgetPolicy
from sardonyx.tensors import TensorBatch, TensorRequest


@dataclass
class Wait:
    """What went by since a flow last had its turn, or came."""

    num_tokens: int = 0
    """Given by ordinary steps."""
    num_own_tokens: int = 0
    max_flows: int = 0


class TokenHistory:
    """Checks every step of a policy that is driven through it."""

    def __init__(self, **options):
        self.options = TokenBudgetOptions(**options)
        self.policy = TokenBudgetPolicy("m", self.options)
        self.now_s = 0.0
        self.num_requests = 0
        self.longest = self.options.max_batch_tokens
        self.added_s: dict[int, float] = {}
        self.waiting: dict[int, TensorRequest] = {}
        self.running: dict[int, TensorBatch] = {}
        self.ended: list[int] = []
        self.waits: dict[int, Wait] = {}
        self.given: dict[int, int] = defaultdict(int)
        """Tokens by flow."""

    def submit(self, flow: int, *lengths: int) -> list[int]:
        ids = []
        for length in lengths:
            request = make_request(self.num_requests, num_tokens=length, flow=flow)
            self.num_requests += 1
            self.policy.check(request)
            self.policy.add(request, self.now_s)
            self.waiting[request.id] = request
            self.added_s[request.id] = self.now_s
            self.longest = max(self.longest, length)
            ids.append(request.id)
        self.note_flows()
        return ids

    def abort(self, request_id: int) -> None:
        request = self.policy.abort(request_id, self.now_s)
        assert request is self.waiting.pop(request_id, None), "what waits is dropped, and nothing else"
        self.note_flows()

    def flows(self) -> dict[int, list[TensorRequest]]:
        """Waiting requests by flow, as they came."""
        flows = defaultdict(list)
        for request in self.waiting.values():
            flows[request.flow].append(request)
        return dict(flows)

    def note_flows(self) -> None:
        flows = self.flows()
        self.waits = {flow: self.waits.get(flow, Wait()) for flow in flows}
        for wait in self.waits.values():
            wait.max_flows = max(wait.max_flows, len(flows))
        assert self.policy.num_waiting == len(self.waiting)

    def is_ordinary(self, instance: int) -> bool:
        return instance < self.options.num_instances

    def is_due(self) -> bool:
        if not self.waiting:
            return False
        lengths = [request.num_tokens for request in self.waiting.values()]
        is_full = sum(lengths) >= self.options.max_batch_tokens or len(lengths) >= self.options.max_batch_size
        oldest_s = min(self.added_s[each] for each in self.waiting)
        return is_full or oldest_s + self.options.max_queue_delay_s <= self.now_s

    def short_flows(self) -> set[int]:
        limit = min(self.options.express_tokens, self.options.max_batch_tokens)
        return {flow for flow, requests in self.flows().items() if sum(each.num_tokens for each in requests) <= limit}

    def may_run(self, instance: int) -> bool:
        """What the docstrings say about it."""
        if self.is_ordinary(instance):
            return self.is_due()
        long = [
            number
            for number, batch in self.running.items()
            if self.is_ordinary(number) and sum(tokens(batch)) > self.options.express_tokens
        ]
        return self.is_due() and len(long) == self.options.num_instances and bool(self.short_flows())

    def schedule(self, instance: int = 0) -> list[int]:
        """Start a step; the ids of its requests."""
        expected = self.may_run(instance)
        assert self.policy.is_ready(instance, self.now_s) == expected
        flows, short = self.flows(), self.short_flows()
        batch = self.policy.schedule(instance, self.now_s)
        assert (batch is not None) == expected, "nobody is woken for nothing, nor sleeps on"
        if batch is None:
            return []
        self.running[instance] = batch
        for request in batch.requests:
            assert self.waiting.pop(request.id) is request, "each runs once"
            self.given[request.flow] += request.num_tokens
        self.check_size(batch, self.options.max_batch_tokens)
        if self.is_ordinary(instance):
            self.check_turns(batch, flows)
        else:
            assert {request.flow for request in batch.requests} <= short
            assert sum(tokens(batch)) <= self.options.express_tokens
            for request in batch.requests:
                self.waits[request.flow].num_own_tokens += request.num_tokens
        self.note_flows()
        return [request.id for request in batch.requests]

    def check_size(self, batch: TensorBatch, max_tokens: int) -> None:
        lengths = tokens(batch)
        assert len(lengths) <= self.options.max_batch_size
        assert sum(lengths) <= max_tokens or len(lengths) == 1
        assert len(lengths) * max(lengths) <= self.options.max_padding * sum(lengths)

    def check_turns(self, batch: TensorBatch, flows: dict[int, list[TensorRequest]]) -> None:
        first = batch.requests[0]
        assert flows[first.flow][0] is first, "a turn begins with the oldest"
        for flow, requests in flows.items():
            wait = self.waits[flow]
            limit = wait.max_flows * (4 * self.longest + wait.num_own_tokens)
            assert wait.num_tokens < limit, "a flow has its turn in time"
            if requests[0].id not in self.waiting:
                self.waits[flow] = Wait()
                continue
            wait.num_tokens += sum(tokens(batch))
            wait.num_own_tokens += sum(each.num_tokens for each in batch.requests if each.flow == flow)

    def finish(self, instance: int = 0) -> None:
        batch = self.running.pop(instance)
        self.policy.update(batch, self.now_s)
        self.ended += [request.id for request in batch.requests]

    def step(self) -> list[int]:
        """A step of instance 0, from its begin to its end."""
        ids = self.schedule()
        if ids:
            self.finish()
        return ids


def tokens(batch: TensorBatch) -> list[int]:
    return [request.num_tokens for request in batch.requests]
