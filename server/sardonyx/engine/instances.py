"""The threads of a tensor model: one for each instance, all fed by one policy.

Floor 3. Its promise is the one of `sardonyx.engine.loop`: every request that was taken gets exactly one event, whatever
happens to the step, the runner or the loop. It is not that loop, because there one step follows from the last, so one
thread does everything and nobody locks. Here steps of different instances run at once and, without sequences, have
nothing to do with each other: what they share is the queue. So the policy lies under a lock that is held for moments,
and a thread whose instance is free takes its next batch itself; no thread stands between.

Threads are woken one at a time, and only when there is something to take: whoever leaves with a batch wakes the next
one if there is more. Where a step takes less time than waking somebody, the thread that submits runs it itself on an
instance that is free (`InstanceLoop.run_ready`). What time alone brings (a batch that waited long enough, a request
that waited too long, an idle sequence) is watched by one more thread, started when a policy first asks for it.
"""

import logging
import math
import threading
import time
from collections.abc import Callable

import msgspec

from sardonyx.engine.ledger import Ledger
from sardonyx.engine.tensor_policy import TensorPolicy as TensorPolicy
from sardonyx.errors import EngineDead, EngineError, InvalidRequest, ModelNotReady, RequestAborted, ServeError
from sardonyx.runtime.priority import be_modest
from sardonyx.tensors import InferenceTimes, TensorBatch, TensorEvent, TensorOutput, TensorRequest, TensorRunner

logger = logging.getLogger(__name__)

STOPPING = "Server is stopping, scheduler for model has stopped accepting new inference requests"


class InstanceStats(msgspec.Struct, frozen=True, kw_only=True):
    """A consistent snapshot of a loop."""

    is_alive: bool
    has_work: bool
    """Some request has not ended."""
    stalled_s: float
    """With work: since the last finished step, or since the work came; else 0."""
    num_waiting: int
    num_running: int
    num_steps: int
    """Executed, failed ones among them."""
    num_failed_steps: int
    num_busy_instances: int


