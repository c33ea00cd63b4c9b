"""Memory of a card: what a model may take is what it takes, and an unload gives it back.

Measured by the driver, so that what libraries take counts as well. A device of our own is open all the while: a card's
context, some hundred MB, is there before the first measurement and after the last.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.gpu.card import SMOLLM2, PagedModel, build_for_cards, make_checkpoint, needs_card, open_device, random_ids
from tests.runners.test_paged_decoder import run

from sardonyx.core import Request, SamplingParams
from sardonyx.errors import ConfigError
from sardonyx.repository.manifest import FILE_NAME, Graph, GraphFile, Manifest, Source, encode, parse
from sardonyx.runtime.device_memory import measure_device
from sardonyx.serving.capacity import EngineLimits
from sardonyx.serving.memory import DeviceBudgets
from sardonyx.serving.text_device import DeviceText, DeviceTexts
from sardonyx.settings import Settings

pytestmark = needs_card

MIB = 1 << 20
LIBRARIES_BYTES = 256 * MIB
"""What CUDA's libraries may load into a card at their first use and keep, beside what a model was promised."""
NOISE_BYTES = 32 * MIB
"""What a driver rounds up and keeps for later, between two equal loads."""
LIMITS = EngineLimits(
    max_num_seqs=32,
    max_model_len=1024,
    max_chunk_tokens=256,
    max_batch_tokens=512,
    max_step_ms=1000.0,
    kv_cache_bytes=None,
)


@pytest.fixture(scope="module", autouse=True)
def context() -> Iterator[None]:
    device = open_device()
    yield
    device.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version folder of SmolLM2's shape: 270 MB of weights in fp16."""
    folder = tmp_path_factory.mktemp("memory") / "1"
    model = build_for_cards(make_checkpoint(SMOLLM2), folder, "fp16")
    (folder / FILE_NAME).write_bytes(encode(describe(model)))
    return folder


def describe(model: PagedModel) -> Manifest:
    def file(path: Path) -> GraphFile:
        return GraphFile(path=path.name, sha256="0" * 64, size_bytes=path.stat().st_size)

    graphs = {}
    for role, path in model.paths.items():
        data = path.with_name(path.name + ".data")
        graphs[role] = Graph(model=file(path), data=[file(data)] if data.exists() else [])
    return Manifest(
        family="llm",
        precision="fp16",
        activations="fp16",
        target="cuda",
        graphs=graphs,
        source=Source(uri="tests/gpu", architecture="LlamaForCausalLM"),
        llm=model.llm,
    )


class Loaded:
    """A model on the card, and what it was promised."""

    def __init__(self, folder: Path, fraction: float = 0.9) -> None:
        settings = Settings(device_memory_fraction=fraction)
        self.budgets = DeviceBudgets(fraction)
        with ExitStack() as undo:
            self._text: DeviceText = DeviceTexts(settings, self.budgets).open(
                0, "test", folder, parse((folder / FILE_NAME).read_bytes()), LIMITS, undo
            )
            undo.pop_all()
        self.runner = self._text.runner
        self.runner.capture()

    @property
    def promised_bytes(self) -> int:
        return sum(share.num_bytes for share in self.budgets.on(0)._shares)

    def serve(self, num_requests: int = 64) -> None:
        requests = [
            Request(
                id=str(index),
                prompt_ids=random_ids(SMOLLM2["vocab_size"], index, 100 + 13 * index),
                max_tokens=24,
                sampling=SamplingParams(temperature=0.8, top_p=0.9),
            )
            for index in range(num_requests)
        ]
        run(self.runner, requests, max_batch_tokens=LIMITS.max_batch_tokens)

    def close(self) -> None:
        self.runner.close()
        self._text.give_back()


def least_free_bytes(work: Callable[[], None]) -> int:
    """The least that was free at any time while some work was done, as far as looking every few milliseconds sees."""
    is_done, least = threading.Event(), [measure_device(0).free_bytes]

    def watch() -> None:
        while not is_done.wait(0.003):
            least.append(measure_device(0).free_bytes)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        is_done.set()
        watcher.join()
    return min(least)


def test_load_and_steps_stay_within_what_the_model_was_promised(folder: Path) -> None:
    before = measure_device(0).free_bytes
    promised: list[int] = []

    def work() -> None:
        loaded = Loaded(folder)
        promised.append(loaded.promised_bytes)
        loaded.serve()
        loaded.close()

    taken = before - least_free_bytes(work)
    assert taken > 300 * MIB, f"{taken / MIB:,.0f} MiB were seen to be taken: less than the weights"
    assert taken <= promised[0] + LIBRARIES_BYTES, (
        f"{taken / MIB:,.0f} MiB were taken at most, {promised[0] / MIB:,.0f} MiB were promised, and "
        f"{LIBRARIES_BYTES / MIB:,.0f} MiB are for libraries"
    )


def test_cache_fits_a_budget_that_is_smaller_than_what_is_wanted(folder: Path) -> None:
    free = measure_device(0).free_bytes
    # Weights and workspace take some 1.0 GiB, the cache that is wanted 0.7 GiB more.
    fraction = 1.4 * (1 << 30) / free
    loaded = Loaded(folder, fraction)
    try:
        taken = free - measure_device(0).free_bytes
        assert loaded.promised_bytes <= fraction * free
        assert loaded.runner.limits.num_blocks < 1 + 32 * 4, "the cache has all that is wanted, so nothing was tried"
        assert taken <= fraction * free + LIBRARIES_BYTES, f"{taken / MIB:,.0f} MiB of {fraction * free / MIB:,.0f}"
        loaded.serve(16)
    finally:
        loaded.close()


def test_unload_gives_memory_back(folder: Path) -> None:
    def cycle() -> int:
        loaded = Loaded(folder)
        loaded.serve(8)
        loaded.close()
        return measure_device(0).free_bytes

    first = cycle()  # libraries stay from here on
    later = [cycle() for _ in range(3)]
    lost = first - min(later)
    assert lost <= NOISE_BYTES, f"{lost / MIB:,.0f} MiB of the card are lost after {len(later)} loads: {later}"


def test_a_model_that_does_not_fit_is_refused_and_takes_nothing(folder: Path) -> None:
    before = measure_device(0).free_bytes
    with pytest.raises(ConfigError, match="on cuda:0"):
        Loaded(folder, fraction=200 * MIB / before)
    lost = before - measure_device(0).free_bytes
    assert lost <= NOISE_BYTES, f"the refused load holds {lost / MIB:,.0f} MiB"
