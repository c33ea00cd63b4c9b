"""Calls on their way from sound to segments: order, ends, languages. The engine's answers are written down."""

import asyncio
import logging
import random
import time

import numpy as np
import pytest
from tests.serving.fakes import until
from tests.serving.speech_serving import failure, in_turn, serving

from sardonyx.core import FinishReason
from sardonyx.errors import (
    DeadlineExceeded,
    EngineDead,
    EngineError,
    ModelNotReady,
    Overloaded,
    RequestAborted,
)
from sardonyx.processing.voice_activity import Span
from sardonyx.serving.tasks import TranscriptionOptions
from sardonyx.serving.transcription import Sound, Transcription, frames_of
from sardonyx.speech import SpeechTask


def hold(_):
    return None


class Calls:
    """Begins calls of a model, and notes their ends."""

    def __init__(self, served):
        self.served = served
        self.ends = []

    def begin(self, num_s=3.0, spans_s=None, *, within_s=60.0, prompt_ids=(), **options):
        """A call over a sound whose frames are numbered by their first band."""
        num_frames = round(num_s * 100)
        spectrogram = np.zeros((80, num_frames + 3000), np.float32)
        spectrogram[0] = np.arange(num_frames + 3000)
        spans = None if spans_s is None else [Span(round(a * 100), round(b * 100)) for a, b in spans_s]
        options.setdefault("languages", ("en",) if self.served.facts.language_ids else ())
        return Transcription(
            "call-1",
            Sound(spectrogram, num_frames, num_s, spans, list(prompt_ids)),
            TranscriptionOptions(**options),
            self.served.model._runtime,
            self.served.admission.reserve(1, round(num_s)),
            flow=3,
            deadline_s=time.monotonic() + within_s,
            on_end=lambda call, error: self.ends.append((call, error)),
        )


def run(tmp_path, test, script=hold, **options):
    async def main():
        async with serving(tmp_path, script, **options) as served:
            await test(served, Calls(served))

    asyncio.run(main())


def begin_s(request):
    return float(request.window.spectrogram[0, 0]) / 100


def texts(windows):
    return ["".join(segment.text for segment in window.segments) for window in windows]


SPANS_S = [(0, 10), (12, 30), (30, 55), (60, 62)]


def test_windows_are_in_order_whatever_finishes_first(tmp_path):
    async def test(served, calls):
        call = calls.begin(65, SPANS_S)
        engine = served.engine
        await until(lambda: len(engine.held) == 4)
        assert [begin_s(request) for request in engine.held.values()] == [0, 12, 30, 60]
        for request in reversed(list(engine.held.values())):
            engine.answer(request, served.says(0.0, f"at {begin_s(request):g}", 1.0))
        assert texts(await call.collect()) == [" at 0", " at 12", " at 30", " at 60"]
        assert calls.ends == [(call, None)]

    run(tmp_path, test)


def test_what_is_ready_in_front_comes_at_once(tmp_path):
    async def test(served, calls):
        call = calls.begin(65, SPANS_S)
        await until(lambda: len(served.engine.held) == 4)
        first, _, third, _ = served.engine.held.values()
        windows = aiter(call)
        served.engine.answer(third, served.says(0.0, "third", 1.0))
        served.engine.answer(first, served.says(0.0, "first", 1.0))
        assert texts([await anext(windows)]) == [" first"]
        waiting = asyncio.ensure_future(anext(windows))
        await asyncio.sleep(0)
        assert not waiting.done()
        second, fourth = served.engine.held.values()
        served.engine.answer(second, served.says(0.0, "second", 1.0))
        served.engine.answer(fourth, served.says(0.0, "fourth", 1.0))
        assert texts([await waiting] + [window async for window in windows]) == [" second", " third", " fourth"]

    run(tmp_path, test)


