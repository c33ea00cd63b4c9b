"""The long-form algorithm, walked window by window over an engine whose answers are written down."""

import asyncio

import numpy as np
import pytest
from tests.serving.speech_serving import Speech, failure, in_turn

from sardonyx.core import FinishReason
from sardonyx.errors import EngineDead, EngineError, Overloaded
from sardonyx.processing.transcript import Thresholds
from sardonyx.serving.passage import Hearing, Passage
from sardonyx.serving.tasks import TranscriptionOptions
from sardonyx.speech import SpeechTask, Window

GUESS = -2.0
"""A log-probability below the threshold."""


@pytest.fixture
def speech(tmp_path):
    speech = Speech(tmp_path, in_turn())
    yield speech
    assert not speech.engine.held
    speech.pool.close()


@pytest.fixture
def english(tmp_path):
    speech = Speech(tmp_path, in_turn(), is_multilingual=False)
    yield speech
    speech.pool.close()


def walk(speech, *answers, num_s=30.0, start_s=0.0, first=None, prompt_ids=(), language="en", script=None, **options):
    """The windows that a passage of a sound gives. Frames of the sound are numbered by their first band."""
    speech.engine.script = script or in_turn(*answers)
    num_frames = round(num_s * 100)
    spectrogram = np.zeros((80, num_frames + 3000), np.float32)
    spectrogram[0] = np.arange(num_frames + 3000)
    if not speech.facts.language_ids:
        language = None
    hearing = Hearing(spectrogram, language, list(prompt_ids), TranscriptionOptions(**options), 5)
    passage = Passage(speech.tools, hearing, first)

    async def main():
        return [window async for window in passage.windows(round(start_s * 100), num_frames)]

    windows = asyncio.run(main())
    if answers:
        assert len(speech.engine.requests) == len(answers)
    return windows


def begins_s(speech):
    """Where the windows of all requests begin in the sound."""
    return [float(request.window.spectrogram[0, 0]) / 100 for request in speech.engine.requests]


def lengths_s(speech):
    return [request.window.num_frames / 100 for request in speech.engine.requests]


def spoken(windows):
    return [[(each.start_s, each.end_s, each.text) for each in window.segments] for window in windows]


def prompts(speech):
    """Of each request for a text what stands before its start sequence."""
    start = speech.facts.start_id
    return [request.prompt_ids[: request.prompt_ids.index(start)] for request in speech.engine.texts()]


def test_next_window_begins_at_the_last_pair_of_timestamps(speech):
    windows = walk(
        speech,
        speech.says(0.0, "one", 4.0, 4.0, "two", 25.0, 25.0, "thr"),
        speech.says(0.0, "three", 6.0, 6.0, "four"),
        speech.says(0.0, "four", 5.0),
        num_s=36.0,
    )
    assert begins_s(speech) == [0, 25, 31]
    assert lengths_s(speech) == [30, 11, 5]
    assert spoken(windows) == [
        [(0.0, 4.0, " one"), (4.0, 25.0, " two")],
        [(25.0, 31.0, " three")],
        [(31.0, 36.0, " four")],
    ]
    assert [[segment.seek for segment in window.segments] for window in windows] == [[0, 0], [2500], [3100]]


def test_single_timestamp_at_the_end_means_that_the_window_is_done(speech):
    windows = walk(
        speech,
        speech.says(0.0, "one", 4.0, 4.0, "two", 9.0),
        speech.says(1.0, "three", 2.0),
        num_s=33.0,
    )
    assert begins_s(speech) == [0, 30]
    assert spoken(windows) == [[(0.0, 4.0, " one"), (4.0, 9.0, " two")], [(30.0, 32.0, " three")]]


def test_result_without_a_pair_is_one_segment_of_the_whole_window(speech):
    windows = walk(speech, speech.says(0.0, "one", has_ended=False), speech.says(0.0, "two", 2.0), num_s=35.0)
    assert begins_s(speech) == [0, 30]
    assert spoken(windows) == [[(0.0, 30.0, " one")], [(30.0, 32.0, " two")]]


