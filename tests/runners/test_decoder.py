import itertools

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from tests.tiny_models import TinyDecoder, make_decoder

from sardonyx.core import Batch, BatchRow, Request, RunnerLimits, SamplingParams, Sequence, SlotCopy
from sardonyx.errors import ConfigError, EngineError
from sardonyx.runners.decoder import DecoderRunner, ForwardRow
from sardonyx.runtime.session import open_session

V, MAX_LEN, MAX_CHUNK, NUM_SLOTS = 64, 96, 16, 6
SIZES = TinyDecoder(vocab_size=V, max_model_len=MAX_LEN)
GREEDY = SamplingParams(temperature=0.0)


def open_runner(path, num_slots=NUM_SLOTS, max_chunk_tokens=MAX_CHUNK, max_model_len=MAX_LEN, **options):
    limits = RunnerLimits(num_slots, max_model_len, max_chunk_tokens, V)
    return DecoderRunner(open_session(path, model_name="tiny"), SIZES.language_model, limits, **options)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    make_decoder(path, SIZES)
    return path


@pytest.fixture(scope="module", params=[-1, 20, 10**6], ids=["split", "as measured", "one run"])
def runner(path, request):
    """Every behaviour must be the same however the rows are divided among session runs."""
    return open_runner(path, max_padding=request.param)


@pytest.fixture(scope="module")
def whole(path):
    """Runs one sequence at a time, its whole prompt at once: what all else is compared with."""
    return open_runner(path, num_slots=1, max_chunk_tokens=MAX_LEN)


def random_ids(seed, count):
    return np.random.default_rng(seed).integers(0, V, count).tolist()


def make_sequence(prompt, slot=0, sampling=GREEDY, **request):
    request = Request(id=str(slot), prompt_ids=list(prompt), sampling=sampling, **request)
    return Sequence(request, seed=slot, arrival_s=0.0, token_ids=list(prompt), slot=slot)


def advance(sequence, output, row, index):
    """What a policy does after a step."""
    sequence.num_computed_tokens += row.num_new_tokens
    sequence.prompt_logprobs += output.prompt_logprobs[index]
    if output.token_ids[index] is not None:
        sequence.token_ids.append(output.token_ids[index])


def step(runner, sequences, max_new_tokens=MAX_CHUNK, copies=()):
    rows = [BatchRow(sequence, min(sequence.num_pending_tokens, max_new_tokens)) for sequence in sequences]
    output = runner.execute(Batch(rows, list(copies)))
    assert not output.failed
    for index, (sequence, row) in enumerate(zip(sequences, rows, strict=True)):
        advance(sequence, output, row, index)
    return output


def generate(runner, prompt, num_tokens, slot=0, chunk=MAX_CHUNK):
    sequence = make_sequence(prompt, slot)
    while sequence.num_completion_tokens < num_tokens:
        step(runner, [sequence], chunk)
    return sequence.token_ids[len(prompt) :]


def logits_of(whole, token_ids):
    """Logits after every token, ``(len(token_ids), V)``."""
    return whole.forward([ForwardRow(0, token_ids, 0)], range(len(token_ids)))


def test_greedy_text_varies_with_the_prompt(whole):
    texts = [tuple(generate(whole, random_ids(seed, 8), 12, chunk=MAX_LEN)) for seed in range(12)]
    assert len(set(texts)) == 12


@pytest.mark.parametrize("chunk", [1, 2, 7, MAX_CHUNK])
def test_prompt_in_chunks_gives_the_tokens_of_the_whole_prompt(runner, whole, chunk):
    prompt = random_ids(1, 41)
    expected = generate(whole, prompt, 10, chunk=MAX_LEN)
    assert generate(runner, prompt, 10, slot=3, chunk=chunk) == expected


