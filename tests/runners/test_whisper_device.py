"""`WhisperDeviceRunner` over a device without a card, its graphs as they are exported, against the CPU's runner."""

import gc
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.reference_device import ReferenceDevice

torch = pytest.importorskip("torch", reason="the extra `export-torch` is not installed")
from tests.export.whisper_checkpoints import make_whisper  # noqa: E402 - it needs torch
from tests.runners.test_whisper import (  # noqa: E402 - it needs torch
    END,
    HEADS,
    MAX_LEN,
    MODEL,
    NUM_SLOTS,
    NUM_WINDOWS,
    START,
    Exported,
    advance,
    begin,
    generate,
    make_sequence,
    play,
    prompt_after,
)

from sardonyx.core import BatchRow, SamplingParams  # noqa: E402
from sardonyx.errors import ConfigError, EngineError  # noqa: E402
from sardonyx.repository.families import Whisper  # noqa: E402
from sardonyx.runners import whisper_device  # noqa: E402
from sardonyx.runners.whisper import slot_bytes  # noqa: E402
from sardonyx.runners.whisper_device import WhisperDeviceRunner  # noqa: E402
from sardonyx.runners.whisper_graphs import WhisperGraphs  # noqa: E402
from sardonyx.speech import Placement, SpeechBatch, SpeechTask  # noqa: E402
from sardonyx_export.builders.whisper import build_whisper  # noqa: E402
from sardonyx_export.builders.whisper_aligner import Alignment  # noqa: E402
from sardonyx_export.families.whisper import read_whisper_spec  # noqa: E402
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder  # noqa: E402

BLOCK_SIZE = 16
LAYERS = MODEL.kv.num_layers


def on_card(datatype: str) -> Whisper:
    return msgspec.structs.replace(
        MODEL, kv=msgspec.structs.replace(MODEL.kv, datatype=datatype, block_size=BLOCK_SIZE)
    )


@dataclass
class Both:
    """The same weights for the CPU and for cards."""

    cpu: Exported
    cards: dict[str, dict[str, Path]]
    """By the cache's datatype: graphs by role."""

    def open(
        self, datatype: str = "FP16", num_slots: int = NUM_SLOTS, *, has_aligner: bool = True
    ) -> tuple[WhisperDeviceRunner, ReferenceDevice]:
        device, paths = ReferenceDevice(), self.cards[datatype]
        sessions = {role: device.open(path, model_name="tiny") for role, path in paths.items()}
        aligner = sessions["aligner"] if has_aligner else None
        graphs = WhisperGraphs("tiny", device, sessions["encoder"], sessions["decoder"], aligner)
        return WhisperDeviceRunner(graphs, on_card(datatype), num_slots), device


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    model = make_whisper(folder / "source", max_target_positions=MAX_LEN)
    checkpoint = SafetensorsFolder(folder / "source", uri="tiny")
    spec, alignment = read_whisper_spec(checkpoint.config), Alignment(heads=HEADS, end_id=END)
    files = {}
    for precision in ("fp32", "fp16", "bf16"):
        (folder / precision).mkdir()
        report = build_whisper(
            checkpoint, spec, folder / precision, precision=precision, alignment=alignment, kv_block_size=BLOCK_SIZE
        )
        files[precision.upper()] = {role: paths[0] for role, paths in report.graphs.items()}
    noise = np.random.default_rng(3).standard_normal((NUM_WINDOWS, MODEL.num_mels, MODEL.num_frames))
    return Both(Exported(files.pop("FP32"), model, list(noise.astype(np.float32))), files)


@pytest.fixture(scope="module")
def cpu(both):
    runner = both.cpu.open()
    yield runner
    runner.close()


def encoded(both, runner):
    windows = [both.cpu.window(number) for number in range(NUM_WINDOWS)]
    runner.execute(SpeechBatch(windows=windows))
    return windows


# Window, text before it, tokens to generate, and the step at which it comes; the second tries are of the same windows.
PLAN = [
    (0, 0, 9, 0),
    (1, 12, 2, 0),
    (2, 0, 7, 0),
    (3, 18, 3, 1),
    (4, 5, 8, 1),
    (0, 0, 6, 2),
    (1, 12, 5, 3),
    (3, 9, 4, 5),
]


def sequences_of(windows):
    """Greedy ones, and the later half of the second tries at a temperature."""
    made = []
    for index, (number, num_previous, _, _) in enumerate(PLAN):
        sampling = SamplingParams(temperature=float(index > 5), seed=index)
        fields = {"has_timestamps": bool(number % 2), "seed": index, "sampling": sampling}
        made.append(make_sequence(windows[number], prompt_after(num_previous), **fields))
    return made


def completions(sequences):
    return [sequence.token_ids[sequence.num_prompt_tokens :] for sequence in sequences]


