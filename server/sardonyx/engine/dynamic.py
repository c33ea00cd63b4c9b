"""The *dynamic* policy: stateless requests share a step where their shapes agree.

Floor 3. Decides which waiting requests run together, and when it pays to wait for more. Knows neither tensors nor
threads nor what time it is.

Source: Triton, ModelDynamicBatching in model_config.proto; core/src/dynamic_batch_scheduler.cc for what the
documentation leaves open.
"""

import math

import msgspec

from sardonyx.engine.request_queue import RETRY_AFTER_S, RequestQueue
from sardonyx.engine.request_queue import QueuePolicy as QueuePolicy
from sardonyx.errors import InvalidRequest, Overloaded, ServeError
from sardonyx.tensors import TensorBatch, TensorRequest, TensorRow


class DynamicOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator decides about the dynamic policy; Triton's ``dynamic_batching``."""

    max_batch_size: int = 0
    """Rows of a step at most; 0: the model has no batch axis."""
    is_batching: bool = False
    """False: each request runs alone, in the order of the queue."""
    preferred_batch_sizes: tuple[int, ...] = ()
    """Sizes that are sent at once. None: `max_batch_size`."""
    max_queue_delay_s: float = 0.0
    """How long the oldest request waits for company while an instance is free."""
    preserve_ordering: bool = False
    num_priority_levels: int = 0
    """0: there is one level."""
    default_priority: int = 0
    default_queue_policy: QueuePolicy = QueuePolicy()
    queue_policies: dict[int, QueuePolicy] = {}
    """By level, where it differs from the default."""


class DynamicPolicy:
    """Dynamic batching over a priority queue; a `sardonyx.engine.instances.TensorPolicy`.

    All instances take from one queue, so the number of an instance means nothing here.

    Args:
        name: of the model, for messages.
        options: the operator's, already checked.
    """

    def __init__(self, name: str, options: DynamicOptions) -> None:
        self._name = name
        self._options = options
        self._queue = RequestQueue(
            options.num_priority_levels,
            options.default_priority,
            options.default_queue_policy,
            options.queue_policies,
        )
        self._preferred = frozenset(options.preferred_batch_sizes or (options.max_batch_size,))
        self._min_preferred = min(self._preferred)
        self._max_preferred = max(self._preferred)
        self._delay_s = options.max_queue_delay_s if options.is_batching else 0.0
        self._refused: list[tuple[TensorRequest, ServeError]] = []
        # What `is_ready` knows without walking the queue. `_has_news` errs towards true; `schedule` puts it right.
        self._has_news = False
        self._send_at_s = math.inf
        self._last_key: object = None
        self._is_mixed = False

    @property
    def preserves_ordering(self) -> bool:
        return self._options.preserve_ordering

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def check(self, request: TensorRequest) -> None:
        """Refuse what never fits a step.

        Raises:
            InvalidRequest: more rows than a step may have.
        """
        if request.batch_size > max(1, self._options.max_batch_size):
            limit = max(1, self._options.max_batch_size)
            raise InvalidRequest(f"inference request batch-size must be <= {limit} for '{self._name}'")

    def add(self, request: TensorRequest, now_s: float) -> None:
        """Queue a request that passed `check`.

        Raises:
            Overloaded: its level's queue is full.
        """
        self._queue.add(request, now_s)
        if self._delay_s == 0.0:
            self._has_news = True
            return
        if len(self._queue) == 1:
            self._is_mixed = False
            self._send_at_s = now_s + self._delay_s
        elif request.batch_key != self._last_key:
            self._is_mixed = True
        self._last_key = request.batch_key
        # A batch that does not go out for its age has a preferred size, or more, or cannot take the next request.
        if self._is_mixed or self._queue.num_rows >= self._min_preferred:
            self._has_news = True

    def abort(self, request_id: int, now_s: float) -> TensorRequest | None:
        """Forget a waiting request; ``None`` where it does not wait."""
        request = self._queue.remove(request_id)
        if request is not None:
            self._note_change()
        return request

    def _note_change(self) -> None:
        """The queue is another one than `schedule` saw."""
        self._has_news = len(self._queue) > 0
        if not self._has_news:
            self._send_at_s = math.inf

    def is_ready(self, instance: int, now_s: float) -> bool:
        """`schedule` may have a batch. Sometimes wrong when true, never when false."""
        return self._has_news or self._send_at_s <= now_s

    def wake_at_s(self, now_s: float) -> float | None:
        """When `is_ready` turns true, or `expire` has something to do, with nothing else happening."""
        at_s = self._queue.next_expiry_s
        if now_s < self._send_at_s < at_s:
            at_s = self._send_at_s
        return at_s if at_s < math.inf else None

    def expire(self, now_s: float) -> None:
        """Refuse or delay the requests that have waited too long."""
        if self._queue.next_expiry_s > now_s:
            return
        for request in self._queue.expire(now_s):
            error = Overloaded("Request timeout expired", retry_after_s=RETRY_AFTER_S)
            self._refused.append((request, error))
        self._note_change()

    def take_refused(self) -> list[tuple[TensorRequest, ServeError]]:
        """Requests that were added and will not run, since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def schedule(self, instance: int, now_s: float) -> TensorBatch | None:
        """Choose what a free instance runs next, or ``None`` to wait.

        The batch is a prefix of the queue: all rows fit `max_batch_size`, all keys are equal. The longest prefix of a
        preferred size goes at once; any other goes when it cannot grow or when its oldest request has waited for
        `max_queue_delay_s`. While no instance is free nobody asks, and the queue grows.
        """
        self.expire(now_s)
        self._has_news = False
        self._send_at_s = math.inf
        if not len(self._queue):
            return None
        count = self._choose(now_s) if self._options.is_batching else 1
        if not count:
            return None
        batch = TensorBatch([TensorRow(request) for request in self._queue.take(count)])
        self._note_change()
        return batch

    def _choose(self, now_s: float) -> int:
        """How many requests go now; with 0, `_send_at_s` says when they go at the latest."""
        count = total = best = 0
        key: object = None
        oldest_s, is_full = math.inf, False
        for waiting in self._queue:
            request = waiting.request
            grown = total + request.batch_size
            if not count:
                key = request.batch_key
            else:
                if grown > self._max_preferred:
                    # The next preferred size is out of reach, so this is as good as one.
                    best = best or count
                    if self._delay_s == 0.0:
                        break
                if grown > self._options.max_batch_size or request.batch_key != key:
                    is_full = True
                    break
            total, count = grown, count + 1
            oldest_s = min(oldest_s, waiting.added_s)
            if total in self._preferred:
                best = count
        send_at_s = oldest_s + self._delay_s
        is_late = self._delay_s > 0.0 and send_at_s <= now_s
        if best and not is_late:
            return best
        if is_full or is_late or total >= self._max_preferred or self._delay_s == 0.0:
            return count
        self._send_at_s = send_at_s
        return 0

    def update(self, batch: TensorBatch, now_s: float) -> None:
        """Nothing is left of a stateless step."""