@given(
    st.dictionaries(
        st.integers(0, NUM_SLOTS - 1), st.tuples(st.integers(0, 60), st.integers(1, MAX_CHUNK)), min_size=1
    ),
    st.randoms(use_true_random=False),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ragged_rows_beside_idle_slots_give_the_logits_of_each_alone(runner, whole, lengths, random):
    texts = {slot: random_ids(slot * 1000 + past, past + new) for slot, (past, new) in lengths.items()}
    for slot, (past, _) in lengths.items():
        for start in range(0, past, MAX_CHUNK):
            runner.forward([ForwardRow(slot, texts[slot][start : min(start + MAX_CHUNK, past)], start)], [0])
    slots = random.sample(sorted(lengths), len(lengths))
    rows = [ForwardRow(slot, texts[slot][lengths[slot][0] :], lengths[slot][0]) for slot in slots]
    num_tokens = sum(len(row.token_ids) for row in rows)
    wanted = random.sample(range(num_tokens), random.randint(1, num_tokens))
    logits = runner.forward(rows, wanted)
    expected = np.concatenate([logits_of(whole, texts[slot])[lengths[slot][0] :] for slot in slots])
    np.testing.assert_allclose(logits, expected[wanted], atol=2e-4)


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 40), st.integers(1, 14)), min_size=2, max_size=10), st.data()
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sequences_that_come_and_go_get_the_tokens_of_their_lonely_runs(runner, whole, plan, data):
    """Arrival step, prompt length and completion length of each; slots are used again as soon as they are free."""
    waiting = [
        (arrival, make_sequence(random_ids(number, length)), num_tokens)
        for number, (arrival, length, num_tokens) in enumerate(plan)
    ]
    running, free = [], list(range(NUM_SLOTS))
    for number in itertools.count():
        while waiting and free and min(arrival for arrival, _, _ in waiting) <= number:
            _, sequence, num_tokens = waiting.pop(min(range(len(waiting)), key=lambda i: waiting[i][0]))
            sequence.slot = free.pop(data.draw(st.integers(0, len(free) - 1), label="slot"))
            running.append((sequence, num_tokens))
        if running:
            step(runner, [sequence for sequence, _ in running], data.draw(st.integers(1, MAX_CHUNK), label="chunk"))
        for sequence, num_tokens in [entry for entry in running if entry[0].num_completion_tokens == entry[1]]:
            expected = generate(whole, sequence.request.prompt_ids, num_tokens, chunk=MAX_LEN)
            assert sequence.token_ids[sequence.num_prompt_tokens :] == expected
            running.remove((sequence, num_tokens))
            free.append(sequence.slot)
        if not waiting and not running:
            break


def test_copied_prefix_gives_the_tokens_of_recomputation(runner, whole):
    shared, tails = random_ids(5, 37), [random_ids(6, 9), random_ids(7, 3)]
    donor = make_sequence(shared, slot=4)
    while donor.num_pending_tokens > 1 or not donor.num_completion_tokens:
        step(runner, [donor])
    heirs = [make_sequence(shared + tail, slot) for slot, tail in zip((0, 5), tails, strict=True)]
    for heir in heirs:
        heir.num_computed_tokens = len(shared)
    copies = [SlotCopy(4, heir.slot, len(shared)) for heir in heirs]
    step(runner, [*heirs, donor], copies=copies)
    while heirs[0].num_completion_tokens < 12:
        step(runner, [*heirs, donor])
    for sequence in (*heirs, donor):
        prompt = sequence.request.prompt_ids
        expected = generate(whole, prompt, sequence.num_completion_tokens, chunk=MAX_LEN)
        assert sequence.token_ids[len(prompt) :] == expected


def test_row_at_its_last_position_runs_beside_a_whole_chunk(runner, whole):
    long, short = random_ids(8, MAX_LEN), random_ids(9, MAX_CHUNK)
    for start in range(0, MAX_LEN - 1, MAX_CHUNK):
        runner.forward([ForwardRow(2, long[start : min(start + MAX_CHUNK, MAX_LEN - 1)], start)], [0])
    rows = [ForwardRow(2, long[-1:], MAX_LEN - 1), ForwardRow(3, short, 0)]
    logits = runner.forward(rows, [0, MAX_CHUNK])
    np.testing.assert_allclose(logits[0], logits_of(whole, long)[-1], atol=2e-4)
    np.testing.assert_allclose(logits[1], logits_of(whole, short)[-1], atol=2e-4)


def test_chunk_that_does_not_end_its_prompt_has_no_token(runner):
    sequences = [make_sequence(random_ids(10, 20), slot=0), make_sequence(random_ids(11, 5), slot=1)]
    output = step(runner, sequences)
    assert output.token_ids[0] is None
    assert output.token_ids[1] is not None
    assert step(runner, sequences).token_ids[0] is not None


