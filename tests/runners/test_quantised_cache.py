"""The whole path over blocks of int8 and fp8: tokens that 16 bits find likely, in memory half as large."""

import numpy as np
import pytest
from tests.reference_device import ReferenceDevice
from tests.runners.test_paged_decoder import (
    BLOCK_SIZE,
    GREEDY,
    MAX_LEN,
    MAX_TOKENS,
    NUM_SEQS,
    SIZES,
    V,
    make_limits,
    make_requests,
    random_ids,
    run,
    tokens_of,
)
from tests.tiny_models import make_decoder
from tests.tiny_paged import make_paged_model, paged_language_model

from sardonyx.core import Request, RunnerLimits
from sardonyx.errors import ConfigError
from sardonyx.runners.decoder import DecoderRunner, ForwardRow
from sardonyx.runners.paged_decoder import PagedRunner
from sardonyx.runners.paged_graphs import PagedGraphs
from sardonyx.runners.paged_pass import PagedOptions
from sardonyx.runtime.session import open_session

MARGINS = {"INT8": 0.25, "FP8": 0.5}
"""Of logits that reach from -9 to 9: how far a drawn token's may be behind the likeliest in float32."""


@pytest.fixture(scope="module")
def slot_runner(tmp_path_factory):
    path = tmp_path_factory.mktemp("slots") / "model.onnx"
    make_decoder(path, SIZES)
    return DecoderRunner(
        open_session(path, model_name="tiny"), SIZES.language_model, RunnerLimits(1, MAX_LEN, MAX_LEN, V)
    )


@pytest.fixture(scope="module", params=["INT8", "FP8"])
def model(request, tmp_path_factory):
    """The cache's datatype and the graphs' paths."""
    return request.param, make_paged_model(tmp_path_factory.mktemp("paged"), SIZES, request.param)


def open_runner(cache, paths, *, limits=None, max_graphs=100, device=None):
    device = device or ReferenceDevice()
    sessions = {role: device.open(path, model_name="tiny") for role, path in paths.items()}
    graphs = PagedGraphs("tiny", device, sessions["decoder"], sessions["sampler"], sessions["feed"])
    options = PagedOptions(max_batch_tokens=MAX_TOKENS, max_graphs=max_graphs)
    runner = PagedRunner(graphs, paged_language_model(SIZES, cache), limits or make_limits(), options)
    runner.capture()
    return runner


def behind(slot_runner, request, tokens):
    """How far each token's logit is behind the likeliest's, in float32."""
    text = [*request.prompt_ids, *tokens]
    places = range(len(request.prompt_ids) - 1, len(text) - 1)
    logits = slot_runner.forward([ForwardRow(0, text, 0)], places)
    return logits.max(axis=1) - logits[np.arange(len(tokens)), tokens]


def test_tokens_are_likely_in_float32_and_mostly_the_likeliest(model, slot_runner):
    cache, paths = model
    runner = open_runner(cache, paths)
    requests = make_requests(5, max_tokens=12)
    events, stats, num_ahead = run(runner, requests, [0, 0, 1, 4, 9])
    assert stats.prefix_hit_tokens > 0
    assert num_ahead > 5
    losses = np.concatenate([behind(slot_runner, each, tokens_of(events[each.id])) for each in requests])
    assert len(losses) == 60
    assert losses.max() < MARGINS[cache]
    assert (losses == 0).mean() > 0.85


def test_captured_steps_and_company_change_no_token(model):
    cache, paths = model
    requests = [
        Request(id=str(i), prompt_ids=random_ids(i, 5 + 9 * i), max_tokens=8, sampling=GREEDY) for i in range(4)
    ]
    together, _, _ = run(open_runner(cache, paths), requests, [0, 0, 2, 3])
    eager = open_runner(cache, paths, max_graphs=0)
    for request in requests:
        assert tokens_of(run(eager, [request])[0][request.id]) == tokens_of(together[request.id])


def test_the_cache_takes_a_byte_for_each_number(model):
    cache, paths = model
    device = ReferenceDevice()
    open_runner(cache, paths, limits=make_limits(num_blocks=40), device=device)
    # What a block says is checked by the device: an array that is shorter would be written past its end.
    kv = paged_language_model(SIZES).kv
    one_side = 40 * BLOCK_SIZE * kv.num_kv_heads * kv.head_size
    sizes = [memory.nbytes for memory in device.allocated.values()]
    assert sum(one_side <= size < one_side + 1024 for size in sizes) == 2 * kv.num_layers


def test_warm_up_runs_the_step_that_unpacks_the_caches_of_all_rows(model):
    cache, paths = model
    runner = open_runner(cache, paths, max_graphs=0)
    runner.warm_up()
    runs = [call.inputs for call in runner._graphs.device.calls if call.what == "run" and call.graph == "decoder"]
    found = [
        (each["input_ids"].shape[0], each["past_seqlens"].shape[0], each["attention_metadata"][1]) for each in runs
    ]
    assert found == [(MAX_TOKENS, 2, MAX_LEN), (NUM_SEQS, NUM_SEQS, MAX_LEN), (16 + NUM_SEQS - 1, NUM_SEQS, MAX_LEN)]


def test_a_graph_with_another_cache_than_the_manifest_says_is_refused(model):
    cache, paths = model
    with pytest.raises(ConfigError, match=f"kv: says {cache} .* unlike the manifest"):
        open_runner("FP16", paths)