def test_so_many_passages_run_at_once_and_no_more(tmp_path):
    async def test(served, calls):
        call = calls.begin(100, [(n * 10, n * 10 + 5) for n in range(10)])
        engine = served.engine
        most = 0
        while not calls.ends:
            await asyncio.sleep(0)
            most = max(most, len(engine.held))
            for request in list(engine.held.values())[:1]:
                engine.answer(request, served.says(0.0, f"{begin_s(request):g}", 1.0))
        assert most == 3
        assert texts(await call.collect()) == [f" {n * 10}" for n in range(10)]

    run(tmp_path, test, max_passages=3)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_or_told_twice(tmp_path, seed):
    """Spans of several windows, second tries among them, answered in any order."""
    rng = random.Random(seed)

    async def test(served, calls):
        spans_s = [(n * 100, n * 100 + rng.choice([5, 30, 70])) for n in range(6)]
        call = calls.begin(600, spans_s)
        engine = served.engine
        while not calls.ends:
            await asyncio.sleep(0)
            if engine.held:
                request = rng.choice(list(engine.held.values()))
                is_guess = rng.random() < 0.3 and request.sampling.temperature < 1
                text = f"{begin_s(request):g}"
                engine.answer(request, served.says(0.0, text, 30.0, logprob=-2.0 if is_guess else -0.1))
        expected = [f" {begin + more:g}" for begin, end in spans_s for more in range(0, end - begin, 30)]
        assert texts(await call.collect()) == expected
        assert {request.flow for request in engine.requests} == {3}

    run(tmp_path, test)


def test_passages_do_not_see_each_others_text(tmp_path):
    async def test(served, calls):
        call = calls.begin(70, [(0, 30), (30, 60)], prompt_ids=served.ids("zero"))
        await call.collect()
        prompt = [served.facts.previous_id, *served.ids("zero")]
        for request in served.engine.requests:
            assert request.prompt_ids[: len(prompt)] == prompt
            assert len(request.prompt_ids) == len(prompt) + 3

    async def script(served, calls):
        served.engine.script = lambda _: served.says(0.0, "one", 30.0)
        await test(served, calls)

    run(tmp_path, script)


def test_abort_ends_everything_at_once(tmp_path):
    async def test(served, calls):
        call = calls.begin(65, SPANS_S)
        await until(lambda: len(served.engine.held) == 4)
        ids = set(served.engine.held)
        call.abort()
        # Synchronously: the place in the queue is free, and whoever reads is told.
        assert served.admission.num_sequences == 0
        [(ended, error)] = calls.ends
        assert ended is call
        assert isinstance(error, RequestAborted)
        await until(lambda: not served.engine.held)
        assert set(served.engine.aborted) == ids
        call.abort()
        assert len(calls.ends) == 1
        with pytest.raises(RequestAborted):
            await call.collect()
        assert len(served.engine.requests) == 4

    run(tmp_path, test)


def test_abort_before_anything_has_begun(tmp_path):
    async def test(served, calls):
        call = calls.begin()
        call.abort()
        with pytest.raises(RequestAborted):
            await call.collect()
        assert served.engine.requests == []

    run(tmp_path, test)


def test_whoever_stops_reading_ends_the_call(tmp_path):
    async def test(served, calls):
        served.engine.script = in_turn(served.says(0.0, "one", 30.0), None)
        windows = aiter(calls.begin(60))
        assert texts([await anext(windows)]) == [" one"]
        await until(lambda: served.engine.held)
        await windows.aclose()
        assert served.admission.num_sequences == 0
        await until(lambda: not served.engine.held)

    run(tmp_path, test)


def test_work_goes_on_while_nobody_reads(tmp_path):
    async def test(served, calls):
        served.engine.script = lambda _: served.says(0.0, "one", 30.0)
        call = calls.begin(120)
        await until(lambda: calls.ends)
        assert texts(await call.collect()) == [" one"] * 4
        assert call.num_tokens == 4 * len(served.ids(0.0, "one", 30.0))

    run(tmp_path, test)


