"""The *dynamic* policy of models that take packed tokens: a step is bounded by its tokens, and calls share it fairly.

Floor 3. Decides which waiting items run together and on which instance. Knows neither tensors nor threads nor what
time it is. `sardonyx.engine.fair_queue` says whose turn it is.
"""

import msgspec

from sardonyx.engine.fair_queue import FairQueue
from sardonyx.errors import ServeError
from sardonyx.tensors import TensorBatch, TensorRequest, TensorRow


class TokenBudgetOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is decided about the policy, already checked."""

    max_batch_tokens: int
    """Of a step. A longer item runs alone."""
    max_batch_size: int = 256
    """Rows of a step at most."""
    max_padding: float = 1.5
    """The padded view (B, S) that attention works on may be so many times the step's tokens."""
    num_instances: int = 1
    """Ordinary ones, numbered from 0."""
    num_express: int = 0
    """Instances for short calls, numbered behind the ordinary ones."""
    express_tokens: int = 32
    """Of a step of an express instance, and so of the items that it takes. A sentence; where it was 128, a sentence
    that found each instance busy with 100 tokens waited for them, and its p99 under load was 1.3 to 7 times as long."""
    max_queue_delay_s: float = 0.0
    """How long the oldest item waits for a full step while an instance is free."""


class TokenBudgetPolicy:
    """Steps of items of like length by a token budget; a `sardonyx.engine.instances.TensorPolicy`.

    Each request is one item: one row of `num_tokens`. Its `flow` is the call that it is a part of. Items of a call run
    in any order, and any number of calls share a step; `FairQueue` says how, and for how long a call waits at most.

    On the CPU a step occupies its instance for tens of milliseconds, and a short text that comes just then should not
    wait for all of it. So there are express instances, whose threads share the cores with the others'. While each
    ordinary instance is busy with more than `express_tokens`, they take calls of which no more than that waits: not the
    short items of long calls, which would fill them at once, and take cores from larger steps.

    Batch keys, priorities and timeouts of requests are not looked at, and there is no bound on how many wait: whoever
    admits calls sees to that.

    Args:
        name: of the model, for messages.
    """

    preserves_ordering = False

    def __init__(self, name: str, options: TokenBudgetOptions) -> None:
        self._name = name
        self._options = options
        self._queue = FairQueue(
            options.max_batch_tokens,
            options.max_batch_size,
            options.max_padding,
            min(options.express_tokens, options.max_batch_tokens),
        )
        self._running: list[TensorBatch | None] = [None] * (options.num_instances + options.num_express)
        self._num_long = 0
        """Ordinary instances with more than `express_tokens` to do."""

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def check(self, request: TensorRequest) -> None:
        """Every item runs, however long it is."""
        assert request.num_tokens >= 1, f"{self._name}: an item has tokens"
        assert request.batch_size == 1, f"{self._name}: an item is one row"

    def add(self, request: TensorRequest, now_s: float) -> None:
        """Queue an item that passed `check`."""
        self._queue.add(request, now_s)

    def abort(self, request_id: int, now_s: float) -> TensorRequest | None:
        """Forget a waiting item; ``None`` where it does not wait."""
        return self._queue.remove(request_id)

    def is_ready(self, instance: int, now_s: float) -> bool:
        """Whether `schedule` has a batch."""
        if not self._is_due(now_s):
            return False
        return instance < self._options.num_instances or self._has_express()

    def _is_due(self, now_s: float) -> bool:
        """Something waits, and not for company."""
        queue, options = self._queue, self._options
        if not len(queue) or options.max_queue_delay_s <= 0.0:
            return len(queue) > 0
        is_full = queue.num_tokens >= options.max_batch_tokens or len(queue) >= options.max_batch_size
        return is_full or queue.oldest_s + options.max_queue_delay_s <= now_s

    def _has_express(self) -> bool:
        return self._queue.num_short > 0 and self._num_long == self._options.num_instances

    def schedule(self, instance: int, now_s: float) -> TensorBatch | None:
        """Choose what a free instance runs next, or ``None`` to wait."""
        assert self._running[instance] is None, "an instance runs one step at a time"
        if not self.is_ready(instance, now_s):
            return None
        is_ordinary = instance < self._options.num_instances
        requests = self._queue.take() if is_ordinary else self._queue.take_short()
        batch = TensorBatch([TensorRow(request) for request in requests])
        self._running[instance] = batch
        self._num_long += is_ordinary and self._is_long(batch)
        return batch

    def _is_long(self, batch: TensorBatch) -> bool:
        return sum(request.num_tokens for request in batch.requests) > self._options.express_tokens

    def update(self, batch: TensorBatch, now_s: float) -> None:
        """The step's instance is free."""
        instance = next(number for number, running in enumerate(self._running) if running is batch)
        self._running[instance] = None
        self._num_long -= instance < self._options.num_instances and self._is_long(batch)

    def wake_at_s(self, now_s: float) -> float | None:
        """When the oldest item has waited long enough for company."""
        if not len(self._queue) or self._is_due(now_s):
            return None
        return self._queue.oldest_s + self._options.max_queue_delay_s

    def expire(self, now_s: float) -> None:
        """Items wait as long as their calls do."""

    def take_refused(self) -> list[tuple[TensorRequest, ServeError]]:
        """None: whatever is added runs."""
        return []
