"""Who waits, who runs, and in which slot. Floor 3.

**Budget.** Free slots keep what the running sequences leave of the budget; where those leave less than nothing, the
youngest is preempted.
"""

from collections.abc import Mapping

import numpy as np

from sardonyx.core import RunnerLimits, Sequence, SlotCopy
from sardonyx.engine.kv_blocks import pack_ids
from sardonyx.engine.kv_slots import MIN_SHARED_TOKENS, KvSlots, PrefixMatch, TokenArray
from sardonyx.engine.roster import GROWTH_TOKENS, Entry, Promise, Roster


class SlotRoster(Roster[PrefixMatch]):
    """A roster whose running sequences have a slot each. Used by one thread.

    Args:
        limits: the runner's.
        max_num_seqs: sequences that run at once, at most one for each slot.
        kv_budget_tokens: tokens that may be cached in all slots together, at least one sequence of `max_model_len`;
            ``None``: as many as the slots hold.
    """

    def __init__(self, limits: RunnerLimits, max_num_seqs: int, kv_budget_tokens: int | None) -> None:
        super().__init__(max_num_seqs)
        self._slots = KvSlots(limits.num_slots, limits.max_model_len)
        self._num_slot_tokens = limits.num_slots * limits.max_model_len
        self._budget = kv_budget_tokens
        self._copies: list[SlotCopy] = []

    @property
    def num_retained_tokens(self) -> int:
        """Tokens that free slots keep."""
        return self._slots.num_retained_tokens

    @property
    def kv_usage(self) -> float:
        num_cached = sum(entry.sequence.num_computed_tokens for entry in self._running)
        return num_cached / (self._budget or self._num_slot_tokens)

    def advance(self, sequence: Sequence, num_tokens: int) -> None:
        sequence.num_computed_tokens += num_tokens
        self._slots.advance(sequence.slot, sequence.num_computed_tokens)

    def append(self, sequence: Sequence, token_id: int) -> None:
        sequence.token_ids.append(token_id)
        self._slots.append(sequence.slot, token_id)

    def settle(self, now_s: float) -> list[SlotCopy]:
        if self._budget is not None:
            while self._num_held_tokens() > self._budget:
                self._preempt(self._running[-1])
        self._copies = []
        self._start_waiting(now_s)
        if self._budget is not None:
            self._slots.trim(self._budget - self._num_held_tokens())
        return self._copies

    def settle_ahead(self, now_s: float, out: Mapping[str, int], growing: list[Sequence]) -> bool:
        """Never: slots serve runners whose steps end before the next one begins."""
        return False

    def restart(self, slots: set[int]) -> None:
        for entry in [entry for entry in self._running if entry.sequence.slot in slots]:
            self._preempt(entry, is_valid=False)

    def _num_held_tokens(self) -> int:
        return sum(len(entry.sequence.token_ids) for entry in self._running)

    def _fits(self, entry: Entry) -> bool:
        if self._budget is None or not self._running:
            return True
        num_tokens = self._num_held_tokens() + len(entry.sequence.token_ids)
        return num_tokens + GROWTH_TOKENS * (len(self._running) + 1) <= self._budget

    def _match(self, entry: Entry, max_tokens: int) -> tuple[PrefixMatch, Promise | None]:
        entry.packed_ids = entry.packed_ids or pack_ids(entry.sequence.token_ids)
        match = self._slots.match(_ids(entry), max_tokens)
        if match.num_promised - match.num_cached < MIN_SHARED_TOKENS:
            return match, None
        other = next(each.sequence for each in self._running if each.sequence.slot == match.promiser)
        return match, Promise(other, match.num_promised)

    def _place(self, entry: Entry, match: PrefixMatch) -> int:
        placement = self._slots.acquire(_ids(entry), match)
        entry.packed_ids = b""
        entry.sequence.slot = placement.slot
        if placement.copy is not None:
            self._copies.append(placement.copy)
        return placement.num_cached

    def _release(self, sequence: Sequence, *, is_valid: bool) -> None:
        self._slots.release(sequence.slot, is_valid=is_valid)
        sequence.slot = -1


def _ids(entry: Entry) -> TokenArray:
    return np.frombuffer(entry.packed_ids, dtype=np.int32)
