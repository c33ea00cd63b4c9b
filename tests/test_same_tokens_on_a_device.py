"""Graphs as the exporter builds them for cards, under the runner: company changes no token, nor does the device."""

import numpy as np
import pytest
from tests.export.builders.arrays import ArrayCheckpoint
from tests.export.builders.test_decoder import CONFIG, arrays
from tests.reference_device import ReferenceDevice
from tests.runners.test_paged_decoder import alone, run, tokens_of

from sardonyx.core import Request, RunnerLimits, SamplingParams
from sardonyx.repository.families import LanguageModel
from sardonyx.runners.decoder import DecoderRunner
from sardonyx.runners.paged_decoder import PagedRunner
from sardonyx.runners.paged_graphs import PagedGraphs
from sardonyx.runners.paged_pass import PagedOptions
from sardonyx.runtime.session import open_session
from sardonyx_export.builders.decoder import BuildOptions, build_decoder
from sardonyx_export.builders.feed import build_feed

V, MAX_LEN, BLOCK_SIZE = 80, 64, 16
CHECKPOINT = ArrayCheckpoint(CONFIG, arrays())


def build(folder, precision):
    options = BuildOptions(precision=precision, target="cuda", kv_block_size=BLOCK_SIZE)
    report = build_decoder(CHECKPOINT, folder, options)
    return report.kv, {"decoder": report.files[0], "sampler": report.sampler[0], "feed": build_feed(folder)[0]}


def open_runner(kv, paths, num_seqs, max_chunk_tokens):
    device = ReferenceDevice()
    sessions = {role: device.open(path, model_name="tiny") for role, path in paths.items()}
    graphs = PagedGraphs("tiny", device, sessions["decoder"], sessions["sampler"], sessions["feed"])
    limits = RunnerLimits(num_seqs, MAX_LEN, max_chunk_tokens, V, block_size=BLOCK_SIZE, num_blocks=1 + 4 * num_seqs)
    model = LanguageModel(vocab_size=V, max_model_len=MAX_LEN, kv=kv)
    runner = PagedRunner(graphs, model, limits, PagedOptions(max_batch_tokens=MAX_LEN))
    runner.capture()
    return runner


REQUESTS = [
    Request(
        id=str(index),
        prompt_ids=np.random.default_rng(index).integers(0, V, 4 + 9 * index).tolist(),
        max_tokens=10,
        sampling=sampling,
    )
    for index, sampling in enumerate(
        [SamplingParams(temperature=0.0)] * 3 + [SamplingParams(temperature=0.7, top_p=0.9, seed=3)]
    )
]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_chunks_company_and_steps_ahead_change_no_token(tmp_path, precision):
    kv, paths = build(tmp_path, precision)
    lonely = open_runner(kv, paths, 1, MAX_LEN)
    expected = {request.id: tokens_of(run(lonely, [request])[0][request.id]) for request in REQUESTS}
    events, _, num_ahead = run(open_runner(kv, paths, 4, 12), REQUESTS, [0, 1, 1, 3])
    assert {each: tokens_of(found) for each, found in events.items()} == expected
    assert num_ahead > 4


def test_tokens_in_16_bits_are_those_of_the_cpu_in_32(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cuda").mkdir()
    report = build_decoder(CHECKPOINT, tmp_path / "cpu", BuildOptions(precision="fp32"))
    model = LanguageModel(vocab_size=V, max_model_len=MAX_LEN, kv=report.kv)
    session = open_session(report.files[0], model_name="tiny")
    slots = DecoderRunner(session, model, RunnerLimits(1, MAX_LEN, MAX_LEN, V))
    events, _, _ = run(open_runner(*build(tmp_path / "cuda", "fp16"), 4, 12), REQUESTS)
    for request in REQUESTS:
        assert tokens_of(events[request.id]) == alone(slots, request)
