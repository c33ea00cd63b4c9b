"""The reference in numpy against transformers, and what the comparison lets pass."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tests.export.whisper_checkpoints import make_whisper
from tests.export.whisper_tokenizers import write_tokenizer

from sardonyx.repository.families import Whisper
from sardonyx_export.errors import ExportError
from sardonyx_export.families.whisper import read_whisper_spec
from sardonyx_export.families.whisper_tokens import read_whisper_facts
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder
from sardonyx_export.stages.whisper_library import library_pass
from sardonyx_export.stages.whisper_reference import WhisperPass, reference_pass
from sardonyx_export.stages.whisper_verify import Trial, compare_logprobs, compare_passes, make_trial

HEADS = [[1, 1], [0, 0]]


class Case:
    """A tiny model, what it is tried with, and the reference's answer."""

    def __init__(self, folder: Path) -> None:
        self.model = make_whisper(folder, vocab_size=288)
        write_tokenizer(folder)
        self.checkpoint = SafetensorsFolder(folder, uri="tiny")
        self.spec = read_whisper_spec(self.checkpoint.config)
        self.facts: Whisper = read_whisper_facts(self.checkpoint.texts(), self.checkpoint.config, self.spec)
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.trial: Trial = make_trial(tokenizer, self.facts)
        self.reference: WhisperPass = reference_pass(self.checkpoint, self.spec, self.trial.mel, self.trial.rows, HEADS)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_a_trial_is_two_windows_with_a_text_each_inside_the_models_limits(case: Case) -> None:
    facts, (plain, timed) = case.facts, case.trial.rows
    assert case.trial.mel.shape == (2, facts.num_mels, facts.num_frames)
    assert plain[:4] == [facts.start_id, facts.language_ids["en"], facts.transcribe_id, facts.no_timestamps_id]
    assert timed[3] == facts.timestamp_begin_id
    for row in (plain, timed):
        assert row[-1] == facts.end_id
        assert len(row) <= facts.max_model_len


def test_reference_equals_transformers(case: Case) -> None:
    found = library_pass(case.checkpoint, case.spec, case.trial.mel, case.trial.rows)
    assert found is not None
    assert found[1].cross.keys() == case.reference.cross.keys()
    for name, expected in found[1].cross.items():
        np.testing.assert_allclose(case.reference.cross[name], expected, atol=1e-4)
    for actual, wanted in zip(case.reference.logits, found[1].logits, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=2e-4)


def test_the_references_attention_is_that_of_the_heads(case: Case) -> None:
    for number, row in enumerate(case.trial.rows):
        with torch.no_grad():
            layers = case.model(
                input_features=torch.from_numpy(case.trial.mel[number : number + 1]),
                decoder_input_ids=torch.tensor([row]),
                output_attentions=True,
            ).cross_attentions
        shares = torch.softmax(torch.from_numpy(case.reference.attention[number]), dim=-1).numpy()
        expected = np.stack([layers[layer][0, head].numpy() for layer, head in HEADS])
        np.testing.assert_allclose(shares, expected, atol=1e-5)


def test_equal_passes_agree_wholly(case: Case) -> None:
    parity = compare_passes(case.reference, case.reference, "fp32", "itself")
    assert [each.max_abs_error for each in parity] == [0, 0, 0]
    assert parity[1].top1_agreement == 1


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("part", ["cross", "logits", "attention"])
@pytest.mark.parametrize("damage", ["shuffled", "not a number"])
def test_a_pass_that_is_wrong_anywhere_is_refused(case: Case, precision: str, part: str, damage: str) -> None:
    def spoil(values: np.ndarray) -> np.ndarray:
        return values[..., ::-1] if damage == "shuffled" else np.full_like(values, np.nan)

    parts = getattr(case.reference, part)
    spoilt = (
        parts | {"cross.2.value": spoil(parts["cross.2.value"])} if part == "cross" else [parts[0], spoil(parts[1])]
    )
    with pytest.raises(ExportError, match="Nothing was published"):
        compare_passes(case.reference, replace(case.reference, **{part: spoilt}), precision, "itself")


def test_logprobs_of_other_tokens_are_refused(case: Case) -> None:
    logprobs = []
    for logits, row in zip(case.reference.logits, case.trial.rows, strict=True):
        shares = torch.log_softmax(torch.from_numpy(logits[:-1, : case.facts.end_id].copy()), dim=-1).numpy()
        following = np.minimum(row[1:], case.facts.end_id - 1)
        logprobs.append(shares[np.arange(len(following)), following])
    parity = compare_logprobs(case.reference, logprobs, case.trial, case.facts, "fp32", "itself")
    assert parity.max_abs_error < 1e-4
    late = [np.roll(values, 1) for values in logprobs]
    with pytest.raises(ExportError, match="log-probabilities of itself differ"):
        compare_logprobs(case.reference, late, case.trial, case.facts, "int8", "itself")
