"""Where the items of calls wait for steps of a token model: who is next, and who fits in beside.

Floor 3. Plain data: no threads, no instances, and no clock.

Two ideas. *Fair sharing*: a call (flow) that has had more than its share of the tokens waits for those that have had
less. There is a virtual clock: what a flow would have got by now that always got its equal share. Each flow has a tag,
which says the same of what it really got. *Like lengths*: attention sees a step's rows filled up to the longest, so
waiting items lie in classes of lengths, and a step takes those of one class, and of its neighbours while little enough
is filled up.

Source: Goyal, Vin, Cheng, "Start-time Fair Queuing" (SIGCOMM 1996), for tags; the rest is said at `FairQueue`.
"""

import itertools
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from sardonyx.engine.turn_heap import TurnHeap
from sardonyx.tensors import TensorRequest


@dataclass(slots=True, eq=False)
class WaitingItem:
    """A request in the queue, and where."""

    request: TensorRequest
    flow: "Flow"
    length_class: int
    number: int
    """Counts what came."""
    added_s: float


@dataclass(slots=True, eq=False)
class Flow:
    """The waiting part of a call."""

    id: int
    number: int
    """Counts flows as they came."""
    tag: float
    """The virtual time to which it has had its share."""
    has_begun: bool = False
    """Some item of it was taken."""
    num_tokens: int = 0
    items: dict[int, OrderedDict[int, WaitingItem]] = field(default_factory=dict)
    """By class of length, then by request, as they came. Without empty classes."""

    @property
    def oldest(self) -> WaitingItem:
        """The first that came of those that wait."""
        return min((next(iter(items.values())) for items in self.items.values()), key=lambda item: item.number)

    def in_order(self) -> list[WaitingItem]:
        """All its items, as they came."""
        items = [item for items in self.items.values() for item in items.values()]
        return sorted(items, key=lambda item: item.number)


class Step:
    """The requests of a step as it grows.

    Args:
        max_padding: (B, S) may be so many times its tokens.
    """

    __slots__ = ("_max_padding", "_max_rows", "_max_tokens", "longest", "num_tokens", "requests")

    def __init__(self, max_tokens: int, max_rows: int, max_padding: float) -> None:
        self._max_tokens = max_tokens
        self._max_rows = max_rows
        self._max_padding = max_padding
        self.requests: list[TensorRequest] = []
        self.num_tokens = 0
        self.longest = 0

    @property
    def is_full(self) -> bool:
        """Nothing fits any more."""
        return self.num_tokens >= self._max_tokens or len(self.requests) >= self._max_rows

    def has_room(self, length: int) -> bool:
        """Within the budgets for tokens and rows."""
        return self.num_tokens + length <= self._max_tokens and len(self.requests) < self._max_rows

    def is_like(self, length: int) -> bool:
        """Little enough would be filled up."""
        area = (len(self.requests) + 1) * max(self.longest, length)
        return area <= self._max_padding * (self.num_tokens + length)

    def add(self, request: TensorRequest) -> None:
        """Take a request, whether it fits or not."""
        self.requests.append(request)
        self.num_tokens += request.num_tokens
        self.longest = max(self.longest, request.num_tokens)


