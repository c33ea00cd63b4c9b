"""One pass over the rows of a step: what the device is given for it, in the order in which it is given.

Floor 3. Knows which steps are captured, and makes the ones that are not on the spot.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from sardonyx.core import RunnerLimits
from sardonyx.errors import ConfigError, EngineError
from sardonyx.repository.families import LanguageModel
from sardonyx.runners.paged_draws import Draws
from sardonyx.runners.paged_graphs import PagedGraphs, StepMemory
from sardonyx.runners.paged_inputs import METADATA, Bucket, Buckets, StepLayout, StepRows, StepSizes
from sardonyx.runtime.device import Bytes, DeviceBinding, DeviceTensor

_logger = logging.getLogger(__name__)

MAX_GRAPHS = 64
"""Steps that are captured. Each is a list of all launches of a step, a few MB, and takes two steps to make."""


class PagedOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is decided outside of a batch."""

    max_batch_tokens: int
    """T at most, as the policy keeps it."""
    max_graphs: int = MAX_GRAPHS
    """Shapes of steps that are captured at most; 0: none."""


@dataclass(slots=True)
class HostSide:
    """What the host writes and reads for one of the two steps that may be out."""

    inputs: Bytes
    drawn: Bytes


@dataclass(slots=True)
class _Bindings:
    """The three graphs of a step, bound. A bucket's stay as they are; the others' are bound anew for each step."""

    feed: DeviceBinding
    decoder: DeviceBinding
    sampler: DeviceBinding


@dataclass(slots=True)
class _Captured:
    layout: StepLayout
    bindings: _Bindings
    decoder_id: int
    shared_id: int
    """Of ``feed`` and ``sampler``: of all buckets with as many rows."""


