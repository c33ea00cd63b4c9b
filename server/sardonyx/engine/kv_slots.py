"""Slots of the KV cache: who owns which, what each still holds, and how much of it a new prompt can use.

Floor 3. Bookkeeping over token ids; the runner moves the data. A slot's content outlives its sequence, so a free slot
is also a prefix cache of one prompt.

Why a `SlotCopy` never reads anything but what it was meant to: ``num_cached`` counts positions that earlier steps
computed or that earlier copies of this step bring, never what this step's pass will compute. Copies run one after the
other, in the order in which `KvSlots.acquire` returned them, and all before the pass. So when a copy runs, nothing
but earlier copies of the same list has changed its source since the last pass, and those the bookkeeping has
followed: a source that is taken in place later in the step loses nothing before the pass, and one that a later copy
overwrites is overwritten after it was read. The pass writes each row at and after its owner's ``num_cached`` only.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sardonyx.core import SlotCopy

MIN_SHARED_TOKENS = 16
"""A shorter common prefix is not worth a copy or a wait: it is a BOS token or the head of a chat template."""

_RECENT_WEIGHT = 8
"""Taking the best slot in place may destroy an eighth of what evicting the least recently used one would."""

TokenArray = npt.NDArray[np.int32]


class PrefixMatch(NamedTuple):
    """What the slots hold of one prompt."""

    lengths: list[int]
    """By slot: leading tokens of the prompt that are cached there."""
    source: int
    """The slot that holds most of it."""
    promiser: int
    """The busy slot that will hold most of it once its own prompt is computed; -1 where none will."""
    num_promised: int
    """How much that will be."""

    @property
    def num_cached(self) -> int:
        return self.lengths[self.source]


class Placement(NamedTuple):
    """Where a sequence goes."""

    slot: int
    num_cached: int
    """Leading tokens that need not be computed, once `copy` has run."""
    copy: SlotCopy | None


@dataclass(slots=True)
class _Slot:
    is_free: bool = True
    num_known: int = 0
    """Tokens that its sequence has; those past `num_cached` are still to be computed. Equal to it when free."""
    num_cached: int = 0
    last_used: int = 0
    """Higher is later; 0 is never."""


class KvSlots:
    """The pool. Used by one thread.

    Args:
        num_slots: rows of the cache.
        max_tokens: the most tokens of one sequence.
    """

    def __init__(self, num_slots: int, max_tokens: int) -> None:
        self._slots = [_Slot() for _ in range(num_slots)]
        self._ids: TokenArray = np.zeros((num_slots, max_tokens), dtype=np.int32)
        self._num_uses = 0
        self._num_retained_tokens = 0

    @property
    def num_retained_tokens(self) -> int:
        """Tokens cached in free slots."""
        return self._num_retained_tokens

    def match(self, ids: TokenArray, max_tokens: int) -> PrefixMatch:
        """Compare a prompt with every slot.

        64 slots of 8,192 tokens that all share the prompt's 8,191 take 0.15 ms; slots that differ from it in the first
        token cost nothing, and 64 that share only that 0.14 ms (2 GHz AVX2 core, best of 20).

        Args:
            ids: the prompt, (n,).
            max_tokens: how many leading tokens may be taken from the cache. The last token of a sequence must be
                computed, so at most n - 1; 0 matches nothing.
        """
        lengths = [0] * len(self._slots)
        promiser, num_promised = -1, 0
        if max_tokens:
            for index in np.flatnonzero(self._ids[:, 0] == ids[0]).tolist():
                slot = self._slots[index]
                num_common = self._num_common(index, ids, min(slot.num_known, max_tokens))
                lengths[index] = min(num_common, slot.num_cached)
                if num_common > max(slot.num_cached, num_promised):
                    promiser, num_promised = index, num_common
        source = max(range(len(lengths)), key=lengths.__getitem__)
        return PrefixMatch(lengths, source, promiser, num_promised)

    def _num_common(self, index: int, ids: TokenArray, num_compared: int) -> int:
        if not num_compared:
            return 0
        differs = self._ids[index, :num_compared] != ids[:num_compared]
        first = int(differs.argmax())
        return first if differs[first] else num_compared

    def acquire(self, ids: TokenArray, match: PrefixMatch) -> Placement:
        """Give a free slot to a sequence. There must be one.

        The slot that goes is the least recently used; slots with next to nothing in them go first. Where another slot
        holds more of the prompt, that part is copied, unless the other is free and loses little by being taken itself
        (a conversation that goes on).

        Args:
            ids: all known tokens, (n,).
            match: of the same tokens, fresh: no other call in between.
        """
        target = self._least_useful()
        source, num_cached, copy = match.source, match.lengths[target], None
        if source != target and self._is_better_in_place(source, target, match):
            target, num_cached = source, match.num_cached
        elif match.num_cached - num_cached >= MIN_SHARED_TOKENS:
            num_cached = match.num_cached
            copy = SlotCopy(source, target, num_cached)
            self._touch(source)
        slot = self._slots[target]
        self._num_retained_tokens -= slot.num_cached
        slot.is_free = False
        slot.num_known, slot.num_cached = len(ids), num_cached
        self._ids[target, : len(ids)] = ids
        return Placement(target, num_cached, copy)

    def _least_useful(self) -> int:
        free = [(slot.num_cached >= MIN_SHARED_TOKENS, slot.last_used, i) for i, slot in self._enumerate_free()]
        return min(free)[-1]

    def _is_better_in_place(self, source: int, target: int, match: PrefixMatch) -> bool:
        """Whether to take `source` itself rather than copy its prefix to `target`."""
        slot = self._slots[source]
        num_lost = slot.num_cached - match.num_cached
        num_lost_by_copy = self._slots[target].num_cached - match.lengths[target]
        return (
            slot.is_free
            and match.num_cached > 0
            and num_lost <= max(MIN_SHARED_TOKENS, num_lost_by_copy // _RECENT_WEIGHT)
        )

    def advance(self, index: int, num_cached: int) -> None:
        """The pass has computed a busy slot's tokens up to here."""
        self._slots[index].num_cached = num_cached

    def append(self, index: int, token_id: int) -> None:
        """A busy slot's sequence has one more token, not yet computed."""
        slot = self._slots[index]
        self._ids[index, slot.num_known] = token_id
        slot.num_known += 1

    def release(self, index: int, *, is_valid: bool = True) -> None:
        """Free a slot. What it holds is kept for other prompts, unless the step that wrote it failed."""
        slot = self._slots[index]
        if not is_valid:
            slot.num_cached = 0
        slot.is_free = True
        slot.num_known = slot.num_cached
        self._num_retained_tokens += slot.num_cached
        self._touch(index)

    def trim(self, max_tokens: int) -> None:
        """Forget what free slots hold, least recently used first and from the end, until `max_tokens` are left."""
        num_excess = self._num_retained_tokens - max_tokens
        if num_excess <= 0:
            return
        for _, slot in sorted(self._enumerate_free(), key=lambda pair: pair[1].last_used):
            num_dropped = min(num_excess, slot.num_cached)
            slot.num_cached -= num_dropped
            slot.num_known = slot.num_cached
            self._num_retained_tokens -= num_dropped
            num_excess -= num_dropped

    def _enumerate_free(self) -> list[tuple[int, _Slot]]:
        return [(index, slot) for index, slot in enumerate(self._slots) if slot.is_free]

    def _touch(self, index: int) -> None:
        self._num_uses += 1
        self._slots[index].last_used = self._num_uses
