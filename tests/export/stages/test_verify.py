from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tests.export.checkpoints import byte_level_vocabulary, write_llama_folder

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder
from sardonyx_export.special_tokens import load_tokenizer
from sardonyx_export.stages.verify import INT8_ROWS_TOLERANCE, MAX_PROMPT_TOKENS, TOLERANCES, compare, make_prompts


def _logits(num_rows: int = 40) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((num_rows, 50)).astype(np.float32) * 3


def test_equal_logits_are_perfect_parity() -> None:
    parity = compare([_logits()], [_logits()], "fp32")
    assert (parity.max_abs_error, parity.mean_kl, parity.top1_agreement, parity.num_positions) == (0.0, 0.0, 1.0, 40)
    assert "numpy" in parity.reference
    assert parity.tolerance == str(TOLERANCES["fp32"])


def test_divergence_is_that_of_the_distributions_not_of_the_logits() -> None:
    parity = compare([_logits()], [_logits() + 5], "int8")
    assert parity.max_abs_error == pytest.approx(5, abs=1e-5)
    assert parity.mean_kl == pytest.approx(0, abs=1e-6)


def test_divergence_is_averaged_over_all_positions_of_all_prompts() -> None:
    expected = np.log(np.array([[0.5, 0.5], [0.5, 0.5]], np.float32))
    actual = np.log(np.array([[0.4, 0.6], [0.5, 0.5]], np.float32))
    parity = compare([expected[:1], expected[1:]], [actual[:1], actual[1:]], "int4")
    assert parity.num_positions == 2
    assert parity.mean_kl == pytest.approx(0.5 * (0.5 * np.log(0.5 / 0.4) + 0.5 * np.log(0.5 / 0.6)), rel=1e-4)


@pytest.mark.parametrize(
    ("precision", "noise", "is_allowed"),
    [("fp32", 1e-5, True), ("fp32", 1e-2, False), ("int8", 0.05, True), ("int8", 1.0, False), ("int4", 3.0, False)],
)
def test_what_is_farther_than_the_precision_allows_is_refused(precision: str, noise: float, is_allowed: bool) -> None:
    actual = _logits() + np.random.default_rng(1).standard_normal((40, 50)).astype(np.float32) * np.float32(noise)
    if is_allowed:
        compare([_logits()], [actual], precision)  # type: ignore[arg-type] # parametrised
    else:
        with pytest.raises(ExportError, match="Nothing was published"):
            compare([_logits()], [actual], precision)  # type: ignore[arg-type] # parametrised


def test_activations_rounded_by_row_have_a_tolerance_of_their_own() -> None:
    actual = _logits() + np.random.default_rng(1).standard_normal((40, 50)).astype(np.float32) * np.float32(0.4)
    with pytest.raises(ExportError, match="int8 has to keep"):
        compare([_logits()], [actual], "int8", "int8")
    parity = compare([_logits()], [actual], "int8", "int8_rows")
    assert parity.tolerance == str(INT8_ROWS_TOLERANCE)
    with pytest.raises(ExportError, match="int8_rows has to keep"):
        compare([_logits()], [_logits()[::-1]], "int8", "int8_rows")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    actual = _logits()
    actual[3, 4] = value
    with pytest.raises(ExportError, match="Nothing was published"):
        compare([_logits()], [actual], "int4")


def test_prompts_fit_the_model(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(SafetensorsFolder(write_llama_folder(tmp_path / "tiny"), uri="tiny"))
    vocab_size = len(byte_level_vocabulary()[0])
    prompts = make_prompts(tokenizer, vocab_size=vocab_size, max_model_len=256)
    assert max(map(len, prompts)) == MAX_PROMPT_TOKENS
    assert min(map(len, prompts)) < MAX_PROMPT_TOKENS
    assert all(len(prompt) <= 5 for prompt in make_prompts(tokenizer, vocab_size=vocab_size, max_model_len=5))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(SafetensorsFolder(write_llama_folder(tmp_path / "tiny"), uri="tiny"))
    with pytest.raises(ExportError, match="the model has 50"):
        make_prompts(tokenizer, vocab_size=50, max_model_len=256)
