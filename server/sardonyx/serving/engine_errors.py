"""What the early end of a sequence means for whoever asked for it. Floor 4."""

from collections.abc import Callable

from sardonyx.core import FinishReason, SequenceEvent
from sardonyx.errors import DeadlineExceeded, EngineDead, EngineError, Overloaded, ServeError


def deadline_exceeded() -> DeadlineExceeded:
    """A request's time was over."""
    return DeadlineExceeded("the request's time was over before its answer was complete")


def error_of(event: SequenceEvent, *, is_alive: bool, retry_after_s: Callable[[], float]) -> ServeError:
    """Of an event that ends a sequence as ERROR or CANCELLED.

    Args:
        event: the sequence's last.
        is_alive: the engine still takes requests.
        retry_after_s: when a request that waited too long for a slot should come back.
    """
    if event.finish_reason is FinishReason.ERROR:
        kind = EngineError if is_alive else EngineDead
        return kind(event.error or "the request failed inside the engine")
    match event.error:
        case "deadline":
            return deadline_exceeded()
        case "queue":
            return Overloaded("no slot came free in time; try again later", retry_after_s=retry_after_s())
        case _:
            return EngineDead("the engine stopped before the request was finished")
