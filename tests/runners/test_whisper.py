"""`WhisperRunner` over a tiny Whisper with random weights, against `transformers` and against one row at a time."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the extra `export-torch` is not installed")
from tests.export.whisper_checkpoints import SIZES, make_whisper  # noqa: E402 - it needs torch

from sardonyx.core import BatchRow, SamplingParams, Sequence  # noqa: E402
from sardonyx.errors import ConfigError, EngineError  # noqa: E402
from sardonyx.repository.families import KvLayout  # noqa: E402
from sardonyx.repository.manifest import Whisper  # noqa: E402
from sardonyx.runners.speech_sampler import SpeechSampler  # noqa: E402
from sardonyx.runners.whisper import WhisperRunner, WhisperSessions, slot_bytes  # noqa: E402
from sardonyx.runtime.session import open_session  # noqa: E402
from sardonyx.speech import Placement, SpeechBatch, SpeechOutput, SpeechRequest, SpeechTask, Window  # noqa: E402
from sardonyx_export.builders.whisper import build_whisper  # noqa: E402
from sardonyx_export.builders.whisper_aligner import Alignment  # noqa: E402
from sardonyx_export.families.whisper import read_whisper_spec  # noqa: E402
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder  # noqa: E402

MAX_LEN, NUM_SLOTS, NUM_WINDOWS = 40, 8, 5
HEADS = [[2, 1], [0, 0]]
END, START, NO_SPEECH, BEGIN = 60, 61, 68, 70
MODEL = Whisper(
    vocab_size=SIZES["vocab_size"],
    max_model_len=MAX_LEN,
    num_mels=SIZES["num_mel_bins"],
    num_frames=2 * SIZES["max_source_positions"],
    kv=KvLayout(num_layers=SIZES["decoder_layers"], num_kv_heads=2, head_size=16),
    start_id=START,
    end_id=END,
    previous_id=62,
    no_speech_id=NO_SPEECH,
    no_timestamps_id=69,
    timestamp_begin_id=BEGIN,
    transcribe_id=66,
    translate_id=67,
    language_ids={"de": 64, "en": 63, "fr": 65},
    suppress_ids=[5, *range(START, BEGIN)],
    begin_suppress_ids=[7, END],
    alignment_heads=HEADS,
)
GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Exported:
    """Graphs by role, the model they are of, and windows of noise that nobody has encoded."""

    files: dict[str, Path]
    model: Any
    spectrograms: list[Any]

    def window(self, number: int) -> Window:
        return Window(self.spectrograms[number], MODEL.num_frames)

    def open(self, num_slots: int = NUM_SLOTS, model: Whisper = MODEL, *, has_aligner: bool = True) -> WhisperRunner:
        sessions = {role: open_session(path, model_name="tiny") for role, path in self.files.items()}
        aligner = sessions["aligner"] if has_aligner else None
        return WhisperRunner(WhisperSessions(sessions["encoder"], sessions["decoder"], aligner), model, num_slots)

    def reference(self, number: int, token_ids: list[int], **options: Any) -> Any:
        """What `transformers` makes of a window and tokens."""
        mel = torch.from_numpy(self.spectrograms[number][None])
        with torch.no_grad():
            return self.model(input_features=mel, decoder_input_ids=torch.tensor([token_ids]), **options)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    model = make_whisper(folder / "source", max_target_positions=MAX_LEN)
    checkpoint = SafetensorsFolder(folder / "source", uri="tiny")
    spec = read_whisper_spec(checkpoint.config)
    alignment = Alignment(heads=HEADS, end_id=END)
    report = build_whisper(checkpoint, spec, folder, precision="fp32", alignment=alignment)
    noise = np.random.default_rng(3).standard_normal((NUM_WINDOWS, MODEL.num_mels, MODEL.num_frames))
    return Exported({role: paths[0] for role, paths in report.graphs.items()}, model, list(noise.astype(np.float32)))


@pytest.fixture(scope="module")
def runner(exported):
    runner = exported.open()
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def windows(exported, runner):
    """Encoded together."""
    windows = [exported.window(number) for number in range(NUM_WINDOWS)]
    assert runner.execute(SpeechBatch(windows=windows)) == SpeechOutput()
    return windows


def make_sequence(window, prompt, *, seed=0, sampling=GREEDY, **fields):
    request = SpeechRequest(id="r", prompt_ids=list(prompt), window=window, sampling=sampling, **fields)
    return Sequence(request, seed=seed, arrival_s=0.0, token_ids=list(prompt))


def advance(runner, sequences, placements=()):
    """One pass of all sequences, in the slots 0, 1 ..."""
    for slot, sequence in enumerate(sequences):
        assert sequence.slot == slot
    rows = [BatchRow(sequence, sequence.num_pending_tokens) for sequence in sequences]
    output = runner.execute(SpeechBatch(placements=list(placements), rows=rows))
    assert not output.failed
    for sequence, token_id in zip(sequences, output.token_ids, strict=True):
        sequence.num_computed_tokens = len(sequence.token_ids)
        if token_id is not None:
            sequence.token_ids.append(token_id)
    return output


def begin(sequence, slot=0):
    sequence.slot = slot
    return Placement(slot, sequence.request.window)


def generate(runner, window, prompt, num_tokens, **fields):
    """Alone in the runner; end tokens are taken like any other."""
    sequence = make_sequence(window, prompt, **fields)
    outputs = [advance(runner, [sequence], [begin(sequence)])]
    outputs += [advance(runner, [sequence]) for _ in range(num_tokens - 1)]
    return sequence.token_ids[len(prompt) :], [output.logprobs[0] for output in outputs]


def expected_after(exported, number, prompt, text, *, has_timestamps):
    """After the prompt, and after each token of the text but the last: the likeliest token that the rules leave.

    Returns:
        Tokens and log-probabilities; the tokens are the greedy text if they are `text`.
    """
    rows = exported.reference(number, prompt + text[:-1]).logits[0, len(prompt) - 1 :].numpy().copy()
    sampler, logprobs = SpeechSampler(MODEL), []
    for place, row in enumerate(rows):
        sampler.apply_rules(row, text[:place], has_timestamps=has_timestamps)
        logprobs.append(float(torch.log_softmax(torch.from_numpy(row), -1).max()))
    return rows.argmax(-1).tolist(), logprobs


PROMPTS = {
    "plain": [START, 63, 66, 69],
    "timestamps": [START, 64, 66],
    "after text": [62, 11, 12, 13, 14, START, 63, 66],
    "start alone": [START],
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("number", [0, 3])
def test_text_is_the_greedy_text_of_transformers(exported, runner, windows, name, number):
    has_timestamps = name != "plain"
    tokens, logprobs = generate(runner, windows[number], PROMPTS[name], 12, has_timestamps=has_timestamps)
    prompt = PROMPTS[name]
    expected, expected_logprobs = expected_after(exported, number, prompt, tokens, has_timestamps=has_timestamps)
    assert tokens == expected
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=2e-4)


def test_logprobs_depend_on_window_and_prompt(runner, windows):
    found = [generate(runner, window, prompt, 3)[1] for window in windows for prompt in PROMPTS.values()]
    gaps = [np.abs(np.subtract(one, other)).max() for one, other in itertools.combinations(found, 2)]
    assert min(gaps) > 0.005, "so that those of other rows would be noticed"


def test_windows_encoded_together_are_those_encoded_alone(exported, runner, windows):
    for number, window in enumerate(windows):
        alone = exported.window(number)
        runner.execute(SpeechBatch(windows=[alone]))
        for layer, other in zip(window.cross, alone.cross, strict=True):
            np.testing.assert_allclose(layer.key, other.key, atol=1e-5)
            np.testing.assert_allclose(layer.value, other.value, atol=1e-5)
            assert layer.key.shape == (1, 2, 16, MODEL.num_frames // 2)
            assert layer.value.shape == (1, 2, MODEL.num_frames // 2, 16)


plans = st.lists(
    st.tuples(st.integers(0, NUM_WINDOWS - 1), st.integers(0, 18), st.integers(1, 9), st.integers(0, 8)),
    min_size=2,
    max_size=14,
)


@given(plans)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_that_begin_decode_and_move_get_the_tokens_of_their_lonely_runs(runner, windows, plan):
    """Each entry: its window, text before it, tokens to generate, and the step at which it comes."""
    sequences, expected = [], []
    for number, num_previous, num_tokens, _ in plan:
        prompt = prompt_after(num_previous)
        sampling = SamplingParams(temperature=float(number % 2), seed=number)
        fields = {"has_timestamps": bool(number % 3), "seed": number, "sampling": sampling}
        sequences.append(make_sequence(windows[number], prompt, **fields))
        expected.append(generate(runner, windows[number], prompt, num_tokens, **fields))
    found = play(runner, sequences, plan)
    for sequence, logprobs, (tokens, expected_logprobs) in zip(sequences, found, expected, strict=True):
        assert sequence.token_ids[sequence.num_prompt_tokens :] == tokens
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=2e-4)


def prompt_after(num_previous):
    return [62, *range(10, 10 + num_previous), START, 63] if num_previous else [START, 63]


def play(runner, sequences, plan):
    """Run all of them, at most `NUM_SLOTS` at once. Returns the log-probabilities of each one's tokens."""
    waiting = sorted(range(len(plan)), key=lambda index: plan[index][3])
    running: list[int] = []
    logprobs: list[list[float]] = [[] for _ in plan]
    for step in itertools.count():
        if not running and not waiting:
            break
        ended = [index for index in running if sequences[index].num_completion_tokens == plan[index][2]]
        placements, running = close_gaps(running, ended, sequences)
        while waiting and plan[waiting[0]][3] <= step and len(running) < NUM_SLOTS:
            running.append(waiting.pop(0))
            placements.append(begin(sequences[running[-1]], len(running) - 1))
        if running:
            output = advance(runner, [sequences[index] for index in running], placements)
            for index, logprob in zip(running, output.logprobs, strict=True):
                logprobs[index].append(logprob)
    return logprobs


