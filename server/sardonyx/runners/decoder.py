"""Runs decoder language models: a `Batch` in, tokens out.

Floor 3. Owns the model's session and KV cache. Which sequence holds which slot, and when, is the engine's decision.
"""

import logging
import time
from collections.abc import Sequence

import numpy as np

from sardonyx.core import Batch, BatchRow, RunnerLimits, StepOutput
from sardonyx.errors import ConfigError, EngineError
from sardonyx.repository.families import LanguageModel
from sardonyx.runners.packed_pass import Logits, PackedPass
from sardonyx.runners.packing import ForwardRow
from sardonyx.runners.prompt_scores import NOT_FINITE, num_prompt_positions, score_prompt
from sardonyx.runners.sampler import Sampler
from sardonyx.runtime.dtypes import KV_DATATYPES
from sardonyx.runtime.kv_cache import KvCache
from sardonyx.runtime.session import Session

__all__ = ["DecoderRunner", "ForwardRow"]

_logger = logging.getLogger(__name__)

MAX_PADDING = 1024
"""Padded positions that sharing a session run may add; see `plan_runs`."""


class DecoderRunner:
    """A `core.Runner` for graphs in the packed-step contract, on the CPU. Used by one thread.

    Args:
        session: of the graph; closed with the runner.
        model: the manifest's part, which the graph is checked against.
        limits: C is ``max_model_len + max_chunk_tokens - 1``: the kernel wants past + S <= C of every row, even of one
            that has a single token left to its limit while another one's chunk sets S.
        max_padding: see `MAX_PADDING`.

    Raises:
        ConfigError: the graph is not what the manifest says, or `limits` ask more than it has.
    """

    def __init__(
        self, session: Session, model: LanguageModel, limits: RunnerLimits, *, max_padding: int = MAX_PADDING
    ) -> None:
        _check_graph(session, model, limits)
        self._session = session
        self._limits = limits
        capacity = limits.max_model_len + limits.max_chunk_tokens - 1
        self._cache = KvCache(model.kv, limits.num_slots, capacity)
        self._pass = PackedPass(
            session,
            limits,
            self._cache,
            # An upper bound is all that the kernel asks for, but it refuses one above the rows of the rotary tables.
            total_length=min(capacity, model.max_model_len),
            max_padding=max_padding,
            max_logits=limits.num_slots,
        )
        self._sampler = Sampler(limits.vocab_size)

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    def execute(self, batch: Batch) -> StepOutput:
        """Run one step: copies of slots, one packed forward pass, one sampling call.

        New tokens of all rows lie one after the other in a single axis, so no matrix product sees padding; only the
        attention operator works on the padded view (B, S). Present tensors are the past tensors' own buffers: the step
        appends in place and returns no cache. `plan_runs` may divide the pass among several session runs.

        Without the session, a step takes 0.03 ms for one greedy row and 0.35 ms for 32 (V = 49,152).

        Tensors bound for the session:
            input_ids                (T,)          int64
            row_gather               (B, S)        int64    packed index of each chunk position
            row_scatter              (T,)          int64    flat (b * S + s) of each packed token
            seqlens_k, query_seqlens (B,)          int32    cache length after the step minus 1; new tokens
            total_sequence_length    ()            int32    an upper bound, constant
            past_key_values.{i}.*    (B, K, C, D)  cache dtype, in place, i in 0..L-1
            logits_index             (N,)          int64    packed indices whose logits are wanted
            logits                   (N, V)        float32  only those

        Args:
            batch: rows of any mix of prefill chunks and decodes, within `limits`.

        Returns:
            For each row its next token if the row is sampled, log-probabilities where it asked for them. Rows whose
            logits are not finite are in `failed`.

        Raises:
            EngineError: the session failed, or the batch breaks the contract; the message names the model, and ONNX
                Runtime's text goes to the log.

        Source: com.microsoft.GroupQueryAttention, input `query_seqlens` (ONNX Runtime 1.32 schema).
        """
        rows = [ForwardRow.of(row) for row in batch.rows]
        scored = [num_prompt_positions(row) for row in batch.rows]
        wanted = [_wanted(row, num_positions) for row, num_positions in zip(batch.rows, scored, strict=True)]
        self._check_rows(rows)
        for copy in batch.copies:
            self._cache.copy(copy.source, copy.target, copy.num_tokens)
        logits, first_logits = self._pass.forward(rows, wanted)
        output = StepOutput([None] * len(rows), [None] * len(rows), [[] for _ in rows])
        self._sample(batch, wanted, logits, first_logits, output)
        for index, num_positions in enumerate(scored):
            if num_positions and index not in output.failed:
                first = first_logits[index]
                logprobs = score_prompt(batch.rows[index], logits[first : first + num_positions])
                if logprobs is None:
                    output.failed[index] = NOT_FINITE
                else:
                    output.prompt_logprobs[index] = logprobs
        return output

    def forward(self, rows: Sequence[ForwardRow], logits_index: Sequence[int]) -> Logits:
        """Run one packed pass and return raw logits: what parity checks compare.

        Args:
            rows: of different slots; their tokens are packed in this order.
            logits_index: packed indices whose logits are wanted, in any order.

        Returns:
            ``(N, V)``, a fresh array.

        Raises:
            EngineError: as `execute`.
        """
        self._check_rows(rows)
        starts = np.cumsum([0, *(len(row.token_ids) for row in rows)])
        places = np.searchsorted(starts, logits_index, side="right") - 1
        wanted: list[list[int]] = [[] for _ in rows]
        offsets = []
        for place, packed in zip(places.tolist(), logits_index, strict=True):
            offsets.append(len(wanted[place]))
            wanted[place].append(packed - int(starts[place]))
        logits, first_logits = self._pass.forward(rows, wanted)
        return logits[[first_logits[place] + offset for place, offset in zip(places.tolist(), offsets, strict=True)]]

    def warm_up(self) -> None:
        """Run the largest shapes once, so that no request pays for ONNX Runtime's first allocations.

        Writes into slots that nobody holds yet: call it before the first step.
        """
        started_s = time.perf_counter()
        limits = self._limits
        self.forward([ForwardRow(0, [0] * limits.max_chunk_tokens, 0)], [0])
        for num_rows in {1, limits.num_slots}:
            self.forward([ForwardRow(slot, [0], 0) for slot in range(num_rows)], range(num_rows))
        _logger.info("%s: warmed up in %.2f s", self._session.model_name, time.perf_counter() - started_s)

    def close(self) -> None:
        """Give back session and cache. Nothing may be executed afterwards."""
        self._pass.close()
        self._session.close()
        self._cache.close()

    def _sample(
        self,
        batch: Batch,
        wanted: Sequence[Sequence[int]],
        logits: Logits,
        first_logits: Sequence[int],
        output: StepOutput,
    ) -> None:
        sampled = [
            (first_logits[index] + len(wanted[index]) - 1, index)
            for index, row in enumerate(batch.rows)
            if row.is_sampled
        ]
        if not sampled:
            return
        sampled.sort()
        if len(sampled) < len(logits):  # the others belong to prompts that are scored
            logits = logits[[place for place, _ in sampled]]
        samples = self._sampler.sample(logits, [batch.rows[index].sequence for _, index in sampled])
        for place, (_, index) in enumerate(sampled):
            output.token_ids[index] = samples.token_ids[place]
            output.logprobs[index] = samples.logprobs[place]
            if place in samples.failed:
                output.failed[index] = samples.failed[place]

    def _check_rows(self, rows: Sequence[ForwardRow]) -> None:
        """Refuse what the kernel would refuse, or worse, accept.

        Raises:
            EngineError: no rows, a slot twice or outside of the pool, tokens beyond a limit.
        """
        limits = self._limits
        slots = [row.slot for row in rows]
        reason = None
        if not rows or len(set(slots)) < len(slots) or min(slots) < 0 or max(slots) >= limits.num_slots:
            reason = f"slots {slots} are not different ones of {limits.num_slots}"
        for row in rows:
            count = len(row.token_ids)
            if not 1 <= count <= limits.max_chunk_tokens or not 0 <= row.num_past <= limits.max_model_len - count:
                reason = f"{count} tokens after {row.num_past} exceed a limit"
        if reason:
            raise EngineError(f"model {self._session.model_name} was given a batch that breaks its limits: {reason}")


