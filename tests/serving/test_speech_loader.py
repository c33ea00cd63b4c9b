"""Speech models from the folder to a version that serves, and what is refused."""

import asyncio
import json

import numpy as np
import pytest
from tests.serving.version_folders import change_manifest, parameter
from tests.tiny_encoders import make_encoder_model
from tests.tiny_speech import LANGUAGES, SEGMENTS, TEXT, TRANSLATION, make_speech_model, wav

from sardonyx.errors import ConfigError, InvalidRequest, ModelNotReady, UnsupportedFeature
from sardonyx.metrics import Metrics
from sardonyx.repository.check import check_repository
from sardonyx.repository.layout import Repository, read_manifest
from sardonyx.runners.whisper import slot_bytes
from sardonyx.serving.loader import build_registry
from sardonyx.serving.memory import KvBudget
from sardonyx.serving.served import InferCall
from sardonyx.serving.speech import SpeechModel
from sardonyx.serving.speech_loader import MAX_NUM_SEQS, SpeechLoader
from sardonyx.serving.tasks import TranscriptionOptions
from sardonyx.settings import Settings
from sardonyx.tensors import Tensor

BUDGET_BYTES = 1 << 30


def load(root, *, budget=None, **options):
    settings = Settings(**({"repository": root, "num_threads": 2} | options))
    loader = SpeechLoader(settings, Metrics("test"), budget or KvBudget(BUDGET_BYTES))
    return loader, loader.load(Repository(root).entry("tiny"), 1)


def run(root, test, **options):
    """A test on the model of a repository. Afterwards nothing may be admitted or in flight."""

    async def main():
        loader, model = load(root, **options)
        try:
            await test(model)
            assert model.calls.num_active == model.statistics.num_pending == 0
            assert loader._admission.num_sequences == 0
        finally:
            await model.close()
            loader.close()
        return model

    return asyncio.run(main())


def refusal(root, **options):
    budget = KvBudget(options.pop("budget_bytes", BUDGET_BYTES))
    with pytest.raises(ConfigError) as caught:
        load(root, budget=budget, **options)
    # Nothing is kept by a model that could not be loaded.
    assert budget.take("other", budget.total_bytes).num_bytes == budget.total_bytes
    return caught.value


async def transcribe(model, sound=None, **options):
    call = await model.task.start(sound or wav(), TranscriptionOptions(**options), request_id="call")
    return call, await call.collect()


def one_slot(folder):
    return slot_bytes(read_manifest(folder).whisper)


def test_version_tells_what_it_is(tmp_path):
    folder = make_speech_model(tmp_path)
    assert check_repository(tmp_path) == []
    loader, model = load(tmp_path)
    try:
        assert (model.name, model.version, model.created) == ("tiny", 1, 1767225600)
        names = ("encoder.onnx", "decoder.onnx", "aligner.onnx", "tokenizer.json")
        assert model.size_bytes == sum((folder / name).stat().st_size for name in names)
        assert isinstance(model.task, SpeechModel)
        assert list(model.task.languages) == list(LANGUAGES)
        assert model.task.is_multilingual
        assert model.task.has_words
        assert model.is_alive
        assert model.stalled_s == 0
        assert model.statistics.load_s > 0
    finally:
        model.discard()
        loader.close()
    assert not model.is_alive


def test_model_hears_what_its_tokens_say(tmp_path):
    make_speech_model(tmp_path)

    async def test(model):
        call, windows = await transcribe(model)
        assert call.language == LANGUAGES[0]
        assert [(each.start_s, each.end_s, each.text) for w in windows for each in w.segments] == list(SEGMENTS)
        _, windows = await transcribe(model, task="translate", languages=("de",))
        assert [each.text for window in windows for each in window.segments] == [f" {TRANSLATION}"]
        _, windows = await transcribe(model, wav(65), has_words=True, has_logprobs=True)
        assert len(windows) == 3
        for window in windows:
            assert [word.text for each in window.segments for word in each.words] == [" one", " two", " three"]
            assert [token.text for token in window.tokens] == [" one", " two", " three"]
            assert all(-0.1 < token.logprob < 0 for token in window.tokens)

    run(tmp_path, test)


def test_english_only_models_without_word_timestamps_are_served(tmp_path):
    make_speech_model(tmp_path, is_multilingual=False, has_aligner=False)

    async def test(model):
        call, windows = await transcribe(model)
        assert call.language == "en"
        assert "".join(each.text for window in windows for each in window.segments) == f" {TEXT}"
        assert model.task.languages == ["en"]
        for refused in ({"has_words": True}, {"task": "translate"}):
            with pytest.raises(UnsupportedFeature):
                await transcribe(model, **refused)

    run(tmp_path, test)


