"""How long a step will take, learnt from the steps before it. Floor 3: it is told durations and reads no clock."""

import math
from dataclasses import dataclass

_KEPT = 0.97
"""Weight of the past at every step: some 30 steps are remembered, a second or two of decoding."""

_MANY = 1 << 30

_OUTLIER = 4.0
"""A step so many times longer than foreseen is noise (another process had the core) unless the next one is too."""


@dataclass(slots=True)
class StepLoad:
    """The quantities that a step's time grows with."""

    num_prefill_tokens: int = 0
    num_prefill_pairs: float = 0.0
    """Attention's work in prompt chunks: each new token with every token before it, sum of n * (P + n / 2)."""
    num_decode_past: int = 0
    """Cached tokens that the decode rows read."""
    num_decode_rows: int = 0

    def add_chunk(self, num_past: int, num_tokens: int) -> None:
        """A prompt chunk of `num_tokens` after `num_past` cached ones is in the step."""
        self.num_prefill_tokens += num_tokens
        self.num_prefill_pairs += num_tokens * (num_past + num_tokens / 2)


class StepCost:
    """A linear model of a step's seconds in its `StepLoad`, with no coefficient below zero.

    Fitted by exponentially weighted least squares: coordinate descent on the normal equations, from the last fit on. It
    moves only what the step had something of, so an hour of pure decoding does not wash out what a prompt token costs.
    Why these four: with SmolLM2-135M, int4, on two cores, 8 decode rows take 22 ms at 128 past tokens and 75 at 1,900,
    and a 128-token chunk takes 192 ms at the start of a prompt and 534 at 4,096.
    """

    def __init__(self) -> None:
        self._weights = [0.0] * 5
        self._products = [[0.0] * 5 for _ in range(5)]
        self._targets = [0.0] * 5
        self._was_outlier = False

    @property
    def knows_prefill(self) -> bool:
        """Some prompt chunk was observed."""
        return self._products[0][0] > 0.0

    def observe(self, load: StepLoad, step_s: float) -> None:
        """Learn that a step with this load took so long."""
        features = _features(load)
        is_foreseen = all(not value or self._products[i][i] for i, value in enumerate(features))
        is_outlier = is_foreseen and step_s > _OUTLIER * self._dot(features)
        if is_outlier and not self._was_outlier:
            self._was_outlier = True
            return
        self._was_outlier = is_outlier
        for i, (row, value) in enumerate(zip(self._products, features, strict=True)):
            for j, other in enumerate(features):
                row[j] = _KEPT * row[j] + value * other
            self._targets[i] = _KEPT * self._targets[i] + value * step_s
        for _ in range(2):
            for i, value in enumerate(features):
                if value:
                    self._fit(i)

    def _fit(self, i: int) -> None:
        row, weights = self._products[i], self._weights
        rest = sum(product * weight for product, weight in zip(row, weights, strict=True)) - row[i] * weights[i]
        weights[i] = max(0.0, (self._targets[i] - rest) / row[i])

    def _dot(self, features: tuple[float, ...]) -> float:
        return sum(weight * value for weight, value in zip(self._weights, features, strict=True))

    def predict(self, load: StepLoad) -> float:
        """Seconds that a step with this load takes."""
        return self._dot(_features(load))

    def chunk_s(self, num_past: int, num_tokens: int) -> float:
        """Seconds that a chunk of `num_tokens` after `num_past` cached ones adds to a step."""
        per_token, per_pair = self._weights[:2]
        return per_token * num_tokens + per_pair * num_tokens * (num_past + num_tokens / 2)

    def max_chunk_tokens(self, num_past: int, budget_s: float) -> int:
        """The longest chunk that adds at most `budget_s`; 0 as long as no chunk was observed, unless time is free.

        Args:
            num_past: cached tokens before it.
            budget_s: seconds; infinity where nobody waits.
        """
        if math.isinf(budget_s):
            return _MANY
        if budget_s <= 0 or not self.knows_prefill:
            return 0
        # chunk_s(num_past, x) = budget_s, solved for x in the form that stays exact when per_pair is 0.
        per_token, per_pair = self._weights[:2]
        linear = per_token + per_pair * num_past
        denominator = linear + math.sqrt(linear * linear + 2 * per_pair * budget_s)
        return min(_MANY, int(2 * budget_s / denominator)) if denominator > 2 * budget_s / _MANY else _MANY


def _features(load: StepLoad) -> tuple[float, ...]:
    # Prompt tokens come first and the constant last: what a first observation cannot tell apart goes to the former, so
    # chunks are too short for a step or two rather than too long.
    return (load.num_prefill_tokens, load.num_prefill_pairs, load.num_decode_past, load.num_decode_rows, 1.0)
