"""One API call on its way: its choices, what they gained so far, and the coroutine that waits for them.

Floor 4. All of it runs on the event loop; the step loop's thread never sees a `Generation`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from sardonyx.core import FinishReason, Request, SequenceEvent, TokenLogprobs
from sardonyx.errors import EngineDead, EngineError, RequestAborted, ServeError
from sardonyx.metrics import ModelMetrics
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.serving.admission import Reservation
from sardonyx.serving.calls import Call
from sardonyx.serving.completion import Completion, best, merge, token_info
from sardonyx.serving.dispatch import EventDispatch
from sardonyx.serving.engine_errors import deadline_exceeded, error_of
from sardonyx.serving.options import Choice, TextChunk, TokenInfo, Usage
from sardonyx.serving.pool import WorkerPool

logger = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class TextRuntime:
    """What the generations of one loaded model share."""

    model_name: str
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    dispatch: EventDispatch
    pool: WorkerPool
    metrics: ModelMetrics
    retry_after_s: Callable[[], float]
    """When a request that waited too long for a slot should come back."""


@dataclass(slots=True)
class _Sequence:
    """One choice under way."""

    completion: Completion
    request: Request
    prompt_index: int
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0


class Generation:
    """The choices of one API call: ``len(prompts) * n``, index prompt-major. Made by `TextModel.start`.

    Read it once: either iterate or `collect`. Whoever holds one must end it on every path: read to the end, or `abort`.
    Closing or cancelling the iterator, or cancelling `collect`, aborts; nothing is awaited on the way out.

    Args:
        call: not yet submitted.
        reservation: released when the generation ends.
        on_end: called once, synchronously, when it ends.
    """

    def __init__(
        self, call: Call, runtime: TextRuntime, reservation: Reservation, on_end: Callable[["Generation"], None]
    ) -> None:
        self.id = call.id
        self.prompts = call.prompts
        self.usage = Usage(prompt_tokens=sum(len(prompt.token_ids) for prompt in call.prompts))
        self._call = call
        self._runtime = runtime
        self._reservation = reservation
        self._on_end = on_end
        self._num_each = call.num_each
        self._unfinished: dict[str, _Sequence] = {}
        self._pending: dict[int, TextChunk] = {}
        """By choice: what the reader has not taken. One chunk a choice however slow it is."""
        self._prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        """By prompt: come in, not yet in `prompts`."""
        self._unscored = set(range(len(call.prompts))) if call.options.num_prompt_logprobs is not None else set[int]()
        """Prompts whose log-probabilities have not come."""
        self._error: ServeError | None = None
        self._reasons: set[FinishReason] = set()
        self._first_token_s: float | None = None
        self._has_ended = False
        self._is_streaming = False
        self._news = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def submit(self) -> None:
        """Give the requests to the engine. Once, by `TextModel`.

        Raises:
            ServeError: the engine is dead, or refused a request; what was submitted is aborted.
        """
        loop = asyncio.get_running_loop()
        # The engine ends requests at their deadline; this ends them where a step hangs.
        self._timer = loop.call_later(self._call.deadline_s - self._runtime.dispatch.clock(), self._expire)
        options, runtime = self._call.options, self._runtime
        for index, request in enumerate(self._call.requests):
            completion = Completion(
                index, runtime.tokenizer, options, prompt_ids=request.prompt_ids, eos_token_ids=runtime.eos_token_ids
            )
            sequence = _Sequence(completion, request, prompt_index=index // self._num_each)
            self._unfinished[request.id] = sequence
        try:
            for request_id, sequence in list(self._unfinished.items()):
                if sequence.request.max_tokens == 0 and sequence.request.num_prompt_logprobs is None:
                    self._take(request_id, SequenceEvent(request_id=request_id, finish_reason=FinishReason.LENGTH))
                else:
                    runtime.dispatch.submit(sequence.request, self._take)
        except BaseException as error:
            self.abort(error if isinstance(error, ServeError) else EngineError("internal error"))
            raise

    async def __aiter__(self) -> AsyncIterator[TextChunk]:
        """Chunks as they come; those that a slow reader missed are merged, by choice.

        Raises:
            EngineError: a step that held one of the choices failed. The other choices are aborted.
            EngineDead: the engine stopped.
            DeadlineExceeded: the time was over first.
            Overloaded: no slot came free within the queue's time limit.
            ModelNotReady: the model was unloaded, or the server shut down, before the end.
        """
        assert self._num_each == self._call.options.n, "best_of cannot be streamed"
        self._is_streaming = True
        try:
            while True:
                await self._describe_prompts()
                # A choice of a prompt that is not scored yet stays: its reader counts on `PromptInfo.logprobs`.
                ready = [index for index in self._pending if index // self._num_each not in self._unscored]
                for index in ready:
                    yield self._pending.pop(index)
                if ready:
                    continue
                if self._error is not None:
                    raise self._error
                if self._has_ended:
                    return
                self._news.clear()
                await self._news.wait()
        finally:
            self.abort()

    async def collect(self) -> list[Choice]:
        """All choices, finished, by index; `best_of` reduced to n. Raises what the iterator raises."""
        try:
            while not self._has_ended:
                self._news.clear()
                await self._news.wait()
            if self._error is not None:
                raise self._error
            await self._describe_prompts()
        finally:
            self.abort()
        choices = [_choice(self._pending.pop(index)) for index in range(len(self._call.requests))]
        return self._reduce(choices)

    def abort(self, error: ServeError | None = None) -> None:
        """End every unfinished choice; their slots are free at the next step. Synchronous, idempotent, never raises.

        Args:
            error: raised from the iterator or `collect`. Without one, choices end as CANCELLED with what they have.
        """
        if self._has_ended:
            return
        if error is None and self._unscored:
            error = RequestAborted("the request was stopped before its prompt was scored")
        self._error = error
        # Time that ran out is no error of the engine's, and is not counted as one.
        reason = FinishReason.ERROR if isinstance(error, EngineError | EngineDead) else FinishReason.CANCELLED
        now_s = self._runtime.dispatch.clock()
        for request_id, sequence in list(self._unfinished.items()):
            self._runtime.dispatch.abort(request_id)
            chunk = sequence.completion.cut()
            if error is None:
                self._offer(chunk)
            self._finish(request_id, sequence, reason, now_s)
        self._end(now_s)

    def _take(self, request_id: str, event: SequenceEvent) -> None:
        """One event of one of our sequences, called by the dispatch on the event loop."""
        sequence = self._unfinished[request_id]
        now_s = self._runtime.dispatch.clock()
        if event.started_s is not None:
            sequence.started_s = event.started_s
        if event.finish_reason is FinishReason.ERROR or event.finish_reason is FinishReason.CANCELLED:
            dispatch, retry_after_s = self._runtime.dispatch, self._runtime.retry_after_s
            self.abort(error_of(event, is_alive=dispatch.is_alive, retry_after_s=retry_after_s))
            return
        num_tokens = sequence.completion.num_tokens
        chunk = sequence.completion.push(event)
        self._count(sequence, event, sequence.completion.num_tokens - num_tokens, now_s)
        if sequence.prompt_index in self._unscored and sequence.request.num_prompt_logprobs is not None:
            self._prompt_logprobs[sequence.prompt_index] = event.prompt_logprobs or []
            self._unscored.discard(sequence.prompt_index)
        self._offer(chunk)
        if chunk.finish_reason is not None:
            if event.finish_reason is None:
                self._runtime.dispatch.abort(request_id)
            self._finish(request_id, sequence, chunk.finish_reason, now_s)
            if not self._unfinished:
                self._end(now_s)

    def _count(self, sequence: _Sequence, event: SequenceEvent, num_tokens: int, now_s: float) -> None:
        """Usage and latencies. `num_tokens` of the event's tokens belong to the completion."""
        if not num_tokens:
            return
        metrics = self._runtime.metrics
        self.usage.completion_tokens += num_tokens
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
            self._first_token_s = now_s if self._first_token_s is None else self._first_token_s
            metrics.observe_ttft(now_s - self._call.arrival_s)
            if sequence.completion.index % self._num_each == 0:
                # The other choices of a prompt find it in the cache; it was computed, and is counted, once.
                self.usage.cached_tokens += event.num_cached_tokens
            num_tokens -= 1
        if num_tokens:
            metrics.observe_itl((now_s - max(sequence.last_token_s, sequence.first_token_s)) / num_tokens, num_tokens)
        sequence.last_token_s = now_s

    def _offer(self, chunk: TextChunk) -> None:
        """Give a chunk to the reader. One that shows nothing waits for the next."""
        pending = self._pending.setdefault(chunk.index, chunk)
        if pending is not chunk:
            merge(pending, chunk)
        if self._is_streaming and (chunk.text or chunk.tokens or chunk.finish_reason is not None):
            self._news.set()

    def _finish(self, request_id: str, sequence: _Sequence, reason: FinishReason, now_s: float) -> None:
        """One choice is over."""
        del self._unfinished[request_id]
        self._runtime.dispatch.forget(request_id)
        self._reasons.add(reason)
        arrival_s, first_token_s = self._call.arrival_s, sequence.first_token_s
        self._runtime.metrics.observe_request(
            reason,
            e2e_s=now_s - arrival_s,
            num_prompt_tokens=len(sequence.request.prompt_ids),
            num_completion_tokens=sequence.completion.num_tokens,
            ttft_s=None if first_token_s is None else first_token_s - arrival_s,
            queue_s=None if sequence.started_s is None else sequence.started_s - arrival_s,
        )

    def _end(self, now_s: float) -> None:
        """All choices are over: give back what the call held, and say so in one line."""
        self._has_ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._reservation.release(was_served=self._error is None and FinishReason.CANCELLED not in self._reasons)
        self._on_end(self)
        self._news.set()
        self._log(now_s)

    def _log(self, now_s: float) -> None:
        call, usage = self._call, self.usage
        first_s = self._first_token_s
        fields = {
            "request_id": self.id,
            "model": self._runtime.model_name,
            "num_choices": len(call.requests),
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "ttft_s": None if first_s is None else round(first_s - call.arrival_s, 4),
            "e2e_s": round(now_s - call.arrival_s, 4),
            "finish": type(self._error).__name__ if self._error is not None else "+".join(sorted(self._reasons)),
        }
        logger.info("request ended: %s", " ".join(f"{name}={value}" for name, value in fields.items()), extra=fields)

    def _expire(self) -> None:
        self.abort(deadline_exceeded())

    async def _describe_prompts(self) -> None:
        """Bring prompt log-probabilities that have come into `prompts`. A long prompt's take milliseconds."""
        while self._prompt_logprobs:
            index, logprobs = self._prompt_logprobs.popitem()
            described = await self._runtime.pool.run(_describe, self._runtime.tokenizer, logprobs)
            self.prompts[index].logprobs = [None, *described]

    def _reduce(self, choices: list[Choice]) -> list[Choice]:
        """Of each prompt's choices the best n, with the indexes that callers know."""
        options = self._call.options
        if self._num_each == options.n:
            return choices
        kept = []
        for start in range(0, len(choices), self._num_each):
            kept += best(choices[start : start + self._num_each], options.n)
        for index, choice in enumerate(kept):
            choice.index = index
            if options.sampling.num_logprobs is None:
                choice.tokens = []
        return kept


def _describe(tokenizer: Tokenizer, logprobs: list[TokenLogprobs]) -> list[TokenInfo]:
    return [token_info(tokenizer, each) for each in logprobs]


def _choice(chunk: TextChunk) -> Choice:
    assert chunk.finish_reason is not None
    return Choice(
        index=chunk.index,
        text=chunk.text,
        token_ids=chunk.token_ids,
        tokens=chunk.tokens,
        finish_reason=chunk.finish_reason,
        stop_reason=chunk.stop_reason,
    )
