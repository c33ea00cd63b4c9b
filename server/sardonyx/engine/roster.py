"""Who waits and who runs. Floor 3; a part of the continuous policy, whatever the KV cache is made of.

**Order** is order of submission, for ever: a preempted sequence takes its old place in the line. The oldest waiting
sequence starts first. It may *hold back* while a running one computes a prefix that they share, to use it afterwards;
its claim on a place stands meanwhile, so others pass it only where there are places for both.

**Room.** A running sequence has room for all tokens that it knows, computed or not: what a prompt will need is set
aside when it starts, and only generated tokens can outgrow the cache. Where they do, the youngest is preempted. Work
never stops: the oldest running sequence is never preempted, and alone it fits.
"""

import bisect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from sardonyx.core import Sequence, SequenceState, SlotCopy

GROWTH_TOKENS = 32
"""Room for the next tokens of each running sequence, before another one may start: one that starts into a full cache
would be preempted, and its prefill lost, within a few steps."""

Match = TypeVar("Match")
"""What a cache holds of one prompt."""

NOTHING_OUT: Mapping[str, int] = {}


@dataclass(slots=True)
class Promise:
    """A running sequence is computing a prefix which a waiting one shares."""

    sequence: Sequence
    num_tokens: int
    """What they share."""
    num_seen: int = 0
    """How much was computed, or on its way, when the waiting one last looked."""


@dataclass(slots=True, eq=False)
class Entry:
    """A sequence's place in the order."""

    sequence: Sequence
    order: int
    packed_ids: bytes = b""
    """All tokens, where it has been compared with the cache since they last changed."""
    awaited: Promise | None = None
    may_hold_back: bool = True


def _order(entry: Entry) -> int:
    return entry.order


