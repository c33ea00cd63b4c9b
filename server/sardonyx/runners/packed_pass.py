"""One packed pass over rows of a step: the session runs that it takes, bound to the caches of their slots.

Floor 3. What decoders of language and of speech have in common.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sardonyx.core import RunnerLimits
from sardonyx.errors import EngineError
from sardonyx.runners.packing import ForwardRow, PackedInputs, Run, named_views, plan_runs
from sardonyx.runtime.kv_cache import KvCache
from sardonyx.runtime.session import Binding, Session

Logits = npt.NDArray[np.float32]

_MAX_BINDINGS = 64
"""Windows of slots whose bindings are kept. One of 30 layers is 120 bound tensors: 0.4 ms to make."""


@dataclass(slots=True)
class _Window:
    """A binding to the cache of neighbouring slots."""

    binding: Binding
    shapes: tuple[int, ...] = ()
    """T, S, N and the first row of the logits that are bound at present."""


class PackedPass:
    """Runs a graph in the packed-step contract over some slots. Used by one thread.

    Args:
        session: of the graph.
        limits: slots, chunk and vocabulary.
        cache: of all slots; present tensors are the past tensors' own buffers.
        total_length: the upper bound that the kernel is given.
        max_padding: padded positions that sharing a session run may add; see `plan_runs`.
        max_logits: rows of logits that fit into the buffer which is kept; more have one for the step.
        bind_more: binds what else a window of slots needs: its first slot, their number.
        pays_for_idle: see `plan_runs`.
    """

    def __init__(
        self,
        session: Session,
        limits: RunnerLimits,
        cache: KvCache,
        *,
        total_length: int,
        max_padding: int,
        max_logits: int,
        bind_more: Callable[[Binding, int, int], None] | None = None,
        pays_for_idle: bool = False,
    ) -> None:
        self._session = session
        self._limits = limits
        self._cache = cache
        self._max_padding = max_padding
        self._bind_more = bind_more
        self._pays_for_idle = pays_for_idle
        self._inputs = PackedInputs(limits.num_slots, limits.max_chunk_tokens)
        self._has_positions = "position_ids" in session.inputs
        self._total_length = np.array(total_length, np.int32)
        self._logits = np.empty((max_logits + 1, limits.vocab_size), np.float32)
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()

    def close(self) -> None:
        """Let go of all bindings."""
        self._windows.clear()

    def forward(self, rows: Sequence[ForwardRow], wanted: Sequence[Sequence[int]]) -> tuple[Logits, list[int]]:
        """Run all rows.

        Args:
            rows: of different slots, within the limits.
            wanted: for each row, positions among its new tokens whose logits are wanted.

        Returns:
            Logits ``(N, V)``, valid until the next call, and for each row where its own begin.
        """
        num_logits = sum(map(len, wanted))
        logits = self._logits
        if num_logits >= len(logits):
            # Scoring prompts: every token's row, 50 MB for 256 of them. Kept only for the step.
            try:
                logits = np.empty((num_logits + 1, self._limits.vocab_size), np.float32)
            except MemoryError as error:
                raise EngineError("there is no memory for this prompt's log-probabilities") from error
        first_logits = [0] * len(rows)
        end = 0
        runs = plan_runs(
            rows,
            self._limits.num_slots,
            self._max_padding,
            capacity=self._cache.capacity,
            pays_for_idle=self._pays_for_idle,
        )
        for run in runs:
            start = end
            for index in run.row_indices:
                first_logits[index] = end
                end += len(wanted[index])
            # A run without wanted logits writes one row behind all others.
            self._run(run, rows, wanted, logits, start if end > start else num_logits)
        return logits[:num_logits], first_logits

    def _run(
        self, run: Run, rows: Sequence[ForwardRow], wanted: Sequence[Sequence[int]], logits: Logits, first: int
    ) -> None:
        num_tokens, num_logits = self._inputs.fill(run, rows, wanted)
        window = self._window(run.first_slot, run.num_slots)
        is_kept = logits is self._logits
        shapes = (num_tokens, run.chunk, num_logits, first)
        if window.shapes != shapes or not is_kept:
            for name, array in named_views(self._inputs, run, num_tokens, num_logits).items():
                if name != "position_ids" or self._has_positions:
                    window.binding.bind_input(name, array)
            window.binding.bind_output("logits", logits[first : first + num_logits])
            window.shapes = shapes if is_kept else ()
        window.binding.run()

    def _window(self, first_slot: int, num_slots: int) -> _Window:
        """The binding to a window of slots, with everything bound that does not change."""
        key = (first_slot, num_slots)
        window = self._windows.get(key)
        if window is not None:
            self._windows.move_to_end(key)
            return window
        binding = self._session.new_binding()
        binding.bind_input("total_sequence_length", self._total_length)
        for layer in range(self._cache.layout.num_layers):
            keys = self._cache.keys(layer, first_slot, num_slots)
            values = self._cache.values(layer, first_slot, num_slots)
            # The same buffer as input and output is what tells the kernel to append in place.
            binding.bind_input(f"past_key_values.{layer}.key", keys)
            binding.bind_input(f"past_key_values.{layer}.value", values)
            binding.bind_output(f"present.{layer}.key", keys)
            binding.bind_output(f"present.{layer}.value", values)
        if self._bind_more is not None:
            self._bind_more(binding, first_slot, num_slots)
        window = self._windows[key] = _Window(binding)
        if len(self._windows) > _MAX_BINDINGS:
            self._windows.popitem(last=False)
        return window
