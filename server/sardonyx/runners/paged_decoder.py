"""Runs decoder language models over a cache in blocks, on a device: a `Batch` in, tokens out, one step ahead.

Floor 3. Owns the model's graphs, its cache and the steps that are out. Who holds which blocks is the engine's decision.
"""

import logging
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sardonyx.core import Batch, RunnerLimits, StepOutput, TokenLogprobs
from sardonyx.errors import EngineError
from sardonyx.repository.families import LanguageModel
from sardonyx.runners.logprobs import MIN_LOGPROB
from sardonyx.runners.paged_draws import needs_host
from sardonyx.runners.paged_graphs import PagedGraphs, check_graphs, check_num_rows
from sardonyx.runners.paged_pass import HostSide, PagedOptions, PagedPass
from sardonyx.runners.paged_plan import NOT_DRAWN, Planner, StepPlan
from sardonyx.runners.prompt_scores import NOT_FINITE, score_prompt
from sardonyx.runners.sampler import Sampler
from sardonyx.runtime.device import DeviceTensor, Mark

_logger = logging.getLogger(__name__)

_MAX_OUT = 2


@dataclass(slots=True)
class _Step:
    """A step that is out."""

    batch: Batch
    plan: StepPlan
    host: HostSide
    logits: npt.NDArray[np.float32] | None
    """Of rows that need the host."""
    mark: Mark