class InstanceLoop:
    """Runs one model version's steps, on all its instances at once; blocks without waking up while there is no work.

    Args:
        name: of the model, for messages.
        policy: belongs to the loop from now on.
        runner: belongs to the loop from now on; `close` closes it.
        deliver: called with the events of a step or of a refusal, mostly in an instance's thread, but in the caller's
            for what `abort` and `close` end; never in two threads at once. It must return at once and never raise.
        num_instances: threads; the runner's instances are numbered from 0.
        num_modest: threads of the first so many instances leave the processor to others, see `runtime.priority`.
        is_quick: steps are over in a moment: `submit` only queues, and `run_ready` must follow.
        clock: monotonic seconds.
        max_failed_steps: so many steps failed one after the other are a broken runner, not bad luck: the loop dies.
            ``None``: however many do, which is for runners that what callers send makes fail.
    """

    def __init__(
        self,
        name: str,
        policy: TensorPolicy,
        runner: TensorRunner,
        deliver: Callable[[list[TensorEvent]], None],
        *,
        num_instances: int = 1,
        num_modest: int = 0,
        is_quick: bool = False,
        clock: Callable[[], float] = time.monotonic,
        max_failed_steps: int | None = 5,
    ) -> None:
        self._name = name
        self._policy = policy
        self._runner = runner
        self._deliver = deliver
        self._clock = clock
        self._max_failed_steps = max_failed_steps
        self._num_modest = num_modest
        self.is_quick = is_quick
        self._threads = [
            threading.Thread(target=self._run, args=(i,), name=f"instance-{name}-{i}", daemon=True)
            for i in range(num_instances)
        ]
        self._watch_thread = threading.Thread(target=self._watch, name=f"instances-watch-{name}", daemon=True)
        # Guards all below and the policy; held for moments only, never while a step or a callback runs.
        self._lock = threading.Lock()
        self._ledger = Ledger(self._lock, deliver, is_ordered=policy.preserves_ordering)
        self._wakers = [threading.Condition(self._lock) for _ in range(num_instances)]
        self._idle: list[int] = []
        self._is_waking = False
        self._alarm = threading.Condition(self._lock)
        self._alarm_s = math.inf
        self._is_open = False
        self._is_closing = False
        self._is_closed = False
        self._is_dead = False
        self._batches: list[TensorBatch | None] = [None] * num_instances
        self._progress_s = 0.0
        self._num_steps = 0
        self._num_failed_steps = 0
        self._num_failed_in_a_row = 0

    def start(self) -> None:
        """Start the threads. Once, and not after `close`."""
        with self._lock:
            self._is_open = True
        for thread in self._threads:
            thread.start()

    @property
    def is_alive(self) -> bool:
        """Requests are taken."""
        return self._is_open

    @property
    def stalled_s(self) -> float:
        """For how long it has had work and finished no step."""
        now_s = self._clock()
        with self._lock:
            return self._stalled_s(now_s)

    def _stalled_s(self, now_s: float) -> float:
        return max(0.0, now_s - self._progress_s) if len(self._ledger) else 0.0

    def stats(self) -> InstanceStats:
        """A consistent snapshot. Any thread."""
        now_s = self._clock()
        with self._lock:
            busy = [batch for batch in self._batches if batch is not None]
            return InstanceStats(
                is_alive=self._is_open,
                has_work=len(self._ledger) > 0,
                stalled_s=self._stalled_s(now_s),
                num_waiting=0 if self._is_closing else self._policy.num_waiting,
                num_running=sum(len(batch.requests) for batch in busy),
                num_steps=self._num_steps,
                num_failed_steps=self._num_failed_steps,
                num_busy_instances=len(busy),
            )

    def submit(self, request: TensorRequest) -> None:
        """Queue a request. Any thread. Whoever gets an exception gets no event.

        Raises:
            InvalidRequest: the policy refuses it, or its id is in use.
            Overloaded: a queue is full.
            ModelNotReady: the loop is closed.
            EngineDead: the loop died, or was never started.
        """
        self._policy.check(request)
        now_s = self._clock()
        with self._lock:
            if not self._is_open:
                raise self._stopped()
            if request.id in self._ledger:
                raise InvalidRequest("a request with this id is running")
            self._policy.add(request, now_s)
            if not len(self._ledger):
                self._progress_s = now_s
            self._ledger.open(request.id)
            if not self.is_quick:
                self._wake(now_s)

    def run_ready(self) -> None:
        """Run in this thread what can begin at once on free instances, and have the rest run when it is time.

        One thread at a time. A model of 5 us, over HTTP and gRPC with one client: 1.4 times the inferences a second
        that waking an instance's thread gave (2 shared cores, h2load, 2 alternating rounds).
        """
        while True:
            now_s = self._clock()
            with self._lock:
                turn = None if self._is_closing else self._take_turn(now_s)
                if turn is None:
                    self._wake(now_s)
                    break
            self._run_here(*turn, now_s)
        self._ledger.flush()

    def abort(self, request_id: int) -> None:
        """End a waiting request as RequestAborted at once; running ones end as they would. Any thread.

        Unknown and ended ids are ignored.
        """
        now_s = self._clock()
        with self._lock:
            request = None if self._is_closing else self._policy.abort(request_id, now_s)
            if request is None:
                return
            self._refuse(request, RequestAborted("the request was cancelled"), now_s)
            self._end_refused(now_s)
            self._wake(now_s)
        self._ledger.flush()

    def close(self, timeout_s: float = 60.0) -> None:
        """Let the steps that run finish, end everything else as ModelNotReady, and close the runner. Idempotent.

        Any thread but the loop's own. A step that does not return within `timeout_s` is left behind with its thread
        and the runner; its requests end.
        """
        with self._lock:
            is_first, self._is_closed = not self._is_closed, True
            self._stop()
        self._ledger.flush()
        deadline_s = time.monotonic() + timeout_s
        threads = [thread for thread in (*self._threads, self._watch_thread) if thread.ident is not None]
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        with self._lock:
            self._ledger.end_all(self._stopped)
        self._ledger.flush()
        if any(thread.is_alive() for thread in threads):
            logger.critical("%s: a step still runs after %.0f s; its thread is left behind", self._name, timeout_s)
        elif is_first:
            self._runner.close()

    def _stopped(self) -> ServeError:
        if self._is_closed and not self._is_dead:
            return ModelNotReady(STOPPING)
        return EngineDead(f"the engine of {self._name} has stopped")

    def _stop(self) -> None:
        """Take no more requests, end those that wait, and let the threads go. With the lock."""
        self._is_open, self._is_closing = False, True
        running = {request.id for batch in self._batches if batch is not None for request in batch.requests}
        self._ledger.end_all(self._stopped, but=running)
        for waker in (*self._wakers, self._alarm):
            waker.notify()

    def _run(self, instance: int) -> None:
        try:
            if instance < self._num_modest:
                be_modest()
            while (turn := self._next(instance)) is not None:
                self._step(instance, *turn)
        except Exception:
            logger.exception("%s: the instance loop died", self._name)
        finally:
            self._leave(instance)

    def _leave(self, instance: int | None = None) -> None:
        """A thread ends, and with it, if nobody asked for that, the loop."""
        with self._lock:
            if instance is not None:
                self._batches[instance] = None
            self._is_dead = self._is_dead or not self._is_closing
            self._stop()
        self._ledger.flush()

    def _take_turn(self, now_s: float) -> tuple[int, TensorBatch] | None:
        """A batch for an instance whose thread sleeps on meanwhile; ``None`` where there is none. With the lock."""
        if self._is_waking or not self._idle or not self._policy.is_ready(self._idle[-1], now_s):
            return None
        batch = self._policy.schedule(self._idle[-1], now_s)
        self._end_refused(now_s)
        if batch is None:
            return None
        instance = self._idle.pop()
        self._batches[instance] = batch
        return instance, batch

    def _run_here(self, instance: int, batch: TensorBatch, now_s: float) -> None:
        """What an instance's thread would do with a batch."""
        try:
            self._step(instance, batch, now_s)
        except Exception:
            logger.exception("%s: the instance loop died", self._name)
            self._leave(instance)
            return
        with self._lock:
            self._idle.append(instance)
            if self._is_closing:
                self._wakers[instance].notify()

    def _next(self, instance: int) -> tuple[TensorBatch, float] | None:
        """The instance's next batch and the time, waiting for one; ``None`` when it is time to go."""
        while True:
            with self._lock:
                if self._is_closing:
                    return None
                now_s = self._clock()
                batch = self._policy.schedule(instance, now_s)
                self._batches[instance] = batch
                self._end_refused(now_s)
                self._wake(now_s)
                if batch is None and not self._ledger.has_deliveries:
                    self._idle.append(instance)
                    self._wakers[instance].wait()
                    self._is_waking = False
                    # At the end, `run_ready` may still have a step on it.
                    while self._batches[instance] is not None:
                        self._wakers[instance].wait()
            self._ledger.flush()
            if batch is not None:
                return batch, now_s

    def _wake(self, now_s: float) -> None:
        """Wake a thread for what its instance could run, or else see to it that somebody looks in time. With the lock.

        A woken thread calls this again once it has looked, so one at a time is enough.
        """
        if self._is_waking:
            return
        for instance in reversed(self._idle):
            if self._policy.is_ready(instance, now_s):
                self._idle.remove(instance)
                self._is_waking = True
                self._wakers[instance].notify()
                return
        at_s = self._policy.wake_at_s(now_s)
        if at_s is not None and at_s < self._alarm_s:
            self._alarm_s = at_s
            if self._watch_thread.ident is None:
                self._watch_thread.start()
            self._alarm.notify()

    def _watch(self) -> None:
        """Ring whenever time alone has changed something."""
        try:
            while self._ring():
                self._ledger.flush()
        except Exception:
            logger.exception("%s: the watch died", self._name)
        finally:
            self._leave()

    def _ring(self) -> bool:
        with self._lock:
            while not self._is_closing:
                now_s = self._clock()
                if self._alarm_s <= now_s:
                    self._alarm_s = math.inf
                    self._policy.expire(now_s)
                    self._end_refused(now_s)
                    self._wake(now_s)
                    return True
                self._alarm.wait(self._alarm_s - now_s if self._alarm_s < math.inf else None)
            return False

    def _end_refused(self, now_s: float) -> None:
        for request, error in self._policy.take_refused():
            self._refuse(request, error, now_s)

    def _refuse(self, request: TensorRequest, error: ServeError, now_s: float) -> None:
        self._ledger.end(TensorEvent(request_id=request.id, error=error, queue_ns=_queue_ns(request, now_s)))

    def _step(self, instance: int, batch: TensorBatch, start_s: float) -> None:
        output, has_failed = self._execute(batch, instance)
        events = _make_events(batch, output, start_s)
        with self._lock:
            self._progress_s = self._clock()
            self._policy.update(batch, self._progress_s)
            self._batches[instance] = None
            self._num_steps += 1
            self._num_failed_steps += has_failed
            self._num_failed_in_a_row = self._num_failed_in_a_row + 1 if has_failed else 0
            num_failed_in_a_row = self._num_failed_in_a_row
            for event in events:
                self._ledger.end(event, has_run=True)
        self._ledger.flush()
        if self._max_failed_steps is not None and num_failed_in_a_row >= self._max_failed_steps:
            raise EngineDead(f"{num_failed_in_a_row} steps failed one after the other")

    def _execute(self, batch: TensorBatch, instance: int) -> tuple[TensorOutput, bool]:
        try:
            output = self._runner.execute(batch, instance)
            assert len(output.results) == len(batch.rows), "one result a row"
            return output, False
        except EngineError as error:
            logger.error("%s: a step of %d rows failed: %s", self._name, len(batch.rows), error.message)
            message = error.message
        except Exception:
            logger.exception("%s: a step of %d rows failed", self._name, len(batch.rows))
            message = "internal error"
        return TensorOutput([EngineError(message) for _ in batch.rows], InferenceTimes()), True


def _queue_ns(request: TensorRequest, now_s: float) -> int:
    return max(0, int((now_s - request.arrival_s) * 1e9)) if request.arrival_s else 0


def _make_events(batch: TensorBatch, output: TensorOutput, start_s: float) -> list[TensorEvent]:
    events: list[TensorEvent] = []
    batch_size = batch.batch_size
    for row, result in zip(batch.rows, output.results, strict=True):
        request = row.request
        if request is None:
            continue
        event = TensorEvent(
            request_id=request.id,
            queue_ns=_queue_ns(request, start_s),
            times=output.times,
            executed_batch_size=batch_size,
            counts_execution=not events,
        )
        if isinstance(result, ServeError):
            event.error = result
        else:
            event.outputs = result
        events.append(event)
    return events
