import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.core import BatchRow, Request, SamplingParams, Sequence
from sardonyx.runners.paged_draws import needs_host, uniforms
from sardonyx.runners.paged_sequences import SequenceTable
from sardonyx.runners.sampler import uniform


def make_sequence(sampling, num_completion=0, seed=0, blocks=(), **request):
    request = Request(id="0", prompt_ids=[1, 2, 3], sampling=sampling, **request)
    ids = [1, 2, 3, *[4] * num_completion]
    return Sequence(request, seed, 0.0, token_ids=ids, num_computed_tokens=max(0, len(ids) - 1), blocks=list(blocks))


@given(st.lists(st.tuples(st.integers(-(1 << 63), (1 << 64) - 1), st.integers(0, 1 << 20)), min_size=1))
def test_uniform_numbers_are_those_of_the_hosts_sampler(pairs):
    seeds = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed, _ in pairs], np.uint64)
    found = uniforms(seeds, np.array([position for _, position in pairs], np.int64))
    assert found.dtype == np.float32
    assert (found < 1).all()
    expected = np.array([uniform(seed, position) for seed, position in pairs])
    np.testing.assert_allclose(found, expected, atol=2**-24)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingParams(), False),
        (SamplingParams(temperature=0.0, typical_p=0.5), False),
        (SamplingParams(typical_p=0.5), True),
        (SamplingParams(repetition_penalty=1.1), True),
        (SamplingParams(presence_penalty=-0.1), True),
        (SamplingParams(frequency_penalty=0.1), True),
        (SamplingParams(logit_bias={3: 1.0}), True),
        (SamplingParams(num_logprobs=0), False),
        (SamplingParams(num_logprobs=1), True),
        (SamplingParams(top_k=5, top_p=0.5, min_p=0.1, seed=3), False),
        (SamplingParams(top_k=1024), False),
        (SamplingParams(top_k=1025), True),
        (SamplingParams(top_k=1025, temperature=0.0), False),
    ],
)
def test_the_host_draws_what_the_device_cannot(sampling, expected):
    assert needs_host(BatchRow(make_sequence(sampling, 2), 1)) is expected


def test_stop_tokens_are_masked_on_the_host_until_min_tokens_are_there():
    for num_completion, stop_ids, expected in ((1, {5}, True), (2, {5}, False), (1, set(), False)):
        sequence = make_sequence(SamplingParams(), num_completion, min_tokens=2, stop_token_ids=frozenset(stop_ids))
        assert needs_host(BatchRow(sequence, 1)) is expected


def test_prompts_are_scored_on_the_host_in_each_chunk_that_predicts_a_token():
    sequence = make_sequence(SamplingParams(), num_prompt_logprobs=0)
    sequence.num_computed_tokens = 0
    assert needs_host(BatchRow(sequence, 1))
    assert not needs_host(BatchRow(make_sequence(SamplingParams(repetition_penalty=2.0), 0), 0))


def test_a_place_knows_how_its_sequence_is_drawn():
    table = SequenceTable(4, 3)
    sampling = SamplingParams(temperature=0.5, top_k=7, top_p=0.9, min_p=0.2)
    greedy = make_sequence(SamplingParams(temperature=1e-6))
    places = table.find([make_sequence(sampling, seed=11), greedy])
    draws = table.draws(places, np.array([3, 4]))
    assert draws.temperature.tolist() == [0.5, 0.0]
    assert draws.top_k.tolist() == [7, 0]
    assert draws.top_p.tolist() == [np.float32(0.9), 1.0]
    assert draws.min_p.tolist() == [np.float32(0.2), 0.0]
    np.testing.assert_allclose(draws.uniform, [uniform(11, 3), uniform(0, 4)], atol=2**-24)


def test_blocks_are_as_they_are_at_each_step():
    table = SequenceTable(4, 3)
    sequence = make_sequence(SamplingParams(), blocks=[5])
    for blocks in ([5], [5, 6], [9, 6], [], [2, 3, 4]):
        sequence.blocks = blocks
        (place,) = table.find([sequence])
        assert table.blocks[place].tolist() == [*blocks, *[-1] * (3 - len(blocks))]


def test_sequences_come_and_go_without_mixing_up():
    table = SequenceTable(4, 2)
    rng = np.random.default_rng(0)
    alive = [make_sequence(SamplingParams(), blocks=[number]) for number in (1, 2)]
    for number in range(3, 60):
        alive[rng.integers(2)] = make_sequence(SamplingParams(), blocks=[number])
        places = table.find(alive)
        assert len(set(places.tolist())) == 2
        assert table.blocks[places, 0].tolist() == [sequence.blocks[0] for sequence in alive]
