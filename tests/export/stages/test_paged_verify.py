"""What verification sees of a graph for CUDA."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.export.builders.arrays import ArrayCheckpoint
from tests.export.builders.test_decoder import CONFIG, arrays, build, logits

from sardonyx.repository.families import LanguageModel
from sardonyx_export.builders.decoder import BuildReport
from sardonyx_export.errors import ExportError
from sardonyx_export.families.llm import read_spec
from sardonyx_export.stages.paged_verify import run_paged_graph
from sardonyx_export.stages.reference import reference_logits
from sardonyx_export.stages.verify import compare

PROMPTS = [np.random.default_rng(i).integers(0, 80, length).tolist() for i, length in enumerate((40, 1, 17))]


@pytest.fixture
def checkpoint() -> ArrayCheckpoint:
    return ArrayCheckpoint(CONFIG, arrays())


@pytest.fixture
def paged(tmp_path: Path, checkpoint: ArrayCheckpoint) -> BuildReport:
    return build(tmp_path / "paged", checkpoint, precision="fp16", target="cuda", kv_block_size=16)


def model_of(report: BuildReport) -> LanguageModel:
    return LanguageModel(vocab_size=report.vocab_size, max_model_len=report.max_model_len, kv=report.kv)


def test_prompts_in_chunks_and_blocks_give_the_logits_of_the_graph_for_the_cpu(
    tmp_path: Path, checkpoint: ArrayCheckpoint, paged: BuildReport
) -> None:
    slots = build(tmp_path / "slots", checkpoint, precision="fp32")
    measured = run_paged_graph(paged.files[0], model_of(paged), PROMPTS)
    for ids, actual in zip(PROMPTS, measured, strict=True):
        expected = np.concatenate([logits(slots, ids[: 1 + i])[-1:] for i in range(len(ids)) if i < 32])
        assert actual.shape == (len(ids), 80)
        assert np.abs(actual[:32] - expected).max() < 0.05


@pytest.mark.parametrize(("attribute", "value"), [("do_rotary", 0), ("local_window_size", 4), ("scale", 1.0)])
def test_a_graph_that_attends_otherwise_is_refused(
    checkpoint: ArrayCheckpoint, paged: BuildReport, attribute: str, value: float
) -> None:
    expected = reference_logits(checkpoint, read_spec(checkpoint.config), PROMPTS)
    path, model = paged.files[0], model_of(paged)
    compare(expected, run_paged_graph(path, model, PROMPTS), "fp16", "fp16")
    graph = onnx.load(path, load_external_data=False)
    for node in graph.graph.node:
        for found in node.attribute:
            if node.op_type == "PagedAttention" and found.name == attribute:
                found.CopyFrom(onnx.helper.make_attribute(attribute, value))
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(ExportError, match="not what the source's weights say"):
        compare(expected, run_paged_graph(path, model, PROMPTS), "fp16", "fp16")
