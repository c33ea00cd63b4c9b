"""What a step loop asks of a policy: the decisions about its steps. Floor 3."""

from typing import Protocol, runtime_checkable

from sardonyx.core import B, O_contra, Request, Sequence, SequenceEvent
from sardonyx.engine.stats import PolicyStats


class Policy(Protocol[B, O_contra]):
    """Decides what the next step is. Used by the loop's thread only, but for `check`.

    The loop calls ``schedule``, then, if that gave a batch, ``update`` or ``fail``, then ``take_events``; ``add`` and
    ``abort`` come before ``schedule``, never while a batch is out.
    """

    def check(self, request: Request) -> None:
        """Refuse a request that can never run. Any thread, at any time: it reads nothing that changes.

        Raises:
            InvalidRequest: it cannot run.
        """
        ...

    def add(self, sequence: Sequence) -> None:
        """Take over a new sequence."""
        ...

    def abort(self, request_id: str) -> None:
        """End a sequence as CANCELLED; unknown and ended ones are ignored."""
        ...

    def schedule(self, now_s: float) -> B | None:
        """The next step, or ``None`` when there is nothing to run until the next `add`."""
        ...

    def update(self, batch: B, output: O_contra, now_s: float) -> None:
        """The step is done."""
        ...

    def fail(self, batch: B, error: str) -> None:
        """The step failed; `error` may be shown to callers."""
        ...

    def take_events(self) -> list[SequenceEvent]:
        """What happened since the last call."""
        ...

    def stats(self) -> PolicyStats: ...


@runtime_checkable
class AheadPolicy(Policy[B, O_contra], Protocol[B, O_contra]):
    """A policy that can say what comes behind a step whose outcome it does not know.

    ``add`` and ``abort`` may come while one step is out; ``schedule`` only while none is. ``update`` and ``fail`` come
    in the order in which the steps were scheduled.
    """

    def schedule_ahead(self, batch: B, now_s: float) -> B | None:
        """The step to launch behind `batch`, or ``None`` where that one's outcome must be known first."""
        ...
