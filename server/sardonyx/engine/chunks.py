"""How the prompts that are being prefilled share what a step has left beside its decodes. Floor 3."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sardonyx.engine.step_cost import StepCost

_OLDEST_SHARE = 4
"""One part in so many belongs to the oldest prompt."""


class Prefill(NamedTuple):
    """A prompt as a step finds it."""

    num_past: int
    """Tokens that are in the cache."""
    num_pending: int
    """Tokens to go."""
    max_tokens: int | None = None
    """Of this prompt in this step at most; ``None``: no limit of its own."""


@dataclass(slots=True, frozen=True)
class ChunkLimits:
    """What prompt chunks may take of one step."""

    max_chunk_tokens: int
    """One sequence at most."""
    max_tokens: int
    """All together at most; at least 1."""
    max_s: float
    """All together at most, in seconds of the step; infinity where nobody decodes."""
    min_tokens: int
    """Where `max_s` allows less than this, all together get this instead."""
    min_oldest_tokens: int
    """The oldest at least, whatever `max_s` says: its guard."""


def divide_chunks(prompts: Sequence[Prefill], limits: ChunkLimits, cost: StepCost) -> list[int]:
    """Decide how many tokens of each prompt this step computes.

    A quarter of the step's room, and at least one token, is the oldest prompt's. The rest goes to the prompt with the
    fewest tokens to go, then to the next (of equals the older first): a short prompt passes a long one, and equal ones
    finish one after the other in order of arrival. As the oldest advances in every step and every prompt becomes the
    oldest, none waits for ever.

    Args:
        prompts: in prefill, oldest first; not empty. The oldest may take a token at least.
        limits: the room. `min_tokens` and `min_oldest_tokens` may go beyond `max_s`, nothing beyond the other two.
        cost: what a chunk costs after so many cached tokens.

    Returns:
        Tokens by prompt; 0 where it has to sit this step out.
    """
    num_past = prompts[0].num_past
    max_tokens, max_s = limits.max_tokens, limits.max_s
    if cost.max_chunk_tokens(num_past, max_s) < limits.min_tokens:
        max_tokens, max_s = min(max_tokens, limits.min_tokens), math.inf
    chunks = [0] * len(prompts)

    def room(i: int) -> int:
        num_pending, most = prompts[i].num_pending, prompts[i].max_tokens
        return min(num_pending, limits.max_chunk_tokens, num_pending if most is None else most) - chunks[i]

    share, share_s = max(1, max_tokens // _OLDEST_SHARE), max_s / _OLDEST_SHARE
    chunk = max(1, min(share, cost.max_chunk_tokens(num_past, share_s)), limits.min_oldest_tokens)
    chunks[0] = min(chunk, limits.max_tokens, room(0))
    # What the guard takes beyond the oldest's share is not the others' loss, and counts when the oldest takes more.
    past_share = max(0, chunks[0] - share)
    past_share_s = max(0.0, cost.chunk_s(num_past, chunks[0]) - share_s)
    num_left = max_tokens - chunks[0] + past_share
    left_s = max_s - cost.chunk_s(num_past, chunks[0]) + past_share_s
    for i in sorted(range(len(prompts)), key=lambda i: prompts[i].num_pending):
        num_past = prompts[i].num_past + chunks[i]
        is_oldest = i == 0
        num_more = min(
            room(i),
            num_left - past_share * is_oldest,
            limits.max_tokens - sum(chunks),
            cost.max_chunk_tokens(num_past, left_s - past_share_s * is_oldest),
        )
        if num_more > 0:
            chunks[i] += num_more
            num_left -= num_more
            left_s -= cost.chunk_s(num_past, num_more)
    return chunks
