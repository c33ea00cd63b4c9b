"""Who waits, who runs, and in which blocks. Floor 3.

**Growth.** A running sequence takes a block whenever its tokens outgrow those it has; where none is free, the youngest
is preempted, but never while a step is out. One that waits starts only where it leaves blocks for the next tokens of
all that run, and for those that hold back before it.

**Steps ahead.** Blocks are taken back the moment their sequence ends, even while a step that was launched before still
has a row that reads and writes them. That row does no harm. Steps run in the order of their launch, each after the one
before it has ended, and a block goes to another sequence only in a step that is launched later. So the row reads its
blocks before anybody else has written them; and whatever it leaves behind lies at positions that a later owner writes
itself, in a step that comes after, before it reads them. Nothing that others may find is touched: a block is found once
a step that computed its last token is known to have succeeded, and every row writes behind what its sequence had
computed by then, so never in such a block.
"""

import heapq
from collections.abc import Mapping

from sardonyx.core import RunnerLimits, Sequence, SequenceState, SlotCopy
from sardonyx.engine.kv_blocks import ID_BYTES, Content, KvBlocks, pack_ids
from sardonyx.engine.roster import GROWTH_TOKENS, NOTHING_OUT, Entry, Promise, Roster


class PagedRoster(Roster[list[int]]):
    """A roster whose running sequences have a block table each. Used by one thread.

    Args:
        limits: the runner's; one sequence of `max_model_len` fits into its blocks.
        max_num_seqs: sequences that run at once, at most `RunnerLimits.num_slots`.
    """

    def __init__(self, limits: RunnerLimits, max_num_seqs: int) -> None:
        super().__init__(max_num_seqs)
        self._block_size = limits.block_size
        self._blocks = KvBlocks(limits.num_blocks, limits.block_size)
        self._places = list(range(max_num_seqs))
        self._num_set_aside = 0
        self._promisers: dict[Content, Entry] = {}
        """Who computes what a full block will hold, by the block that each fills next."""
        self._promised: dict[str, Content] = {}
        """The same by request."""

    @property
    def num_retained_tokens(self) -> int:
        """Tokens that free blocks keep."""
        return self._blocks.num_retained_tokens

    @property
    def kv_usage(self) -> float:
        return self._blocks.num_held / self._blocks.num_usable

    def advance(self, sequence: Sequence, num_tokens: int) -> None:
        num_full = sequence.num_computed_tokens // self._block_size
        sequence.num_computed_tokens += num_tokens
        num_full_now = sequence.num_computed_tokens // self._block_size
        if num_full_now > num_full:
            for index in range(num_full, num_full_now):
                self._blocks.fill(sequence.blocks, index, sequence.token_ids)
            self._promise(self._entries[sequence.request.id], num_full_now)

    def append(self, sequence: Sequence, token_id: int) -> None:
        sequence.token_ids.append(token_id)

    def settle(self, now_s: float) -> list[SlotCopy]:
        """Decide who runs in the next step. No step is out, and nothing is ever copied."""
        for entry in list(self._running):
            # The younger ones behind a preempted sequence are preempted as well.
            while entry.sequence.state is SequenceState.RUNNING and self._is_short(entry.sequence):
                if self._blocks.num_free:
                    self._blocks.extend(entry.sequence.blocks)
                else:
                    self._preempt(self._running[-1])
        self._start_waiting(now_s)
        return []

    def settle_ahead(self, now_s: float, out: Mapping[str, int], growing: list[Sequence]) -> bool:
        short = [sequence for sequence in growing if self._is_short(sequence, num_more=1)]
        if len(short) > self._blocks.num_free:
            return False
        for sequence in short:
            self._blocks.extend(sequence.blocks)
        self._start_waiting(now_s, out)
        return True

    def restart(self, slots: set[int]) -> None:
        """Nothing is lost but with the sequences that end: there are no copies."""
        assert not slots

    def _is_short(self, sequence: Sequence, num_more: int = 0) -> bool:
        return len(sequence.token_ids) + num_more > len(sequence.blocks) * self._block_size

    def _start_waiting(self, now_s: float, out: Mapping[str, int] = NOTHING_OUT) -> None:
        if self._waiting:
            self._num_set_aside = sum(self._num_growth_blocks(entry.sequence) for entry in self._running)
            super()._start_waiting(now_s, out)

    def _num_growth_blocks(self, sequence: Sequence) -> int:
        """Blocks for a sequence's next tokens, beside those that it has, or will have when it starts."""
        num_tokens = len(sequence.token_ids)
        num_most = min(num_tokens + GROWTH_TOKENS, sequence.num_prompt_tokens + sequence.request.max_tokens)
        num_blocks = len(sequence.blocks) or self._blocks.num_needed(num_tokens)
        return max(0, self._blocks.num_needed(num_most) - num_blocks)

    def _fits(self, entry: Entry) -> bool:
        return not self._running or self._blocks.num_free > self._num_set_aside

    def _find_prefix(self, entry: Entry, out: Mapping[str, int]) -> list[int] | None:
        match = super()._find_prefix(entry, out)
        if match is None:
            assert entry.awaited is not None
            num_tokens = len(entry.sequence.token_ids) - entry.awaited.num_tokens
            self._num_set_aside += self._blocks.num_needed(num_tokens)
        return match

    def _match(self, entry: Entry, max_tokens: int) -> tuple[list[int], Promise | None]:
        entry.packed_ids = entry.packed_ids or pack_ids(entry.sequence.token_ids)
        matched = self._blocks.match(entry.packed_ids, max_tokens)
        name = self._blocks.name(matched, len(matched), entry.packed_ids[: max_tokens * ID_BYTES])
        other = self._promisers.get(name) if name is not None else None
        if other is None:
            return matched, None
        num_blocks = self._num_common_blocks(entry, other, len(matched) + 1, max_tokens)
        return matched, Promise(other.sequence, num_blocks * self._block_size)

    def _num_common_blocks(self, entry: Entry, other: Entry, num_known: int, max_tokens: int) -> int:
        """Full blocks that two prompts begin with, where so many are known to be."""
        num_bytes = self._block_size * ID_BYTES
        num_most = min(max_tokens * ID_BYTES, len(other.packed_ids)) // num_bytes
        for index in range(num_known, num_most):
            start = index * num_bytes
            if not entry.packed_ids.startswith(other.packed_ids[start : start + num_bytes], start):
                return index
        return num_most

    def _promise(self, entry: Entry, index: int) -> None:
        """A running sequence fills its block at `index` next."""
        self._withdraw(entry.sequence)
        name = self._blocks.name(entry.sequence.blocks, index, entry.packed_ids)
        if name is not None and self._promisers.setdefault(name, entry) is entry:
            self._promised[entry.sequence.request.id] = name

    def _withdraw(self, sequence: Sequence) -> None:
        name = self._promised.pop(sequence.request.id, None)
        if name is not None:
            del self._promisers[name]

    def _place(self, entry: Entry, match: list[int]) -> int | None:
        sequence, num_tokens = entry.sequence, len(entry.sequence.token_ids)
        num_new = self._blocks.num_needed(num_tokens) - len(match)
        num_growth = self._num_growth_blocks(sequence)
        num_free = self._blocks.num_free - self._blocks.num_free_among(match)
        if self._running and num_new + num_growth + self._num_set_aside > num_free:
            return None
        self._num_set_aside += num_growth
        sequence.blocks = self._blocks.take(match, num_new)
        sequence.slot = heapq.heappop(self._places)
        self._promise(entry, len(match))
        return len(match) * self._block_size

    def _release(self, sequence: Sequence, *, is_valid: bool) -> None:
        self._withdraw(sequence)
        self._blocks.release(sequence.blocks, is_valid=is_valid)
        heapq.heappush(self._places, sequence.slot)
        sequence.blocks, sequence.slot = [], -1
