"""A language model for cards from the repository to text, over a device without a card."""

import asyncio
import logging

import numpy as np
import onnxruntime as ort
import pytest
from tests.reference_device import ReferenceDevice
from tests.tiny_models import make_language_model
from tests.tiny_paged import BLOCK_SIZE, make_paged_repository

from sardonyx.core import SamplingParams
from sardonyx.errors import ConfigError, EngineError
from sardonyx.metrics import Metrics
from sardonyx.repository import manifest
from sardonyx.repository.layout import Repository
from sardonyx.runtime.device_memory import DeviceMemory
from sardonyx.serving.memory import DeviceBudgets, KvBudget
from sardonyx.serving.text import GenerationOptions
from sardonyx.serving.text_device import CAPTURE_BYTES, WORKSPACE_BYTES, Cards, DeviceTexts
from sardonyx.serving.text_loader import TextLoader
from sardonyx.settings import Settings

GIB, MIB = 1 << 30, 1 << 20
GREEDY = SamplingParams(temperature=0.0)
BLOCK_BYTES = 2 * 2 * BLOCK_SIZE * 2 * 16 * 2
"""Of the tiny model: sides, layers, positions, heads, head size, bytes."""
LEAST_BLOCKS = 1 + 256 // BLOCK_SIZE


class Bench:
    """A loader of a machine with cards that are numpy."""

    def __init__(self, root, *, num_cards=2, free_bytes=8 * GIB, measured_bytes=None, **options):
        self.devices: dict[int, ReferenceDevice] = {}
        self.metrics = Metrics("test")
        defaults = {"repository": root, "max_num_seqs": 4, "max_chunk_tokens": 64}
        settings = Settings(**(defaults | options))
        measure = lambda _: DeviceMemory(free_bytes=free_bytes, total_bytes=80 * GIB)  # noqa: E731
        self.budgets = DeviceBudgets(settings.device_memory_fraction, measure=measure)
        cards = Cards(
            count=lambda: num_cards,
            open=lambda gpu: self.devices.setdefault(gpu, ReferenceDevice()),
            free_bytes=lambda _: free_bytes if measured_bytes is None else measured_bytes,
        )
        self.loader = TextLoader(settings, self.metrics, KvBudget(GIB), DeviceTexts(settings, self.budgets, cards))
        self.repository = Repository(root)

    def load(self):
        return self.loader.load(self.repository.entry("tiny"))

    def num_blocks(self):
        ((block_size, num_blocks),) = [
            labels for family, labels, _ in self.metrics.model("tiny").rows() if family == "cache_config_info"
        ]
        assert int(block_size) == BLOCK_SIZE
        return int(num_blocks)

    def held_bytes(self, gpu=0):
        return sum(share.num_bytes for share in self.budgets.on(gpu)._shares)


def complete(bench, prompts, **options):
    """The texts of prompts that are completed at once."""
    made = {"max_tokens": 12, "sampling": GREEDY} | options

    async def main():
        model = bench.load().text
        try:
            calls = [
                await model.start([prompt], GenerationOptions(**made), request_id=str(number))
                for number, prompt in enumerate(prompts)
            ]
            return [(await call.collect())[0].text for call in calls]
        finally:
            await model.close()

    return asyncio.run(main())


PROMPTS = ["the cat", "you and they had one", "for this" * 12]


def test_prompts_are_completed_the_same_alone_and_in_company(tmp_path):
    make_paged_repository(tmp_path)
    bench = Bench(tmp_path)
    together = complete(bench, PROMPTS)
    assert all(together)
    assert len(set(together)) == 3
    assert [complete(Bench(tmp_path), [prompt])[0] for prompt in PROMPTS] == together
    device = bench.devices[0]
    assert device.is_closed
    assert bench.held_bytes() == 0
    graph_ids = {call.graph_id for call in device.calls if call.what == "run" and call.graph == "decoder"}
    assert len(graph_ids) > 1, "some steps were captured, some not"