def close_gaps(running, ended, sequences):
    """The last ones move to where others have ended."""
    running = [None if index in ended else index for index in running]
    placements = []
    while None in running:
        last = running.pop()
        if last is not None:
            gap, mover = running.index(None), sequences[last]
            placements.append(Placement(gap, mover.request.window, mover.slot, mover.num_computed_tokens))
            running[gap], mover.slot = last, gap
    return placements, running


def test_row_at_the_models_limit_shares_its_step_with_prompts_that_begin(runner, windows):
    prompts = [[62, *range(10, 10 + length - 2), START] for length in (9, 17, 18, 19, 20, 21, 22)]
    expected = [generate(runner, windows[1], prompt, 1)[0] for prompt in prompts]
    long = make_sequence(windows[0], [62, *range(10, 46), START])
    text = generate(runner, windows[0], long.token_ids, 2)[0]
    advance(runner, [long], [begin(long)])
    assert len(long.token_ids) == MAX_LEN - 1
    others = [make_sequence(windows[1], prompt) for prompt in prompts]
    advance(runner, [long, *others], [begin(other, slot) for slot, other in enumerate(others, 1)])
    assert long.token_ids[-2:] == text
    assert [other.token_ids[-1:] for other in others] == expected


def test_no_speech_prob_is_the_softmax_at_the_start_token_of_rows_that_begin(exported, runner, windows):
    prompts = [PROMPTS["after text"], PROMPTS["plain"], [START]]
    sequences = [make_sequence(windows[number], prompt) for number, prompt in enumerate(prompts)]
    output = advance(runner, sequences, [begin(sequence, slot) for slot, sequence in enumerate(sequences)])
    for number, prompt in enumerate(prompts):
        logits = exported.reference(number, prompt).logits[0, prompt.index(START)]
        expected = torch.softmax(logits, -1)[NO_SPEECH].item()
        assert output.no_speech_probs[number] == pytest.approx(expected, rel=1e-3)
    assert advance(runner, sequences).no_speech_probs == [None] * 3


