"""How the device draws tokens: which rows it can draw for, and what its sampler is told of them.

Floor 3. Pure numpy.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sardonyx.core import BatchRow, Sequence
from sardonyx.runners.prompt_scores import num_prompt_positions
from sardonyx.runners.sampler import MIN_TEMPERATURE

MAX_CANDIDATES = 1024
"""Likeliest tokens that the device's sampler sorts; of a wider nucleus it draws from the first so many."""
_ALMOST_ONE = np.float32(1.0 - 2.0**-24)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def draws_on_host(sequence: Sequence) -> bool:
    """The device's sampler has not what this sequence asks for, whatever the step."""
    params = sequence.request.sampling
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.num_logprobs
        or (params.temperature >= MIN_TEMPERATURE and (params.typical_p < 1.0 or params.top_k > MAX_CANDIDATES))
    )


def needs_host(row: BatchRow) -> bool:
    """The row's logits have to come to the host: its token is drawn there, or its prompt is scored.

    Of a row that goes on from a step not seen yet the completion may be one token longer than is known here. It cannot
    lack `min_tokens` then: the step before would have needed the host.
    """
    sequence = row.sequence
    if num_prompt_positions(row):
        return True
    if not row.is_sampled:
        return False
    is_masked = sequence.num_completion_tokens < sequence.request.min_tokens and sequence.request.stop_token_ids
    return bool(is_masked) or draws_on_host(sequence)


@dataclass(slots=True)
class Draws:
    """The sampler's inputs, one entry for each row of logits that the device draws from."""

    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    uniform: npt.NDArray[np.float32]


def uniforms(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """`sardonyx.runners.sampler.uniform` of each pair, below 1 in float32 too.

    Args:
        seeds: ``(N,)``, the low 64 bits of each.
        positions: ``(N,)``, of the token that is drawn.
    """
    states = _mix(_mix(seeds) + positions.astype(np.uint64) * _GOLDEN)  # numpy's integers wrap around
    return np.minimum(((states >> np.uint64(11)) * 2.0**-53).astype(np.float32), _ALMOST_ONE)


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