class Roster(ABC, Generic[Match]):
    """All sequences that have not ended. Used by one thread.

    Args:
        max_num_seqs: sequences that run at once.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._entries: dict[str, Entry] = {}
        self._waiting: list[Entry] = []
        self._running: list[Entry] = []
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
    @abstractmethod
    def num_retained_tokens(self) -> int:
        """Tokens that the cache keeps for prompts to come."""

    @property
    @abstractmethod
    def kv_usage(self) -> float:
        """Share of the cache that running sequences use."""

    def get(self, request_id: str) -> Sequence | None:
        """The sequence of a request, unless it has ended."""
        entry = self._entries.get(request_id)
        return entry.sequence if entry else None

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the line."""
        entry = Entry(sequence, self._num_added)
        self._num_added += 1
        self._entries[sequence.request.id] = entry
        self._waiting.append(entry)

    def remove(self, sequence: Sequence, *, is_valid: bool = True) -> None:
        """A sequence has ended. The cache keeps what it holds, unless the step that wrote it failed."""
        entry = self._entries.pop(sequence.request.id)
        if sequence.state is SequenceState.RUNNING:
            self._leave(entry, is_valid=is_valid)
        else:
            self._waiting.remove(entry)
        sequence.state = SequenceState.FINISHED

    @abstractmethod
    def advance(self, sequence: Sequence, num_tokens: int) -> None:
        """A step computed so many more tokens of a running sequence."""

    @abstractmethod
    def append(self, sequence: Sequence, token_id: int) -> None:
        """A running sequence has a new token."""

    @abstractmethod
    def settle(self, now_s: float) -> list[SlotCopy]:
        """Decide who runs in the next step. No step is out.

        Returns:
            What must be copied, in this order, before the step's pass.
        """

    @abstractmethod
    def settle_ahead(self, now_s: float, out: Mapping[str, int], growing: list[Sequence]) -> bool:
        """Decide who runs in a step behind the one that is out. Nobody is preempted.

        Args:
            now_s: monotonic.
            out: tokens that it computes, by request.
            growing: running sequences that will have one more token than they know.

        Returns:
            Whether there can be such a step: the growing ones all have room.
        """

    @abstractmethod
    def restart(self, slots: set[int]) -> None:
        """What running sequences have in these slots was lost: they wait again and are computed from the start."""

    @abstractmethod
    def _fits(self, entry: Entry) -> bool:
        """Whether a waiting sequence may be looked at: false where there is certainly no room."""

    @abstractmethod
    def _match(self, entry: Entry, max_tokens: int) -> tuple[Match, Promise | None]:
        """What the cache holds of a waiting sequence, `max_tokens` at most, and who computes more that is worth it."""

    @abstractmethod
    def _place(self, entry: Entry, match: Match) -> int | None:
        """Give a sequence its part of the cache.

        Returns:
            Its leading tokens that need not be computed; ``None`` where there is no room.
        """

    @abstractmethod
    def _release(self, sequence: Sequence, *, is_valid: bool) -> None:
        """Take its part of the cache from a sequence."""

    def _leave(self, entry: Entry, *, is_valid: bool) -> None:
        self._running.remove(entry)
        self._release(entry.sequence, is_valid=is_valid)
        entry.packed_ids = b""

    def _preempt(self, entry: Entry, *, is_valid: bool = True) -> None:
        sequence = entry.sequence
        self._leave(entry, is_valid=is_valid)
        bisect.insort(self._waiting, entry, key=_order)
        sequence.state = SequenceState.PREEMPTED
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.prompt_logprobs.clear()
        self.num_preemptions += 1

    def _start_waiting(self, now_s: float, out: Mapping[str, int] = NOTHING_OUT) -> None:
        num_places = self._max_num_seqs - len(self._running)
        index = 0
        while num_places > 0 and index < len(self._waiting) and self._fits(self._waiting[index]):
            num_places -= 1
            entry = self._waiting[index]
            match = self._find_prefix(entry, out)
            if match is None:
                index += 1
                continue
            num_cached = self._place(entry, match)
            if num_cached is None:
                return
            del self._waiting[index]
            self._start(entry, num_cached, now_s)

    def _find_prefix(self, entry: Entry, out: Mapping[str, int]) -> Match | None:
        """What the cache holds of a waiting sequence, or ``None`` while it holds back.

        To compute the shared tokens itself would not be quicker, as long as the other sequence advances in every step.
        When that one sits a step out, this one holds back no more, so it waits for fewer steps than they share tokens.
        """
        if self._goes_on_holding_back(entry, out):
            return None
        match, promise = self._match(entry, num_reusable_tokens(entry.sequence))
        if entry.may_hold_back and promise is not None:
            promise.num_seen = _num_computed(promise.sequence, out)
            entry.awaited = promise
            return None
        return match

    def _goes_on_holding_back(self, entry: Entry, out: Mapping[str, int]) -> bool:
        promise, entry.awaited = entry.awaited, None
        if promise is None or promise.sequence.state is not SequenceState.RUNNING:
            return False
        is_kept = promise.sequence.num_computed_tokens >= promise.num_tokens
        num_computed = _num_computed(promise.sequence, out)
        if not is_kept and num_computed > promise.num_seen:
            promise.num_seen = num_computed
            entry.awaited = promise
            return True
        entry.may_hold_back = is_kept
        return False

    def _start(self, entry: Entry, num_cached: int, now_s: float) -> None:
        sequence = entry.sequence
        bisect.insort(self._running, entry, key=_order)
        sequence.state = SequenceState.RUNNING
        sequence.num_computed_tokens = num_cached
        if sequence.started_s is None:
            sequence.started_s = now_s
            sequence.num_cached_tokens = num_cached
            self.prompt_tokens += sequence.num_prompt_tokens
            self.prefix_hit_tokens += num_cached


def _num_computed(sequence: Sequence, out: Mapping[str, int]) -> int:
    """Tokens that are computed, or on their way."""
    return sequence.num_computed_tokens + out.get(sequence.request.id, 0)


def num_reusable_tokens(sequence: Sequence) -> int:
    """How many leading tokens may be taken from the cache: the last one must be computed.

    Prompt log-probabilities take the logits of every prompt token.
    """
    return 0 if is_scored(sequence) else len(sequence.token_ids) - 1


def is_scored(sequence: Sequence) -> bool:
    """Log-probabilities of its prompt are wanted, and have not been delivered."""
    return sequence.request.num_prompt_logprobs is not None and not sequence.num_completion_tokens
