"""Where stateless requests wait: by priority level, each with its own bound and time limit.

Floor 3. Plain data: no threads, no clock, and no opinion about batches.

Source: Triton, ModelQueuePolicy in model_config.proto.
"""

import heapq
import math
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from sardonyx.errors import Overloaded
from sardonyx.tensors import TensorRequest

RETRY_AFTER_S = 1.0
"""A queue of tensor requests moves on within a step, and most steps are shorter than this."""


class QueuePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How long, and in what company, requests of a level may wait."""

    timeout_action: Literal["reject", "delay"] = "reject"
    """What happens to a request whose time is over: it is refused, or it waits on behind the others of its level."""
    default_timeout_s: float = 0.0
    """0: no limit."""
    allows_timeout_override: bool = False
    """A request's own limit counts where it is shorter."""
    max_queue_size: int = 0
    """Waiting requests of the level; 0: any number."""

    def timeout_s(self, request: TensorRequest) -> float:
        """How long the request may wait; infinite where nothing limits it."""
        limit_s = self.default_timeout_s or math.inf
        if self.allows_timeout_override and request.timeout_s > 0:
            return min(limit_s, request.timeout_s)
        return limit_s


@dataclass(slots=True, eq=False)
class WaitingRequest:
    """A request in the queue."""

    request: TensorRequest
    level: int
    added_s: float
    expires_s: float
    """Infinite: never."""


@dataclass(slots=True, eq=False)
class _Level:
    policy: QueuePolicy
    fresh: OrderedDict[int, WaitingRequest] = field(default_factory=OrderedDict)
    delayed: OrderedDict[int, WaitingRequest] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self.fresh) + len(self.delayed)


class RequestQueue:
    """Waiting requests in the order in which they should run: by level, then as they came, delayed ones last.

    Adding, removing and taking cost the same however many wait, but for the logarithm of the time limits and of the
    levels in use.

    Args:
        num_levels: levels are 1 to this; 0: there is one.
        default_level: of requests with priority 0, or with one that there is not.
        default_policy: of levels that are not in `policies`.
    """

    def __init__(
        self, num_levels: int, default_level: int, default_policy: QueuePolicy, policies: Mapping[int, QueuePolicy]
    ) -> None:
        self._num_levels = num_levels
        self._default_level = default_level
        self._default_policy = default_policy
        self._policies = policies
        # Made when first used and dropped when empty: a config may allow millions of levels.
        self._levels: dict[int, _Level] = {}
        self._order: list[int] = []
        self._waiting: dict[int, WaitingRequest] = {}
        self._expiries: list[tuple[float, int]] = []
        self.num_rows = 0
        """Sum of the waiting requests' batch sizes."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[WaitingRequest]:
        for number in self._order:
            level = self._levels[number]
            yield from level.fresh.values()
            yield from level.delayed.values()

    @property
    def next_expiry_s(self) -> float:
        """No later than the next time limit; infinite where there is none."""
        return self._expiries[0][0] if self._expiries else math.inf

    def add(self, request: TensorRequest, now_s: float) -> None:
        """Put a request behind the others of its level.

        Raises:
            Overloaded: the level is full.
        """
        number = request.priority if 0 < request.priority <= self._num_levels else self._default_level
        level = self._levels.get(number)
        if level is None:
            level = self._levels[number] = _Level(self._policies.get(number, self._default_policy))
            insort(self._order, number)
        policy = level.policy
        if 0 < policy.max_queue_size <= len(level):
            raise Overloaded("Exceeds maximum queue size", retry_after_s=RETRY_AFTER_S)
        waiting = WaitingRequest(request, number, now_s, now_s + policy.timeout_s(request))
        level.fresh[request.id] = self._waiting[request.id] = waiting
        self.num_rows += request.batch_size
        if waiting.expires_s < math.inf:
            heapq.heappush(self._expiries, (waiting.expires_s, request.id))
            self._compact()

    def _compact(self) -> None:
        """Drop the time limits of requests that are gone, once they are the most part."""
        if len(self._expiries) > 64 + 2 * len(self._waiting):
            self._expiries = [(each.expires_s, id) for id, each in self._waiting.items() if each.expires_s < math.inf]
            heapq.heapify(self._expiries)

    def remove(self, request_id: int) -> TensorRequest | None:
        """Take a request out of turn; ``None`` where it does not wait."""
        waiting = self._waiting.get(request_id)
        if waiting is None:
            return None
        level = self._levels[waiting.level]
        if level.fresh.pop(request_id, None) is None:
            del level.delayed[request_id]
        self._forget(waiting)
        return waiting.request

    def take(self, count: int) -> list[TensorRequest]:
        """The first requests, so many of them; they wait no more."""
        taken = []
        for _ in range(count):
            level = self._levels[self._order[0]]
            _, waiting = (level.fresh or level.delayed).popitem(last=False)
            self._forget(waiting)
            taken.append(waiting.request)
        return taken

    def _forget(self, waiting: WaitingRequest) -> None:
        request = waiting.request
        del self._waiting[request.id]
        self.num_rows -= request.batch_size
        if not self._levels[waiting.level]:
            del self._levels[waiting.level]
            self._order.remove(waiting.level)

    def expire(self, now_s: float) -> list[TensorRequest]:
        """Do what the policies say to requests whose time is over; the ones that are refused, which wait no more."""
        refused = []
        while self._expiries and self._expiries[0][0] <= now_s:
            expires_s, request_id = heapq.heappop(self._expiries)
            waiting = self._waiting.get(request_id)
            if waiting is None or waiting.expires_s != expires_s:
                continue
            level = self._levels[waiting.level]
            if level.policy.timeout_action == "delay":
                waiting.expires_s = math.inf
                level.delayed[request_id] = level.fresh.pop(request_id)
            else:
                self.remove(request_id)
                refused.append(waiting.request)
        return refused
