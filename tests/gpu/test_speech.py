"""Whisper on a card, its graphs as they are exported, against a numpy pass over the source's weights.

Not against the CPU's graphs: their decoder needs a newer ONNX Runtime than there is for CUDA.
"""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.gpu.card import needs_device, open_device

pytest.importorskip("torch", reason="random checkpoints are made with torch, which is not installed")
pytest.importorskip("transformers", reason="random checkpoints are made with transformers, which is not installed")

from tests.export.whisper_checkpoints import make_whisper
from tests.runners.test_whisper import HEADS, MAX_LEN, MODEL, START, make_sequence, play, prompt_after

from sardonyx.core import SamplingParams
from sardonyx.runners.speech_sampler import SpeechSampler
from sardonyx.runners.whisper_device import WhisperDeviceRunner
from sardonyx.runners.whisper_graphs import WhisperGraphs
from sardonyx.speech import SpeechBatch, SpeechTask, Window
from sardonyx_export.builders.whisper import build_whisper
from sardonyx_export.builders.whisper_aligner import Alignment
from sardonyx_export.families.whisper import read_whisper_spec
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder
from sardonyx_export.stages.whisper_reference import WhisperPass, reference_pass

pytestmark = needs_device

ERRORS = {"fp16": 0.1, "bf16": 0.8}
"""Of logits and of attention before the softmax, whose largest are 45 and 6: what 16 bits may decide either way. In
numpy attention is off by 0.011 and 0.08."""
# Window, text before it, tokens to generate, and the step at which it comes; some windows are heard twice.
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


class Speech:
    """A model with heads of 64, as Whisper's, on a card, with windows of noise; and what its weights say."""

    def __init__(self, folder: Path, precision: Any) -> None:
        sizes = {"d_model": 128, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "encoder_attention_heads": 2}
        make_whisper(folder / "source", decoder_attention_heads=2, max_target_positions=MAX_LEN, **sizes)
        self._checkpoint = SafetensorsFolder(folder / "source", uri="random")
        self._spec = read_whisper_spec(self._checkpoint.config)
        (folder / "built").mkdir()
        alignment = Alignment(heads=HEADS, end_id=MODEL.end_id)
        report = build_whisper(self._checkpoint, self._spec, folder / "built", precision=precision, alignment=alignment)
        kv = msgspec.structs.replace(
            MODEL.kv, head_size=self._spec.head_size, datatype=precision.upper(), block_size=report.block_size
        )
        device = open_device()
        sessions = {role: device.open(paths[0], model_name="test") for role, paths in report.graphs.items()}
        graphs = WhisperGraphs("test", device, sessions["encoder"], sessions["decoder"], sessions["aligner"])
        self.runner = WhisperDeviceRunner(graphs, msgspec.structs.replace(MODEL, kv=kv), 8)
        self.runner.warm_up()
        noise = np.random.default_rng(3).standard_normal((5, MODEL.num_mels, MODEL.num_frames))
        self.mel = noise.astype(np.float32)

    def windows(self) -> list[Window]:
        """Encoded."""
        windows = [Window(mel, MODEL.num_frames) for mel in self.mel]
        self.runner.execute(SpeechBatch(windows=windows))
        return windows

    def reference(self, numbers: list[int], texts: list[list[int]]) -> WhisperPass:
        return reference_pass(self._checkpoint, self._spec, self.mel[numbers], texts, HEADS)


@pytest.fixture(params=["fp16", "bf16"])
def precision(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_sequences_that_begin_move_and_share_steps_say_what_the_weights_do(tmp_path: Path, precision: Any) -> None:
    speech, error = Speech(tmp_path, precision), ERRORS[precision]
    windows = speech.windows()
    sampling = SamplingParams(temperature=0.0)
    sequences = [
        make_sequence(windows[number], prompt_after(length), sampling=sampling, has_timestamps=bool(number % 2))
        for number, length, _, _ in PLAN
    ]
    found = play(speech.runner, sequences, PLAN)
    reference = speech.reference([number for number, *_ in PLAN], [sequence.token_ids for sequence in sequences])
    sampler = SpeechSampler(MODEL)
    for sequence, logits, logprobs in zip(sequences, reference.logits, found, strict=True):
        first = sequence.num_prompt_tokens
        drawn = sequence.token_ids[first:]
        for place, (token_id, logprob) in enumerate(zip(drawn, logprobs, strict=True)):
            row = logits[first + place - 1].copy()
            sampler.apply_rules(row, drawn[:place], has_timestamps=sequence.request.has_timestamps)
            assert row.max() - row[token_id] <= error, f"token {place} is not among the likeliest"
            expected = row[token_id] - row.max() - np.log(np.exp(row - row.max()).sum())
            assert logprob == pytest.approx(expected, abs=error)
    speech.runner.close()


def test_the_aligner_finds_what_the_weights_do(tmp_path: Path, precision: Any) -> None:
    speech, error = Speech(tmp_path, precision), ERRORS[precision]
    text = [START, 63, 66, 69, 12, 40, MODEL.end_id]
    sequence = make_sequence(speech.windows()[4], text, task=SpeechTask.ALIGNMENT)
    alignment = speech.runner.execute(SpeechBatch(aligned=sequence)).alignment
    assert alignment is not None
    reference = speech.reference([4], [text])
    np.testing.assert_allclose(alignment.attention, reference.attention[0], atol=error)
    logits = reference.logits[0][:, : MODEL.end_id]
    expected = [logits[place, text[place + 1]] - np.log(np.exp(logits[place]).sum()) for place in (3, 4)]
    np.testing.assert_allclose(alignment.logprobs[3:5], expected, atol=error)
    speech.runner.close()