class PagedPass:
    """Runs the graphs over the cache. Used by one thread at a time.

    Args:
        graphs: of the model.
        model: the manifest's part.
        limits: of rows, positions and blocks.
        options: see there.

    Raises:
        ConfigError: the cache does not fit the device, or a step's inputs the host.
    """

    def __init__(self, graphs: PagedGraphs, model: LanguageModel, limits: RunnerLimits, options: PagedOptions) -> None:
        self._graphs = graphs
        self._limits = limits
        self._has_staging = model.kv.is_quantised
        """Steps of chunks have their rows' caches unpacked to 16 bits: those of the most rows take the most memory."""
        max_columns = -(-limits.max_model_len // limits.block_size)
        self._buckets = Buckets(limits.num_slots, max_columns, options.max_graphs)
        max_rows = self._buckets.max_rows
        self._max_tokens = max(options.max_batch_tokens, max_rows)
        self._max_logits = self._max_tokens
        if limits.max_scored_tokens is not None:
            self._max_logits = min(self._max_tokens, max_rows + limits.max_scored_tokens)
        columns = max([max_columns, *(bucket.num_columns for bucket in self._buckets.chosen)])
        largest = StepLayout(StepSizes(self._max_tokens, max_rows, self._max_tokens, max_rows, columns))
        self._memory = StepMemory(
            graphs,
            model,
            limits,
            input_bytes=largest.num_bytes,
            max_tokens=self._max_tokens,
            max_rows=max_rows,
            max_logits=self._max_logits,
        )
        self.drawn = self._memory.drawn
        self.hosts = self._allocate_hosts(largest.num_bytes)
        """Memory for two steps."""
        self._eager: _Bindings | None = self._new_bindings()
        self._captured: dict[Bucket, _Captured] = {}
        metadata_shape = graphs.decoder.inputs[METADATA].shape
        self._num_bounds = metadata_shape[0] if isinstance(metadata_shape[0], int) else 3

    def start(self, rows: StepRows, host: HostSide) -> DeviceTensor:
        """Give the device a step, the copy of what it draws into `host` included.

        Args:
            rows: of the step.
            host: stays as it is until the step is done.

        Returns:
            Where the logits will be, ``(N, V)`` or more rows.

        Raises:
            EngineError: the device did not take all of it.
        """
        num_rows, num_columns = rows.blocks.shape
        is_decode = len(rows.tokens) == num_rows
        bucket = self._buckets.find(num_rows, num_columns) if is_decode else None
        captured = self._captured.get(bucket) if bucket is not None else None
        logits = self._start_eager(rows, host) if captured is None else self._replay(captured, rows, host)
        self._graphs.device.read(self._memory.drawn_address, host.drawn)
        return logits

    def _replay(self, captured: _Captured, rows: StepRows, host: HostSide) -> DeviceTensor:
        self._write(rows, captured.layout, host)
        captured.bindings.feed.run(captured.shared_id)
        captured.bindings.decoder.run(captured.decoder_id)
        if rows.sizes.num_draws:
            captured.bindings.sampler.run(captured.shared_id)
        return self._memory.logits(self._memory.max_rows)

    def _start_eager(self, rows: StepRows, host: HostSide) -> DeviceTensor:
        eager = self._eager
        if eager is None:
            raise EngineError(f"model {self._graphs.model_name} is unloaded")
        layout, logits = StepLayout(rows.sizes), self._memory.logits(len(rows.logits_index))
        longest = int((rows.num_past + rows.num_new).max())
        self._bind(eager, layout, rows.sizes, logits)
        eager.decoder.bind_input(METADATA, self._bounds(int(rows.num_new.max()), longest, longest))
        self._write(rows, layout, host)
        eager.feed.run()
        eager.decoder.run()
        if rows.sizes.num_draws:
            eager.sampler.run()
        return logits

    def warm_up(self) -> None:
        """Run the largest shapes once, so that the device's arenas grow now; what is free then may become cache.

        Reads and writes block 0 alone. No step may be out.
        """
        started_s = time.perf_counter()
        limits, num_tokens = self._limits, self._max_tokens
        num_chunks = min(-(-num_tokens // limits.max_chunk_tokens), limits.num_slots)
        chunk = min(limits.max_chunk_tokens, num_tokens // num_chunks)
        num_logits = min(self._max_logits, num_chunks * chunk)
        largest = [
            self._blank_rows([chunk] * num_chunks, limits.max_model_len, num_logits=num_logits),
            self._blank_rows([1] * limits.num_slots, limits.max_model_len),
        ]
        if self._has_staging:
            chunk = min(limits.max_chunk_tokens, num_tokens - limits.num_slots + 1)
            largest.append(self._blank_rows([*[1] * (limits.num_slots - 1), chunk], limits.max_model_len))
        for rows in largest:
            self.start(rows, self.hosts[0])
            self._graphs.device.mark().wait()
        _logger.info("%s: warmed up in %.2f s", self._graphs.model_name, time.perf_counter() - started_s)

    def capture(self) -> None:
        """Capture the steps of decodes alone, by bucket. In the thread that runs the steps, before the first of them.

        A captured graph belongs to its thread. Where one cannot be captured, which others on the same card may cause
        by taking memory meanwhile, the log says so and the buckets that are left run as any step does.
        """
        started_s = time.perf_counter()
        name, chosen = self._graphs.model_name, self._buckets.chosen
        for bucket, decoder_id in chosen.items():
            try:
                self._captured[bucket] = self._capture(bucket, decoder_id)
            except EngineError as error:
                _logger.warning(
                    "%s: steps of %d rows and %d columns cannot be captured: %s", name, *bucket, error.message
                )
                break
        num_captured, taken_s = len(self._captured), time.perf_counter() - started_s
        _logger.info("%s: %d of %d shapes of steps captured in %.1f s", name, num_captured, len(chosen), taken_s)

    def close(self) -> None:
        """Give back all memory but that of the graphs. Idempotent."""
        # Bindings first: a session lives on in them, and it must be gone before its stream.
        self._captured.clear()
        self._eager = None
        self._memory.close()

    def _capture(self, bucket: Bucket, decoder_id: int) -> _Captured:
        sizes = StepSizes.of(bucket)
        layout, bindings = StepLayout(sizes), self._new_bindings()
        shared_id = bucket.num_rows.bit_length()
        is_new = all(known.num_rows != bucket.num_rows for known in self._captured)
        self._bind(bindings, layout, sizes, self._memory.logits(bucket.num_rows))
        bounds = self._buckets.bounds(bucket, self._limits.block_size)
        bindings.decoder.bind_input(METADATA, self._bounds(*bounds))
        length = min(bounds[1], self._limits.max_model_len)
        rows = self._blank_rows([1] * bucket.num_rows, length, num_columns=bucket.num_columns)
        self._write(rows, layout, self.hosts[0])
        if is_new:
            bindings.feed.capture(shared_id)
        bindings.decoder.capture(decoder_id)
        if is_new:
            bindings.sampler.capture(shared_id)
        return _Captured(layout, bindings, decoder_id, shared_id)

    def _write(self, rows: StepRows, layout: StepLayout, host: HostSide) -> None:
        layout.fill(rows, self._limits.block_size, host.inputs)
        self._graphs.device.write(self._memory.inputs, host.inputs[: layout.num_bytes])

    def _bind(self, bindings: _Bindings, layout: StepLayout, sizes: StepSizes, logits: DeviceTensor) -> None:
        self._memory.bind_feed(bindings.feed, layout, sizes.num_tokens)
        self._memory.bind_decoder(bindings.decoder, layout, sizes.num_tokens, logits)
        if sizes.num_draws:
            drawn = DeviceTensor(logits.address, (sizes.num_draws, logits.shape[1]), logits.datatype)
            self._memory.bind_sampler(bindings.sampler, layout, drawn)

    def _bounds(self, *bounds: int) -> npt.NDArray[np.int32]:
        return np.array(bounds[: self._num_bounds], np.int32)

    def _blank_rows(
        self, lengths: Sequence[int], length: int, *, num_columns: int = 0, num_logits: int = 0
    ) -> StepRows:
        """Rows of so many new tokens that end at position `length`, all in block 0; one token is drawn of each."""
        num_rows, num_new = len(lengths), np.array(lengths, np.int64)
        num_tokens = int(num_new.sum())
        columns = num_columns or -(-length // self._limits.block_size)
        zeros = np.zeros(num_rows, np.float32)
        return StepRows(
            tokens=np.zeros(num_tokens, np.int64),
            source=np.full(num_tokens, -1, np.int64),
            num_new=num_new,
            num_past=length - num_new,
            blocks=np.zeros((num_rows, columns), np.int32),
            logits_index=np.arange(num_logits or num_rows, dtype=np.int64),
            draws=Draws(zeros, np.zeros(num_rows, np.int64), zeros + 1, zeros, zeros),
        )

    def _allocate_hosts(self, input_bytes: int) -> list[HostSide]:
        device = self._graphs.device
        try:
            return [
                HostSide(device.allocate_host(input_bytes), device.allocate_host(self.drawn.num_bytes))
                for _ in range(2)
            ]
        except EngineError as error:
            self._memory.close()
            raise ConfigError(f"the inputs of its steps do not fit the host: {error.message}") from None

    def _new_bindings(self) -> _Bindings:
        graphs = self._graphs
        bindings = _Bindings(graphs.feed.new_binding(), graphs.decoder.new_binding(), graphs.sampler.new_binding())
        self._memory.bind_cache(bindings.decoder)
        return bindings
