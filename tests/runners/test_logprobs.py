import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from sardonyx.runners.logprobs import MIN_LOGPROB, likeliest, token_logprobs

rows = st_numpy.arrays(
    np.float32, st.integers(1, 60), elements=st.floats(-50, 50, width=16) | st.sampled_from([0.0, -np.inf])
).map(lambda row: np.append(row, np.float32(1.0)))


@settings(deadline=None)
@given(rows)
def test_probabilities_of_all_tokens_sum_to_one_and_are_never_below_the_least(row):
    logprobs = [token_logprobs(row, token_id, 0).logprob for token_id in range(len(row))]
    assert sum(np.exp(logprobs)) == pytest.approx(1.0, abs=1e-5)
    assert min(logprobs) >= MIN_LOGPROB
    assert max(logprobs) <= 1e-6


@settings(deadline=None)
@given(rows, st.integers(0, 70))
def test_likeliest_are_those_of_a_full_sort_with_the_lower_id_first_among_equals(row, num_tokens):
    expected = sorted(range(len(row)), key=lambda token_id: (-row[token_id], token_id))[:num_tokens]
    assert likeliest(row, num_tokens).tolist() == expected
    top = token_logprobs(row, 0, num_tokens).top
    assert [token_id for token_id, _ in top] == expected
    assert all(logprob == token_logprobs(row, token_id, 0).logprob for token_id, logprob in top)


def test_impossible_token_has_the_least_log_probability():
    row = np.array([0.0, -np.inf], np.float32)
    assert token_logprobs(row, 1, 2) == token_logprobs(row, 1, 5)
    assert token_logprobs(row, 1, 2).logprob == MIN_LOGPROB
    assert token_logprobs(row, 1, 2).top == [(0, 0.0), (1, MIN_LOGPROB)]


def test_log_probability_is_exact_where_logits_are_large():
    row = np.array([1000.0, 999.0], np.float32)
    assert token_logprobs(row, 1, 0).logprob == pytest.approx(-1.0 - np.log1p(np.exp(-1.0)), abs=1e-6)
