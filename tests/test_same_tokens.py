"""Policy, slots, runner and a real fp32 graph together: company changes no token.

A sequence's tokens must be those of its run alone, whole prompt at once, whatever happens around it: neighbours that
come and go, chunked prefill, prefixes reused in place or copied from a busy slot, preemption when the KV budget ends.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.tiny_models import TinyDecoder, make_decoder

from sardonyx.core import FinishReason, Request, RunnerLimits, SamplingParams, Sequence
from sardonyx.engine.continuous import ContinuousOptions, ContinuousPolicy
from sardonyx.runners.decoder import DecoderRunner
from sardonyx.runtime.session import open_session

V, MAX_LEN, MAX_CHUNK, NUM_SEQUENCES = 64, 96, 16, 16
SIZES = TinyDecoder(vocab_size=V, max_model_len=MAX_LEN)
GREEDY = SamplingParams(temperature=0.0)
PREFIXES = [np.random.default_rng(seed).integers(0, V, 40).tolist() for seed in range(3)]


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    path = tmp_path_factory.mktemp("same") / "model.onnx"
    make_decoder(path, SIZES)
    return path


def open_runner(graph, num_slots, max_chunk_tokens):
    limits = RunnerLimits(num_slots, MAX_LEN, max_chunk_tokens, V)
    return DecoderRunner(open_session(graph, model_name="tiny"), SIZES.language_model, limits)


@pytest.fixture(scope="module")
def runner(graph):
    return open_runner(graph, NUM_SEQUENCES // 2, MAX_CHUNK)


@pytest.fixture(scope="module")
def alone(graph):
    """Tokens of a request by itself."""
    lonely = open_runner(graph, 1, MAX_LEN)
    known = {}

    def tokens_of(request):
        key = (tuple(request.prompt_ids), request.max_tokens, request.sampling.seed)
        if key not in known:
            policy = ContinuousPolicy(lonely.limits, ContinuousOptions(max_num_seqs=1))
            known[key] = run(policy, lonely, [request], [0])[0][request.id]
        return known[key]

    return tokens_of


def run(policy, runner, requests, arrivals):
    """Step until all is done, adding each request before the step of its number."""
    made = {request.id: [] for request in requests}
    waiting = sorted(zip(arrivals, range(len(requests)), strict=True))
    number = 0
    while True:
        while waiting and waiting[0][0] <= number:
            request = requests[waiting.pop(0)[1]]
            seed = request.sampling.seed or 0
            policy.add(Sequence(request, seed=seed, arrival_s=number, token_ids=list(request.prompt_ids)))
        batch = policy.schedule(float(number))
        if batch is not None:
            policy.update(batch, runner.execute(batch), float(number))
        for event in policy.take_events():
            made[event.request_id] += event.token_ids
            assert event.finish_reason in (None, FinishReason.LENGTH), event
        number += 1
        if batch is None and not waiting:
            return made, policy.stats()


prompts = st.builds(
    lambda prefix, shared, own: PREFIXES[prefix][:shared] + own,
    st.integers(0, 2),
    st.integers(0, 40),
    st.lists(st.integers(0, V - 1), min_size=1, max_size=20),
)
samplings = st.one_of(st.just(GREEDY), st.builds(SamplingParams, temperature=st.just(0.8), seed=st.integers(1, 99)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(prompts, st.integers(1, 12), samplings, st.integers(0, 30)), min_size=16, max_size=16),
    st.sampled_from([None, 150, 300]),
)
def test_sixteen_sequences_with_any_arrivals_get_the_tokens_of_their_lonely_runs(runner, alone, plan, budget):
    requests = [
        Request(id=str(index), prompt_ids=prompt, max_tokens=max_tokens, sampling=sampling)
        for index, (prompt, max_tokens, sampling, _) in enumerate(plan)
    ]
    options = ContinuousOptions(max_batch_tokens=24, min_prefill_tokens=4, kv_budget_tokens=budget)
    made, _ = run(ContinuousPolicy(runner.limits, options), runner, requests, [row[3] for row in plan])
    for request in requests:
        assert made[request.id] == alone(request)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.9, seed=7)], ids=["greedy", "seeded"])
def test_a_preempted_sequence_goes_on_with_the_same_tokens(runner, alone, sampling):
    requests = [
        Request(id=str(index), prompt_ids=PREFIXES[index][:30], max_tokens=60, sampling=sampling) for index in range(2)
    ]
    options = ContinuousOptions(kv_budget_tokens=130)
    made, stats = run(ContinuousPolicy(runner.limits, options), runner, requests, [0, 0])
    assert stats.num_preemptions > 0
    assert [made[request.id] for request in requests] == [alone(request) for request in requests]


def test_a_prefix_hit_and_a_copy_from_a_busy_slot_change_no_token(runner, alone):
    first = Request(id="0", prompt_ids=PREFIXES[0], max_tokens=30, sampling=GREEDY)
    copied = Request(id="1", prompt_ids=[*PREFIXES[0][:35], 1, 2], max_tokens=10, sampling=GREEDY)
    reused = Request(id="2", prompt_ids=[*PREFIXES[0][:38], 3], max_tokens=10, sampling=GREEDY)
    requests = [first, copied, reused]
    made, stats = run(ContinuousPolicy(runner.limits), runner, requests, [0, 10, 60])
    assert stats.prefix_hit_tokens >= 35 + 38
    assert [made[request.id] for request in requests] == [alone(request) for request in requests]
