"""The sampler as its documentation reads: full sorts, one row, no thought of speed. What the real one is held to."""

import math

import numpy as np

from sardonyx.runners.sampler import MIN_TEMPERATURE


def process(row, sequence):
    """Penalties, bias and masked stop tokens."""
    params, row = sequence.request.sampling, row.astype(np.float32).copy()
    completion = sequence.token_ids[len(sequence.request.prompt_ids) :]
    for token_id in set(sequence.token_ids):
        penalty = np.float32(params.repetition_penalty)
        row[token_id] = row[token_id] / penalty if row[token_id] > 0 else row[token_id] * penalty
    for token_id in set(completion):
        count = completion.count(token_id)
        row[token_id] -= np.float32(params.frequency_penalty * count + params.presence_penalty)
    for token_id, bias in params.logit_bias.items():
        row[token_id] += np.float32(bias)
    if len(completion) < sequence.request.min_tokens:
        row[list(sequence.request.stop_token_ids)] = -np.inf
    return row


def weights_left(row, params):
    """Weight of every token after the filters, ``(V,)`` float32; 0 for those that are filtered out."""
    distances = (row.max() - row) / np.float32(params.temperature)
    alive = np.ones(len(row), bool)
    if params.min_p > 0:
        alive &= distances <= -math.log(params.min_p)
    if params.top_k > 0:
        alive &= np.isin(
            np.arange(len(row)), [i for i in np.lexsort((np.arange(len(row)), distances)) if alive[i]][: params.top_k]
        )
    weights = np.where(alive, np.exp(-distances), np.float32(0))
    if params.top_p < 1:
        alive &= first_until(distances, alive, weights, params.top_p)
        weights = np.where(alive, weights, np.float32(0))
    if params.typical_p < 1:
        total = weights[alive].sum(dtype=np.float64)
        shares = weights[alive] / total
        finite = np.where(weights[alive] > 0, distances[alive], 0)
        entropy = float((shares * finite).sum()) + math.log(total)
        surprise = np.abs(distances + np.float32(math.log(total) - entropy))
        alive &= first_until(surprise, alive, weights, params.typical_p)
        weights = np.where(alive, weights, np.float32(0))
    return weights


def first_until(scores, alive, weights, share):
    """The alive tokens of the lowest scores that together have `share` of the alive weight."""
    order = [i for i in np.lexsort((np.arange(len(scores)), scores)) if alive[i]]
    mass = np.cumsum(weights[order], dtype=np.float64)
    num_kept = np.searchsorted(mass, share * weights[alive].sum(dtype=np.float64)) + 1
    kept = np.zeros(len(scores), bool)
    kept[order[:num_kept]] = True
    return kept


def draw(row, sequence, position):
    """The token that cumulated weights reach at `position` in [0, 1)."""
    row = process(row, sequence)
    if sequence.request.sampling.temperature < MIN_TEMPERATURE:
        return int(row.argmax())
    cumulated = weights_left(row, sequence.request.sampling).cumsum(dtype=np.float64)
    return int(np.searchsorted(cumulated, position * cumulated[-1], side="right"))
