"""A loaded version of a plain tensor model: calls in, one answer each.

Floor 4. Everything but the instances' threads runs on the event loop that made the first call.
"""

import asyncio
import functools
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import DeadlineExceeded, InvalidRequest, ModelNotReady, ServeError, UnsupportedFeature
from sardonyx.serving.admission import Admission
from sardonyx.serving.event_inbox import EventInbox
from sardonyx.serving.open_calls import OpenCalls
from sardonyx.serving.response_cache import CacheKey, ResponseCache
from sardonyx.serving.served import InferAnswer, InferCall
from sardonyx.serving.strings import has_many, with_bytes
from sardonyx.serving.tensor_checks import BoundCall, TensorSignature
from sardonyx.statistics import InferenceStatistics, failure_reason
from sardonyx.tensors import SequenceControl, Tensor, TensorEvent, TensorMetadata, TensorRequest

_MAX_INLINE_KEY_BYTES = 1 << 20
"""Inputs of more are hashed in a thread; so many take a millisecond."""


class InstanceEngine(Protocol):
    """What a tensor model asks of its instances. `engine.instances.InstanceLoop` is one."""

    @property
    def is_alive(self) -> bool: ...

    @property
    def stalled_s(self) -> float: ...

    @property
    def is_quick(self) -> bool:
        """`submit` only queues; `run_ready` then runs what can begin, in the calling thread."""
        ...

    def run_ready(self) -> None: ...

    def submit(self, request: TensorRequest) -> None:
        """Raises Overloaded, InvalidRequest or EngineDead; no event follows then."""
        ...

    def abort(self, request_id: int) -> None: ...

    def close(self) -> None:
        """End everything, join the threads, free the session. Blocks for a run at most; idempotent."""
        ...


class TensorVersion(msgspec.Struct, frozen=True, kw_only=True):
    """What a version folder and a completed config say about a tensor model."""

    name: str
    version: int
    config: ModelConfig
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    labels: dict[str, list[str]] = {}
    created: int = 0
    size_bytes: int = 0
    is_decoupled: bool = False
    is_stateful: bool = False
    """Requests belong to sequences."""
    correlation_datatype: str | None = None
    """Of the control input that gets a sequence's id, where there is one."""