def test_window_holds_the_sound_and_zeros_behind_it(speech):
    walk(speech, speech.says(0.0, "one", 3.0), num_s=3.0, start_s=1.0)
    [request] = speech.engine.requests
    assert request.window.num_frames == 200
    assert request.window.spectrogram.shape == (80, 3000)
    assert request.window.spectrogram[0, :200].tolist() == list(range(100, 300))
    assert not request.window.spectrogram[:, 200:].any()


def test_request_is_what_whisper_was_trained_on(speech):
    walk(speech, speech.says(0.0, "one", 3.0), num_s=3.0, seed=11)
    [request] = speech.engine.requests
    facts = speech.facts
    assert request.prompt_ids == [facts.start_id, facts.language_ids["en"], facts.transcribe_id]
    assert request.task is SpeechTask.TEXT
    assert request.has_timestamps
    assert (request.sampling.temperature, request.sampling.seed) == (0.0, 11)
    assert request.max_tokens == 224
    assert request.stop_token_ids == {facts.end_id}
    assert request.flow == 5
    assert (request.deadline_s, request.start_by_s) == (None, None)  # the call sees to its end itself


def test_translations_name_their_task_and_the_language_that_is_spoken(speech):
    walk(speech, speech.says(0.0, "one", 3.0), num_s=3.0, language="de", task="translate")
    facts = speech.facts
    assert speech.engine.requests[0].prompt_ids == [facts.start_id, facts.language_ids["de"], facts.translate_id]


def test_english_only_models_are_told_neither_language_nor_task(english):
    walk(english, english.says(0.0, "one", 3.0), num_s=3.0)
    assert english.engine.requests[0].prompt_ids == [english.facts.start_id]


def test_without_timestamps_a_window_is_a_segment(speech):
    windows = walk(speech, speech.says("one"), speech.says("two"), num_s=34.5, has_timestamps=False, has_logprobs=True)
    assert begins_s(speech) == [0, 30]
    assert spoken(windows) == [[(0.0, 30.0, " one")], [(30.0, 34.5, " two")]]
    for request in speech.engine.requests:
        assert request.prompt_ids[-1] == speech.facts.no_timestamps_id
        assert not request.has_timestamps
    assert "".join(info.text for info in windows[0].tokens) == " one"


def test_silent_window_is_left_out_and_its_text_is_no_prompt(speech):
    windows = walk(
        speech,
        speech.says(0.0, "one", 30.0),
        speech.says(0.0, "thanks for watching", 2.0, logprob=-1.5, no_speech_prob=0.7),
        speech.says(0.0, "two", 5.0),
        num_s=65.0,
    )
    assert begins_s(speech) == [0, 30, 60]
    assert spoken(windows) == [[(0.0, 30.0, " one")], [], [(60.0, 65.0, " two")]]
    assert prompts(speech)[2] == [speech.facts.previous_id, *speech.ids(0.0, "one", 30.0)]


def test_window_that_seems_silent_but_has_a_sure_text_is_kept(speech):
    windows = walk(speech, speech.says(0.0, "one", 3.0, logprob=-0.5, no_speech_prob=0.9), num_s=3.0)
    assert spoken(windows) == [[(0.0, 3.0, " one")]]
    assert windows[0].segments[0].no_speech_prob == 0.9


def test_silence_is_asked_for_by_its_thresholds(speech):
    answer = speech.says(0.0, "one", 3.0, logprob=-1.5, no_speech_prob=0.9)
    thresholds = Thresholds(no_speech=None, logprob=None)
    assert spoken(walk(speech, answer, num_s=3.0, thresholds=thresholds)) == [[(0.0, 3.0, " one")]]


def test_guesses_are_tried_again_at_higher_temperatures(speech):
    windows = walk(
        speech,
        speech.says(0.0, "won", 3.0, logprob=GUESS),
        speech.says(0.0, "wan", 3.0, logprob=GUESS),
        speech.says(0.0, "one", 3.0),
        num_s=3.0,
    )
    assert [request.sampling.temperature for request in speech.engine.requests] == [0.0, 0.2, 0.4]
    [segment] = windows[0].segments
    assert (segment.text, segment.temperature) == (" one", 0.4)
    assert segment.avg_logprob == pytest.approx(-0.1)


