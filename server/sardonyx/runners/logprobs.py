"""Log-probabilities of tokens from rows of logits.

Floor 3. Pure numpy; knows no sequences.
"""

import math

import numpy as np
import numpy.typing as npt

from sardonyx.core import TokenLogprobs

MIN_LOGPROB = -9999.0
"""What a token of probability 0 gets, since JSON has no infinity."""


def token_logprobs(row: npt.NDArray[np.float32], token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probability of one token, and of the `num_top` likeliest at its position.

    `row` is ``(V,)``, raw logits, the largest of them finite. One row at a time: V = 49,152 values stay in the core's
    own cache, a batch of them does not.
    """
    peak = row.max()
    # In float64, so that the sum of 262,144 terms is as good as its terms.
    log_sum = float(peak) + math.log(np.exp(row - peak).sum(dtype=np.float64))
    top = [(int(top_id), _clip(float(row[top_id]) - log_sum)) for top_id in likeliest(row, num_top)]
    return TokenLogprobs(token_id, _clip(float(row[token_id]) - log_sum), top)


def likeliest(row: npt.NDArray[np.float32], num_tokens: int) -> npt.NDArray[np.intp]:
    """Ids of the largest values, largest first, the lower id first where two are equal."""
    num_tokens = min(num_tokens, len(row))
    if num_tokens <= 1:
        return np.array([row.argmax()][:num_tokens], np.intp)
    # The bound alone and not argpartition's ids: those differ between processors where values are equal.
    bound = np.partition(row, -num_tokens)[-num_tokens]
    ids = np.flatnonzero(row >= bound)
    return ids[np.argsort(-row[ids], kind="stable")[:num_tokens]]


def _clip(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
