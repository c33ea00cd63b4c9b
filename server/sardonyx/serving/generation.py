"""One API call on its way: its choices, what they gained so far, and the coroutine that waits for them.

Floor 4. All of it runs on the event loop; the step loop's thread never sees a `Generation`.
"""

from collections.abc import AsyncIterator

from sardonyx.errors import ServeError
from sardonyx.serving.options import Choice, PromptInfo, TextChunk, Usage


class Generation:
    """The choices of one API call: ``len(prompts) * n``, index prompt-major. Made by `TextModel.start`.

    Read it once: either iterate or `collect`. Whoever holds one must end it on every path: read to the end, or `abort`.
    Closing or cancelling the iterator, or cancelling `collect`, aborts; nothing is awaited on the way out.
    """

    id: str
    prompts: list[PromptInfo]
    usage: Usage

    def __aiter__(self) -> AsyncIterator[TextChunk]:
        """Chunks as they come; those that a slow reader missed are merged, by choice.

        Raises:
            EngineError: a step that held one of the choices failed. The other choices are aborted.
            EngineDead: the engine stopped.
            DeadlineExceeded: the time was over first.
            ModelNotReady: the model was unloaded, or the server shut down, before the end.
        """
        raise NotImplementedError

    async def collect(self) -> list[Choice]:
        """All choices, finished, by index; `best_of` reduced to n. Raises what the iterator raises."""
        raise NotImplementedError

    def abort(self, error: ServeError | None = None) -> None:
        """End every unfinished choice; their slots are free at the next step. Synchronous, idempotent, never raises.

        Args:
            error: raised from the iterator or `collect`. Without one, choices end as CANCELLED with what they have.
        """
        raise NotImplementedError