def test_repetition_is_tried_again(speech):
    loop = "no " * 60
    walk(speech, speech.says(0.0, loop, 3.0), speech.says(0.0, "no", 3.0), num_s=3.0)
    assert [request.sampling.temperature for request in speech.engine.requests] == [0.0, 0.2]


def test_last_temperature_counts_whatever_it_gives(speech):
    windows = walk(speech, *[speech.says(0.0, "hm", 3.0, logprob=GUESS)] * 6, num_s=3.0)
    assert [request.sampling.temperature for request in speech.engine.requests] == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert windows[0].segments[0].temperature == 1.0


def test_guess_at_silence_is_not_tried_again(speech):
    windows = walk(speech, speech.says(0.0, "hm", 3.0, logprob=GUESS, no_speech_prob=0.7), num_s=3.0)
    assert spoken(windows) == [[]]


def test_single_temperature_is_tried_once(speech):
    windows = walk(speech, speech.says(0.0, "hm", 3.0, logprob=GUESS), num_s=3.0, temperatures=(0.3,))
    assert windows[0].segments[0].temperature == 0.3


def test_second_tries_and_words_are_over_the_same_window(speech):
    """What it was encoded to lies with it."""
    answers = [speech.says(0.0, "hm", 3.0, logprob=GUESS), speech.says(0.0, "one", 3.0)]
    hears = speech.hears([0.5] * len(speech.ids("one")))
    windows = walk(speech, script=by_task(answers, [hears]), num_s=3.0, has_words=True)
    assert len({id(request.window) for request in speech.engine.requests}) == 1
    assert [request.task for request in speech.engine.requests] == [
        SpeechTask.TEXT,
        SpeechTask.TEXT,
        SpeechTask.ALIGNMENT,
    ]
    assert windows[0].segments[0].text == " one"


def test_prompt_is_the_text_before_with_its_timestamps(speech):
    walk(
        speech,
        speech.says(0.0, "one", 4.0, 4.0, "two", 25.0, 25.0),
        speech.says(0.0, "three", 5.0, 5.0),
        speech.says(0.0, "four", 5.0),
        num_s=35.0,
    )
    before = speech.ids(0.0, "one", 4.0, 4.0, "two", 25.0)
    assert prompts(speech) == [
        [],
        [speech.facts.previous_id, *before],
        [speech.facts.previous_id, *before, *speech.ids(0.0, "three", 5.0)],
    ]


def test_prompt_keeps_nothing_of_segments_without_length(speech):
    walk(
        speech,
        speech.says(0.0, "one", 4.0, 4.0, "two", 4.0, 4.0, "three", 30.0),
        speech.says(0.0, "four", 2.0),
        num_s=32.0,
    )
    assert prompts(speech)[1][1:] == speech.ids(0.0, "one", 4.0, 4.0, "three", 30.0)


def test_prompt_is_cut_to_its_last_223_tokens(speech):
    given = speech.tokens.prompt("a b c d " * 100)
    assert len(given) > 300
    walk(speech, speech.says(0.0, "one", 30.0), speech.says(0.0, "two", 2.0), num_s=32.0, prompt_ids=given)
    first, second = prompts(speech)
    assert first == [speech.facts.previous_id, *given[-223:]]
    assert second == [speech.facts.previous_id, *(given + speech.ids(0.0, "one", 30.0))[-223:]]
    # Half of what the decoder sees is left for the result.
    for request in speech.engine.requests:
        assert len(request.prompt_ids) + request.max_tokens <= speech.facts.max_model_len


def test_prompt_and_result_share_the_room_of_small_models(tmp_path):
    """As in 448 tokens: a half for the text before, a half for the result."""
    speech = Speech(tmp_path, in_turn(), max_model_len=64)
    given = list(range(100))
    walk(speech, speech.says(0.0, "one", 3.0), num_s=3.0, prompt_ids=given)
    [request] = speech.engine.requests
    assert prompts(speech) == [[speech.facts.previous_id, *given[-31:]]]
    assert request.max_tokens == 29
    speech.pool.close()


