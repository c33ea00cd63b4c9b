"""One thread per model that runs its steps: schedule, execute, update, deliver.

Where the runner's steps run on a device, the next one is launched before the last is collected, so that the device
goes on while the host looks at what came out of it, delivers it, and decides what comes then.

Floor 3. It decides nothing about the steps themselves; that is the policy's. Its promise to whoever submits: every
request that was taken gets exactly one event with a finish reason, whatever happens to the step, the runner or the
loop.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Generic

import msgspec

from sardonyx.core import AsyncRunner, B, FinishReason, O, Request, Runner, Sequence, SequenceEvent
from sardonyx.engine.policy import AheadPolicy, Policy
from sardonyx.engine.stats import LoopStats, StepCounts
from sardonyx.errors import EngineDead, EngineError, InvalidRequest

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Step(Generic[B]):
    """A step that is not finished."""

    batch: B
    start_s: float
    error: EngineError | None = None
    """Why it was not started."""


class StepLoop(Generic[B, O]):
    """Runs one model's steps in a thread of its own; blocks without waking up while there is no work.

    Args:
        name: of the model, for messages.
        policy: belongs to the loop from now on.
        runner: belongs to the loop from now on; `close` closes it. Steps overlap where it is an `AsyncRunner` and the
            policy an `AheadPolicy`.
        deliver: called in the loop's thread with all events of a step. It must return at once and never raise.
        clock: monotonic seconds.
        max_failed_steps: so many steps failed one after the other are a broken runner, not bad luck: the loop dies.
        prepare: called in the loop's thread before anything else there.
    """

    def __init__(
        self,
        name: str,
        policy: Policy[B, O],
        runner: Runner[B, O],
        deliver: Callable[[list[SequenceEvent]], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        max_failed_steps: int = 5,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name
        self._policy = policy
        self._runner = runner
        self._deliver = deliver
        self._clock = clock
        self._max_failed_steps = max_failed_steps
        self._prepare = prepare
        self._prepared: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=f"step-loop-{name}", daemon=True)
        self._is_idle = True
        self._num_failed_in_a_row = 0
        self._overlapped: tuple[AsyncRunner[B, O], AheadPolicy[B, O]] | None = None
        if isinstance(runner, AsyncRunner) and isinstance(policy, AheadPolicy):
            self._overlapped = runner, policy
        self._ahead: _Step[B] | None = None
        # Guards all below; held for moments only, never while a step or a callback runs.
        self._changed = threading.Condition()
        self._is_open = False
        self._is_closing = False
        self._inbox: list[Sequence | str] = []
        self._live: dict[str, None] = {}
        self._progress_s = 0.0
        self._num_queued = 0
        self._policy_stats = policy.stats()
        self._steps = StepCounts()

    def start(self) -> None:
        """Start the thread, and return when it has prepared. Once, and not after `close`.

        Raises:
            Exception: what `prepare` raised; the loop takes no requests.
        """
        with self._changed:
            self._is_open = True
        self._thread.start()
        self._prepared.result()

    @property
    def is_alive(self) -> bool:
        """Requests are taken."""
        return self._is_open

    @property
    def num_steps(self) -> int:
        """Steps executed, failed ones among them."""
        return self._steps.num_steps

    def submit(self, request: Request) -> None:
        """Queue a request. Any thread.

        Raises:
            InvalidRequest: the policy refuses it, or its id is in use.
            EngineDead: the loop is not running.
        """
        self._policy.check(request)
        sequence = Sequence(
            request=request,
            seed=random.getrandbits(63) if request.sampling.seed is None else request.sampling.seed,
            arrival_s=self._clock(),
            token_ids=list(request.prompt_ids),
        )
        with self._changed:
            if not self._is_open:
                raise EngineDead(f"the engine of {self._name} has stopped")
            if request.id in self._live:
                raise InvalidRequest("a request with this id is running")
            if not self._live:
                self._progress_s = sequence.arrival_s
            self._live[request.id] = None
            self._inbox.append(sequence)
            self._num_queued += 1
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        """End a request as CANCELLED before the next step. Any thread; unknown and ended ids are ignored."""
        with self._changed:
            if request_id in self._live:
                self._inbox.append(request_id)
                self._changed.notify()

    def close(self, timeout_s: float = 60.0) -> None:
        """Finish the step that runs, end everything else as CANCELLED, and close the runner. Any thread but the loop's.

        A step that does not return within `timeout_s` is left behind with its thread and its runner; its requests end.
        """
        with self._changed:
            self._is_open = False
            is_first, self._is_closing = not self._is_closing, True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        self._end_all(FinishReason.CANCELLED)
        if self._thread.is_alive():
            logger.critical("%s: a step still runs after %.0f s; its thread is left behind", self._name, timeout_s)
        elif is_first:
            self._runner.close()

    def stats(self) -> LoopStats:
        """A consistent snapshot. Any thread."""
        now_s = self._clock()
        with self._changed:
            policy = self._policy_stats
            steps = asdict(self._steps)
            num_queued = self._num_queued
            has_work, progress_s, is_alive = bool(self._live), self._progress_s, self._is_open
        counts = msgspec.structs.asdict(policy)
        counts["num_waiting"] += num_queued
        steps["step_s_counts"] = tuple(steps["step_s_counts"])
        stalled_s = max(0.0, now_s - progress_s) if has_work else 0.0
        return LoopStats(**counts, **steps, is_alive=is_alive, has_work=has_work, stalled_s=stalled_s)

    def _run(self) -> None:
        end: tuple[FinishReason, str | None] = (FinishReason.ERROR, f"the engine of {self._name} has stopped")
        try:
            self._prepare()
        except Exception as error:
            self._end_all(*end)
            self._prepared.set_exception(error)
            return
        self._prepared.set_result(None)
        try:
            while self._apply_inbox():
                self._step()
            if self._ahead is not None:
                self._step()
            end = (FinishReason.CANCELLED, None)
        except Exception:
            logger.exception("%s: the step loop died", self._name)
        finally:
            self._end_all(*end)

    def _apply_inbox(self) -> bool:
        """Hand what callers want to the policy, waiting for something to do first; false when it is time to go."""
        with self._changed:
            while self._is_idle and not self._inbox and not self._is_closing:
                self._changed.wait()
            if self._is_closing:
                return False
            commands, self._inbox = self._inbox, []
        for command in commands:
            if isinstance(command, Sequence):
                self._policy.add(command)
            else:
                self._policy.abort(command)
        return True

    def _step(self) -> None:
        if self._overlapped is None:
            self._step_alone()
        else:
            self._step_overlapped(*self._overlapped)
        self._deliver_live(self._policy.take_events())
        if self._num_failed_in_a_row >= self._max_failed_steps:
            raise EngineDead(f"{self._num_failed_in_a_row} steps failed one after the other")

    def _step_alone(self) -> None:
        start_s = self._clock()
        batch = self._policy.schedule(start_s)
        self._is_idle = batch is None
        self._publish()
        if batch is None:
            return
        try:
            output = self._runner.execute(batch)
        except EngineError as error:
            self._fail(error, [_Step(batch, start_s)])
        else:
            self._update(_Step(batch, start_s), output)

    def _step_overlapped(self, runner: AsyncRunner[B, O], policy: AheadPolicy[B, O]) -> None:
        """Collect the step that is out, or else the next one, with another launched behind it where that can be."""
        step, self._ahead = self._ahead, None
        if step is None:
            start_s = self._clock()
            step = self._launch(runner, policy.schedule(start_s), start_s)
            self._is_idle = step is None
            self._publish()
        if step is None:
            return
        if step.error is None and not self._is_closing and runner.can_follow(step.batch):
            start_s = self._clock()
            self._ahead = self._launch(runner, policy.schedule_ahead(step.batch, start_s), start_s)
        try:
            if step.error is not None:
                raise step.error
            output = runner.collect()
        except EngineError as error:
            ahead, self._ahead = self._ahead, None
            self._fail(error, [step, ahead] if ahead is not None else [step])
        else:
            self._update(step, output)

    def _launch(self, runner: AsyncRunner[B, O], batch: B | None, start_s: float) -> _Step[B] | None:
        """Start a step. One that does not start fails when its turn comes: the one before it may still succeed."""
        if batch is None:
            return None
        step = _Step(batch, start_s)
        try:
            runner.launch(batch)
        except EngineError as error:
            step.error = error
        return step

    def _update(self, step: _Step[B], output: O) -> None:
        self._num_failed_in_a_row = 0
        self._policy.update(step.batch, output, self._clock())
        self._publish(step)

    def _fail(self, error: EngineError, steps: list[_Step[B]]) -> None:
        """One failure, of a step and of the one behind it."""
        self._num_failed_in_a_row += 1
        for step in steps:
            logger.error("%s: a step of %d rows failed: %s", self._name, len(step.batch.rows), error.message)
            self._policy.fail(step.batch, error.message)
            self._publish(step, has_failed=True)

    def _publish(self, step: _Step[B] | None = None, *, has_failed: bool = False) -> None:
        """Renew what `stats` shows; with a step, count it."""
        policy_stats, now_s = self._policy.stats(), self._clock()
        with self._changed:
            self._policy_stats = policy_stats
            self._num_queued = sum(isinstance(command, Sequence) for command in self._inbox)
            if step is not None:
                # A step that was launched ahead begins where the one before it ended.
                step_s = now_s - max(step.start_s, self._progress_s)
                self._steps.count(step.batch, step_s, has_failed=has_failed)
                self._progress_s = now_s

    def _deliver_live(self, events: list[SequenceEvent]) -> None:
        """Deliver the events of requests that have not ended, and note which end now."""
        passed = []
        with self._changed:
            for event in events:
                if event.request_id not in self._live:
                    continue
                passed.append(event)
                if event.finish_reason is not None:
                    del self._live[event.request_id]
        if passed:
            self._deliver(passed)

    def _end_all(self, reason: FinishReason, error: str | None = None) -> None:
        """Take no more requests and end those there are. Any thread; whoever comes first ends them."""
        with self._changed:
            self._is_open = False
            live, self._live = self._live, {}
            self._inbox.clear()
            self._num_queued = 0
            self._policy_stats = msgspec.structs.replace(self._policy_stats, num_waiting=0, num_running=0, kv_usage=0.0)
        if live:
            try:
                self._deliver([SequenceEvent(request_id=each, finish_reason=reason, error=error) for each in live])
            except Exception:
                logger.exception("%s: the last events were not delivered", self._name)