def test_passage_that_fails_takes_the_others_along(tmp_path):
    async def test(served, calls):
        call = calls.begin(65, SPANS_S)
        await until(lambda: len(served.engine.held) == 4)
        first, second, third, _ = served.engine.held.values()
        served.engine.answer(first, served.says(0.0, "first", 1.0))
        served.engine.answer(third, failure("the step failed"))
        with pytest.raises(EngineError, match="the step failed"):
            await call.collect()
        await until(lambda: not served.engine.held)
        assert second.id in served.engine.aborted

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (failure("the step failed"), EngineError, "the step failed"),
        (failure("deadline", reason=FinishReason.CANCELLED), DeadlineExceeded, "time was over"),
        (failure("queue", reason=FinishReason.CANCELLED), Overloaded, "no slot"),
        (failure(None, reason=FinishReason.CANCELLED), EngineDead, "stopped"),
    ],
)
def test_engines_reasons_become_errors(tmp_path, answer, kind, words):
    async def test(served, calls):
        call = calls.begin()
        with pytest.raises(kind, match=words) as caught:
            await call.collect()
        assert calls.ends == [(call, caught.value)]

    run(tmp_path, test, script=lambda _: answer)


def test_dead_engine_ends_the_call(tmp_path):
    async def test(served, calls):
        served.engine.is_alive = False
        with pytest.raises(EngineDead):
            await calls.begin().collect()

    run(tmp_path, test)


def test_bug_of_ours_is_an_internal_error_and_in_the_log(tmp_path, caplog):
    async def test(served, calls):
        def script(_):
            raise ValueError("a secret of the code")

        served.engine.script = script
        with pytest.raises(EngineError, match=r"^internal error$"):
            await calls.begin().collect()

    run(tmp_path, test)
    assert "a secret of the code" in caplog.text


@pytest.mark.parametrize("spans_s", [None, SPANS_S])
def test_time_that_is_over_ends_the_call_and_its_requests(tmp_path, spans_s):
    async def test(served, calls):
        call = calls.begin(65, spans_s, within_s=0.05)
        with pytest.raises(DeadlineExceeded):
            await call.collect()
        assert not served.engine.held
        assert len(served.engine.aborted) == len(served.engine.requests) > 0

    run(tmp_path, test)


def test_time_that_was_over_before_the_begin(tmp_path):
    async def test(served, calls):
        with pytest.raises(DeadlineExceeded):
            await calls.begin(within_s=-1).collect()

    run(tmp_path, test)


@pytest.mark.parametrize(("languages", "language"), [((), "en"), (("de",), "de"), (("ja", "de"), "ja")])
@pytest.mark.parametrize(("num_s", "spans_s"), [(3, []), (0, None)])
def test_silence_asks_nothing_of_the_engine(tmp_path, languages, language, num_s, spans_s):
    async def test(served, calls):
        call = calls.begin(num_s, spans_s, languages=languages)
        assert await call.collect() == []
        assert call.language == language
        assert call.num_tokens == 0
        assert served.engine.requests == []

    run(tmp_path, test)


def test_windows_without_text_are_not_told_but_counted(tmp_path):
    async def test(served, calls):
        served.engine.script = in_turn(
            served.says(0.0, "hm", 1.0, logprob=-1.5, no_speech_prob=0.9), served.says(0.0, "one", 1.0)
        )
        call = calls.begin(33)
        assert texts(await call.collect()) == [" one"]
        assert call.num_tokens == len(served.ids(0.0, "hm", 1.0)) + len(served.ids(0.0, "one", 1.0))

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("languages", "expected"), [((), "ja"), (("en", "de"), "de"), (("de", "ja"), "ja"), (("de", "en"), "de")]
)
def test_language_is_heard_among_the_candidates(tmp_path, languages, expected):
    async def test(served, calls):
        served.engine.script = in_turn(
            served.languages(ja=0.6, de=0.3, en=0.1), served.says(0.0, "one", 30.0), served.says(0.0, "two", 1.0)
        )
        call = calls.begin(33, languages=languages)
        await call.collect()
        assert call.language == expected
        asked, first, second = served.engine.requests
        assert asked.task is SpeechTask.LANGUAGES
        assert asked.prompt_ids == [served.facts.start_id]
        # Encoded once.
        assert asked.window is first.window
        assert served.facts.language_ids[expected] in first.prompt_ids
        assert served.facts.language_ids[expected] in second.prompt_ids

    run(tmp_path, test)


