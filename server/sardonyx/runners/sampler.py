"""Draws one token for each row of a step's logits.

Floor 3. Pure numpy; reads sequences and changes nothing.

Order of operations, as in vLLM: repetition, then frequency and presence penalty; logit bias; stop tokens masked while
`min_tokens` are not reached; temperature; min_p; top_k; top_p; typical_p, each on what the one before has left. Where
tokens are equally likely the lower id counts as likelier. Log-probabilities come from the logits as they were.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sardonyx.core import SamplingParams, Sequence, TokenLogprobs
from sardonyx.runners.logprobs import token_logprobs

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

MIN_TEMPERATURE = 1e-5
"""Below it a row is greedy: dividing by it would leave one token anyway, or overflow."""

_BLOCK = 256


@dataclass(slots=True)
class Samples:
    """One entry for each row of logits."""

    token_ids: list[int | None]
    logprobs: list[TokenLogprobs | None]
    failed: dict[int, str] = field(default_factory=dict)
    """By row: why it has no token."""


class Sampler:
    """Samples for one model. Used by one thread: it keeps scratch rows, since fresh ones cost page faults each step."""

    def __init__(self, vocab_size: int) -> None:
        self._ids: Ids = np.arange(vocab_size)
        self._row = np.empty(vocab_size, np.float32)
        self._distances = np.empty(vocab_size, np.float32)
        self._weights = np.empty(vocab_size, np.float32)

    def sample(self, logits: Floats, sequences: list[Sequence]) -> Samples:
        """Draw the next token of each sequence.

        Greedy rows share one argmax. The others are drawn row by row, so that a row's token depends on nothing but
        its logits, its sequence and its seed, to the bit, and because a row of V values stays in the core's own cache.
        Measured for 32 rows of real logits, V = 49,152: greedy 0.25 ms, temperature alone 3 ms, with top_p 5 ms.

        Args:
            logits: ``(N, V)``, raw. Left as they are.
            sequences: N of them. The number of their tokens so far is the position that the draw is seeded with.

        Returns:
            Tokens and log-probabilities. A row whose likeliest value is not finite fails alone.
        """
        winners = logits.argmax(axis=1).tolist()
        samples = Samples([None] * len(sequences), [None] * len(sequences))
        for index, (sequence, winner) in enumerate(zip(sequences, winners, strict=True)):
            row = logits[index]
            if not math.isfinite(row[winner]):
                samples.failed[index] = "the model's output for this sequence is not finite"
                continue
            params = sequence.request.sampling
            token_id: int = winner
            if _changes_logits(sequence):
                row = self._processed(row, sequence)
                token_id = int(row.argmax())
                if not math.isfinite(row[token_id]):
                    samples.failed[index] = "penalties, bias and masked stop tokens leave no token to draw"
                    continue
            if params.temperature >= MIN_TEMPERATURE:
                token_id = self._draw(
                    row, float(row[token_id]), params, uniform(sequence.seed, len(sequence.token_ids))
                )
            samples.token_ids[index] = token_id
            if params.num_logprobs is not None:
                samples.logprobs[index] = token_logprobs(logits[index], token_id, params.num_logprobs)
        return samples

    def _processed(self, row: Floats, sequence: Sequence) -> Floats:
        """The row after penalties, bias and the mask of stop tokens, in a scratch row."""
        params, request = sequence.request.sampling, sequence.request
        changed = self._row
        np.copyto(changed, row)
        if params.repetition_penalty != 1.0:
            ids = np.array(sequence.token_ids)  # some more than once, which assigns the same value again
            values = changed[ids]
            penalty = np.float32(params.repetition_penalty)
            changed[ids] = np.where(values > 0, values / penalty, values * penalty)
        if (params.frequency_penalty or params.presence_penalty) and sequence.num_completion_tokens:
            completion = np.array(sequence.token_ids[sequence.num_prompt_tokens :])
            ids, counts = np.unique(completion, return_counts=True)
            changed[ids] -= (params.frequency_penalty * counts + params.presence_penalty).astype(np.float32)
        for token_id, bias in params.logit_bias.items():
            if token_id < len(changed):
                changed[token_id] += bias
        if sequence.num_completion_tokens < request.min_tokens:
            changed[[token_id for token_id in request.stop_token_ids if token_id < len(changed)]] = -np.inf
        return changed

    def _draw(self, row: Floats, peak: float, params: SamplingParams, position: float) -> int:
        """Draw from what the filters leave, where the weights, cumulated in the order of ids, pass `position`.

        Works on distances, ``(peak - logit) / temperature``, all >= 0: a token's weight is ``exp(-distance)``, and the
        bits of a float >= 0 sort like the float.
        """
        # + 0.0 makes 0.0 of a peak of -0.0, and so of each distance: the bits of -0.0 sort last.
        distances = np.subtract(np.float32(peak + 0.0), row, out=self._distances)
        with np.errstate(over="ignore"):  # a small temperature makes unlikely tokens impossible
            distances /= np.float32(params.temperature)
        ids = self._ids
        if params.min_p > 0.0:
            near = np.flatnonzero(distances <= -math.log(params.min_p))
            ids, distances = ids[near], distances[near]
        if 0 < params.top_k < len(ids):
            near = _nearest(distances, params.top_k)
            ids, distances = ids[near], distances[near]
        weights = np.negative(distances, out=self._weights[: len(ids)])
        np.exp(weights, out=weights)
        if params.top_p < 1.0:
            kept = _nucleus(distances, weights, params.top_p)
            ids, distances, weights = ids[kept], distances[kept], weights[kept]
        if params.typical_p < 1.0:
            kept = _typical(distances, weights, params.typical_p)
            ids, weights = ids[kept], weights[kept]
        return int(ids[_position(weights, position)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments, so a draw can be repeated in any batch.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014), on
    the seed and again on its `position`-th state.
    """
    return (_mix(_mix(seed) + position * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    state &= 0xFFFFFFFFFFFFFFFF
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return state ^ (state >> 31)


def _changes_logits(sequence: Sequence) -> bool:
    params = sequence.request.sampling
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or sequence.num_completion_tokens < sequence.request.min_tokens
    )


def _order(distances: Floats) -> Ids:
    """Indices by distance, equal ones by index. One sort of 64-bit integers: 5 times as fast as a stable argsort."""
    keys = distances.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(len(distances), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)


def _nearest(distances: Floats, num_kept: int) -> Ids:
    """Indices of the smallest distances, ascending; the lower index first where two are equal."""
    bound = np.partition(distances, num_kept - 1)[num_kept - 1]
    near = np.flatnonzero(distances <= bound)
    if len(near) > num_kept:
        near = np.sort(near[_order(distances[near])[:num_kept]])
    return near


def _nucleus(distances: Floats, weights: Floats, top_p: float) -> Ids:
    """Indices of the smallest set of the likeliest tokens that has at least the share `top_p` of all weight, ascending.

    Only the heavy ones are sorted: if those above some bound weigh enough together, the set is among them. A bound of
    ``(1 - top_p) * total / n`` always does, for fewer than n lighter tokens weigh less than ``(1 - top_p) * total``
    together; one that is n / 1000 times higher nearly always does and leaves fewer to sort. The last bound is for
    rounding (top_p within 1e-11 of 1).
    """
    total = weights.sum(dtype=np.float64)
    target = top_p * total
    for share in (1e-3, 1 / len(weights), 0.0):
        heavy = np.flatnonzero(weights >= (1.0 - top_p) * total * share)
        order = heavy[_order(distances[heavy])]
        mass = weights[order].cumsum(dtype=np.float64)
        if len(mass) and mass[-1] >= target:
            break
    return np.sort(order[: int(mass.searchsorted(target)) + 1])


def _typical(distances: Floats, weights: Floats, typical_p: float) -> Ids:
    """Indices of the tokens whose information is closest to the entropy and that have the share `typical_p`, ascending.

    Source: Meister et al.: Locally Typical Sampling, 2022.
    """
    total = weights.sum(dtype=np.float64)
    probabilities = weights / total
    # -log p = distance + log(total). Impossible tokens (distance infinite) carry no information into the mean.
    finite = np.where(weights > 0, distances, 0)
    entropy = float((probabilities * finite).sum()) + math.log(total)
    surprise = np.abs(distances + np.float32(math.log(total) - entropy)).astype(np.float32)
    order = _order(surprise)
    mass = weights[order].cumsum(dtype=np.float64)
    return np.sort(order[: int(mass.searchsorted(typical_p * total)) + 1])


def _position(weights: Floats, position: float) -> int:
    """Index at which the cumulated weights pass `position` (in [0, 1)) of their sum. Its weight is above 0.

    Sums of blocks first, then inside of one: a third of the time of a cumulated sum over 49,152 weights.
    """
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64).cumsum()
    target = min(position * blocks[-1], np.nextafter(blocks[-1], 0.0))
    block = int(blocks.searchsorted(target, side="right"))
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK]
    before = blocks[block - 1] if block else 0.0
    index = int((before + inside.cumsum(dtype=np.float64)).searchsorted(target, side="right"))
    if index == len(inside):  # the two sums of this block are rounded differently
        index = int(np.flatnonzero(inside)[-1])
    return block * _BLOCK + index
