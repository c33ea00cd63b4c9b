"""From a graph's output to scores, as a model's labels want it. Floor 4. Pure."""

from typing import Literal

import numpy as np
import numpy.typing as npt

Activation = Literal["none", "sigmoid", "softmax"]


def activate(values: npt.NDArray[np.float32], activation: Activation) -> npt.NDArray[np.float32]:
    """Scores of logits (..., labels), computed in double precision so that no logit overflows."""
    if activation == "none":
        return values
    logits = values.astype(np.float64)
    scores: npt.NDArray[np.float64]
    if activation == "softmax":
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores = powers / powers.sum(axis=-1, keepdims=True)
    else:
        scores = 1.0 / (1.0 + np.exp(-np.clip(logits, -700.0, None)))
    return scores.astype(np.float32)
