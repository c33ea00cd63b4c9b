"""A speech model: what it accepts and refuses, what it counts, and how it ends."""

import asyncio
import io
import threading
import time

import msgspec
import numpy as np
import pytest
import soundfile
from tests.serving.fakes import until
from tests.serving.speech_serving import in_turn, serving
from tests.tiny_speech import wav

from sardonyx.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotReady,
    Overloaded,
    PayloadTooLarge,
    UnsupportedFeature,
)
from sardonyx.processing.voice_activity import VoiceOptions
from sardonyx.serving.admission import Admission
from sardonyx.serving.speech import SpeechLimits
from sardonyx.serving.tasks import TranscriptionOptions
from sardonyx.speech import SpeechTask

ENGLISH = TranscriptionOptions(languages=("en",))


def hold(_):
    return None


def run(tmp_path, test, script=hold, **options):
    async def main():
        async with serving(tmp_path, script, **options) as served:
            await test(served)
            return served.statistics

    return asyncio.run(main())


def start(served, sound=None, options=ENGLISH, request_id="call-1", **changes):
    options = msgspec.structs.replace(options, **changes)
    return served.model.start(wav() if sound is None else sound, options, request_id=request_id)


def texts(windows):
    return [segment.text for window in windows for segment in window.segments]


def block(pool):
    """Take all the threads of a pool, until the event is set."""
    gate = threading.Event()
    for _ in range(2):
        pool._executor.submit(gate.wait)
    return gate


def test_sound_becomes_text(tmp_path):
    async def test(served):
        served.engine.script = in_turn(served.says(0.0, "one", 2.0))
        call = await start(served, wav(2.5))
        assert (call.id, call.duration_s) == ("call-1", 2.5)
        assert served.calls.num_active == served.statistics.num_pending == 1
        assert texts(await call.collect()) == [" one"]
        [request] = served.engine.requests
        assert request.window.num_frames == 250
        assert request.window.spectrogram.shape == (80, 3000)

    statistics = run(tmp_path, test)
    assert (statistics.success.count, statistics.fail.count) == (1, 0)
    assert (statistics.inference_count, statistics.execution_count) == (1, 1)
    assert statistics.success.ns > 0


def test_calls_have_flows_of_their_own(tmp_path):
    async def test(served):
        served.engine.script = lambda _: served.says(0.0, "one", 2.0)
        for _ in range(3):
            await (await start(served)).collect()
        assert len({request.flow for request in served.engine.requests}) == 3

    run(tmp_path, test)


def test_prompt_is_tokenised_and_the_end_of_a_long_one_counts(tmp_path):
    async def test(served):
        served.engine.script = lambda _: served.says(0.0, "one", 2.0)
        await (await start(served, prompt="x" * 100_000 + " the end")).collect()
        [request] = served.engine.requests
        end = served.ids("the end")
        before = request.prompt_ids[: request.prompt_ids.index(served.facts.start_id)]
        assert before[0] == served.facts.previous_id
        assert before[-len(end) :] == end
        assert len(before) == 224

    run(tmp_path, test)


def test_sound_is_cut_at_pauses_where_asked_for(tmp_path):
    async def test(served):
        served.engine.script = lambda request: served.says(0.0, "one", 2.0)
        call = await start(served, wav(25, pauses_at_s=(5, 15)), chunking=VoiceOptions())
        windows = await call.collect()
        assert len(windows) == len(served.engine.requests) == 3
        begins_s = [window.segments[0].start_s for window in windows]
        assert begins_s == sorted(begins_s)
        assert begins_s == [pytest.approx(near, abs=1) for near in (0, 9, 19)]

    run(tmp_path, test)


@pytest.mark.parametrize("chunking", [None, VoiceOptions()])
def test_silence(tmp_path, chunking):
    """Cut at pauses nothing is left of it; otherwise the model says that nobody speaks."""

    async def test(served):
        served.engine.script = lambda _: served.says(0.0, "thanks", 2.0, logprob=-1.5, no_speech_prob=0.9)
        call = await start(served, wav(is_silent=True), chunking=chunking)
        assert await call.collect() == []
        assert call.duration_s == 2
        assert len(served.engine.requests) == (chunking is None)

    assert run(tmp_path, test).success.count == 1


@pytest.mark.parametrize(
    ("changes", "options", "kind", "param", "words"),
    [
        (
            {"languages": ("en", "fr")},
            {},
            InvalidRequest,
            "language",
            "'fr' is none of the languages of tiny: de, en, ja",
        ),
        ({"languages": ("de",)}, {"is_multilingual": False}, InvalidRequest, "language", "'de'"),
        ({"task": "translate"}, {"is_multilingual": False}, UnsupportedFeature, "model", "English only"),
        (
            {"has_words": True},
            {"has_words": False},
            UnsupportedFeature,
            "timestamp_granularities",
            "without word timestamps",
        ),
    ],
)
def test_what_the_model_cannot_do_is_refused(tmp_path, changes, options, kind, param, words):
    async def test(served):
        with pytest.raises(kind, match=words) as caught:
            await start(served, **changes)
        assert caught.value.param == param

    statistics = run(tmp_path, test, **options)
    assert statistics.fail.count == statistics.success.count == 0


