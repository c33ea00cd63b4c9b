import numpy as np
import pytest

from sardonyx.serving.activation import activate

LOGITS = np.array([[-1000, -10, 0, 10, 1000]], np.float32)


@pytest.mark.filterwarnings("error")
def test_sigmoid_of_any_logit_lies_between_0_and_1():
    scores = activate(LOGITS, "sigmoid")
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [[0, 4.539787e-05, 0.5, 0.9999546, 1]], rtol=1e-6, atol=1e-30)


@pytest.mark.filterwarnings("error")
def test_softmax_of_any_logits_sums_to_one():
    scores = activate(np.concatenate([LOGITS, np.zeros_like(LOGITS)]), "softmax")
    np.testing.assert_allclose(scores, [[0, 0, 0, 0, 1], [0.2] * 5], atol=1e-7)


def test_without_activation_logits_stay():
    assert activate(LOGITS, "none") is LOGITS