def test_text_that_took_a_high_temperature_is_no_prompt(speech):
    guess = speech.says(0.0, "hm", 30.0, logprob=GUESS)
    walk(
        speech,
        speech.says(0.0, "one", 30.0),
        *[guess] * 3,
        speech.says(0.0, "two", 30.0),
        speech.says(0.0, "three", 30.0),
        speech.says(0.0, "four", 2.0),
        num_s=92.0,
        prompt_ids=speech.ids("zero"),
    )
    assert speech.engine.requests[4].sampling.temperature == 0.6
    assert prompts(speech)[5] == []
    assert prompts(speech)[6] == [speech.facts.previous_id, *speech.ids(0.0, "three", 30.0)]


def test_text_that_took_a_middling_temperature_is_one(speech):
    guess = speech.says(0.0, "hm", 30.0, logprob=GUESS)
    walk(speech, *[guess] * 2, speech.says(0.0, "one", 30.0), speech.says(0.0, "two", 2.0), num_s=32.0)
    assert speech.engine.requests[2].sampling.temperature == 0.4
    assert prompts(speech)[3] == [speech.facts.previous_id, *speech.ids(0.0, "one", 30.0)]


def test_callers_prompt_is_there_for_the_first_window_only_where_nothing_else_is(speech):
    given = speech.ids("zero")
    walk(
        speech,
        speech.says(0.0, "one", 30.0),
        speech.says(0.0, "two", 30.0),
        speech.says(0.0, "three", 2.0),
        num_s=62.0,
        prompt_ids=given,
        conditions_on_previous_text=False,
    )
    assert prompts(speech) == [[speech.facts.previous_id, *given], [], []]


def test_callers_prompt_outlives_a_silent_window(speech):
    given = speech.ids("zero")
    silence = speech.says(0.0, "hm", 2.0, logprob=-1.5, no_speech_prob=0.9)
    walk(speech, silence, speech.says(0.0, "one", 2.0), num_s=32.0, prompt_ids=given)
    assert prompts(speech)[1] == [speech.facts.previous_id, *given]


def by_task(texts, alignments):
    """A script that answers texts in turn and alignments in turn."""
    texts, alignments = list(texts), list(alignments)

    def script(request):
        if request.task is SpeechTask.ALIGNMENT:
            return alignments.pop(0)(request)
        return texts.pop(0)

    return script


def heard(speech, *words_s):
    """An alignment in which each of the words, pairs of text and end, takes its tokens up to its end."""
    ends = []
    for word, end_s in words_s:
        ends += [end_s] * len(speech.ids(word))
    return speech.hears(ends)


def test_words_have_times_and_the_next_window_begins_behind_the_last(speech):
    windows = walk(
        speech,
        script=by_task(
            [speech.says(0.0, "one two", 25.0, 25.0, "thr"), speech.says(0.0, "three", 2.0)],
            [heard(speech, ("one", 0.5), ("two", 1.0)), heard(speech, ("three", 0.4))],
        ),
        num_s=31.0,
        has_words=True,
    )
    aligned = [request for request in speech.engine.requests if request.task is SpeechTask.ALIGNMENT]
    facts = speech.facts
    start = [facts.start_id, facts.language_ids["en"], facts.transcribe_id, facts.no_timestamps_id]
    assert aligned[0].prompt_ids == [*start, *speech.ids("one two"), facts.end_id]
    assert [each.flow for each in aligned] == [5, 5]
    [first], [second] = (window.segments for window in windows)
    assert [word.text for word in first.words] == [" one", " two"]
    assert first.words[-1].end_s == first.end_s
    # Not at 25 s, where the timestamps say.
    assert second.seek == round(first.end_s * 100) < 200
    assert [word.text for word in second.words] == [" three"]
    assert second.words[0].start_s >= first.end_s
    assert first.words[0].probability == pytest.approx(0.5)


def test_words_do_not_move_the_end_of_a_window_that_is_done(speech):
    windows = walk(
        speech,
        script=by_task(
            [speech.says(0.0, "one", 25.0), speech.says(0.0, "two", 1.0)],
            [heard(speech, ("one", 0.5)), heard(speech, ("two", 0.5))],
        ),
        num_s=31.0,
        has_words=True,
    )
    assert windows[1].segments[0].seek == 3000