def _wanted(row: BatchRow, num_positions: int) -> Sequence[int]:
    """Positions among the row's new tokens whose logits are wanted, the sampled one last."""
    if not row.is_sampled:
        return range(num_positions)
    return [*range(num_positions), row.num_new_tokens - 1]


def _check_graph(session: Session, model: LanguageModel, limits: RunnerLimits) -> None:
    """Raise ConfigError unless the graph follows the packed-step contract in the manifest's sizes."""
    small = ("input_ids", "row_gather", "row_scatter", "seqlens_k", "query_seqlens", "total_sequence_length")
    sides = [f"{layer}.{side}" for layer in range(model.kv.num_layers) for side in ("key", "value")]
    needed = {*small, "logits_index", *(f"past_key_values.{side}" for side in sides)}
    if session.inputs.keys() != needed or session.outputs.keys() != {"logits", *(f"present.{side}" for side in sides)}:
        odd = sorted(needed ^ session.inputs.keys()) or sorted(session.outputs)
        raise ConfigError(f"is no decoder in the packed-step contract: see {', '.join(odd[:4])}", file="model.onnx")
    cache = session.inputs["past_key_values.0.key"]
    if cache.datatype != KV_DATATYPES[model.kv.datatype] or (cache.shape[1], cache.shape[3]) != (
        model.kv.num_kv_heads,
        model.kv.head_size,
    ):
        raise ConfigError(
            f"says {cache.datatype.name} {cache.shape}, unlike the manifest", file="model.onnx", field="kv"
        )
    if session.outputs["logits"].shape[-1] != model.vocab_size or limits.vocab_size != model.vocab_size:
        raise ConfigError("is not the vocabulary of manifest and limits", file="model.onnx", field="logits")
    if not 0 < limits.max_chunk_tokens <= limits.max_model_len <= model.max_model_len or limits.num_slots < 1:
        raise ConfigError(
            f"{limits.num_slots} slots, {limits.max_chunk_tokens} tokens a chunk and {limits.max_model_len} positions "
            f"do not fit a model of {model.max_model_len}",
            field="max_model_len",
        )