def test_same_seed_gives_the_same_text_in_any_company(runner):
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=7)

    def run(slot, neighbours):
        sequence = make_sequence(random_ids(12, 10), slot, sampling)
        sequence.seed = 7
        others = [make_sequence(random_ids(100 + other, 30), other, sampling) for other in neighbours]
        while sequence.num_completion_tokens < 20:
            step(runner, [*others, sequence])
        return sequence.token_ids

    assert run(0, []) == run(5, [1, 2]) == run(3, [0, 1, 2, 4])


@pytest.mark.parametrize("chunk", [3, MAX_CHUNK])
def test_prompt_log_probabilities_are_those_of_the_whole_prompt(runner, whole, chunk):
    prompt = random_ids(13, 29)
    sequence = make_sequence(prompt, slot=1, num_prompt_logprobs=2)
    others = [
        make_sequence(random_ids(14, 50), slot=0),
        make_sequence(random_ids(15, 2), slot=4, num_prompt_logprobs=0),
    ]
    while not sequence.num_completion_tokens:
        step(runner, [others[0], sequence, others[1]], chunk)
    logits = logits_of(whole, prompt).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert [entry.token_id for entry in sequence.prompt_logprobs] == prompt[1:]
    for position, entry in enumerate(sequence.prompt_logprobs):
        assert entry.logprob == pytest.approx(expected[position, entry.token_id], abs=1e-4)
        assert [token_id for token_id, _ in entry.top] == np.argsort(-expected[position])[:2].tolist()
    assert sequence.token_ids[-1] == generate(whole, prompt, 1, chunk=MAX_LEN)[0]
    assert len(others[1].prompt_logprobs) == 1
    assert others[1].prompt_logprobs[0].top == []
    assert not others[0].prompt_logprobs


def test_recomputed_completion_has_no_prompt_log_probabilities(runner, whole):
    prompt = random_ids(16, 6)
    sequence = make_sequence(prompt, slot=2, num_prompt_logprobs=0)
    completion = generate(whole, prompt, 5, chunk=MAX_LEN)
    sequence.token_ids += completion[:4]  # preempted: prompt and completion are prefilled again
    output = step(runner, [sequence])
    assert output.prompt_logprobs[0] == []
    assert output.token_ids == [completion[4]]


def test_prompt_of_one_token_has_no_prompt_log_probabilities(runner):
    sequence = make_sequence([3], slot=2, num_prompt_logprobs=1)
    assert step(runner, [sequence]).prompt_logprobs == [[]]


def test_completion_log_probabilities_are_given_to_rows_that_ask(runner, whole):
    prompt = random_ids(17, 9)
    asking = make_sequence(prompt, slot=0, sampling=SamplingParams(temperature=0.0, num_logprobs=3))
    output = step(runner, [make_sequence(prompt, slot=1), asking])
    assert output.logprobs[0] is None
    logits = logits_of(whole, prompt)[-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    assert output.logprobs[1].token_id == output.token_ids[1]
    assert output.logprobs[1].logprob == pytest.approx(expected.max(), abs=1e-4)
    assert len(output.logprobs[1].top) == 3


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [ForwardRow(0, [1], 0), ForwardRow(0, [1], 1)],
        [ForwardRow(NUM_SLOTS, [1], 0)],
        [ForwardRow(-1, [1], 0)],
        [ForwardRow(0, [], 3)],
        [ForwardRow(0, [1] * (MAX_CHUNK + 1), 0)],
        [ForwardRow(0, [1, 2], MAX_LEN - 1)],
        [ForwardRow(0, [1], -1)],
    ],
)
def test_batch_that_breaks_the_contract_is_refused_before_it_runs(runner, whole, rows):
    with pytest.raises(EngineError, match="model tiny was given a batch that breaks its limits"):
        runner.forward(rows, [0])
    assert generate(runner, [5, 6], 3) == generate(whole, [5, 6], 3, chunk=MAX_LEN)


def test_failing_kernel_is_an_engine_error_and_the_next_step_runs(runner, whole):
    with pytest.raises(EngineError, match="model tiny failed on the execution provider cpu"):
        runner.forward([ForwardRow(0, [V], 0)], [0])
    assert generate(runner, [5, 6], 3) == generate(whole, [5, 6], 3, chunk=MAX_LEN)


