"""The rules and the draws of Whisper, against a literal reading of the rules: token by token, in plain Python."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sardonyx.repository.families import KvLayout, Whisper
from sardonyx.runners.sampler import MIN_TEMPERATURE
from sardonyx.runners.speech_sampler import MAX_INITIAL_TIMESTAMP, SpeechSampler, log_sum_exp, probability

V, END, BEGIN = 100, 20, 30
SPECIALS = list(range(END + 1, BEGIN))
MODEL = Whisper(
    vocab_size=V,
    max_model_len=64,
    num_mels=8,
    num_frames=40,
    kv=KvLayout(num_layers=1, num_kv_heads=1, head_size=8),
    start_id=21,
    end_id=END,
    previous_id=22,
    no_speech_id=23,
    no_timestamps_id=24,
    timestamp_begin_id=BEGIN,
    suppress_ids=[3, 4, *SPECIALS],
    begin_suppress_ids=[7, END],
)
SAMPLER = SpeechSampler(MODEL)

seeds = st.integers(0, 2**32 - 1)
temperatures = st.sampled_from([0.0, MIN_TEMPERATURE, 0.2, 0.4, 1.0, 3.0])


def make_row(seed, spread=3.0, timestamps=0.0):
    """Logits; those of timestamps raised."""
    row = np.random.default_rng(seed).normal(0, spread, V).astype(np.float32)
    row[BEGIN:] += np.float32(timestamps)
    return row


def allowed(row, drawn, has_timestamps):
    """The tokens that may come next, and by how much timestamps together are likelier than the likeliest text token.

    None of the reasons to forbid a token looks at more than one token or at more than one rule.
    """
    stamps = [token_id for token_id in drawn if token_id >= BEGIN]
    last_is_stamp = bool(drawn) and drawn[-1] >= BEGIN
    one_before_is_stamp = len(drawn) < 2 or drawn[-2] >= BEGIN
    left = []
    for token_id in range(V):
        is_stamp = token_id >= BEGIN
        forbidden = token_id in MODEL.suppress_ids
        forbidden |= not drawn and token_id in MODEL.begin_suppress_ids
        if has_timestamps:
            forbidden |= token_id == MODEL.no_timestamps_id
            forbidden |= last_is_stamp and one_before_is_stamp and is_stamp
            forbidden |= last_is_stamp and not one_before_is_stamp and token_id < END
            forbidden |= not drawn and not is_stamp
            forbidden |= not drawn and token_id > BEGIN + MAX_INITIAL_TIMESTAMP
            if stamps and is_stamp:
                is_second_of_pair = last_is_stamp and not one_before_is_stamp
                forbidden |= token_id < stamps[-1] if is_second_of_pair else token_id <= stamps[-1]
        if not forbidden:
            left.append(token_id)
    if not has_timestamps:
        return left, -math.inf
    weights = {token_id: math.exp(row[token_id]) for token_id in left}
    together = sum(weight for token_id, weight in weights.items() if token_id >= BEGIN)
    most = max((weight for token_id, weight in weights.items() if token_id < BEGIN), default=0.0)
    if together > most:
        left = [token_id for token_id in left if token_id >= BEGIN]
    if not together or not most:
        return left, math.inf
    return left, math.log(together / most)


def say(seed, length, *, temperature=1.0, timestamps=0.0):
    """A result as the rules let it come, with another row of logits at each token; ends with an end token or not."""
    drawn = []
    for position in range(length):
        row = make_row(seed + position, timestamps=timestamps)
        SAMPLER.apply_rules(row, drawn, has_timestamps=True)
        drawn.append(SAMPLER.draw(row, temperature, seed, position)[0])
        if drawn[-1] == END:
            break
    return drawn


legal_results = st.builds(say, seeds, st.integers(0, 12), timestamps=st.sampled_from([-6.0, -3.0, 0.0])).map(
    lambda drawn: [token_id for token_id in drawn if token_id != END]
)
any_results = st.lists(st.integers(0, V - 1) | st.integers(BEGIN, V - 1), max_size=8)


@given(seeds, legal_results | any_results, st.booleans(), st.sampled_from([-6.0, -3.0, -1.0, 0.0, 3.0]))
@settings(max_examples=400, deadline=None)
def test_rules_leave_what_a_literal_reading_leaves(seed, drawn, has_timestamps, timestamps):
    row = make_row(seed, timestamps=timestamps)
    expected, margin = allowed(row, drawn, has_timestamps)
    assume(abs(margin) > 1e-4)
    masked = row.copy()
    SAMPLER.apply_rules(masked, drawn, has_timestamps=has_timestamps)
    assert np.flatnonzero(masked > -np.inf).tolist() == expected
    assert np.array_equal(masked[expected], row[expected]), "what is left stays as it was"


@given(seeds, temperatures, st.sampled_from([-6.0, -4.0, -2.0, 0.0]))
@settings(max_examples=60, deadline=None)
def test_results_are_segments_between_timestamps_that_never_fall(seed, temperature, timestamps):
    drawn = say(seed, 40, temperature=temperature, timestamps=timestamps)
    assert not set(drawn) & set(MODEL.suppress_ids)
    spoken = drawn[:-1] if drawn[-1] == END else drawn
    assert BEGIN <= spoken[0] <= BEGIN + MAX_INITIAL_TIMESTAMP
    stamps = [token_id for token_id in spoken if token_id >= BEGIN]
    assert stamps == sorted(stamps)
    groups = [(is_stamp, list(group)) for is_stamp, group in itertools.groupby(spoken, lambda each: each >= BEGIN)]
    between = [group for is_stamp, group in groups[1:-1] if is_stamp]
    assert len(groups[0][1]) == 1
    assert all(len(group) == 2 for group in between), "a segment's end and the next one's begin"
    assert len(groups[-1][1]) <= 2 or not groups[-1][0]
    ends = [(groups[i - 2][1][-1], group[0]) for i, (is_stamp, group) in enumerate(groups) if is_stamp and i]
    assert all(end > begin for begin, end in ends), "no segment is empty"


def test_samples_hold_results_of_every_shape():
    results = [say(seed, 40, timestamps=-5.0) for seed in range(60)]
    assert {drawn[-1] == END for drawn in results} == {True, False}
    assert max(sum(token_id >= BEGIN for token_id in drawn) for drawn in results) >= 4
    assert max(sum(token_id < END for token_id in drawn) for drawn in results) >= 10


def test_timestamp_comes_where_all_of_them_together_are_likelier_than_any_text():
    row = np.full(V, -10.0, np.float32)
    row[5] = 0.0
    row[BEGIN + 10 : BEGIN + 20] = -2.0  # ten together: -2 + log(10) = 0.3
    masked = row.copy()
    SAMPLER.apply_rules(masked, [BEGIN, 5], has_timestamps=True)
    assert masked.argmax() == BEGIN + 10
    row[BEGIN + 15 : BEGIN + 20] = -10.0  # five: -0.4
    SAMPLER.apply_rules(row, [BEGIN, 5], has_timestamps=True)
    assert row.argmax() == 5


def test_last_timestamp_may_close_a_pair_or_be_the_end():
    row = make_row(1)
    SAMPLER.apply_rules(row, [BEGIN, 5, V - 1], has_timestamps=True)
    assert set(np.flatnonzero(row > -np.inf)) <= {END, V - 1}
    row = make_row(1)
    SAMPLER.apply_rules(row, [BEGIN, 5, V - 1, V - 1], has_timestamps=True)
    assert set(np.flatnonzero(row > -np.inf)) == set(range(END + 1)) - {3, 4}
    row = make_row(1)
    SAMPLER.apply_rules(row, [BEGIN, 5, V - 1, V - 1, 5], has_timestamps=True)
    assert set(np.flatnonzero(row > -np.inf)) == set(range(END + 1)) - {3, 4}


def test_likeliest_token_is_drawn_at_temperature_0_whatever_the_seed():
    row = make_row(3)
    assert {SAMPLER.draw(row, 0.0, seed, seed)[0] for seed in range(50)} == {int(row.argmax())}


@given(seeds, temperatures, seeds, st.integers(0, 500), any_results)
@settings(max_examples=200, deadline=None)
def test_logprob_is_that_of_what_the_rules_leave_at_temperature_1(seed, temperature, draw_seed, position, drawn):
    row = make_row(seed)
    SAMPLER.apply_rules(row, drawn, has_timestamps=True)
    assume(row.max() > -np.inf)
    token_id, logprob = SAMPLER.draw(row, temperature, draw_seed, position)
    exact = row.astype(np.float64)
    expected = exact[token_id] - exact.max() - np.log(np.exp(exact - exact.max()).sum())
    assert row[token_id] > -np.inf, "nothing that is masked is drawn"
    assert logprob == pytest.approx(expected, abs=1e-5)
    assert SAMPLER.draw(row.copy(), temperature, draw_seed, position) == (token_id, logprob)


@pytest.mark.parametrize("temperature", [0.2, 0.6, 1.0])
def test_draws_are_distributed_as_the_temperature_says(temperature):
    row = np.full(V, -np.inf, np.float32)
    kept = np.arange(5, 95, 9)
    row[kept] = np.random.default_rng(0).normal(0, temperature, len(kept))
    heated = np.exp(row[kept].astype(np.float64) / temperature)
    num_draws = 6000
    expected = num_draws * heated / heated.sum()
    assert expected.min() > 50
    for one_seed in (True, False):
        draws = [
            SAMPLER.draw(row, temperature, 11 if one_seed else each, each if one_seed else 4)[0]
            for each in range(num_draws)
        ]
        observed = np.array([draws.count(token_id) for token_id in kept])
        assert observed.sum() == num_draws
        # Nine degrees of freedom: 33.7 is passed once in 10,000 times.
        assert ((observed - expected) ** 2 / expected).sum() < 33.7


def test_only_token_that_is_left_is_drawn():
    row = np.full(V, -np.inf, np.float32)
    row[V - 1] = -80.0
    for seed in range(20):
        assert SAMPLER.draw(row, 1.0, seed, 0) == (V - 1, 0.0)


@given(seeds, st.integers(0, V - 1), st.sampled_from([0.1, 3.0, 200.0]))
def test_probability_is_the_softmax(seed, token_id, spread):
    row = make_row(seed, spread)
    exact = np.exp(row.astype(np.float64) - float(row.max()))
    assert probability(row, token_id) == pytest.approx(exact[token_id] / exact.sum(), rel=1e-4, abs=1e-30)
    assert log_sum_exp(row) == pytest.approx(float(row.max()) + math.log(exact.sum()), rel=1e-6)
