"""The whole path over blocks with real numbers: policy, block manager, runner, graphs, and a device that works late."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.reference_device import ReferenceDevice
from tests.tiny_models import make_decoder
from tests.tiny_paged import BLOCK_SIZE, make_paged_model, paged_language_model, poison, tiny_sizes

from sardonyx.core import Batch, BatchRow, FinishReason, Request, RunnerLimits, SamplingParams, Sequence
from sardonyx.engine.continuous import ContinuousOptions, ContinuousPolicy
from sardonyx.errors import ConfigError, EngineError
from sardonyx.runners.decoder import DecoderRunner, ForwardRow
from sardonyx.runners.paged_decoder import PagedRunner
from sardonyx.runners.paged_graphs import PagedGraphs
from sardonyx.runners.paged_pass import PagedOptions
from sardonyx.runtime.session import open_session

V, MAX_LEN, MAX_CHUNK, NUM_SEQS, MAX_TOKENS = 64, 96, 16, 6, 32
SIZES = tiny_sizes()
GREEDY = SamplingParams(temperature=0.0)
PREFIX = np.random.default_rng(99).integers(0, V, 40).tolist()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_paged_model(tmp_path_factory.mktemp("paged"), SIZES)


@pytest.fixture(scope="module")
def slot_runner(tmp_path_factory):
    path = tmp_path_factory.mktemp("slots") / "model.onnx"
    make_decoder(path, SIZES)
    limits = RunnerLimits(1, MAX_LEN, MAX_LEN, V)
    return DecoderRunner(open_session(path, model_name="tiny"), SIZES.language_model, limits)


def make_limits(num_blocks=40, num_seqs=NUM_SEQS, **fields):
    return RunnerLimits(num_seqs, MAX_LEN, MAX_CHUNK, V, block_size=BLOCK_SIZE, num_blocks=num_blocks, **fields)


def open_runner(paths, *, device=None, limits=None, max_graphs=0, max_tokens=MAX_TOKENS):
    device = device or ReferenceDevice()
    sessions = {role: device.open(path, model_name="tiny") for role, path in paths.items()}
    graphs = PagedGraphs("tiny", device, sessions["decoder"], sessions["sampler"], sessions["feed"])
    options = PagedOptions(max_batch_tokens=max_tokens, max_graphs=max_graphs)
    runner = PagedRunner(graphs, paged_language_model(SIZES), limits or make_limits(), options)
    runner.capture()
    return runner


@pytest.fixture(params=["eager", "captured"])
def runner(paths, request):
    runner = open_runner(paths, max_graphs=100 if request.param == "captured" else 0)
    yield runner
    runner.close()
    assert not runner._graphs.device.allocated


def random_ids(seed, count):
    return np.random.default_rng(seed).integers(0, V, count).tolist()


def run(runner, requests, arrivals=None, *, is_overlapped=True, **options):
    """Step until all is done, adding each request before the step of its number."""
    options = {"max_batch_tokens": MAX_TOKENS, "min_prefill_tokens": 4} | options
    policy = ContinuousPolicy(runner.limits, ContinuousOptions(**options))
    events = {request.id: [] for request in requests}
    waiting = sorted(zip(arrivals or [0] * len(requests), range(len(requests)), strict=True))
    number, ahead, num_ahead = 0, None, 0
    while True:
        while waiting and waiting[0][0] <= number:
            request = requests[waiting.pop(0)[1]]
            seed = request.sampling.seed or 0
            policy.add(Sequence(request, seed=seed, arrival_s=number, token_ids=list(request.prompt_ids)))
        batch, ahead = ahead or policy.schedule(float(number)), None
        if batch is not None:
            if not runner._out:
                runner.launch(batch)
            if is_overlapped and runner.can_follow(batch):
                ahead = policy.schedule_ahead(batch, float(number))
                if ahead is not None:
                    runner.launch(ahead)
                    num_ahead += 1
            policy.update(batch, runner.collect(), float(number))
        for event in policy.take_events():
            events[event.request_id].append(event)
        number += 1
        if batch is None and not waiting:
            return events, policy.stats(), num_ahead


def tokens_of(events):
    return [token for event in events for token in event.token_ids]


def alone(slot_runner, request):
    """The tokens of the runner over slots, whole prompt at once."""
    sequence = Sequence(
        request, seed=request.sampling.seed or 0, arrival_s=0.0, token_ids=list(request.prompt_ids), slot=0
    )
    while sequence.num_completion_tokens < request.max_tokens:
        output = slot_runner.execute(Batch([BatchRow(sequence, sequence.num_pending_tokens)]))
        sequence.num_computed_tokens = len(sequence.token_ids)
        sequence.token_ids.append(output.token_ids[0])
    return sequence.token_ids[sequence.num_prompt_tokens :]


def assert_likeliest(slot_runner, request, tokens):
    """Each token is the likeliest after those before it, but for what 16 bits may decide otherwise."""
    assert len(tokens) == request.max_tokens
    text = [*request.prompt_ids, *tokens]
    places = range(len(request.prompt_ids) - 1, len(text) - 1)
    logits = slot_runner.forward([ForwardRow(0, text, 0)], places)
    np.testing.assert_allclose(logits[np.arange(len(tokens)), tokens], logits.max(axis=1), atol=0.02)


def make_requests(num_requests, *, max_tokens=10, sampling=GREEDY, **fields):
    return [
        Request(
            id=str(index),
            prompt_ids=PREFIX[: 7 * index] + random_ids(index, 3 + 5 * index),
            max_tokens=max_tokens,
            sampling=sampling,
            **fields,
        )
        for index in range(num_requests)
    ]


@pytest.mark.parametrize("is_overlapped", [True, False])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.8, top_p=0.95, top_k=20, seed=7)])
def test_tokens_are_those_of_the_runner_over_slots(runner, slot_runner, is_overlapped, sampling):
    requests = make_requests(5, sampling=sampling)
    events, stats, num_ahead = run(runner, requests, [0, 0, 1, 4, 9], is_overlapped=is_overlapped)
    for request in requests:
        assert tokens_of(events[request.id]) == alone(slot_runner, request)
    assert (num_ahead > 5) == is_overlapped
    assert stats.prefix_hit_tokens > 0


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 8), st.integers(0, 12)), min_size=6, max_size=8),
    st.integers(8, 20),
    st.booleans(),
)
def test_company_chunks_and_preemption_leave_the_likeliest_tokens(paths, slot_runner, plan, num_blocks, is_overlapped):
    runner = open_runner(paths, limits=make_limits(num_blocks), max_graphs=100)
    requests = [
        Request(id=str(index), prompt_ids=random_ids(index, length), max_tokens=count, sampling=GREEDY)
        for index, (length, count, _) in enumerate(plan)
    ]
    events, _, _ = run(runner, requests, [row[2] for row in plan], is_overlapped=is_overlapped)
    for request in requests:
        assert_likeliest(slot_runner, request, tokens_of(events[request.id]))


def test_a_preempted_sequence_goes_on_as_if_nothing_had_been(paths, slot_runner):
    runner = open_runner(paths, limits=make_limits(num_blocks=8))
    requests = [Request(id=str(i), prompt_ids=random_ids(i, 5), max_tokens=60, sampling=GREEDY) for i in range(3)]
    events, stats, _ = run(runner, requests)
    assert stats.num_preemptions > 0
    for request in requests:
        assert_likeliest(slot_runner, request, tokens_of(events[request.id]))


def test_rows_that_need_the_host_are_drawn_beside_those_that_do_not(runner, slot_runner):
    samplings = [
        SamplingParams(temperature=0.0, repetition_penalty=1.3),
        GREEDY,
        SamplingParams(temperature=0.9, typical_p=0.5, seed=3),
        SamplingParams(temperature=0.9, seed=4),
        SamplingParams(temperature=0.0, logit_bias={5: 3.0}, num_logprobs=2),
    ]
    requests = [
        Request(id=str(index), prompt_ids=random_ids(index, 9), max_tokens=8, sampling=sampling)
        for index, sampling in enumerate(samplings)
    ]
    events, _, num_ahead = run(runner, requests)
    for request in requests:
        assert tokens_of(events[request.id]) == alone(slot_runner, request)
    assert all(len(event.logprobs[0].top) == 2 for event in events["4"])
    assert num_ahead == 0


def test_no_stop_token_is_drawn_before_min_tokens(runner):
    free = Request(id="0", prompt_ids=random_ids(1, 9), max_tokens=8, sampling=GREEDY)
    first = tokens_of(run(runner, [free])[0]["0"])[0]
    held = Request(
        id="0",
        prompt_ids=free.prompt_ids,
        max_tokens=8,
        min_tokens=3,
        stop_token_ids=frozenset({first}),
        sampling=GREEDY,
    )
    events, _, num_ahead = run(runner, [held])
    assert first not in tokens_of(events["0"])[:3]
    assert num_ahead > 0


def test_log_probabilities_come_from_the_device_and_prompts_are_scored_on_the_host(runner, slot_runner):
    sampling = SamplingParams(temperature=0.0, num_logprobs=0)
    chosen, scored = (
        Request(id="0", prompt_ids=random_ids(1, 9), max_tokens=3, sampling=sampling),
        Request(id="1", prompt_ids=random_ids(2, 41), max_tokens=2, sampling=sampling, num_prompt_logprobs=1),
    )
    events, _, _ = run(runner, [chosen, scored])
    for request in (chosen, scored):
        limits = ContinuousOptions(max_num_seqs=1)
        policy = ContinuousPolicy(slot_runner.limits, limits)
        policy.add(Sequence(request, seed=0, arrival_s=0.0, token_ids=list(request.prompt_ids)))
        expected = []
        while (batch := policy.schedule(0.0)) is not None:
            policy.update(batch, slot_runner.execute(batch), 0.0)
            expected += policy.take_events()
        found = events[request.id]
        assert tokens_of(found) == tokens_of(expected)
        for mine, other in zip(found, expected, strict=True):
            assert mine.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=2e-2)
            assert mine.logprobs[0].top == []
        for mine, other in zip(found[0].prompt_logprobs or [], expected[0].prompt_logprobs or [], strict=True):
            assert mine.token_id == other.token_id
            assert mine.logprob == pytest.approx(other.logprob, abs=2e-2)
    assert len(events["1"][0].prompt_logprobs) == 40


def test_prompts_are_scored_in_memory_that_was_there_before(paths):
    device = ReferenceDevice()
    runner = open_runner(paths, device=device, limits=make_limits(max_scored_tokens=10), max_tokens=64)
    device.capacity_bytes = 0
    requests = make_requests(4, num_prompt_logprobs=0)
    events, _, _ = run(runner, requests, max_batch_tokens=64)
    assert [len(events[request.id][0].prompt_logprobs) for request in requests] == [2, 14, 26, 38]
    assert all(len(tokens_of(events[request.id])) == 10 for request in requests)


def test_more_prompt_tokens_to_score_than_there_is_memory_for_are_refused(paths):
    runner = open_runner(paths, limits=make_limits(max_scored_tokens=10))
    sequence = make_sequence(random_ids(1, 15), [1], num_prompt_logprobs=0)
    with pytest.raises(EngineError, match="11 prompt tokens to score"):
        runner.launch(Batch([BatchRow(sequence, 11)]))


def test_a_seeded_request_has_the_same_tokens_in_any_company(runner):
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=11)
    mine = Request(id="mine", prompt_ids=random_ids(50, 12), max_tokens=12, sampling=sampling)
    alone_tokens = tokens_of(run(runner, [mine])[0]["mine"])
    others = make_requests(5, sampling=SamplingParams(temperature=1.0, seed=2), max_tokens=20)
    events, _, _ = run(runner, [*others, mine], [0, 0, 2, 3, 4, 5])
    assert tokens_of(events["mine"]) == alone_tokens


def test_a_row_that_is_not_a_number_fails_alone(paths):
    bad_paths = paths | {"decoder": poison(paths["decoder"], 9)}
    runner, clean = open_runner(bad_paths, max_graphs=100), open_runner(paths)
    good = Request(id="good", prompt_ids=[1, 2, 3], max_tokens=6, sampling=SamplingParams(temperature=0.0))
    bad = Request(id="bad", prompt_ids=[4, 9, 5], max_tokens=6, sampling=GREEDY)
    hosted = Request(
        id="hosted", prompt_ids=[9, 5], max_tokens=6, sampling=SamplingParams(temperature=0.0, presence_penalty=0.1)
    )
    scored = Request(id="scored", prompt_ids=[6, 9, 5, 4], max_tokens=1, sampling=GREEDY, num_prompt_logprobs=0)
    expected = tokens_of(run(clean, [good])[0]["good"])
    assert 9 not in expected
    events, _, _ = run(runner, [good, bad, hosted, scored])
    assert tokens_of(events["good"]) == expected
    for request_id in ("bad", "hosted", "scored"):
        assert events[request_id][-1].finish_reason is FinishReason.ERROR
        assert "not finite" in events[request_id][-1].error


def make_sequence(prompt, blocks, **request):
    request = Request(id="0", prompt_ids=prompt, sampling=GREEDY, **request)
    return Sequence(request, seed=0, arrival_s=0.0, token_ids=list(prompt), slot=0, blocks=blocks)


@pytest.mark.parametrize(
    ("sequence", "num_new", "fields"),
    [
        (make_sequence([1] * 20, [1]), 17, {}),
        (make_sequence([1] * 20, [1]), 16, {"num_ahead": 4}),
        (make_sequence([1] * 20, [1, 40]), 16, {"num_ahead": 4}),
        (make_sequence([1] * 20, [0, 1]), 16, {}),
        (make_sequence([1] * 20, list(range(1, 9))), 16, {}),
        (make_sequence([1, V], [1]), 2, {}),
        (make_sequence([1, -1], [1]), 2, {}),
        (make_sequence([1, 2], [1]), 3, {}),
        (make_sequence([1, 2], [1]), 0, {}),
        (make_sequence([1, 2], [1]), 1, {"fed_by": 0}),
        (make_sequence([1] * 100, list(range(1, 7))), 16, {"num_ahead": 84}),
    ],
    ids=[
        "chunk",
        "too few",
        "not there",
        "nobody's",
        "too many",
        "vocabulary",
        "negative",
        "left",
        "none",
        "fed",
        "len",
    ],
)
def test_a_batch_that_breaks_the_limits_is_refused_before_it_is_launched(paths, sequence, num_new, fields):
    runner = open_runner(paths)
    num_calls = len(runner._graphs.device.calls)
    with pytest.raises(EngineError, match="model tiny was given a batch that breaks its limits"):
        runner.launch(Batch([BatchRow(sequence, num_new, **fields)]))
    assert len(runner._graphs.device.calls) == num_calls
    assert runner.execute(Batch([BatchRow(make_sequence([1, 2], [1]), 2)])).token_ids[0] is not None


def test_a_step_that_fails_takes_the_one_behind_it_along(paths):
    runner = open_runner(paths)
    device, fails = runner._graphs.device, [True]

    def fail_once(graph):
        if graph == "decoder" and fails.pop():
            raise EngineError("the card is lost")

    device.on_run = fail_once
    batch = Batch([BatchRow(make_sequence([1, 2], [1]), 2)])
    runner.launch(batch)
    runner.launch(batch)
    with pytest.raises(EngineError, match="the card is lost"):
        runner.collect()
    device.on_run = None
    device.finish()
    assert runner.execute(batch).token_ids[0] is not None


def test_warm_up_leaves_no_trace(paths, slot_runner):
    runner = open_runner(paths)
    runner.warm_up()
    request = make_requests(2)[1]
    assert tokens_of(run(runner, [request])[0]["1"]) == alone(slot_runner, request)


@pytest.mark.parametrize(("max_tokens", "num_tokens", "num_logits"), [(32, 32, 18), (40, 39, 18), (500, 96, 18)])
def test_warm_up_runs_the_largest_steps(paths, max_tokens, num_tokens, num_logits):
    runner = open_runner(paths, limits=make_limits(max_scored_tokens=10), max_tokens=max_tokens)
    runner.warm_up()
    runs = [call.inputs for call in runner._graphs.device.calls if call.what == "run" and call.graph == "decoder"]
    found = [(inputs["input_ids"].shape[0], inputs["logits_index"].shape[0]) for inputs in runs]
    assert found == [(num_tokens, num_logits), (NUM_SEQS, NUM_SEQS)]


def test_a_cache_that_does_not_fit_is_refused_and_takes_nothing(paths):
    device = ReferenceDevice(capacity_bytes=1 << 14)
    with pytest.raises(ConfigError, match="40 blocks of 16 tokens do not fit"):
        open_runner(paths, device=device)
    assert not device.allocated


def test_more_rows_than_the_kernel_takes_are_refused(paths):
    with pytest.raises(ConfigError, match="max_num_seqs: is 257"):
        open_runner(paths, limits=make_limits(num_seqs=257))


def test_another_models_graphs_are_refused(paths):
    with pytest.raises(ConfigError, match=r"graphs.sampler: is no sampler of steps over blocks: see input_ids"):
        open_runner(paths | {"sampler": paths["feed"]})
