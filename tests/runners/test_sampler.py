import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runners import naive_sampler

from sardonyx.core import Request, SamplingParams, Sequence
from sardonyx.runners.sampler import Sampler, uniform

V = 300


def make_sequence(params=None, prompt=(1,), completion=(), seed=0, **request):
    request = Request(id="r", prompt_ids=list(prompt), sampling=params or SamplingParams(), **request)
    return Sequence(request, seed=seed, arrival_s=0.0, token_ids=[*prompt, *completion])


def greedy(**params):
    return SamplingParams(temperature=0.0, **params)


def sample_row(row, sequence):
    return Sampler(len(row)).sample(row[None], [sequence]).token_ids[0]


def random_logits(num_rows=1, vocab_size=V, seed=0, scale=3.0):
    return (np.random.default_rng(seed).standard_normal((num_rows, vocab_size)) * scale).astype(np.float32)


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-4, 0.2, 1.0, 1.7, 50.0]),
    top_k=st.sampled_from([0, 1, 2, 7, V, 10 * V]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-6, 1 - 1e-12]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    typical_p=st.sampled_from([1.0, 0.9, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.2]),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100.0, -1.0, 2.5, 100.0]), max_size=3),
)
sequence_strategy = st.builds(
    make_sequence,
    params=params_strategy,
    prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=9),
    completion=st.lists(st.integers(0, V - 1), max_size=9),
    seed=st.integers(-(2**63), 2**65),
    min_tokens=st.sampled_from([0, 3]),
    stop_token_ids=st.frozensets(st.integers(0, V - 1), max_size=2),
)
# Steps of one half make many equal logits; the finer ones none.
rows_strategy = st.builds(
    lambda seed, scale, step: (np.round(random_logits(1, V, seed, scale)[0] / step) * step).astype(np.float32),
    st.integers(0, 10**6),
    st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    st.sampled_from([0.5, 1e-3]),
)


@settings(deadline=None)
@given(rows_strategy, sequence_strategy)
def test_token_is_the_one_that_full_sorts_would_give(row, sequence):
    sampler = Sampler(V)
    for seed in range(5):
        sequence.seed = seed
        position = uniform(seed, len(sequence.token_ids))
        assert sampler.sample(row[None], [sequence]).token_ids == [naive_sampler.draw(row, sequence, position)]


