"""Every architecture against `transformers`: the same random checkpoint, the same logits.

The reference computes a whole sequence at once in fp32; the graph, in the server's own runner, at once, in chunks, and
row by row beside others.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tests.export.families.parity_cases import CASES
from tests.export.families.reference_models import VOCAB_SIZE, reference_model

from sardonyx.core import RunnerLimits
from sardonyx.repository.families import LanguageModel
from sardonyx.runners.decoder import DecoderRunner, ForwardRow
from sardonyx.runtime.session import open_session
from sardonyx_export.builders.decoder import BuildOptions, build_decoder
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")

TOLERANCE = 1e-3
NUM_SLOTS = 4


@dataclass
class Pair:
    """A graph, and what the reference says of three sequences."""

    runner: DecoderRunner
    sequences: list[list[int]]
    logits: list[npt.NDArray[np.float32]]

    def run(self, *rows: tuple[int, list[int], int]) -> npt.NDArray[np.float32]:
        """Logits of all tokens of one step; each row is a slot, new tokens and the number of tokens before them."""
        return self.runner.forward([ForwardRow(*row) for row in rows], range(sum(len(row[1]) for row in rows)))


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    case = CASES[request.param]
    folder: Path = tmp_path_factory.mktemp(request.param)
    reference = reference_model(case)
    reference.save_pretrained(folder / "source")
    (folder / "source" / "tokenizer.json").write_text("{}")
    (folder / "graph").mkdir()
    options = BuildOptions(precision="fp32", max_model_len=case.max_model_len)
    report = build_decoder(SafetensorsFolder(folder / "source", uri="tiny"), folder / "graph", options)
    limits = RunnerLimits(
        num_slots=NUM_SLOTS,
        max_model_len=report.max_model_len,
        max_chunk_tokens=report.max_model_len,
        vocab_size=VOCAB_SIZE,
    )
    model = LanguageModel(vocab_size=report.vocab_size, max_model_len=report.max_model_len, kv=report.kv)
    generator = np.random.default_rng(5)
    sequences = [generator.integers(0, VOCAB_SIZE, length).tolist() for length in case.lengths]
    with torch.no_grad():
        logits = [reference(torch.tensor([ids])).logits[0].numpy() for ids in sequences]
    runner = DecoderRunner(open_session(report.files[0], model_name=request.param), model, limits)
    yield Pair(runner, sequences, logits)
    runner.close()


def test_logits_equal_the_reference_when_a_prompt_is_run_at_once(pair: Pair) -> None:
    logits = pair.run((2, pair.sequences[0], 0))
    assert np.ptp(pair.logits[0], axis=-1).min() > 1  # A flat reference would prove nothing.
    _assert_near(logits, pair.logits[0])


def test_logits_equal_the_reference_when_a_prompt_is_run_in_chunks(pair: Pair) -> None:
    ids = pair.sequences[0]
    borders = [0, 5, 6, 22, len(ids) - 1, len(ids)]
    chunks = [pair.run((1, ids[start:stop], start)) for start, stop in itertools.pairwise(borders)]
    _assert_near(np.concatenate(chunks), pair.logits[0])


def test_logits_equal_the_reference_when_rows_of_different_length_decode_together(pair: Pair) -> None:
    first, second, third = pair.sequences
    ends = [len(ids) for ids in pair.sequences]
    expected = pair.logits
    prefilled = pair.run((0, first[:-3], 0), (1, second[:-3], 0), (3, third[:-3], 0))
    _assert_near(prefilled, np.concatenate([logits[:-3] for logits in expected]))
    # A step where one row has a chunk, one decodes and one waits; then one where all three decode. Slot 2 always idles.
    mixed = pair.run((0, first[-3:-1], ends[0] - 3), (3, third[-3:-2], ends[2] - 3))
    _assert_near(mixed, np.concatenate([expected[0][-3:-1], expected[2][-3:-2]]))
    decoded = pair.run((0, first[-1:], ends[0] - 1), (1, second[-3:-2], ends[1] - 3), (3, third[-2:-1], ends[2] - 2))
    _assert_near(decoded, np.stack([expected[0][-1], expected[1][-3], expected[2][-2]]))


def _assert_near(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE
