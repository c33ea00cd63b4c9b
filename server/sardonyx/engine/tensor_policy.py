"""What an instance loop asks of a policy. `sardonyx.engine.dynamic` and `sardonyx.engine.sequences` are such policies.

Floor 3.
"""

from typing import Protocol

from sardonyx.errors import ServeError
from sardonyx.tensors import TensorBatch, TensorRequest


class TensorPolicy(Protocol):
    """Decides which requests run together, and when. Used under the loop's lock only, but for `check`."""

    @property
    def preserves_ordering(self) -> bool:
        """Answers leave in the order of the requests. Never changes."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests that were added and neither scheduled nor refused nor aborted."""
        ...

    def check(self, request: TensorRequest) -> None:
        """Refuse a request that can never run. Any thread, at any time: it reads nothing that changes.

        Raises:
            InvalidRequest: it cannot run.
        """
        ...

    def add(self, request: TensorRequest, now_s: float) -> None:
        """Take over a new request.

        Raises:
            Overloaded: a queue is full.
            InvalidRequest: what it goes on from is not there.
        """
        ...

    def abort(self, request_id: int, now_s: float) -> TensorRequest | None:
        """Forget a waiting request; ``None`` for all others."""
        ...

    def is_ready(self, instance: int, now_s: float) -> bool:
        """`schedule` may have a batch: true where it has, and false from when it said no until something changed."""
        ...

    def schedule(self, instance: int, now_s: float) -> TensorBatch | None:
        """What a free instance runs next; ``None``: nothing yet. `update` follows before it is asked again."""
        ...

    def wake_at_s(self, now_s: float) -> float | None:
        """When `is_ready` turns true, or `expire` has something to do, with nothing else happening."""
        ...

    def expire(self, now_s: float) -> None:
        """Do what is due."""
        ...

    def update(self, batch: TensorBatch, now_s: float) -> None:
        """The step is over, well or badly."""
        ...

    def take_refused(self) -> list[tuple[TensorRequest, ServeError]]:
        """Requests that were added and will not run, since the last call."""
        ...