class FairQueue:
    """Items that wait, by flow and by length.

    A step begins with the oldest item of the flow whose turn it is. Then it takes, of the first item's class of length,
    then of shorter ones, then of longer ones, always from the flow that is to have the next turn among those with such
    items, while tokens, rows and padding allow. Everything costs the logarithm of the waiting flows, and a step besides
    a look at each class.

    Turns. Time is counted in tokens, and `max_batch_tokens` of it are a round. The turn is that of the flow with the
    lowest tag, but within a round flows come first of which nothing has run, as they came: a short call need not wait
    for a long one that is owed less than a step. A flow begins with the clock's time as its tag, and what it is given
    is added. After each step the clock moves on by the step's tokens through the number of flows that waited; nor does
    it lag behind a flow that has the turn. A flow that has its turn is owed no more than D, below, and nothing where no
    other waits: its tag is drawn up to that. A flow that is given something as it fits is lent no more than D.

    Nobody starves. Let N flows at most wait at once, and D be the larger of `max_batch_tokens` and the longest item
    that there was. A flow that is given w tokens meanwhile has its turn, in which its oldest item runs, before `take`
    has given 4 N D + N w tokens. For its tag is at most D + w ahead of where the clock was; T tokens move the clock by
    T / N at least; once it is a round and D beyond the tag (3 N D + N w, and the last step's), whoever comes, or has a
    turn, has a tag of a later round, so each other flow has one turn more at most.

    Args:
        max_batch_tokens: of a step. A longer item runs alone.
        max_batch_size: rows of a step.
        max_padding: at least 1.
        short_tokens: flows with at most so many waiting tokens are short.
    """

    def __init__(self, max_batch_tokens: int, max_batch_size: int, max_padding: float, short_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_size = max_batch_size
        self._max_padding = max_padding
        self._short_tokens = short_tokens
        self._clock = 0.0
        self._credit = max_batch_tokens
        self._bounds = [0]
        self._items: OrderedDict[int, WaitingItem] = OrderedDict()
        self._flows: dict[int, Flow] = {}
        self._numbers = itertools.count()
        self._turns: TurnHeap[Flow] = TurnHeap(self._turn, lambda flow: flow.num_tokens > 0)
        self._short: TurnHeap[Flow] = TurnHeap(self._turn, self._is_short)
        self._classes: dict[int, TurnHeap[Flow]] = {}
        self.num_tokens = 0
        """Of all waiting items."""
        self.num_short = 0
        """Flows that are short."""

    def __len__(self) -> int:
        return len(self._items)

    @property
    def oldest_s(self) -> float:
        """When the item came that has waited longest. Something must wait."""
        return next(iter(self._items.values())).added_s

    def _turn(self, flow: Flow) -> tuple[float, float, int]:
        """Lowest first. Only ever grows."""
        return flow.tag // self._max_batch_tokens, flow.tag if flow.has_begun else -1.0, flow.number

    def _is_short(self, flow: Flow) -> bool:
        return 0 < flow.num_tokens <= self._short_tokens

    def add(self, request: TensorRequest, now_s: float) -> None:
        """Queue a request of at least one token."""
        number = next(self._numbers)
        self._credit = max(self._credit, request.num_tokens)
        flow = self._flows.get(request.flow)
        if flow is None:
            flow = self._flows[request.flow] = Flow(request.flow, number, self._clock)
        item = WaitingItem(request, flow, self._class_of(request.num_tokens), number, now_s)
        self._items[request.id] = item
        items = flow.items.get(item.length_class)
        if items is None:
            items = flow.items[item.length_class] = OrderedDict()
        items[request.id] = item
        self._count(flow, request.num_tokens)
        self._turns.add(flow)
        if len(items) == 1:
            self._class(item.length_class).add(flow)

    def _class_of(self, length: int) -> int:
        """Any two lengths of a class are so alike that rows of them may be filled up to each other."""
        bounds = self._bounds
        while bounds[-1] < length:
            bounds.append(max(bounds[-1] + 1, int(bounds[-1] * self._max_padding)))
        return bisect_left(bounds, length)

    def _class(self, number: int) -> TurnHeap[Flow]:
        heap = self._classes.get(number)
        if heap is None:
            heap = self._classes[number] = TurnHeap(self._turn, lambda flow: number in flow.items)
        return heap

    def _count(self, flow: Flow, num_tokens: int) -> None:
        """So many more tokens of a flow wait."""
        was_short = self._is_short(flow)
        flow.num_tokens += num_tokens
        self.num_tokens += num_tokens
        is_short = self._is_short(flow)
        self.num_short += is_short - was_short
        if is_short:
            self._short.add(flow)

    def remove(self, request_id: int) -> TensorRequest | None:
        """Take a request out of turn; ``None`` where it does not wait."""
        item = self._items.pop(request_id, None)
        if item is None:
            return None
        items = item.flow.items[item.length_class]
        del items[request_id]
        if not items:
            del item.flow.items[item.length_class]
        self._count(item.flow, -item.request.num_tokens)
        if not item.flow.items:
            del self._flows[item.flow.id]
        return item.request

    def take(self) -> list[TensorRequest]:
        """The requests of the next step; they wait no more. None wait: none."""
        flow = self._turns.peek()
        if flow is None:
            return []
        num_flows = len(self._flows)
        step = Step(self._max_batch_tokens, self._max_batch_size, self._max_padding)
        self._clock = max(self._clock, flow.tag)
        first = flow.oldest
        self._give(flow, first.request.num_tokens, is_first=True)
        self._move(first, step)
        for number in self._near(first.length_class):
            if step.is_full:
                break
            self._take_class(number, step)
        self._clock += step.num_tokens / num_flows
        return step.requests

    def take_short(self) -> list[TensorRequest]:
        """Requests of short flows, `short_tokens` together at most, which wait no more; flow by flow while all fits."""
        num_flows = len(self._flows)
        step = Step(self._short_tokens, self._max_batch_size, self._max_padding)
        has_all = True
        while has_all and not step.is_full and (flow := self._short.peek()) is not None:
            for item in flow.in_order():
                length = item.request.num_tokens
                if step.has_room(length) and step.is_like(length):
                    self._give(flow, length)
                    self._move(item, step)
                else:
                    has_all = False
        if step.requests:
            self._clock += step.num_tokens / num_flows
        return step.requests

    def _near(self, number: int) -> Iterator[int]:
        """Classes in which something waits: this one, shorter ones downwards, longer ones upwards."""
        numbers = sorted(self._classes)
        place = bisect_left(numbers, number)
        return itertools.chain(numbers[place : place + 1], reversed(numbers[:place]), numbers[place + 1 :])

    def _take_class(self, number: int, step: Step) -> None:
        """Give a step of a class what fits, by turns of flows."""
        heap = self._classes[number]
        while (flow := heap.peek()) is not None:
            item = next(iter(flow.items[number].values()))
            length = item.request.num_tokens
            if not step.has_room(length) or not step.is_like(length):
                return
            self._give(flow, length)
            self._move(item, step)
        del self._classes[number]

    def _move(self, item: WaitingItem, step: Step) -> None:
        step.add(item.request)
        self.remove(item.request.id)

    def _give(self, flow: Flow, num_tokens: int, *, is_first: bool = False) -> None:
        """Put what a flow is given on its tag."""
        if is_first:
            owed = self._credit if len(self._flows) > 1 else 0
            flow.tag = max(flow.tag, self._clock - owed) + num_tokens
        else:
            flow.tag = max(flow.tag, min(flow.tag + num_tokens, self._clock + self._credit))
        flow.has_begun = True
