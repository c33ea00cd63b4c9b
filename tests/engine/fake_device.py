"""A device whose cache is blocks of plain token ids and whose steps run late, so that a wrong block, position, owner or
order of steps changes the tokens that come out."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.engine.fake_runner import next_token, prompt_logprob

from sardonyx.core import Batch, BatchRow, RunnerLimits, StepOutput, TokenLogprobs
from sardonyx.errors import EngineError


@dataclass
class Launched:
    """What a launch reads of a batch: sequences may change, end and lose their blocks before the step runs."""

    batch: Batch
    blocks: list[list[int]]
    ids: list[list[int]]
    before: "Launched | None"
    """The step that was out then."""
    token_ids: list[int | None] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)
    """Rows, by id of their sequence, whose positions were destroyed."""


class FakeDevice:
    """Keeps the promises of `core.AsyncRunner` and no others.

    Args:
        limits: what batches are held to.
        max_batch_tokens: T at most.
        is_followed: what `can_follow` says.
        is_late: steps run when they are collected, else when they are launched.
    """

    def __init__(
        self,
        limits: RunnerLimits,
        *,
        max_batch_tokens: int = 1 << 30,
        is_followed: Callable[[Batch], bool] = lambda batch: True,
        is_late: bool = True,
    ) -> None:
        self.limits = limits
        self.max_batch_tokens = max_batch_tokens
        self.is_followed = is_followed
        self.is_late = is_late
        self.memory: list[list[int | None]] = [[None] * limits.block_size for _ in range(limits.num_blocks)]
        self.out: deque[Launched] = deque()
        self.last: Launched | None = None
        self.on_launch: Callable[[Batch], None] | None = None
        """May raise."""
        self.on_step: Callable[[Batch], dict[int, str] | None] | None = None
        """Called when a step is collected; may raise, or name rows that fail."""
        self.num_computed_tokens = 0
        self.num_closed = 0
        self.log: list[str] = []

    def can_follow(self, batch: Batch) -> bool:
        return self.is_followed(batch)

    def launch(self, batch: Batch) -> None:
        assert len(self.out) < 2, "at most two steps are out"
        self._check(batch)
        if self.on_launch is not None:
            self.on_launch(batch)
        self.log.append("launch")
        blocks = [list(row.sequence.blocks) for row in batch.rows]
        ids = [row.sequence.token_ids[: row.num_past + row.num_new_tokens] for row in batch.rows]
        self.last = Launched(batch, blocks, ids, self.out[-1] if self.out else None)
        self.out.append(self.last)
        if not self.is_late:
            self._run(self.last)

    def collect(self) -> StepOutput:
        step = self.out.popleft()
        self.log.append("collect")
        try:
            failed = (self.on_step(step.batch) if self.on_step else None) or {}
        except EngineError:
            for each in (step, *self.out):
                for index in range(len(each.batch.rows)):
                    self._destroy(each, index)
            self.out.clear()
            raise
        if self.is_late:
            self._run(step)
        output = StepOutput(token_ids=list(step.token_ids), logprobs=[], prompt_logprobs=[], failed=failed)
        for index, row in enumerate(step.batch.rows):
            self._score(row, step.ids[index], output)
            if index in failed:
                self._destroy(step, index)
                step.failed.add(id(row.sequence))
                output.token_ids[index] = step.token_ids[index] = None
        return output

    def execute(self, batch: Batch) -> StepOutput:
        self.launch(batch)
        return self.collect()

    def close(self) -> None:
        assert not self.out, "nothing is out when the runner is closed"
        self.num_closed += 1

    def _check(self, batch: Batch) -> None:
        assert batch.rows
        assert not batch.copies, "blocks are shared, not copied"
        assert batch.num_tokens <= self.max_batch_tokens
        slots = [row.sequence.slot for row in batch.rows]
        assert len(set(slots)) == len(slots) <= self.limits.num_slots
        written = [block for row in batch.rows for block in self._written_blocks(row)]
        assert len(set(written)) == len(written), "no two rows write to one block"
        held = [block for row in batch.rows for block in row.sequence.blocks]
        assert all(held.count(block) == 1 for block in written), "nobody reads what another writes"
        for row in batch.rows:
            num_after = row.num_past + row.num_new_tokens
            assert 0 <= row.sequence.slot < self.limits.num_slots
            assert 1 <= row.num_new_tokens <= self.limits.max_chunk_tokens
            assert num_after <= self.limits.max_model_len
            assert num_after <= len(row.sequence.blocks) * self.limits.block_size
            assert 0 not in row.sequence.blocks
            assert num_after == len(row.sequence.token_ids) + (row.fed_by >= 0) or not row.is_sampled
            if row.fed_by >= 0:
                source = self.out[-1].batch.rows[row.fed_by]
                assert source.sequence is row.sequence
                assert source.is_sampled
                assert (row.num_new_tokens, row.num_ahead) == (1, source.num_new_tokens)

    def _written_blocks(self, row: BatchRow) -> list[int]:
        first, last = row.num_past, row.num_past + row.num_new_tokens - 1
        size = self.limits.block_size
        return row.sequence.blocks[first // size : last // size + 1]

    def _places(self, step: Launched, index: int) -> list[tuple[int, int]]:
        row, size = step.batch.rows[index], self.limits.block_size
        return [(step.blocks[index][p // size], p % size) for p in range(row.num_past + row.num_new_tokens)]

    def _destroy(self, step: Launched, index: int) -> None:
        """What the row was to write is unspecified."""
        for block, offset in self._places(step, index)[step.batch.rows[index].num_past :]:
            self.memory[block][offset] = None

    def _run(self, step: Launched) -> None:
        for index, row in enumerate(step.batch.rows):
            if row.fed_by >= 0:
                assert step.before is not None
                fed = step.before.token_ids[row.fed_by]
                step.ids[index] = [*step.ids[index][: row.num_past], -1 if fed is None else fed]
            places, ids = self._places(step, index), step.ids[index]
            for (block, offset), token_id in zip(places[row.num_past :], ids[row.num_past :], strict=True):
                self.memory[block][offset] = token_id
        for index, row in enumerate(step.batch.rows):
            prefix = [self.memory[block][offset] for block, offset in self._places(step, index)]
            is_broken = step.before is not None and id(row.sequence) in step.before.failed
            assert is_broken or prefix == step.ids[index], "the blocks hold what the sequence thinks they hold"
            is_wanted = row.is_sampled and row.sequence.request.max_tokens > 0
            step.token_ids.append(next_token(step.ids[index], self.limits.vocab_size) if is_wanted else None)
        self.num_computed_tokens += step.batch.num_tokens

    def _score(self, row: BatchRow, ids: list[int], output: StepOutput) -> None:
        request = row.sequence.request
        asked = request.sampling.num_logprobs is not None and row.is_sampled
        output.logprobs.append(TokenLogprobs(token_id=0, logprob=-1.0, top=[]) if asked else None)
        predicted = range(row.num_past + 1, min(len(ids) + 1, row.sequence.num_prompt_tokens))
        is_scored = request.num_prompt_logprobs is not None
        output.prompt_logprobs.append([prompt_logprob(request.prompt_ids, i) for i in predicted] if is_scored else [])
