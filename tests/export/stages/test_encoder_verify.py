"""Comparisons of encoders with their source: what passes, and what is refused with its numbers."""

import numpy as np
import pytest

from sardonyx.repository.families import Labels
from sardonyx_export.errors import ExportError
from sardonyx_export.stages.encoder_verify import compare_embeddings, compare_scores

ONE = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
LABELS = Labels(names=["a", "b"], activation="softmax")


def test_equal_embeddings_pass_with_their_numbers():
    parity = compare_embeddings(ONE, ONE, "fp32", "itself")
    assert (parity.min_cosine, parity.max_abs_error, parity.num_positions) == (1.0, 0.0, 2)
    assert parity.tolerance == "min_cosine >= 0.9999"


def test_one_bad_row_is_enough_to_refuse():
    bad = ONE + np.array([[0.0, 0.0], [0.5, 0.0]], np.float32)
    with pytest.raises(ExportError, match=r"cosine 0\.97014 with itself; fp32 has to keep 0\.9999"):
        compare_embeddings(ONE, bad, "fp32", "itself")
    with pytest.raises(ExportError, match=r"int8 has to keep 0\.99"):
        compare_embeddings(ONE, bad, "int8", "itself")


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ExportError, match="cosine nan"):
        compare_embeddings(ONE, np.full_like(ONE, np.nan), "fp32", "itself")


def test_scores_are_compared_behind_their_activation():
    expected = np.array([[2.0, -2.0]], np.float32)
    shifted = expected + 100  # softmax does not see it
    parity = compare_scores(expected, shifted, LABELS, "fp32", "itself")
    assert parity.max_abs_error < 1e-6
    assert parity.top1_agreement == 1.0
    with pytest.raises(ExportError, match="a score differs by"):
        compare_scores(expected, -expected, LABELS, "int8", "itself")


def test_bare_logits_count_as_a_share_of_the_largest():
    labels = Labels(names=["a"], activation="none")
    expected = np.array([[1000.0]], np.float32)
    parity = compare_scores(expected, expected + 0.05, labels, "fp32", "itself")
    assert parity.tolerance == "max_abs_error <= 0.1"
    assert parity.top1_agreement is None
    with pytest.raises(ExportError, match="a score differs by"):
        compare_scores(expected, expected + 0.2, labels, "fp32", "itself")
