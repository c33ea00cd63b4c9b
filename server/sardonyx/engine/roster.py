"""Who waits, who runs, and in which slot. Floor 3; a part of the continuous policy.

**Order** is order of submission, for ever: a preempted sequence takes its old place in the line. The oldest waiting
sequence starts first. It may *hold back* while a running one computes a prefix that they share, to copy it afterwards;
its claim on a slot stands meanwhile, so others pass it only where there are slots for both.

**Budget.** A running sequence holds all tokens that it knows, computed or not: what a prompt will need is set aside
when it starts, and only generated tokens can outgrow the budget. Free slots keep what the running ones leave of it;
where they leave less than nothing, the youngest is preempted. Work never stops: the oldest running sequence is never
preempted, and alone it fits.
"""

import bisect
from dataclasses import dataclass

import numpy as np

from sardonyx.core import RunnerLimits, Sequence, SequenceState, SlotCopy
from sardonyx.engine.kv_slots import MIN_SHARED_TOKENS, KvSlots, PrefixMatch, TokenArray

_GROWTH_TOKENS = 32
"""Room in the budget for the next tokens of each running sequence, before another one may start: one that starts into a
full budget would be preempted, and its prefill lost, within a few steps."""


@dataclass(slots=True)
class _Awaited:
    """A running sequence that is computing a prefix which a waiting one shares."""

    sequence: Sequence
    num_tokens: int
    """What they share."""
    num_seen: int
    """How much was computed when the waiting one last looked."""


@dataclass(slots=True, eq=False)
class _Entry:
    sequence: Sequence
    order: int
    ids: TokenArray | None = None
    """All tokens, while it waits and has been compared with the slots."""
    awaited: _Awaited | None = None
    may_hold_back: bool = True


def _order(entry: _Entry) -> int:
    return entry.order


