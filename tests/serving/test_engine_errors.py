import pytest

from sardonyx.core import FinishReason, SequenceEvent
from sardonyx.errors import DeadlineExceeded, EngineDead, EngineError, Overloaded
from sardonyx.serving.engine_errors import error_of


@pytest.mark.parametrize(
    ("reason", "error", "is_alive", "kind", "words"),
    [
        (FinishReason.ERROR, "the step failed", True, EngineError, "the step failed"),
        (FinishReason.ERROR, None, True, EngineError, "the request failed inside the engine"),
        (FinishReason.ERROR, "the step failed", False, EngineDead, "the step failed"),
        (FinishReason.CANCELLED, "deadline", True, DeadlineExceeded, "time was over"),
        (FinishReason.CANCELLED, "queue", True, Overloaded, "no slot came free"),
        (FinishReason.CANCELLED, None, True, EngineDead, "the engine stopped"),
    ],
)
def test_early_end_has_the_error_that_says_what_to_do(reason, error, is_alive, kind, words):
    event = SequenceEvent(request_id="a", finish_reason=reason, error=error)
    found = error_of(event, is_alive=is_alive, retry_after_s=lambda: 4.0)
    assert type(found) is kind
    assert words in found.message
    if isinstance(found, Overloaded):
        assert found.retry_after_s == 4.0