@pytest.mark.parametrize("max_positions", [whisper_device.MAX_POSITIONS, 24])
def test_sequences_of_many_lengths_that_move_and_are_tried_again_get_the_cpus_tokens(
    both, cpu, monkeypatch, max_positions
):
    monkeypatch.setattr(whisper_device, "MAX_POSITIONS", max_positions)
    expected = sequences_of(encoded(both, cpu))
    expected_logprobs = play(cpu, expected, PLAN)
    runner, device = both.open()
    found = sequences_of(encoded(both, runner))
    logprobs = play(runner, found, PLAN)
    assert completions(found) == completions(expected)
    for own, wanted in zip(logprobs, expected_logprobs, strict=True):
        np.testing.assert_allclose(own, wanted, atol=0.05)
    num_copies = sum(call.what == "copy" for call in device.calls)
    assert num_copies > 2 * LAYERS * len(PLAN), "some moved"
    runner.close()


def test_bf16_says_the_same_alone_and_in_company(both, cpu):
    runner, _ = both.open("BF16")
    windows = encoded(both, runner)
    together = sequences_of(windows)
    logprobs = play(runner, together, PLAN)
    for sequence, own in zip(together, logprobs, strict=True):
        request = sequence.request
        fields = {"has_timestamps": request.has_timestamps, "seed": sequence.seed, "sampling": request.sampling}
        alone = generate(runner, request.window, request.prompt_ids, len(own), **fields)
        assert completions([sequence]) == [alone[0]]
    expected = generate(cpu, encoded(both, cpu)[0], prompt_after(0), 9)
    np.testing.assert_allclose(logprobs[0][:3], expected[1][:3], atol=0.3)
    runner.close()


def test_a_move_copies_the_windows_part_alone_and_on_the_device(both):
    runner, device = both.open()
    windows = encoded(both, runner)
    alone = generate(runner, windows[1], [START, 63], 2)[0]
    sequences = [make_sequence(windows[number], [START, 63]) for number in (0, 1)]
    advance(runner, sequences, [begin(sequence, slot) for slot, sequence in enumerate(sequences)])
    mover, num_before = sequences[1], len(device.calls)
    mover.slot = 0
    advance(runner, [mover], [Placement(0, windows[1], 1, mover.num_computed_tokens)])
    moved = [call.what for call in device.calls[num_before:]]
    assert moved == ["copy"] * 2 * LAYERS + ["write", "run", "read", "mark", "wait"]
    assert mover.token_ids[2:] == alone
    runner.close()


