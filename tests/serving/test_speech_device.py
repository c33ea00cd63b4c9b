"""A speech model for cards from the repository to text, over a device without a card."""

import asyncio

import onnxruntime as ort
import pytest
from tests.reference_device import ReferenceDevice
from tests.serving.version_folders import change_manifest, parameter
from tests.tiny_speech import SEGMENTS, TEXT, TRANSLATION, make_speech_model, make_speech_model_for_cards, wav

from sardonyx.errors import ConfigError, EngineError
from sardonyx.metrics import Metrics
from sardonyx.repository.check import check_repository
from sardonyx.repository.layout import Repository, read_manifest
from sardonyx.runners.whisper import slot_bytes
from sardonyx.runtime.device_memory import DeviceMemory
from sardonyx.serving.memory import DeviceBudgets, KvBudget
from sardonyx.serving.speech_device import WORKSPACE_BYTES, DeviceSpeeches
from sardonyx.serving.speech_loader import MAX_NUM_SEQS, SpeechLoader
from sardonyx.serving.tasks import TranscriptionOptions
from sardonyx.serving.text_device import Cards
from sardonyx.settings import Settings

GIB = 1 << 30


class Bench:
    """A loader of a machine with cards that are numpy."""

    def __init__(self, root, *, num_cards=2, free_bytes=8 * GIB, measured_bytes=None):
        self.devices: dict[int, ReferenceDevice] = {}
        settings = Settings(repository=root, num_threads=2)
        measure = lambda _: DeviceMemory(free_bytes=free_bytes, total_bytes=80 * GIB)  # noqa: E731
        self.budgets = DeviceBudgets(settings.device_memory_fraction, measure=measure)
        cards = Cards(
            count=lambda: num_cards,
            open=lambda gpu: self.devices.setdefault(gpu, ReferenceDevice()),
            free_bytes=lambda _: free_bytes if measured_bytes is None else measured_bytes,
        )
        devices = DeviceSpeeches(settings, self.budgets, cards)
        self.loader = SpeechLoader(settings, Metrics("test"), KvBudget(0), devices)
        self.repository = Repository(root)

    def load(self):
        return self.loader.load(self.repository.entry("tiny"), 1)

    def held_bytes(self, gpu=0):
        return sum(share.num_bytes for share in self.budgets.on(gpu)._shares)


def transcribe(bench, calls):
    """What the calls at once say, window by window: sounds and options."""

    async def one(model, number, sound, options):
        call = await model.task.start(sound, TranscriptionOptions(**options), request_id=str(number))
        return await call.collect()

    async def main():
        model = bench.load()
        try:
            return await asyncio.gather(*(one(model, number, *call) for number, call in enumerate(calls)))
        finally:
            await model.close()
            bench.loader.close()

    return asyncio.run(main())


def texts(windows):
    return [segment.text for window in windows for segment in window.segments]


def test_calls_at_once_say_what_their_sounds_do(tmp_path):
    make_speech_model_for_cards(tmp_path)
    assert check_repository(tmp_path) == []
    bench = Bench(tmp_path)
    calls = [(wav(2 + 31 * (number % 3)), {}) for number in range(5)]
    calls += [(wav(), {"task": "translate", "languages": ("de",)}), (wav(), {"has_words": True})]
    answers = transcribe(bench, calls)
    for number, windows in enumerate(answers[:5]):
        assert len(windows) == 1 + number % 3
        assert "".join(texts(windows)) == f" {TEXT}" * len(windows)
    assert texts(answers[5]) == [f" {TRANSLATION}"]
    words = [word.text for window in answers[6] for segment in window.segments for word in segment.words]
    assert words == [" one", " two", " three"]
    assert bench.devices[0].is_closed
    assert not bench.devices[0].allocated
    assert bench.held_bytes() == 0


def test_a_window_that_repeats_itself_is_tried_again_without_being_encoded_again(tmp_path):
    make_speech_model_for_cards(tmp_path, script="endless")
    bench = Bench(tmp_path)
    ([window],) = transcribe(bench, [(wav(), {})])
    assert window.segments[0].temperature == 1.0
    encoded = [call for call in bench.devices[0].calls if call.what == "run" and call.graph == "encoder"]
    assert len(encoded) == 3, "two to warm up, and the window's"


@pytest.mark.parametrize(
    ("group", "gpu"),
    [("", 0), ("instance_group { kind: KIND_GPU }", 0), ("instance_group { kind: KIND_GPU gpus: 1 }", 1)],
)
def test_the_config_chooses_the_card(tmp_path, group, gpu):
    make_speech_model_for_cards(tmp_path, config=group, has_aligner=False)
    bench = Bench(tmp_path)
    assert texts(transcribe(bench, [(wav(), {})])[0]) == [text for _, _, text in SEGMENTS]
    assert list(bench.devices) == [gpu]


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("instance_group { kind: KIND_GPU gpus: 2 }", r"instance_group\[0\].gpus"),
        ("instance_group { kind: KIND_CPU }", r"instance_group\[0\].kind: is KIND_CPU"),
        ("optimization { }", "optimization: has no meaning for a speech model"),
        (parameter("max_num_seqs", "300"), "max_num_seqs: is 300; steps over blocks have 256 rows"),
    ],
)
def test_a_config_that_asks_for_what_is_not_there_is_refused(tmp_path, config, match):
    make_speech_model_for_cards(tmp_path, config=config)
    bench = Bench(tmp_path)
    with pytest.raises(ConfigError, match=match):
        bench.load()
    assert bench.held_bytes() == 0