@settings(deadline=None)
@given(st.lists(st.tuples(rows_strategy, sequence_strategy), min_size=2, max_size=6), st.integers(0, 5))
def test_row_gives_the_same_token_alone_and_in_any_batch(rows, place):
    place %= len(rows)
    logits = np.stack([row for row, _ in rows])
    together = Sampler(V).sample(logits, [sequence for _, sequence in rows])
    alone = Sampler(V).sample(logits[place : place + 1], [rows[place][1]])
    assert together.token_ids[place] == alone.token_ids[0]
    backwards = Sampler(V).sample(logits[::-1].copy(), [sequence for _, sequence in rows[::-1]])
    assert backwards.token_ids[::-1] == together.token_ids


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=8),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(typical_p=0.7),
        SamplingParams(temperature=1.4, top_k=25, top_p=0.9, min_p=0.01, typical_p=0.95),
    ],
)
def test_tokens_are_drawn_as_often_as_their_weights_say(params):
    vocab_size, num_draws = 600, 20_000  # three blocks of the cumulated sum, the last one short
    row = random_logits(1, vocab_size, seed=1, scale=2.0)[0]
    weights = naive_sampler.weights_left(row, params)
    expected = weights / weights.sum() * num_draws
    sampler = Sampler(vocab_size)
    sequences = [make_sequence(params, prompt=range(1 + index % 50), seed=index // 50) for index in range(num_draws)]
    drawn = np.bincount(
        [sampler.sample(row[None], [sequence]).token_ids[0] for sequence in sequences], minlength=vocab_size
    )
    assert not drawn[weights == 0].any()
    is_common = expected >= 5
    observed = np.append(drawn[is_common], drawn[~is_common].sum())
    expected = np.append(expected[is_common], expected[~is_common].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi_square = ((observed - expected) ** 2 / expected).sum()
    freedom = len(observed) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@settings(deadline=None)
@given(st.integers(), st.integers(0, 10**6))
def test_uniform_is_in_its_range_and_repeatable(seed, position):
    value = uniform(seed, position)
    assert 0.0 <= value < 1.0
    assert uniform(seed, position) == value


@pytest.mark.parametrize("numbers", [lambda n: (n, 7), lambda n: (7, n), lambda n: (n % 100, n // 100)])
def test_uniform_is_even_over_seeds_and_over_positions(numbers):
    values = np.array([uniform(*numbers(index)) for index in range(20_000)])
    counts = np.bincount((values * 100).astype(int), minlength=100)
    assert ((counts - 200) ** 2 / 200).sum() < 99 + 4 * math.sqrt(198)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


def test_same_seed_and_position_give_the_same_token_and_others_differ():
    row = random_logits(seed=3, scale=0.5)[0]
    tokens = [sample_row(row, make_sequence(seed=seed)) for seed in range(40)]
    assert tokens == [sample_row(row, make_sequence(seed=seed)) for seed in range(40)]
    assert len(set(tokens)) > 25
    assert len({sample_row(row, make_sequence(prompt=[0] * length)) for length in range(1, 41)}) > 25


def test_greedy_takes_the_likeliest_and_the_lowest_id_of_equal_ones():
    row = np.array([0, 3, 1, 3, 2], np.float32)
    assert sample_row(row, make_sequence(greedy())) == 1


def test_temperature_too_small_to_divide_by_is_greedy():
    row = random_logits(seed=4)[0]
    assert sample_row(row, make_sequence(SamplingParams(temperature=1e-300))) == row.argmax()


def test_small_temperature_draws_the_likeliest_without_a_warning():
    row = np.array([1e30, -1e30, 0, 0.5], np.float32)
    assert sample_row(row, make_sequence(SamplingParams(temperature=1e-4))) == 0


def test_equal_logits_at_the_border_of_top_k_keep_the_lower_ids():
    row = np.zeros(V, np.float32)
    tokens = {sample_row(row, make_sequence(SamplingParams(top_k=3), seed=seed)) for seed in range(60)}
    assert tokens == {0, 1, 2}


def test_logits_are_left_as_they_were():
    logits = random_logits(2)
    before = logits.copy()
    params = SamplingParams(repetition_penalty=2.0, logit_bias={5: 3.0}, top_p=0.5, num_logprobs=3)
    Sampler(V).sample(logits, [make_sequence(params), make_sequence(params)])
    np.testing.assert_array_equal(logits, before)


def test_stop_tokens_are_not_drawn_before_min_tokens():
    row = np.array([9, 1, 2, 8], np.float32)
    sequence = make_sequence(greedy(), completion=[2], min_tokens=2, stop_token_ids=frozenset({0, 3, 999}))
    assert sample_row(row, sequence) == 2
    sequence.token_ids.append(2)
    assert sample_row(row, sequence) == 0


def test_bias_of_a_token_beyond_the_vocabulary_changes_nothing():
    row = random_logits()[0]
    assert sample_row(row, make_sequence(greedy(logit_bias={V: 100.0, 10**9: 100.0}))) == row.argmax()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_row_that_is_not_finite_fails_alone(bad):
    logits = random_logits(3)
    logits[1, 17] = bad
    sequences = [make_sequence(greedy(num_logprobs=1)), make_sequence(greedy(num_logprobs=1)), make_sequence()]
    samples = Sampler(V).sample(logits, sequences)
    assert samples.token_ids[0] == logits[0].argmax()
    assert samples.token_ids[1] is None
    assert samples.logprobs[1] is None
    assert samples.token_ids[2] is not None
    assert samples.failed == {1: "the model's output for this sequence is not finite"}


def test_row_of_impossible_tokens_draws_the_possible_one():
    row = np.full(V, -np.inf, np.float32)
    row[42] = -3.0
    for params in (greedy(), SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(typical_p=0.5, top_k=9)):
        assert sample_row(row, make_sequence(params)) == 42


def test_row_whose_every_token_is_masked_fails_with_the_reason():
    sequence = make_sequence(greedy(), min_tokens=5, stop_token_ids=frozenset(range(4)))
    samples = Sampler(4).sample(random_logits(1, 4), [sequence])
    assert samples.failed == {0: "penalties, bias and masked stop tokens leave no token to draw"}


def test_logprobs_come_from_the_raw_logits():
    logits = random_logits(1, seed=5)
    likeliest = int(logits[0].argmax())
    params = greedy(logit_bias={likeliest: -100.0}, num_logprobs=2)
    samples = Sampler(V).sample(logits, [make_sequence(params)])
    expected = logits[0].astype(np.float64) - np.log(np.exp(logits[0].astype(np.float64)).sum())
    (logprobs,) = samples.logprobs
    assert samples.token_ids == [logprobs.token_id] == [int(np.argsort(logits[0])[-2])]
    assert logprobs.logprob == pytest.approx(expected[logprobs.token_id], abs=1e-6)
    assert logprobs.top[0] == (likeliest, pytest.approx(expected[likeliest], abs=1e-6))
    assert len(logprobs.top) == 2


def test_logprobs_are_only_made_where_asked_for():
    samples = Sampler(V).sample(random_logits(2), [make_sequence(), make_sequence(SamplingParams(num_logprobs=0))])
    assert samples.logprobs[0] is None
    assert samples.logprobs[1].top == []