def test_the_cache_has_what_is_wanted_where_the_card_has_it(tmp_path, caplog):
    make_paged_repository(tmp_path)
    bench = Bench(tmp_path)
    with caplog.at_level(logging.INFO):
        complete(bench, ["the"])
    assert bench.num_blocks() == 1 + 4 * (LEAST_BLOCKS - 1)
    assert "blocks of 16 tokens, for 4 sequences of 256 tokens (as many as wanted)" in caplog.text
    assert "from device_memory_fraction 0.9 of cuda:0" in caplog.text


@pytest.mark.parametrize("cache", ["INT8", "FP8"])
def test_a_quantised_cache_has_twice_the_blocks_in_the_same_memory(tmp_path, cache):
    make_paged_repository(tmp_path, parameters={"kv_cache_bytes": str(30 * BLOCK_BYTES)}, cache=cache)
    bench = Bench(tmp_path)
    assert all(complete(bench, PROMPTS))
    assert bench.num_blocks() == 60


@pytest.mark.parametrize(("cache", "workspace_mib"), [("FP16", 768), ("INT8", 770)])
def test_what_unpacking_a_quantised_cache_takes_is_promised(tmp_path, cache, workspace_mib):
    """Of 64 sequences of 256 tokens: keys and values of a layer, in 16 bits."""
    make_paged_repository(tmp_path, cache=cache)
    bench = Bench(tmp_path, free_bytes=WORKSPACE_BYTES, max_num_seqs=64)
    with pytest.raises(ConfigError, match=rf"on cuda:0 \(weights 0 MiB, workspace {workspace_mib} MiB"):
        bench.load()


def test_kv_cache_bytes_bounds_the_cache(tmp_path):
    make_paged_repository(tmp_path, parameters={"kv_cache_bytes": str(30 * BLOCK_BYTES)})
    bench = Bench(tmp_path)
    complete(bench, ["the"])
    assert bench.num_blocks() == 30


def test_what_steps_take_more_than_foreseen_is_taken_from_the_cache(tmp_path, caplog):
    make_paged_repository(tmp_path)
    bench = Bench(tmp_path, measured_bytes=CAPTURE_BYTES + 20 * BLOCK_BYTES)
    with caplog.at_level(logging.INFO):
        complete(bench, ["the"])
    assert bench.num_blocks() == 20
    assert "from what weights and steps leave of cuda:0" in caplog.text


def test_a_card_without_room_for_one_sequence_is_told_and_everything_given_back(tmp_path):
    make_paged_repository(tmp_path)
    bench = Bench(tmp_path, measured_bytes=CAPTURE_BYTES + 3 * BLOCK_BYTES)
    with pytest.raises(ConfigError, match=r"max_model_len: one sequence of 256 tokens needs .* \(to 32 at most\)"):
        bench.load()
    assert bench.devices[0].is_closed
    assert not bench.devices[0].allocated
    assert bench.held_bytes() == 0


def test_a_model_that_does_not_fit_is_refused_before_its_graphs_are_opened(tmp_path):
    make_paged_repository(tmp_path)
    bench = Bench(tmp_path, free_bytes=WORKSPACE_BYTES)
    with pytest.raises(ConfigError, match="on cuda:0"):
        bench.load()
    assert not bench.devices


def test_a_captured_step_that_fails_at_the_start_gives_everything_back(tmp_path):
    make_paged_repository(tmp_path)
    bench = Bench(tmp_path)
    device = bench.devices[0] = ReferenceDevice()

    def break_down(graph, graph_id):
        raise RuntimeError("a bug")

    device.on_capture = break_down
    with pytest.raises(RuntimeError, match="a bug"):
        bench.load()
    assert device.is_closed
    assert bench.held_bytes() == 0


@pytest.mark.parametrize(
    ("group", "gpu"),
    [("", 0), ("instance_group { kind: KIND_GPU }", 0), ("instance_group { kind: KIND_GPU gpus: 1 }", 1)],
)
def test_the_config_chooses_the_card(tmp_path, group, gpu):
    make_paged_repository(tmp_path, instance_group=group)
    bench = Bench(tmp_path)
    complete(bench, ["the"])
    assert list(bench.devices) == [gpu]