def test_languages_share_the_probability_of_the_first_token(exported, runner, windows):
    text = make_sequence(windows[0], PROMPTS["plain"])
    asked = make_sequence(windows[2], [START], task=SpeechTask.LANGUAGES)
    output = advance(runner, [text, asked], [begin(text), begin(asked, 1)])
    logits = exported.reference(2, [START]).logits[0, -1, [64, 63, 65]]
    expected = torch.softmax(logits, -1).tolist()
    assert output.language_probs[1] == pytest.approx(dict(zip([64, 63, 65], expected, strict=True)), rel=1e-3)
    assert sum(output.language_probs[1].values()) == pytest.approx(1.0)
    assert output.language_probs[0] == {}
    assert (output.token_ids[1], output.no_speech_probs[1]) == (None, None)


def test_alignment_is_the_cross_attention_and_the_logprobs_among_text(exported, runner, windows):
    token_ids = [START, 63, 66, 69, 12, 40, END]
    sequence = make_sequence(windows[4], token_ids, task=SpeechTask.ALIGNMENT)
    alignment = runner.execute(SpeechBatch(aligned=sequence)).alignment
    reference = exported.reference(4, token_ids, output_attentions=True)
    shares = torch.softmax(torch.from_numpy(alignment.attention.copy()), -1).numpy()
    expected = np.stack([reference.cross_attentions[layer][0, head].numpy() for layer, head in HEADS])
    np.testing.assert_allclose(shares, expected, atol=1e-5)
    logprobs = torch.log_softmax(reference.logits[0, :, :END], -1)
    heard = [logprobs[place, token_id].item() for place, token_id in ((3, 12), (4, 40))]
    np.testing.assert_allclose(alignment.logprobs[3:5], heard, atol=2e-4)
    assert alignment.logprobs.shape == (len(token_ids) - 1,)