@pytest.mark.parametrize("sound", [b"", b"no sound", wav()[:-100]])
def test_what_is_no_sound_is_refused_and_not_counted(tmp_path, sound):
    async def test(served):
        with pytest.raises(InvalidRequest) as caught:
            await start(served, sound)
        assert caught.value.param == "file"

    assert run(tmp_path, test).fail.count == 0


def test_too_long_a_sound_is_refused(tmp_path):
    async def test(served):
        with pytest.raises(PayloadTooLarge):
            await start(served, wav(2.5))
        served.engine.script = lambda _: served.says(0.0, "one", 2.0)
        await (await start(served, wav(2))).collect()

    run(tmp_path, test, limits=SpeechLimits(max_audio_s=2, timeout_s=60))


def test_so_many_calls_and_no_more(tmp_path):
    async def test(served):
        first = await start(served, request_id="first")
        with pytest.raises(Overloaded, match="limit of 1 requests"):
            await start(served, request_id="second")
        first.abort()
        (await start(served, request_id="third")).abort()

    statistics = run(tmp_path, test, admission=Admission(1, 10_000))
    assert statistics.failures == {"REJECTED": 1, "CANCELED": 2}


def test_sound_is_counted_by_what_its_bytes_suggest_and_then_by_its_length(tmp_path):
    async def test(served):
        gate = block(served.pool)
        task = asyncio.ensure_future(start(served, wav(50)))
        await until(lambda: served.admission.num_sequences)
        assert served.admission.num_tokens == 100  # 32,000 bytes a second, and not 16,000
        gate.set()
        call = await task
        assert served.admission.num_tokens == 50
        call.abort()

    run(tmp_path, test)


def test_sound_that_turns_out_too_long_for_the_queue_is_refused(tmp_path):
    async def test(served):
        first = await start(served, wav(10), request_id="first")
        compressed = flac(60)
        assert len(compressed) < 16_000 * 20
        with pytest.raises(Overloaded, match="limit of 50 seconds of queued sound"):
            await start(served, compressed, request_id="second")
        assert served.admission.num_tokens == 10
        first.abort()

    admission = Admission(8, 50, unit="seconds of queued sound")
    assert run(tmp_path, test, admission=admission).failures == {"REJECTED": 1, "CANCELED": 1}


def flac(duration_s):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(round(16_000 * duration_s), np.int16), 16_000, format="FLAC")
    return file.getvalue()


@pytest.mark.parametrize("changes", [{}, {"timeout_s": 0.001}])
def test_time_may_be_over_while_the_sound_waits_for_a_thread(tmp_path, changes):
    async def test(served):
        gate = block(served.pool)
        try:
            with pytest.raises(DeadlineExceeded):
                await start(served, **changes)
        finally:
            gate.set()

    limits = SpeechLimits(max_audio_s=7200, timeout_s=60 if changes else 0.001)
    assert run(tmp_path, test, limits=limits).failures == {"CANCELED": 1}


def test_callers_time_cannot_be_longer_than_the_servers(tmp_path):
    async def test(served):
        call = await start(served, timeout_s=1e9)
        assert call._deadline_s < time.monotonic() + 60
        call.abort()

    run(tmp_path, test)


def test_caller_that_leaves_while_its_sound_is_decoded_leaves_nothing(tmp_path):
    async def test(served):
        gate = block(served.pool)
        task = asyncio.ensure_future(start(served))
        await until(lambda: served.calls.num_active)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        served.assert_idle()
        gate.set()

    assert run(tmp_path, test).failures == {"CANCELED": 1}


def test_unload_waits_for_sounds_that_are_decoded(tmp_path):
    async def test(served):
        gate = block(served.pool)
        served.engine.script = lambda _: served.says(0.0, "one", 2.0)
        task = asyncio.ensure_future(start(served))
        await until(lambda: served.calls.num_active)
        draining = asyncio.ensure_future(served.calls.drain(30))
        await asyncio.sleep(0)
        gate.set()
        assert texts(await (await task).collect()) == [" one"]
        await draining

    run(tmp_path, test)


def test_close_while_a_sound_is_decoded_ends_that_call_too(tmp_path):
    async def test(served):
        gate = block(served.pool)
        task = asyncio.ensure_future(start(served))
        await until(lambda: served.calls.num_active)
        await served.calls.close()
        gate.set()
        with pytest.raises(ModelNotReady):
            await task
        assert served.engine.requests == []

    run(tmp_path, test)


def test_languages_are_asked_for_once_a_call(tmp_path):
    async def test(served):
        served.engine.script = lambda request: (
            served.languages(de=0.9) if request.task is SpeechTask.LANGUAGES else served.says(0.0, "eins", 30.0)
        )
        call = await start(served, wav(65), languages=())
        await call.collect()
        assert call.language == "de"
        assert [request.task for request in served.engine.requests].count(SpeechTask.LANGUAGES) == 1

    run(tmp_path, test)