@pytest.fixture(scope="module")
def poisoned_path(path):
    """Token 9 has an embedding that is not a number."""
    model = onnx.load(path)
    for initializer in model.graph.initializer:
        if initializer.name == "embed.weight":
            values = numpy_helper.to_array(initializer).copy()
            values[9] = np.nan
            initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
    onnx.save_model(model, path.with_name("poisoned.onnx"))
    return path.with_name("poisoned.onnx")


@pytest.mark.parametrize("max_padding", [-1, 10**6])
def test_row_that_is_not_a_number_fails_alone_and_its_slot_serves_the_next(poisoned_path, whole, max_padding):
    runner = open_runner(poisoned_path, max_padding=max_padding)
    clean = [token_id for token_id in random_ids(18, 20) if token_id != 9]
    bad = make_sequence([*clean[:8], 9, 9, 9], slot=1)
    scored = make_sequence([*clean[:3], 9, 4, 4, 4], slot=2, num_prompt_logprobs=0)
    good = [make_sequence(clean[:11], slot=0), make_sequence(clean[3:9], slot=3)]
    rows = [BatchRow(sequence, len(sequence.token_ids)) for sequence in (good[0], bad, scored, good[1])]
    output = runner.execute(Batch(rows))
    assert sorted(output.failed) == [1, 2]
    assert "not finite" in output.failed[1]
    assert output.token_ids[0] == generate(whole, clean[:11], 1, chunk=MAX_LEN)[0]
    assert output.token_ids[3] == generate(whole, clean[3:9], 1, chunk=MAX_LEN)[0]
    # The poisoned positions beyond the new sequence's own must not reach it.
    logits = runner.forward([ForwardRow(1, clean[:4], 0)], [3])
    np.testing.assert_allclose(logits[0], logits_of(whole, clean[:4])[-1], atol=2e-4)


def test_warm_up_changes_no_token(path, whole):
    runner = open_runner(path)
    runner.warm_up()
    assert generate(runner, [1, 2, 3], 5) == generate(whole, [1, 2, 3], 5, chunk=MAX_LEN)


def test_closed_runner_runs_nothing(path):
    runner = open_runner(path)
    generate(runner, [1, 2], 2)
    runner.close()
    runner.close()
    with pytest.raises(EngineError):
        runner.forward([ForwardRow(0, [1], 0)], [0])


def test_bindings_beyond_those_that_are_kept_are_made_again(path, whole, monkeypatch):
    monkeypatch.setattr("sardonyx.runners.packed_pass._MAX_BINDINGS", 2)
    runner = open_runner(path)
    prompt = random_ids(19, 20)
    expected = generate(whole, prompt, 4, chunk=MAX_LEN)
    for _ in range(2):
        for slot in range(NUM_SLOTS):
            assert generate(runner, prompt, 4, slot) == expected
    assert len(runner._pass._windows) == 2


def test_slots_shorter_than_the_model_use_the_models_rotary_tables(path, whole):
    runner = open_runner(path, max_model_len=30, max_chunk_tokens=8)
    assert generate(runner, random_ids(20, 20), 10, chunk=8) == generate(whole, random_ids(20, 20), 10, chunk=MAX_LEN)
    with pytest.raises(EngineError):
        runner.forward([ForwardRow(0, [1], 30)], [0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, "is no decoder in the packed-step contract: see past_key_values.2.key"),
        ({"num_kv_heads": 4}, "kv: says FP32 .* unlike the manifest"),
        ({"head_size": 8}, "kv: says FP32 .* unlike the manifest"),
        ({"vocab_size": V + 1}, "logits: is not the vocabulary"),
        ({"max_model_len": MAX_LEN - 1}, "max_model_len: .* do not fit a model of 95"),
    ],
)
def test_graph_that_is_not_what_the_manifest_says_is_a_config_error(path, changes, message):
    model = TinyDecoder(**{"vocab_size": V, "max_model_len": MAX_LEN, **changes}).language_model
    with pytest.raises(ConfigError, match=message):
        DecoderRunner(open_session(path, model_name="tiny"), model, RunnerLimits(2, MAX_LEN, 8, V))


def test_chunk_longer_than_the_model_is_a_config_error(path):
    with pytest.raises(ConfigError, match="do not fit a model of 96"):
        open_runner(path, max_chunk_tokens=MAX_LEN + 1)