class PagedRunner:
    """A `core.AsyncRunner` for graphs of steps over blocks. Used by one thread at a time.

    A step's tensors:
        tokens, source             (T,)      int64   ``feed`` makes input_ids (T,) of them and of the last token_ids
        logits_index               (N,)      int64   packed indices, first those of tokens that the device draws
        block_table                (B, M)    int32   -1 behind a row's last block
        cumulative_sequence_length (B + 1,)  int32
        past_seqlens               (B,)      int32
        slot_mapping               (T,)      int32   where each token's keys and values go
        attention_metadata         (2 or 3,) int32   on the host: bounds of query and KV lengths
        past_key_values.{i}.*      (blocks, block_size, K, D), in place
        logits                     (N, V)    float32
        temperature, top_k, top_p, min_p, uniform -> token_ids, logprobs, is_finite, each (N,)

    All but cache, logits and metadata go to the device in one copy, and what is drawn comes back in one. The device
    does everything in the order in which it was given, so its side of these tensors exists once; the host's side exists
    twice, since the host writes a step while the device may still copy the one before.

    Args:
        graphs: closed with the runner.
        model: the manifest's part, which the graphs are checked against.
        limits: block 0 of the cache is in no batch: rows that fill a bucket write there.
        options: see there.

    Raises:
        ConfigError: the graphs are not what the manifest says, `limits` ask more than they have, or the cache does not
            fit the device.

    Source: com.microsoft.PagedAttention (ONNX Runtime 1.32 schema).
    """

    def __init__(self, graphs: PagedGraphs, model: LanguageModel, limits: RunnerLimits, options: PagedOptions) -> None:
        check_graphs(graphs, model, limits)
        check_num_rows(limits.num_slots)
        self._graphs = graphs
        self._limits = limits
        self._planner = Planner(graphs.model_name, limits, options.max_batch_tokens)
        self._pass = PagedPass(graphs, model, limits, options)
        self._sampler = Sampler(limits.vocab_size)
        self._out: deque[_Step] = deque()
        self._num_launched = 0
        self._drawn_at: list[int] = []

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    def can_follow(self, batch: Batch) -> bool:
        """All of the batch's tokens are drawn on the device, and no prompt of it is scored."""
        return not any(needs_host(row) for row in batch.rows)

    def execute(self, batch: Batch) -> StepOutput:
        """Launch a step and wait for it. None may be out.

        Raises:
            EngineError: as `launch` and `collect`.
        """
        assert not self._out, "steps are out"
        self.launch(batch)
        return self.collect()

    def launch(self, batch: Batch) -> None:
        """Start a step behind those that are out, one at most.

        Raises:
            EngineError: the batch breaks a limit, or the device did not take the step.
        """
        assert len(self._out) < _MAX_OUT, "two steps are out"
        plan = self._planner.plan(batch, self._drawn_at)
        host = self._pass.hosts[self._num_launched % _MAX_OUT]
        try:
            logits = self._pass.start(plan.rows, host)
            fetched = self._fetch_logits(plan, logits) if plan.host_rows else None
            mark = self._graphs.device.mark()
        except EngineError:
            self._settle()
            raise
        self._out.append(_Step(batch, plan, host, fetched, mark))
        self._num_launched += 1
        self._drawn_at = plan.drawn_at

    def collect(self) -> StepOutput:
        """Wait for the oldest step that is out.

        Returns:
            For each row its next token if the row is sampled, log-probabilities where it asked for them. Rows whose
            logits are not finite are in `failed`.

        Raises:
            EngineError: the device failed; no step is out any more.
        """
        step = self._out.popleft()
        try:
            step.mark.wait()
        except EngineError:
            self._out.clear()
            self._drawn_at = []
            raise
        num_rows = len(step.batch.rows)
        output = StepOutput([None] * num_rows, [None] * num_rows, [[] for _ in range(num_rows)])
        self._take_drawn(step, output)
        if step.logits is not None:
            self._draw_on_host(step, step.logits, output)
            self._score_prompts(step, step.logits, output)
        return output

    def warm_up(self) -> None:
        """See `PagedPass.warm_up`: before the first step, in any thread."""
        self._pass.warm_up()

    def capture(self) -> None:
        """See `PagedPass.capture`: before the first step, in the thread that runs the steps."""
        self._pass.capture()

    def release(self) -> None:
        """Give back all memory but that of the graphs. Nothing may be executed afterwards. Idempotent."""
        self._out.clear()
        self._pass.close()

    def close(self) -> None:
        """`release`, and give back the graphs. Idempotent."""
        self.release()
        self._graphs.close()

    def _fetch_logits(self, plan: StepPlan, logits: DeviceTensor) -> npt.NDArray[np.float32]:
        """Order the copy of the logits that the host needs: they lie behind those that the device draws from."""
        width = self._limits.vocab_size
        try:
            fetched = np.empty((plan.num_host_logits, width), np.float32)
        except MemoryError as error:
            raise EngineError("there is no memory for this prompt's log-probabilities") from error
        self._graphs.device.read(logits.address + plan.num_drawn * width * 4, fetched.view(np.uint8).reshape(-1))
        return fetched

    def _settle(self) -> None:
        """After a step that was taken in part: wait, since the device may still read what the host would overwrite."""
        try:
            self._graphs.device.mark().wait()
        except EngineError as error:
            _logger.error("%s: the device does not answer: %s", self._graphs.model_name, error.message)

    def _take_drawn(self, step: _Step, output: StepOutput) -> None:
        stretches = {
            name: step.host.drawn[tensor.address : tensor.address + tensor.num_bytes].view(tensor.datatype.array)
            for name, tensor in self._pass.drawn.tensors(0, step.plan.num_drawn).items()
        }
        token_ids, logprobs = stretches["token_ids"].tolist(), stretches["logprobs"].tolist()
        is_finite = stretches["is_finite"].tolist()
        for index, (row, place) in enumerate(zip(step.batch.rows, step.plan.drawn_at, strict=True)):
            if place == NOT_DRAWN:
                continue
            if not is_finite[place]:
                output.failed[index] = "the model's output for this sequence is not finite"
                continue
            output.token_ids[index] = token_ids[place]
            if row.sequence.request.sampling.num_logprobs is not None:
                output.logprobs[index] = TokenLogprobs(token_ids[place], max(logprobs[place], MIN_LOGPROB), [])

    def _draw_on_host(self, step: _Step, logits: npt.NDArray[np.float32], output: StepOutput) -> None:
        drawn = [row for row in step.plan.host_rows if row.is_drawn]
        if not drawn:
            return
        sequences = [step.batch.rows[row.index].sequence for row in drawn]
        samples = self._sampler.sample(logits[[row.first + row.num_positions for row in drawn]], sequences)
        for place, row in enumerate(drawn):
            output.token_ids[row.index] = samples.token_ids[place]
            output.logprobs[row.index] = samples.logprobs[place]
            if place in samples.failed:
                output.failed[row.index] = samples.failed[place]

    def _score_prompts(self, step: _Step, logits: npt.NDArray[np.float32], output: StepOutput) -> None:
        for row in step.plan.host_rows:
            if row.num_positions and row.index not in output.failed:
                scores = score_prompt(step.batch.rows[row.index], logits[row.first : row.first + row.num_positions])
                if scores is None:
                    output.failed[row.index] = NOT_FINITE
                else:
                    output.prompt_logprobs[row.index] = scores