def test_a_machine_without_cards_is_told(tmp_path):
    make_speech_model_for_cards(tmp_path)
    with pytest.raises(ConfigError, match="there is none"):
        Bench(tmp_path, num_cards=0).load()


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this ONNX Runtime has CUDA")
def test_an_onnx_runtime_without_cuda_is_told_what_to_install(tmp_path):
    make_speech_model_for_cards(tmp_path)
    loader = SpeechLoader(Settings(repository=tmp_path), Metrics("test"), KvBudget(GIB))
    with pytest.raises(ConfigError, match=r"install sardonyx\[cuda\]"):
        loader.load(Repository(tmp_path).entry("tiny"), 1)


def test_a_model_for_the_cpu_has_no_device(tmp_path):
    make_speech_model(tmp_path, config="instance_group { kind: KIND_GPU }")
    with pytest.raises(ConfigError, match="instance_group: has no meaning for a speech model"):
        Bench(tmp_path).load()


def one_slot(folder):
    return slot_bytes(read_manifest(folder).whisper)


def test_windows_are_as_many_as_wanted_where_the_card_has_room(tmp_path, caplog):
    make_speech_model_for_cards(tmp_path)
    caplog.set_level("INFO")
    Bench(tmp_path).load().discard()
    assert f"tiny: {MAX_NUM_SEQS} windows at once ({MAX_NUM_SEQS} wanted)" in caplog.text
    assert "from device_memory_fraction 0.9 of cuda:0" in caplog.text


def test_windows_are_as_many_as_steps_leave_memory_for(tmp_path, caplog):
    bytes_each = one_slot(make_speech_model_for_cards(tmp_path))
    caplog.set_level("INFO")
    Bench(tmp_path, measured_bytes=5 * bytes_each + 7).load().discard()
    assert "tiny: 5 windows at once (16 wanted)" in caplog.text
    assert "from what weights and steps leave of cuda:0" in caplog.text


def test_operators_bytes_go_before_the_servers(tmp_path, caplog):
    bytes_each = one_slot(make_speech_model_for_cards(tmp_path / "sized"))
    make_speech_model_for_cards(tmp_path / "models", config=parameter("kv_cache_bytes", str(2 * bytes_each)))
    caplog.set_level("INFO")
    Bench(tmp_path / "models").load().discard()
    assert "tiny: 2 windows at once (16 wanted)" in caplog.text
    assert "from kv_cache_bytes" in caplog.text


def test_a_card_without_room_for_one_window_is_told_and_everything_given_back(tmp_path):
    bytes_each = one_slot(make_speech_model_for_cards(tmp_path))
    bench = Bench(tmp_path, measured_bytes=bytes_each - 1)
    words = (
        r"one window needs .* MiB, there are .* MiB from what weights and steps leave of cuda:0; unload another model$"
    )
    with pytest.raises(ConfigError, match=words):
        bench.load()
    assert bench.devices[0].is_closed
    assert not bench.devices[0].allocated
    assert bench.held_bytes() == 0


def test_kv_cache_bytes_below_one_window_are_refused(tmp_path):
    make_speech_model_for_cards(tmp_path, config=parameter("kv_cache_bytes", "1000"))
    words = r"^kv_cache_bytes: one window needs .* MiB, there are 0.0 MiB from kv_cache_bytes; raise it$"
    with pytest.raises(ConfigError, match=words):
        Bench(tmp_path).load()


def test_a_model_that_does_not_fit_is_refused_before_its_graphs_are_opened(tmp_path):
    make_speech_model_for_cards(tmp_path)
    bench = Bench(tmp_path, free_bytes=WORKSPACE_BYTES)
    with pytest.raises(ConfigError, match="on cuda:0"):
        bench.load()
    assert not bench.devices


def test_a_card_on_which_the_largest_step_does_not_run_says_what_to_lower(tmp_path):
    make_speech_model_for_cards(tmp_path)
    bench = Bench(tmp_path)
    device = bench.devices[0] = ReferenceDevice()

    def fail(graph):
        if graph == "decoder":
            raise EngineError("model tiny failed on the execution provider cuda")

    device.on_run = fail
    with pytest.raises(ConfigError, match=r"max_num_seqs: the largest steps do not run .* on cuda:0") as error:
        bench.load()
    assert error.value.__context__ is None
    assert device.is_closed
    assert bench.held_bytes() == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"whisper__kv__block_size": None}, "whisper.kv.block_size: is missing although the target is cuda"),
        ({"whisper__kv__block_size": 128}, "has past_key_values.0.key of FP16"),
        ({"whisper__num_mels": 80}, "is not the manifest's window"),
        ({"target": "cpu"}, "is no encoder of a Whisper model|is no decoder of a Whisper model"),
    ],
)
def test_a_manifest_that_does_not_fit_the_graphs_is_refused(tmp_path, fields, words):
    change_manifest(make_speech_model_for_cards(tmp_path), **fields)
    bench = Bench(tmp_path)
    bench.loader._budget = KvBudget(GIB)
    with pytest.raises(ConfigError, match=words):
        bench.load()
    assert not bench.devices or bench.devices[0].is_closed