class Roster:
    """All sequences that have not ended. Used by one thread.

    Args:
        limits: the runner's.
        max_num_seqs: sequences that run at once, at most one for each slot.
        kv_budget_tokens: tokens that may be cached in all slots together, at least one sequence of `max_model_len`;
            ``None``: as many as the slots hold.
    """

    def __init__(self, limits: RunnerLimits, max_num_seqs: int, kv_budget_tokens: int | None) -> None:
        self._slots = KvSlots(limits.num_slots, limits.max_model_len)
        self._num_slot_tokens = limits.num_slots * limits.max_model_len
        self._max_num_seqs = max_num_seqs
        self._budget = kv_budget_tokens
        self._entries: dict[str, _Entry] = {}
        self._waiting: list[_Entry] = []
        self._running: list[_Entry] = []
        self._num_added = 0
        self.num_preemptions = 0
        self.prompt_tokens = 0
        self.prefix_hit_tokens = 0

    @property
    def running(self) -> list[Sequence]:
        """Oldest first."""
        return [entry.sequence for entry in self._running]

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_retained_tokens(self) -> int:
        """Tokens that free slots keep."""
        return self._slots.num_retained_tokens

    @property
    def kv_usage(self) -> float:
        """Share of the cache that running sequences use."""
        num_cached = sum(entry.sequence.num_computed_tokens for entry in self._running)
        return num_cached / (self._budget or self._num_slot_tokens)

    def get(self, request_id: str) -> Sequence | None:
        """The sequence of a request, unless it has ended."""
        entry = self._entries.get(request_id)
        return entry.sequence if entry else None

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the line."""
        entry = _Entry(sequence, self._num_added)
        self._num_added += 1
        self._entries[sequence.request.id] = entry
        self._waiting.append(entry)

    def remove(self, sequence: Sequence, *, is_valid: bool = True) -> None:
        """A sequence has ended. Its slot keeps what it holds, unless the step that wrote it failed."""
        entry = self._entries.pop(sequence.request.id)
        if sequence.state is SequenceState.RUNNING:
            self._leave_slot(entry, is_valid=is_valid)
        else:
            self._waiting.remove(entry)
        sequence.state = SequenceState.FINISHED

    def advance(self, sequence: Sequence, num_tokens: int) -> None:
        """A step computed so many more tokens of a running sequence."""
        sequence.num_computed_tokens += num_tokens
        self._slots.advance(sequence.slot, sequence.num_computed_tokens)

    def append(self, sequence: Sequence, token_id: int) -> None:
        """A running sequence has a new token."""
        sequence.token_ids.append(token_id)
        self._slots.append(sequence.slot, token_id)

    def settle(self, now_s: float) -> list[SlotCopy]:
        """Decide who runs in the next step.

        Returns:
            What must be copied, in this order, before the step's pass.
        """
        if self._budget is not None:
            while self._num_held_tokens() > self._budget:
                self._preempt(self._running[-1])
        copies = self._start_waiting(now_s)
        if self._budget is not None:
            self._slots.trim(self._budget - self._num_held_tokens())
        return copies

    def restart(self, slots: set[int]) -> None:
        """What running sequences have in these slots was lost: they wait again and are computed from the start."""
        for entry in [entry for entry in self._running if entry.sequence.slot in slots]:
            self._preempt(entry, is_valid=False)

    def _num_held_tokens(self) -> int:
        return sum(len(entry.sequence.token_ids) for entry in self._running)

    def _preempt(self, entry: _Entry, *, is_valid: bool = True) -> None:
        sequence = entry.sequence
        self._leave_slot(entry, is_valid=is_valid)
        bisect.insort(self._waiting, entry, key=_order)
        sequence.state = SequenceState.PREEMPTED
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.prompt_logprobs.clear()
        self.num_preemptions += 1

    def _leave_slot(self, entry: _Entry, *, is_valid: bool) -> None:
        self._running.remove(entry)
        self._slots.release(entry.sequence.slot, is_valid=is_valid)
        entry.sequence.slot = -1

    def _start_waiting(self, now_s: float) -> list[SlotCopy]:
        copies: list[SlotCopy] = []
        num_places = self._max_num_seqs - len(self._running)
        index = 0
        while num_places > 0 and index < len(self._waiting) and self._fits(self._waiting[index]):
            num_places -= 1
            entry = self._waiting[index]
            match = self._find_prefix(entry)
            if match is None:
                index += 1
                continue
            del self._waiting[index]
            copies += self._start(entry, match, now_s)
        return copies

    def _fits(self, entry: _Entry) -> bool:
        if self._budget is None or not self._running:
            return True
        num_tokens = self._num_held_tokens() + len(entry.sequence.token_ids)
        return num_tokens + _GROWTH_TOKENS * (len(self._running) + 1) <= self._budget

    def _find_prefix(self, entry: _Entry) -> PrefixMatch | None:
        """What the slots hold of a waiting sequence, or ``None`` while it holds back.

        To compute the shared tokens itself would not be quicker, as long as the other sequence advances in every step.
        When that one sits a step out, this one holds back no more, so it waits for fewer steps than they share tokens.
        """
        awaited, entry.awaited = entry.awaited, None
        if awaited is not None and awaited.sequence.state is SequenceState.RUNNING:
            num_computed = awaited.sequence.num_computed_tokens
            if awaited.num_seen < num_computed < awaited.num_tokens:
                awaited.num_seen = num_computed
                entry.awaited = awaited
                return None
            entry.may_hold_back = num_computed >= awaited.num_tokens
        if entry.ids is None:
            entry.ids = np.array(entry.sequence.token_ids, dtype=np.int32)
        match = self._slots.match(entry.ids, len(entry.ids) - 1 if _may_reuse(entry.sequence) else 0)
        if entry.may_hold_back and match.num_promised - match.num_cached >= MIN_SHARED_TOKENS:
            other = next(each.sequence for each in self._running if each.sequence.slot == match.promiser)
            entry.awaited = _Awaited(other, match.num_promised, other.num_computed_tokens)
            return None
        return match

    def _start(self, entry: _Entry, match: PrefixMatch, now_s: float) -> list[SlotCopy]:
        assert entry.ids is not None
        sequence = entry.sequence
        placement = self._slots.acquire(entry.ids, match)
        entry.ids = None
        bisect.insort(self._running, entry, key=_order)
        sequence.slot = placement.slot
        sequence.state = SequenceState.RUNNING
        sequence.num_computed_tokens = placement.num_cached
        if sequence.started_s is None:
            sequence.started_s = now_s
            sequence.num_cached_tokens = placement.num_cached
            self.prompt_tokens += sequence.num_prompt_tokens
            self.prefix_hit_tokens += placement.num_cached
        return [placement.copy] if placement.copy else []


def _may_reuse(sequence: Sequence) -> bool:
    """Prompt log-probabilities take the logits of every prompt token, until they have been delivered."""
    return sequence.request.num_prompt_logprobs is None or sequence.num_completion_tokens > 0