@pytest.mark.parametrize(
    ("group", "match"),
    [
        ("instance_group { kind: KIND_GPU gpus: 2 }", r"instance_group\[0\].gpus"),
        ("instance_group { kind: KIND_CPU }", r"instance_group\[0\].kind: is KIND_CPU"),
        ("instance_group { kind: KIND_GPU count: 2 }", r"instance_group\[0\].count"),
        (
            'optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" } } }',
            "optimization: has no meaning for a language model",
        ),
    ],
)
def test_a_config_that_asks_for_what_is_not_there_is_refused(tmp_path, group, match):
    make_paged_repository(tmp_path, instance_group=group)
    with pytest.raises(ConfigError, match=match):
        Bench(tmp_path).load()


def test_a_machine_without_cards_is_told(tmp_path):
    make_paged_repository(tmp_path)
    with pytest.raises(ConfigError, match="there is none"):
        Bench(tmp_path, num_cards=0).load()


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this ONNX Runtime has CUDA")
def test_an_onnx_runtime_without_cuda_is_told_what_to_install(tmp_path):
    make_paged_repository(tmp_path)
    loader = TextLoader(Settings(repository=tmp_path), Metrics("test"), KvBudget(GIB))
    with pytest.raises(ConfigError, match=r"install sardonyx\[cuda\]"):
        loader.load(Repository(tmp_path).entry("tiny"))


def test_max_cuda_graphs_bounds_what_is_captured(tmp_path):
    for number, max_graphs in enumerate((0, 2)):
        root = tmp_path / str(number)
        make_paged_repository(root, parameters={"max_cuda_graphs": str(max_graphs)})
        bench = Bench(root)
        assert all(complete(bench, PROMPTS))
        captures = [call for call in bench.devices[0].calls if call.what == "capture" and call.graph == "decoder"]
        assert len(captures) == max_graphs


def test_captured_graphs_are_refused_where_there_is_no_card(tmp_path):
    make_language_model(tmp_path, parameters={"max_cuda_graphs": "0"})
    with pytest.raises(ConfigError, match=r"parameters\.max_cuda_graphs: is for models that were exported for CUDA"):
        Bench(tmp_path).load()


def test_a_card_on_which_the_largest_step_does_not_run_says_what_to_lower(tmp_path):
    make_paged_repository(tmp_path)
    bench = Bench(tmp_path)
    device = bench.devices[0] = ReferenceDevice()

    def fail(graph):
        if graph == "decoder":
            raise EngineError("model tiny failed on the execution provider cuda")

    device.on_run = fail
    with pytest.raises(ConfigError, match=r"max_batch_tokens: steps of so many .* on cuda:0") as error:
        bench.load()
    assert error.value.__context__ is None
    device.on_run = None
    assert device.is_closed
    assert bench.held_bytes() == 0


@pytest.mark.parametrize("role", ["sampler", "feed"])
def test_an_export_without_a_graph_is_told_to_be_made_anew(tmp_path, role):
    folder = make_paged_repository(tmp_path)
    path = folder / manifest.FILE_NAME
    old = manifest.parse(path.read_bytes())
    del old.graphs[role]
    path.write_bytes(manifest.encode(old))
    with pytest.raises(ConfigError, match=f"graphs: has no {role}; export the model anew"):
        Bench(tmp_path).load()


def test_more_sequences_than_a_step_has_rows_are_refused(tmp_path):
    make_paged_repository(tmp_path)
    bench = Bench(tmp_path, max_num_seqs=300, max_batch_tokens=512)
    with pytest.raises(ConfigError, match="max_num_seqs: is 300"):
        bench.load()
    assert not bench.devices


def test_sampled_text_is_the_same_for_the_same_seed(tmp_path):
    make_paged_repository(tmp_path)
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=5)
    first = complete(Bench(tmp_path), PROMPTS, sampling=sampling)
    assert complete(Bench(tmp_path), PROMPTS[::-1], sampling=sampling) == first[::-1]
    assert np.unique(first).size == 3