def test_language_is_heard_in_the_first_span(tmp_path):
    async def test(served, calls):
        served.engine.script = lambda request: (
            served.languages(de=1.0)
            if request.task is SpeechTask.LANGUAGES
            else served.says(0.0, f"{begin_s(request):g}", 1.0)
        )
        call = calls.begin(65, [(2, 10), (20, 30)], languages=())
        assert texts(await call.collect()) == [" 2", " 20"]
        asked, *others = served.engine.requests
        assert begin_s(asked) == 2
        assert asked.window.num_frames == 800
        assert [request.window is asked.window for request in others] == [True, False]

    run(tmp_path, test)


@pytest.mark.parametrize("languages", [(), ("en",)])
def test_english_only_models_are_asked_for_no_language(tmp_path, languages):
    async def test(served, calls):
        served.engine.script = in_turn(served.says(0.0, "one", 1.0))
        call = calls.begin(languages=languages)
        await call.collect()
        assert call.language == "en"

    run(tmp_path, test, is_multilingual=False)


@pytest.mark.parametrize("is_multilingual", [False, True])
@pytest.mark.parametrize("languages", [(), ("en",)])
def test_only_a_calls_first_request_may_wait_too_long(tmp_path, languages, is_multilingual):
    async def test(served, calls):
        served.engine.script = lambda request: (
            served.languages(en=1.0) if request.task is SpeechTask.LANGUAGES else served.says(0.0, "one", 30.0)
        )
        before_s = served.dispatch.clock()
        await calls.begin(65, languages=languages).collect()
        first, *others = served.engine.requests
        assert before_s + 20 <= first.start_by_s <= served.dispatch.clock() + 20
        assert [request.start_by_s for request in others] == [None] * len(others)
        assert others

    run(tmp_path, test, is_multilingual=is_multilingual, queue_timeout_s=20)


def test_call_that_found_no_slot_in_time_is_overloaded(tmp_path):
    async def test(served, calls):
        served.engine.script = lambda _: failure("queue", reason=FinishReason.CANCELLED)
        with pytest.raises(Overloaded) as caught:
            await calls.begin().collect()
        assert caught.value.retry_after_s == 7.0

    run(tmp_path, test)


def test_end_is_one_line_of_the_log_without_what_was_said(tmp_path, caplog):
    async def test(served, calls):
        served.engine.script = lambda _: served.says(0.0, "hush", 30.0)
        await calls.begin(40).collect()

    with caplog.at_level(logging.INFO):
        run(tmp_path, test)
    [record] = [each for each in caplog.records if each.message.startswith("request ended")]
    assert (record.request_id, record.model, record.language, record.finish) == ("call-1", "tiny", "en", "stop")
    assert record.audio_s == 40
    assert record.tokens > 0
    assert record.ttft_s <= record.e2e_s
    assert "hush" not in caplog.text


def test_end_by_error_is_in_the_log_by_its_name(tmp_path, caplog):
    async def test(served, calls):
        call = calls.begin()
        call.abort(ModelNotReady("it goes"))
        with pytest.raises(ModelNotReady):
            await call.collect()

    with caplog.at_level(logging.INFO):
        run(tmp_path, test)
    [record] = [each for each in caplog.records if each.message.startswith("request ended")]
    assert (record.finish, record.ttft_s) == ("ModelNotReady", None)


@pytest.mark.parametrize(
    ("span", "frames"),
    [
        (Span(0, 16_000), Span(0, 100)),
        (Span(1, 16_001), Span(0, 101)),
        (Span(159, 161), Span(0, 2)),
        (Span(16_000, 100_000), Span(100, 500)),
        # Thirty seconds are one window wherever they begin.
        (Span(80, 480_080), Span(0, 3000)),
    ],
)
def test_spans_of_samples_become_spans_of_frames(span, frames):
    assert frames_of(span, 500 if span.end == 100_000 else 10_000) == frames
