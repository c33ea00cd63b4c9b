"""What a step loop counts. Floor 3."""

from bisect import bisect_left
from dataclasses import dataclass, field

import msgspec

from sardonyx.core import AnyBatch

STEP_S_BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper bounds of the buckets of `LoopStats.step_s_counts`, in seconds; a last bucket takes what is longer."""


class PolicyStats(msgspec.Struct, frozen=True, kw_only=True):
    """A policy's counts between two steps. Token counts only grow."""

    num_waiting: int = 0
    """Sequences without a slot, preempted ones among them."""
    num_running: int = 0
    kv_usage: float = 0.0
    """Share of the KV cache that running sequences use, in [0, 1]."""
    num_retained_tokens: int = 0
    """Tokens that free slots keep for prompts to come."""
    num_preemptions: int = 0
    prompt_tokens: int = 0
    """Of sequences that got a slot, cached ones among them, each prompt once."""
    prefix_hit_tokens: int = 0
    """Of these, found in the cache and not computed."""
    generated_tokens: int = 0


class LoopStats(PolicyStats, frozen=True, kw_only=True):
    """A consistent snapshot of a loop: all counts are of the same moment, between two steps."""

    is_alive: bool
    has_work: bool
    """Some request has not ended."""
    stalled_s: float
    """With work: since the last finished step, or since the work came; else 0."""
    num_steps: int
    num_failed_steps: int
    last_step_s: float
    """Schedule, execution and update."""
    last_step_tokens: int
    last_step_rows: int
    step_tokens: int
    """T of all steps together."""
    step_s_sum: float
    step_s_counts: tuple[int, ...]
    """Steps by duration, one count for each of `STEP_S_BOUNDS` and one for the longer; not cumulative."""


@dataclass(slots=True)
class StepCounts:
    """The fields of `LoopStats` that are about steps, while they are counted."""

    num_steps: int = 0
    num_failed_steps: int = 0
    last_step_s: float = 0.0
    last_step_tokens: int = 0
    last_step_rows: int = 0
    step_tokens: int = 0
    step_s_sum: float = 0.0
    step_s_counts: list[int] = field(default_factory=lambda: [0] * (len(STEP_S_BOUNDS) + 1))

    def count(self, batch: AnyBatch, step_s: float, *, has_failed: bool) -> None:
        """A step is finished, after `step_s` seconds."""
        self.num_steps += 1
        self.num_failed_steps += has_failed
        self.last_step_s = step_s
        self.last_step_tokens = batch.num_tokens
        self.last_step_rows = len(batch.rows)
        self.step_tokens += self.last_step_tokens
        self.step_s_sum += step_s
        self.step_s_counts[bisect_left(STEP_S_BOUNDS, step_s)] += 1