def test_windows_without_segments_are_not_aligned(speech):
    silence = speech.says(0.0, "hm", 2.0, logprob=-1.5, no_speech_prob=0.9)
    assert spoken(walk(speech, silence, num_s=3.0, has_words=True)) == [[]]


def test_logprobs_are_those_of_the_text_that_is_kept(speech):
    answer = speech.says(0.0, "one", 4.0, 4.0, "two", 4.0, 4.0, "three", 9.0)
    answer.token_logprobs = [-0.01 * n for n in range(len(answer.token_logprobs))]
    [window] = walk(speech, answer, num_s=10.0, has_logprobs=True)
    assert [segment.text for segment in window.segments] == [" one", " three"]
    expected = [
        (token_id, pytest.approx(-0.01 * place))
        for place, token_id in enumerate(answer.token_ids)
        if speech.tokens.is_text(token_id) and not _is_of_second(speech, place)
    ]
    assert [(info.token_id, info.logprob) for info in window.tokens] == expected
    assert "".join(info.text for info in window.tokens) == " one three"
    assert b"".join(info.bytes_ for info in window.tokens) == b" one three"


def _is_of_second(speech, place):
    num_before = len(speech.ids(0.0, "one", 4.0, 4.0))
    return num_before <= place < num_before + len(speech.ids("two"))


def test_logprobs_are_there_only_where_asked_for(speech):
    [window] = walk(speech, speech.says(0.0, "one", 3.0), num_s=3.0)
    assert window.tokens == []
    assert window.num_tokens == len(speech.ids(0.0, "one", 3.0))


def test_characters_in_two_tokens_are_whole_in_text_and_bytes(speech):
    [window] = walk(speech, speech.says(0.0, "\N{GRINNING FACE}", 3.0), num_s=3.0, has_logprobs=True)
    assert window.segments[0].text == " \N{GRINNING FACE}"
    assert b"".join(info.bytes_ for info in window.tokens).decode() == " \N{GRINNING FACE}"


def test_mean_logprob_counts_the_end(speech):
    answer = speech.says(0.0, "one", 3.0, logprob=-0.2)
    answer.token_logprobs[-1] = -0.9
    num_tokens = len(answer.token_ids)
    [window] = walk(speech, answer, num_s=3.0)
    assert window.segments[0].avg_logprob == pytest.approx((-0.2 * num_tokens - 0.9) / (num_tokens + 1))


def test_window_that_was_encoded_for_its_language_is_used_again(speech):
    first = Window(np.full((80, 3000), 7, np.float32), 3000)
    walk(speech, speech.says(0.0, "one", 30.0), speech.says(0.0, "two", 1.0), num_s=31.0, first=first)
    assert speech.engine.requests[0].window is first
    assert speech.engine.requests[1].window is not first
    assert begins_s(speech)[1] == 30


def test_whatever_the_tokens_every_window_begins_behind_the_one_before(speech):
    begin = speech.tokens.timestamp_begin_id
    answers = [
        speech.says(0.0, 0.0, "one"),
        speech.says(0.02, 0.02),
        speech.says(),
        speech.says(30.0, 30.0, "x"),
        speech.says(29.0, "x", 1.0, 1.0),
    ]
    assert begin
    walk(speech, script=lambda _: answers[len(speech.engine.requests) % len(answers)], num_s=120.0)
    places = begins_s(speech)
    distinct = [place for index, place in enumerate(places) if index == 0 or place != places[index - 1]]
    assert distinct == sorted(set(distinct))


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (failure("the step failed"), EngineError),
        (failure("queue", reason=FinishReason.CANCELLED), Overloaded),
        (failure(None, reason=FinishReason.CANCELLED), EngineDead),
    ],
)
def test_request_that_fails_ends_the_passage(speech, answer, kind):
    with pytest.raises(kind):
        walk(speech, speech.says(0.0, "one", 30.0), answer, num_s=31.0)


def test_engine_that_died_is_told_from_a_step_that_failed(speech):
    def script(_):
        speech.engine.is_alive = False
        return failure("the step failed")

    with pytest.raises(EngineDead, match="the step failed"):
        walk(speech, script=script, num_s=3.0)