def test_calls_at_once_share_the_steps_and_get_the_same(tmp_path):
    make_speech_model(tmp_path)

    async def test(model):
        answers = await asyncio.gather(*(transcribe(model, wav(2 + 31 * (n % 3))) for n in range(12)))
        for n, (_, windows) in enumerate(answers):
            assert len(windows) == 1 + n % 3
            for window in windows:
                assert "".join(each.text for each in window.segments) == f" {TEXT}"

    run(tmp_path, test)


def test_window_that_repeats_itself_is_ended_and_tried_at_each_temperature(tmp_path):
    make_speech_model(tmp_path, script="endless")

    async def test(model):
        _, [window] = await transcribe(model)
        [segment] = window.segments
        assert segment.temperature == 1.0
        assert segment.compression_ratio > 2.4
        assert model.calls.stats().generated_tokens < 6 * 224

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("lines", "num_slots"),
    [
        ("", MAX_NUM_SEQS),
        (parameter("max_num_seqs", "3"), 3),
        (parameter("max_num_seqs", "40"), 40),
    ],
)
def test_slots_are_as_many_as_wanted(tmp_path, lines, num_slots, caplog):
    make_speech_model(tmp_path, config=lines)
    caplog.set_level("INFO")
    budget = KvBudget(BUDGET_BYTES)
    loader, model = load(tmp_path, budget=budget)
    assert f"tiny: {num_slots} windows at once ({num_slots} wanted)" in caplog.text
    model.discard()
    loader.close()


def test_slots_are_as_many_as_memory_allows(tmp_path, caplog):
    bytes_each = one_slot(make_speech_model(tmp_path))
    caplog.set_level("INFO")
    loader, model = load(tmp_path, budget=KvBudget(5 * bytes_each + 7))
    assert "tiny: 5 windows at once (16 wanted)" in caplog.text
    assert "memory_fraction" in caplog.text
    model.discard()
    loader.close()


def test_operators_bytes_go_before_the_servers(tmp_path, caplog):
    bytes_each = one_slot(make_speech_model(tmp_path / "sized"))
    make_speech_model(tmp_path / "repository", config=parameter("kv_cache_bytes", str(2 * bytes_each)))
    caplog.set_level("INFO")
    loader, model = load(tmp_path / "repository", budget=KvBudget(BUDGET_BYTES))
    assert "tiny: 2 windows at once (16 wanted)" in caplog.text
    model.discard()
    loader.close()


def test_memory_is_given_back_when_the_model_goes(tmp_path):
    make_speech_model(tmp_path)
    budget = KvBudget(BUDGET_BYTES)

    async def test(_):
        assert budget.take("other", BUDGET_BYTES).num_bytes < BUDGET_BYTES

    run(tmp_path, test, budget=budget)
    assert budget.take("another", BUDGET_BYTES).num_bytes > 0
    assert not [share for share in budget._shares if share.model_name == "tiny"]


def test_too_little_memory_for_one_window_names_the_way_out(tmp_path):
    make_speech_model(tmp_path)
    error = refusal(tmp_path, budget_bytes=10_000)
    assert error.field == "kv_cache_bytes"
    assert "one window needs 0." in error.message
    assert "raise kv_cache_bytes or memory_fraction" in error.message


def test_too_few_bytes_of_the_operators_own(tmp_path):
    make_speech_model(tmp_path, config=parameter("kv_cache_bytes", "1000"))
    assert refusal(tmp_path).field == "kv_cache_bytes"


@pytest.mark.parametrize(
    ("lines", "field", "words"),
    [
        (parameter("max_num_seq", "3"), "max_num_seq", ""),
        (parameter("max_num_seqs", "0"), "max_num_seqs", ""),
        (parameter("max_batch_windows", "many"), "max_batch_windows", ""),
        ("max_batch_size: 4", "max_batch_size", "has no meaning for a speech model"),
        ("dynamic_batching { }", "dynamic_batching", "has no meaning for a speech model"),
    ],
)
def test_config_that_asks_for_what_is_not_there(tmp_path, lines, field, words):
    make_speech_model(tmp_path, config=lines)
    error = refusal(tmp_path)
    assert field in error.field
    assert words in error.message
    assert error.file.endswith("config.pbtxt")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"family": "llm"}, "llm"),
        ({"whisper__num_frames": 1500}, "1500 frames"),
        ({"whisper__num_mels": 80}, "is not the manifest's window"),
        ({"whisper__vocab_size": 99}, ""),
        ({"whisper__kv__head_size": 64}, "unlike the manifest"),
        ({"whisper__kv__num_layers": 2}, "is no encoder of a Whisper model"),
    ],
)
def test_manifest_that_does_not_fit_the_graphs(tmp_path, fields, words):
    change_manifest(make_speech_model(tmp_path), **fields)
    assert words in str(refusal(tmp_path))


