"""The next token of a Whisper decoder: what its rules leave, and what is drawn of that.

Floor 3. Pure numpy. Source: openai-whisper's ``decoding.py`` for the rules and their order.
"""

import math

import numpy as np
import numpy.typing as npt

from sardonyx.repository.families import Whisper
from sardonyx.runners.sampler import MIN_TEMPERATURE, uniform

Floats = npt.NDArray[np.float32]

MAX_INITIAL_TIMESTAMP = 50
"""In steps of 20 ms: speech begins within the first second of a window, or the window was cut wrongly."""


class SpeechSampler:
    """Applies one model's rules, and draws. Used by one thread."""

    def __init__(self, model: Whisper) -> None:
        self._end_id = model.end_id
        self._no_timestamps_id = model.no_timestamps_id
        self._first_timestamp = model.timestamp_begin_id
        self._suppress = np.array(model.suppress_ids, np.intp)
        self._begin_suppress = np.array(model.begin_suppress_ids, np.intp)

    def apply_rules(self, row: Floats, drawn: list[int], *, has_timestamps: bool) -> None:
        """Mask what may not come next with -inf.

        Args:
            row: ``(V,)``, raw logits, changed in place.
            drawn: tokens so far, without the prompt.
            has_timestamps: timestamps are wanted: they come in pairs but for the first and the last, never fall, and
                come where they are likelier together than any text token.
        """
        row[self._suppress] = -np.inf
        if not drawn:
            row[self._begin_suppress] = -np.inf
        if not has_timestamps:
            return
        begin = self._first_timestamp
        row[self._no_timestamps_id] = -np.inf
        if not drawn:
            row[:begin] = -np.inf
            row[begin + MAX_INITIAL_TIMESTAMP + 1 :] = -np.inf
            return
        follows_one = drawn[-1] >= begin
        follows_two = follows_one and (len(drawn) < 2 or drawn[-2] >= begin)
        last = next((token_id for token_id in reversed(drawn) if token_id >= begin), None)
        if last is not None:
            # A segment ends after it began; the next one may begin where the last one ended.
            row[begin : last if follows_one and not follows_two else last + 1] = -np.inf
        if follows_two:
            row[begin:] = -np.inf
            return
        if follows_one:
            row[: self._end_id] = -np.inf
        peak = float(row[:begin].max())
        timestamps = row[begin:]
        top = float(timestamps.max(initial=-np.inf))
        if top == -np.inf:
            return
        together = top + math.log(float(np.exp(timestamps - top).sum(dtype=np.float64)))
        if together > peak:
            row[:begin] = -np.inf

    def draw(self, row: Floats, temperature: float, seed: int, position: int) -> tuple[int, float]:
        """A token and its log-probability at temperature 1.

        Args:
            row: ``(V,)`` after the rules.
            temperature: below `MIN_TEMPERATURE` the likeliest token.
            seed, position: decide the draw, and nothing else does.
        """
        token_id = int(row.argmax())
        peak = float(row[token_id])
        weights = np.exp(row - np.float32(peak))
        log_sum = math.log(float(weights.sum(dtype=np.float64)))
        if temperature >= MIN_TEMPERATURE:
            heated = np.exp((row - np.float32(peak)) / np.float32(temperature))
            cumulated = heated.cumsum(dtype=np.float64)
            target = min(uniform(seed, position) * cumulated[-1], np.nextafter(cumulated[-1], 0.0))
            token_id = int(cumulated.searchsorted(target, side="right"))
        return token_id, float(row[token_id]) - peak - log_sum


def probability(row: Floats, token_id: int) -> float:
    """Of one token, from ``(V,)`` raw logits."""
    return float(np.exp(row[token_id] - log_sum_exp(row)))


def log_sum_exp(row: Floats) -> float:
    """Of raw logits, the largest of them finite."""
    peak = float(row.max())
    return peak + math.log(float(np.exp(row - np.float32(peak)).sum(dtype=np.float64)))
