"""Which logits rows a step's prompts want for their log-probabilities, and what is made of them.

Floor 3. Pure numpy; what decoders over slots and over blocks have in common.
"""

import numpy as np
import numpy.typing as npt

from sardonyx.core import BatchRow, TokenLogprobs
from sardonyx.runners.logprobs import token_logprobs

NOT_FINITE = "the model's output for this prompt is not finite"


def num_prompt_positions(row: BatchRow) -> int:
    """New tokens of the row that predict a prompt token whose log-probability is wanted: the first so many."""
    sequence = row.sequence
    if sequence.request.num_prompt_logprobs is None or sequence.num_completion_tokens:
        return 0  # with completion tokens, this is a recomputation after a preemption: the prompt was scored before
    return max(0, min(row.num_new_tokens, sequence.num_prompt_tokens - 1 - row.num_past))


def score_prompt(row: BatchRow, logits: npt.NDArray[np.float32]) -> list[TokenLogprobs] | None:
    """Log-probabilities of the prompt tokens that a row's first positions predict; ``None`` where one is not finite.

    Args:
        row: of a step.
        logits: ``(num_prompt_positions(row), V)``.
    """
    if not np.isfinite(logits.max(axis=1)).all():
        return None
    num_top, first = row.sequence.request.num_prompt_logprobs or 0, row.num_past + 1
    token_ids = row.sequence.token_ids[first : first + len(logits)]
    return [token_logprobs(values, token_id, num_top) for values, token_id in zip(logits, token_ids, strict=True)]