def test_model_of_another_family_is_none(tmp_path):
    make_encoder_model(tmp_path)
    assert "is no speech model" in refusal(tmp_path).message


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx", "aligner.onnx", "tokenizer.json", "manifest.json"])
def test_missing_file_is_named(tmp_path, name):
    (make_speech_model(tmp_path) / name).unlink()
    error = refusal(tmp_path)
    assert name in str(error) or "manifest" in str(error)


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx", "aligner.onnx", "tokenizer.json"])
def test_broken_file_is_no_surprise(tmp_path, name):
    path = make_speech_model(tmp_path) / name
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert refusal(tmp_path).message


def tensor(sound):
    return Tensor("audio", "BYTES", np.array([sound], dtype=np.object_))


def test_sound_as_a_tensor_becomes_text_as_tensors(tmp_path):
    make_speech_model(tmp_path)

    async def test(model):
        answer = await model.infer(InferCall(inputs=[tensor(wav())]))
        outputs = {each.name: each.array[0] for each in answer.outputs}
        assert list(outputs) == ["text", "language", "segments"]
        assert (outputs["text"], outputs["language"]) == (TEXT.encode(), b"en")
        assert json.loads(outputs["segments"]) == [
            {"start": start_s, "end": end_s, "text": text} for start_s, end_s, text in SEGMENTS
        ]
        parameters = {"task": "translate", "language": "German", "temperature": "0.5"}
        answer = await model.infer(InferCall(inputs=[tensor(wav())], outputs=["text"], parameters=parameters))
        assert [(each.name, each.array.tolist()) for each in answer.outputs] == [("text", [TRANSLATION.encode()])]
        assert [each.is_final async for each in model.stream(InferCall(inputs=[tensor(wav())]))] == [True]

    model = run(tmp_path, test)
    assert model.statistics.success.count == 3
    assert [each.name for each in model.config.input] == ["audio"]
    assert [each.name for each in model.config.output] == ["text", "language", "segments"]
    assert model.labels("text") == []


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (InferCall(inputs=[]), None),
        (InferCall(inputs=[Tensor("audio", "BYTES", np.array([b"a", b"b"], dtype=np.object_))]), None),
        (InferCall(inputs=[tensor(b"no sound")]), "file"),
        (InferCall(inputs=[tensor(b"")]), "file"),
        (InferCall(inputs=[tensor(wav())], outputs=["words"]), None),
        (InferCall(inputs=[tensor(wav())], parameters={"language": "Klingon"}), "language"),
        (InferCall(inputs=[tensor(wav())], parameters={"task": "sing"}), "task"),
        (InferCall(inputs=[tensor(wav())], parameters={"temperature": "2"}), "temperature"),
        (InferCall(inputs=[tensor(wav())], parameters={"beam_size": 5}), "beam_size"),
    ],
)
def test_tensors_that_make_no_sense_are_refused(tmp_path, call, param):
    make_speech_model(tmp_path)

    async def test(model):
        with pytest.raises(InvalidRequest) as caught:
            await model.infer(call)
        if param is not None:
            assert caught.value.param == param

    run(tmp_path, test)


def test_registry_loads_reloads_and_unloads_it(tmp_path):
    make_speech_model(tmp_path)
    settings = Settings(repository=tmp_path, num_threads=2, model_control_mode="explicit", load_model=("tiny",))

    async def main():
        registry = build_registry(settings, Metrics("test"))
        try:
            await registry.start(("tiny",))
            task = registry.newest(None, frozenset({"whisper"}), "speech model").task
            call = await task.start(wav(), TranscriptionOptions(), request_id="first")
            assert len(await call.collect()) == 1
            await registry.load("tiny")
            with pytest.raises(ModelNotReady):
                await task.start(wav(), TranscriptionOptions(), request_id="second")
            again = registry.newest("tiny", frozenset({"whisper"}), "speech model").task
            call = await again.start(wav(), TranscriptionOptions(), request_id="third")
            assert len(await call.collect()) == 1
            await registry.unload("tiny")
            assert not again.calls.is_alive
        finally:
            await registry.close()

    asyncio.run(main())