def test_alignment_without_its_graph_is_an_error_that_says_so(exported, windows):
    runner = exported.open(1, has_aligner=False)
    runner.warm_up()
    with pytest.raises(EngineError, match="model tiny has no graph for word timestamps"):
        runner.execute(SpeechBatch(aligned=make_sequence(windows[0], [START, END], task=SpeechTask.ALIGNMENT)))
    runner.close()


def test_row_whose_logits_are_not_finite_fails_alone(exported, runner, windows):
    spectrogram = windows[1].spectrogram.copy()
    spectrogram[0, 0] = np.nan
    broken = Window(spectrogram, MODEL.num_frames)
    runner.execute(SpeechBatch(windows=[broken]))
    expected = generate(runner, windows[0], PROMPTS["plain"], 1)
    sequences = [make_sequence(window, PROMPTS["plain"]) for window in (broken, windows[0])]
    rows = [BatchRow(sequence, sequence.num_pending_tokens) for sequence in sequences]
    placements = [begin(sequence, slot) for slot, sequence in enumerate(sequences)]
    output = runner.execute(SpeechBatch(placements=placements, rows=rows))
    assert output.failed == {0: "the model's output for this sound is not finite"}
    assert output.token_ids == [None, expected[0][0]]
    assert generate(runner, windows[0], PROMPTS["plain"], 1) == expected, "the slot is good again"


def test_warm_up_leaves_nothing_behind(exported, runner, windows):
    fresh = exported.open(2)
    fresh.warm_up()
    assert generate(fresh, windows[0], PROMPTS["plain"], 5) == generate(runner, windows[0], PROMPTS["plain"], 5)
    fresh.close()


def test_closed_runner_runs_no_more(exported, windows):
    runner = exported.open(1)
    generate(runner, windows[0], [START], 1)
    runner.close()
    with pytest.raises(EngineError, match="model tiny is unloaded"):
        runner.execute(SpeechBatch(windows=[exported.window(0)]))


def test_slot_bytes_are_the_caches_and_the_window(exported):
    floats = 2 * MODEL.kv.num_layers * 2 * 16
    assert slot_bytes(MODEL) == 4 * floats * (MAX_LEN + 2 * MODEL.num_frames // 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kv": KvLayout(num_layers=2, num_kv_heads=2, head_size=16)},
            "encoder.onnx: is no encoder of a Whisper model: see cross.2.key, cross.2.value",
        ),
        (
            {"kv": KvLayout(num_layers=3, num_kv_heads=4, head_size=8)},
            r"decoder.onnx: kv: has cross.0.key of \(2, 16, 20\), unlike the manifest",
        ),
        ({"num_frames": 38}, r"decoder.onnx: kv: has cross.0.key of \(2, 16, 20\), unlike the manifest"),
        ({"vocab_size": 95}, "decoder.onnx: logits: is not the manifest's vocabulary"),
        ({"num_mels": 80}, "encoder.onnx: mel: is not the manifest's window"),
    ],
)
def test_graphs_that_are_not_the_manifests_are_refused(exported, changes, message):
    with pytest.raises(ConfigError, match=message):
        exported.open(1, msgspec.structs.replace(MODEL, **changes))


def test_graph_in_another_ones_place_is_refused(exported):
    swapped = Exported(exported.files | {"aligner": exported.files["encoder"]}, None, [])
    with pytest.raises(ConfigError, match=r"aligner\.onnx: is no aligner of a Whisper model: see attention"):
        swapped.open(1)