def test_alignment_is_the_cpus(both, cpu):
    runner, _ = both.open()
    token_ids = [START, 63, 66, 69, 12, 40, END]
    found, expected = (
        each.execute(
            SpeechBatch(aligned=make_sequence(encoded(both, each)[4], token_ids, task=SpeechTask.ALIGNMENT))
        ).alignment
        for each in (runner, cpu)
    )
    assert found.attention.shape == expected.attention.shape == (len(HEADS), len(token_ids), MODEL.num_frames // 2)
    np.testing.assert_allclose(found.attention, expected.attention, atol=0.05)
    np.testing.assert_allclose(found.logprobs[3:5], expected.logprobs[3:5], atol=0.05)
    runner.close()


def test_alignment_without_its_graph_is_an_error_that_says_so(both):
    runner, _ = both.open(num_slots=1, has_aligner=False)
    runner.warm_up()
    sequence = make_sequence(both.cpu.window(0), [START, END], task=SpeechTask.ALIGNMENT)
    with pytest.raises(EngineError, match="model tiny has no graph for word timestamps"):
        runner.execute(SpeechBatch(aligned=sequence))
    runner.close()


def test_the_longest_unused_window_gives_way_and_is_encoded_again(both):
    runner, _ = both.open(num_slots=2)
    first, second, third = (both.cpu.window(number) for number in range(3))
    runner.execute(SpeechBatch(windows=[first, second]))
    expected = generate(runner, first, [START, 63], 4)
    runner.execute(SpeechBatch(windows=[third]))
    assert (first.cross is None, second.cross is None, third.cross is None) == (False, True, False)
    runner.execute(SpeechBatch(windows=[second]))
    assert first.cross is None
    runner.execute(SpeechBatch(windows=[first]))
    assert generate(runner, first, [START, 63], 4) == expected
    runner.close()


def test_windows_that_nobody_keeps_give_way_first(both):
    runner, _ = both.open(num_slots=2)
    kept, dropped = both.cpu.window(0), both.cpu.window(1)
    runner.execute(SpeechBatch(windows=[kept, dropped]))
    del dropped
    gc.collect()
    other = both.cpu.window(2)
    runner.execute(SpeechBatch(windows=[other]))
    assert kept.cross is not None
    runner.close()


def test_a_row_whose_logits_are_not_finite_fails_alone(both):
    runner, _ = both.open()
    good, broken = both.cpu.window(0), both.cpu.window(1)
    broken.spectrogram = np.full_like(broken.spectrogram, np.nan)
    runner.execute(SpeechBatch(windows=[broken, good]))
    expected = generate(runner, good, [START, 63], 1)
    sequences = [make_sequence(window, [START, 63]) for window in (broken, good)]
    rows = [BatchRow(sequence, sequence.num_pending_tokens) for sequence in sequences]
    placements = [begin(sequence, slot) for slot, sequence in enumerate(sequences)]
    output = runner.execute(SpeechBatch(placements=placements, rows=rows))
    assert output.failed == {0: "the model's output for this sound is not finite"}
    assert output.token_ids == [None, expected[0][0]]
    runner.close()


def test_a_step_that_fails_is_an_engine_error_and_the_next_one_runs(both):
    runner, device = both.open()
    window = both.cpu.window(0)

    def fail(graph):
        raise EngineError("model tiny failed on the execution provider cuda")

    device.on_run = fail
    with pytest.raises(EngineError, match="failed on the execution provider"):
        runner.execute(SpeechBatch(windows=[window]))
    assert window.cross is None
    device.on_run = None
    device.finish()
    runner.execute(SpeechBatch(windows=[window]))
    assert len(generate(runner, window, [START, 63], 2)[0]) == 2
    runner.close()


def test_warm_up_leaves_nothing_behind_and_all_memory_is_given_back(both):
    runner, device = both.open(num_slots=2)
    window = both.cpu.window(0)
    runner.warm_up()
    runner.execute(SpeechBatch(windows=[window]))
    fresh, _ = both.open(num_slots=2)
    again = both.cpu.window(0)
    fresh.execute(SpeechBatch(windows=[again]))
    assert generate(runner, window, [START, 63], 5) == generate(fresh, again, [START, 63], 5)
    cache_bytes = 2 * slot_bytes(on_card("FP16"))
    assert sum(memory.nbytes for memory in device.allocated.values()) > cache_bytes
    for each in (runner, fresh):
        each.close()
        each.close()
    assert not device.allocated
    assert device.is_closed
    with pytest.raises(EngineError, match="model tiny is unloaded"):
        runner.execute(SpeechBatch(windows=[both.cpu.window(0)]))


def test_warm_up_runs_a_whole_prompt_a_full_padded_view_and_as_many_logits_as_a_step_may_want(both, monkeypatch):
    monkeypatch.setattr(whisper_device, "MAX_POSITIONS", 36)
    runner, device = both.open(num_slots=3)
    runner.warm_up()
    runs = [call.inputs for call in device.calls if call.what == "run" and call.graph == "decoder"]
    sizes = [tuple(each[name].shape[0] for name in ("past_seqlens", "input_ids", "logits_index")) for each in runs]
    assert sizes == [(1, MAX_LEN - 1, 2), (3, 36, 6), (3, 3, 6)]
    runner.close()


def test_a_card_without_room_is_told_with_what_to_lower(both):
    device = ReferenceDevice(capacity_bytes=10_000)
    sessions = {role: device.open(path, model_name="tiny") for role, path in both.cards["FP16"].items()}
    graphs = WhisperGraphs("tiny", device, sessions["encoder"], sessions["decoder"], None)
    with pytest.raises(ConfigError, match="max_num_seqs: 4 windows at once do not fit: the card has not so much"):
        WhisperDeviceRunner(graphs, on_card("FP16"), 4)
    assert not device.allocated
    with pytest.raises(ConfigError, match="max_num_seqs: is 300; steps over blocks have 256 rows"):
        WhisperDeviceRunner(graphs, on_card("FP16"), 300)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (on_card("BF16"), "decoder.onnx: kv: has cross.0.key of FP16"),
        (on_card("FP8"), "decoder.onnx: kv: has cross.0.key of FP16"),
        (msgspec.structs.replace(on_card("FP16"), num_frames=38), "decoder.onnx: kv: has cross.0.key of FP16"),
        (msgspec.structs.replace(on_card("FP16"), vocab_size=95), "decoder.onnx: logits: is not the manifest's"),
        (msgspec.structs.replace(on_card("FP16"), num_mels=80), "encoder.onnx: mel: is not the manifest's window"),
    ],
)
def test_graphs_that_are_not_the_manifests_are_refused(both, model, message):
    device = ReferenceDevice()
    sessions = {role: device.open(path, model_name="tiny") for role, path in both.cards["FP16"].items()}
    graphs = WhisperGraphs("tiny", device, sessions["encoder"], sessions["decoder"], sessions["aligner"])
    with pytest.raises(ConfigError, match=message):
        WhisperDeviceRunner(graphs, model, 1)


def test_graphs_for_the_cpu_are_refused(both):
    device = ReferenceDevice()
    sessions = {role: device.open(path, model_name="tiny") for role, path in both.cpu.files.items()}
    graphs = WhisperGraphs("tiny", device, sessions["encoder"], sessions["decoder"], sessions["aligner"])
    with pytest.raises(ConfigError, match=r"decoder\.onnx: is no decoder of a Whisper model for cards: see"):
        WhisperDeviceRunner(graphs, on_card("FP16"), 1)
