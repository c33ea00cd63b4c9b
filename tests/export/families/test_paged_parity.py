"""Every architecture's graph for CUDA against `transformers`, its operators in numpy.

Chunked prefill, steps of chunks and decodes, blocks out of order, and a prefix whose blocks two sequences share.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.export.families.parity_cases import CASES
from tests.export.families.reference_models import VOCAB_SIZE, reference_model
from tests.paged_reference import evaluator, feeds_of

from sardonyx_export.builders.decoder import BuildOptions, BuildReport, build_decoder
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder
from sardonyx_export.stages.operators import MappedEvaluator
from sardonyx_export.stages.paged_verify import empty_caches

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")

Array = npt.NDArray[np.float32]
BLOCK_SIZE = 16
BLOCKS = [[9, 2, 13, 4, 11], [1, 12, 7], [5, 3]]
"""Of three sequences; blocks 0, 6, 8 and 10 are nobody's."""
ERRORS = {"fp16": 0.015, "bf16": 0.1}
"""Root mean square, as a share of the reference logits' deviation. Most are 0.002 and 0.02."""
BFLOAT_CASES = {"llama-biased", "qwen3", "gemma2"}
"""What bf16 alone could break is the same in all."""


@dataclass
class Pair:
    """A graph, and what the reference says of three sequences."""

    graph: MappedEvaluator
    caches: dict[str, npt.NDArray[np.generic]]
    sequences: list[list[int]]
    logits: list[Array]

    def run(self, *rows: tuple[int, int, int], wanted: list[int] | None = None) -> Array:
        """Logits of one step; each row is a sequence and its first and last new token."""
        given = [(self.sequences[i][start:end], start, BLOCKS[i]) for i, start, end in rows]
        wanted = list(range(sum(end - start for _, start, end in rows))) if wanted is None else wanted
        logits: Array = self.graph.run(["logits"], feeds_of(given, BLOCK_SIZE, wanted) | self.caches)[0]
        return logits


def build(folder: Path, source: Path, **options: Any) -> BuildReport:
    folder.mkdir()
    checkpoint = SafetensorsFolder(source, uri="tiny")
    return build_decoder(checkpoint, folder, BuildOptions(target="cuda", kv_block_size=BLOCK_SIZE, **options))


@pytest.mark.parametrize(
    ("name", "precision"), [(name, "fp16") for name in CASES] + [(name, "bf16") for name in sorted(BFLOAT_CASES)]
)
def test_logits_are_those_of_the_reference(tmp_path: Path, name: str, precision: str) -> None:
    case = CASES[name]
    reference = reference_model(case)
    reference.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    generator = np.random.default_rng(5)
    sequences = [generator.integers(0, VOCAB_SIZE, length).tolist() for length in case.lengths]
    with torch.no_grad():
        expected = [reference(torch.tensor([ids])).logits[0].numpy() for ids in sequences]
    report = build(tmp_path / "graph", tmp_path / "source", precision=precision, max_model_len=case.max_model_len)
    graph = evaluator(report.files[0])
    pair = Pair(graph, empty_caches(graph, 14), sequences, expected)
    ends = [len(ids) for ids in sequences]
    measured = [
        pair.run((0, 0, 17), (1, 0, ends[1] - 1)),
        pair.run((1, ends[1] - 1, ends[1]), (0, 17, ends[0] - 1), (2, 0, ends[2] - 1)),
        pair.run((2, ends[2] - 1, ends[2]), (0, ends[0] - 1, ends[0])),
    ]
    wanted = [
        np.concatenate([expected[0][:17], expected[1][:-1]]),
        np.concatenate([expected[1][-1:], expected[0][17:-1], expected[2][:-1]]),
        np.concatenate([expected[2][-1:], expected[0][-1:]]),
    ]
    for actual, right in zip(measured, wanted, strict=True):
        assert actual.dtype == np.float32
        error = np.sqrt(np.square(actual - right).mean()) / right.std()
        assert error < ERRORS[precision]