class TensorModel:
    """A `served.ServedModel`.

    Args:
        version: what was loaded.
        engine: started; its `deliver` is the inbox's.
        inbox: connected here.
        statistics: of this version; they outlive it.
        admission: shared by all tensor models; its tokens are bytes of inputs.
        cache: ``None``: answers are not kept.
        timeout_s: most time of a call.
    """

    task = None

    def __init__(
        self,
        version: TensorVersion,
        engine: InstanceEngine,
        inbox: EventInbox,
        statistics: InferenceStatistics,
        *,
        admission: Admission,
        cache: ResponseCache | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.name = version.name
        self.version = version.version
        self.config = version.config
        self.inputs = version.inputs
        self.outputs = version.outputs
        self.created = version.created
        self.size_bytes = version.size_bytes
        self.is_decoupled = version.is_decoupled
        self.statistics = statistics
        self._version = version
        self._engine = engine
        self._inbox = inbox
        self._admission = admission
        self._cache = cache
        self._generation = cache.new_generation() if cache is not None else 0
        self._timeout_s = timeout_s
        self._signature = TensorSignature(version.name, version.inputs, version.outputs, version.config.max_batch_size)
        self._datatypes = {each.name: each.datatype for each in version.outputs}
        self._takes_strings = any(each.datatype == "BYTES" for each in version.inputs)
        self._gives_strings = any(each.datatype == "BYTES" for each in version.outputs)
        self._ids = itertools.count()
        self._futures: dict[int, asyncio.Future[TensorEvent]] = {}
        self._calls = OpenCalls()
        self._num_in_turn = 0
        self._is_gathering = False
        self._is_closed = False
        inbox.connect(self._take)

    @property
    def num_active(self) -> int:
        """Calls that were accepted and have not ended."""
        return self._calls.num_calls

    @property
    def is_alive(self) -> bool:
        """Its instances take requests."""
        return self._engine.is_alive

    @property
    def stalled_s(self) -> float:
        """For how long its instances have had work and finished none."""
        return self._engine.stalled_s

    def labels(self, output: str) -> list[str]:
        """Class names of an output."""
        return self._version.labels.get(output, [])

    async def infer(self, call: InferCall) -> InferAnswer:
        """See `served.ServedModel.infer`."""
        if self.is_decoupled:
            raise UnsupportedFeature("ModelInfer RPC doesn't support models with decoupled transaction policy")
        return await self._infer(call)

    async def stream(self, call: InferCall) -> AsyncIterator[InferAnswer]:
        """See `served.ServedModel.stream`."""
        yield await self._infer(call)

    def stop_generation(self, request_id: str | None = None) -> int:
        """Tensor models generate nothing."""
        return 0

    async def drain(self, timeout_s: float) -> None:
        """Take no more calls, and wait until the accepted ones have ended, so long at most."""
        await self._calls.drain(timeout_s)

    async def close(self) -> None:
        """End what is left with ModelNotReady, and free the session. Idempotent."""
        self._calls.is_draining = True
        if self._is_closed:
            return
        self._is_closed = True
        error = ModelNotReady(f"model '{self.name}' was unloaded before the request was finished")
        self._take([TensorEvent(request_id=request_id, error=error) for request_id in list(self._futures)])
        await asyncio.to_thread(self._engine.close)
        if self._cache is not None:
            self._cache.drop(self.name, self.version)

    def discard(self) -> None:
        """Free what was never put in place. Blocks."""
        self._engine.close()

    async def _infer(self, call: InferCall) -> InferAnswer:
        if self._calls.is_draining:
            raise ModelNotReady(
                f"Server is stopping, scheduler for model '{self.name}' has stopped accepting new inference requests"
            )
        self._calls.begin()
        try:
            return await self._look_up_or_run(call)
        finally:
            self._calls.end()

    async def _look_up_or_run(self, call: InferCall) -> InferAnswer:
        started_ns = time.perf_counter_ns()
        # Requests of a sequence keep their order: nothing is awaited before the queue has them.
        if self._takes_strings and not self._version.is_stateful and has_many(call.inputs):
            bound = await asyncio.to_thread(self._signature.bind, call)
        else:
            bound = self._signature.bind(call)
        sequence = self._sequence(call.sequence) if self._version.is_stateful else None
        key, lookup_ns = None, 0
        if self._cache is not None:
            looked_ns = time.perf_counter_ns()
            key = await self._key(self._cache, bound)
            outputs = self._cache.get(key)
            now_ns = time.perf_counter_ns()
            lookup_ns = now_ns - looked_ns
            if outputs is not None:
                self.statistics.observe_cache_hit(total_ns=now_ns - started_ns, lookup_ns=lookup_ns)
                return await self._answer(outputs, bound.outputs)
        try:
            event = await self._run(call, bound, sequence)
            if event.error is not None:
                raise event.error
        except ServeError as error:
            self.statistics.observe_failure(failure_reason(error), time.perf_counter_ns() - started_ns)
            raise
        except asyncio.CancelledError:
            self.statistics.observe_failure("CANCELED", time.perf_counter_ns() - started_ns)
            raise
        ended_ns = time.perf_counter_ns()
        self.statistics.observe_success(
            total_ns=ended_ns - started_ns, queue_ns=event.queue_ns, times=event.times, batch_size=bound.batch_size
        )
        if key is not None and self._cache is not None:
            self._cache.put(key, event.outputs)
            self.statistics.cache_miss.add(lookup_ns + time.perf_counter_ns() - ended_ns)
        return await self._answer(event.outputs, bound.outputs)

    async def _key(self, cache: ResponseCache, bound: BoundCall) -> CacheKey:
        make = functools.partial(
            cache.key, self.name, self.version, bound.inputs, bound.outputs, generation=self._generation
        )
        return make() if bound.num_bytes <= _MAX_INLINE_KEY_BYTES else await asyncio.to_thread(make)

    async def _run(self, call: InferCall, bound: BoundCall, sequence: SequenceControl | None) -> TensorEvent:
        """Admit, submit, wait. Leaving early aborts."""
        loop = self._inbox.open()
        reservation = self._admission.reserve(1, bound.num_bytes)
        request_id = next(self._ids)
        future: asyncio.Future[TensorEvent] = loop.create_future()
        self._futures[request_id] = future
        self.statistics.num_pending += 1
        timer: asyncio.TimerHandle | None = None
        try:
            self._engine.submit(
                TensorRequest(
                    id=request_id,
                    inputs=bound.inputs,
                    outputs=bound.outputs,
                    batch_size=bound.batch_size,
                    batch_key=bound.batch_key,
                    priority=call.priority,
                    timeout_s=call.timeout_us / 1e6,
                    sequence=sequence,
                    arrival_s=time.monotonic(),
                )
            )
            if self._engine.is_quick:
                self._run_quick(loop)
            if not future.done():
                timer = loop.call_later(self._timeout_s, self._expire, request_id)
            return await future
        except asyncio.CancelledError:
            self._engine.abort(request_id)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            del self._futures[request_id]
            reservation.release(was_served=True)
            self.statistics.num_pending -= 1

    def _run_quick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run what can begin: at once, or where several requests come in a turn of the event loop, together at its end.

        How many came in the turn before says what to expect.
        """
        if not self._num_in_turn:
            loop.call_soon(self._end_turn)
        self._num_in_turn += 1
        if not self._is_gathering:
            self._engine.run_ready()

    def _end_turn(self) -> None:
        self._is_gathering = self._num_in_turn > 1
        self._num_in_turn = 0
        self._engine.run_ready()

    def _take(self, events: list[TensorEvent]) -> None:
        """Ends of requests, on the event loop."""
        for event in events:
            if event.counts_execution:
                self.statistics.observe_execution(event.executed_batch_size, event.times)
            future = self._futures.get(event.request_id)
            if future is not None and not future.done():
                future.set_result(event)

    def _expire(self, request_id: int) -> None:
        # First: the abort's own event comes at once.
        error = DeadlineExceeded("the request's time was over before its answer")
        self._take([TensorEvent(request_id=request_id, error=error)])
        self._engine.abort(request_id)

    def _sequence(self, control: SequenceControl | None) -> SequenceControl | None:
        datatype = self._version.correlation_datatype
        if control is not None and datatype is not None and isinstance(control.id, str) != (datatype == "BYTES"):
            raise InvalidRequest(
                f"sequence_id of model '{self.name}' must be {'a string' if datatype == 'BYTES' else 'a number'}",
                param="sequence_id",
            )
        if control is not None and datatype is not None and isinstance(control.id, int):
            limits = np.iinfo(datatype.lower())
            if not limits.min <= control.id <= limits.max:
                raise InvalidRequest(
                    f"sequence_id {control.id} of model '{self.name}' does not fit {datatype}", param="sequence_id"
                )
        return control

    async def _answer(self, outputs: dict[str, npt.NDArray[Any]], wanted: tuple[str, ...]) -> InferAnswer:
        tensors = [Tensor(name, self._datatypes[name], outputs[name]) for name in wanted]
        if self._gives_strings:
            many = has_many(tensors)
            tensors = [await asyncio.to_thread(with_bytes, each) if many else with_bytes(each) for each in tensors]
        return InferAnswer(outputs=tensors)
