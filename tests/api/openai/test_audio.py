"""The audio endpoints: every field, every format, every refusal."""

import asyncio
import logging
from contextlib import contextmanager

import msgspec
import pytest
from litestar.testing import TestClient
from tests.api.live import BASE_URL, application, eventually, frames, listening
from tests.api.openai.answers import error
from tests.serving.fake_tasks import FakeEmbedder, FakeTranscriber, TaskSource
from tests.tiny_speech import SEGMENTS, TEXT, TRANSLATION, make_speech_model, wav

from sardonyx.app import create_app
from sardonyx.errors import DeadlineExceeded, EngineDead, EngineError, ModelNotReady, Overloaded, PayloadTooLarge
from sardonyx.metrics import Metrics
from sardonyx.processing.transcript import Segment, Word
from sardonyx.processing.voice_activity import VoiceOptions
from sardonyx.serving.loader import build_registry
from sardonyx.serving.options import TokenInfo
from sardonyx.serving.tasks import HeardWindow
from sardonyx.settings import Settings

TRANSCRIPTIONS, TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"
FILE = {"file": ("speech.wav", b"sound", "audio/wav")}


def segment(start_s, end_s, text, *, seek=0, words=None):
    return Segment(
        seek=seek,
        start_s=start_s,
        end_s=end_s,
        text=text,
        token_ids=[50364, 440, 50414],
        temperature=0.2,
        avg_logprob=-0.25,
        compression_ratio=1.5,
        no_speech_prob=0.125,
        words=words,
    )


def token(text, logprob):
    return TokenInfo(7, text, text.encode(), logprob, [])


FIRST = HeardWindow(
    [
        segment(0.0, 1.5, " The cat", words=[Word(" The", 0.0, 0.5, 0.9), Word(" cat", 0.5, 1.5, 0.8)]),
        segment(1.5, 2.25, " sat <down> & so on.", words=[Word(" sat", 1.5, 2.25, 0.5)]),
    ],
    [token(" The", -0.25), token(" cat", -0.5)],
    5,
)
SILENT = HeardWindow([], [], 3)
LAST = HeardWindow([segment(3661.0, 3662.5, " Über", seek=3000, words=[])], [token(" Über", -0.125)], 2)
SAID = "The cat sat <down> & so on. Über"


@pytest.fixture(scope="module")
def task():
    return FakeTranscriber("whisper-tiny", FIRST, SILENT, LAST)


@pytest.fixture(scope="module")
def api(task):
    with application(TaskSource(task, FakeEmbedder("embedder")), aliases={"ears": "whisper-tiny"}) as api:
        yield api


@pytest.fixture
def transcribe(api):
    """A multipart POST; lists are repeated fields."""

    def post(path=TRANSCRIPTIONS, files=FILE, headers=None, **fields):
        return api.client.post(path, data=fields, files=files, headers=headers)

    return post


# Formats


def test_json_is_the_text_and_what_it_cost(transcribe, task):
    answer = transcribe(model="whisper-tiny")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"text": SAID, "usage": {"type": "duration", "seconds": 4.5}}
    assert task.calls[-1] == b"sound"
    assert task.transcripts[-1].id.startswith("transcription-")


def test_text_ends_with_a_newline(transcribe):
    answer = transcribe(response_format="text")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.content == f"{SAID}\n".encode()


def test_srt(transcribe):
    answer = transcribe(response_format="srt")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text == (
        "1\n00:00:00,000 --> 00:00:01,500\nThe cat\n\n"
        "2\n00:00:01,500 --> 00:00:02,250\nsat <down> & so on.\n\n"
        "3\n01:01:01,000 --> 01:01:02,500\nÜber\n\n"
    )


def test_vtt(transcribe):
    answer = transcribe(response_format="vtt")
    assert answer.headers["content-type"] == "text/vtt; charset=utf-8"
    assert answer.text == (
        "WEBVTT\n\n"
        "00:00:00.000 --> 00:00:01.500\nThe cat\n\n"
        "00:00:01.500 --> 00:00:02.250\nsat &lt;down> &amp; so on.\n\n"
        "01:01:01.000 --> 01:01:02.500\nÜber\n\n"
    )


def test_verbose_json_has_segments(transcribe, task):
    answer = transcribe(response_format="verbose_json").json()
    segments = answer.pop("segments")
    assert answer == {
        "task": "transcribe",
        "language": "english",
        "duration": 4.5,
        "text": SAID,
        "usage": {"type": "duration", "seconds": 4.5},
    }
    assert segments[2] == {
        "id": 2,
        "seek": 3000,
        "start": 3661.0,
        "end": 3662.5,
        "text": " Über",
        "tokens": [50364, 440, 50414],
        "temperature": 0.2,
        "avg_logprob": -0.25,
        "compression_ratio": 1.5,
        "no_speech_prob": 0.125,
    }
    assert [each["id"] for each in segments] == [0, 1, 2]
    assert not task.asked[-1].has_words


@pytest.mark.parametrize(
    ("granularities", "has_segments", "has_words"),
    [
        ([], True, False),
        (["segment"], True, False),
        (["word"], False, True),
        (["word", "word"], False, True),
        (["word", "segment"], True, True),
        (["segment", "word"], True, True),
    ],
)
@pytest.mark.parametrize("name", ["timestamp_granularities", "timestamp_granularities[]"])
def test_granularities_say_what_has_times(transcribe, task, granularities, has_segments, has_words, name):
    answer = transcribe(response_format="verbose_json", **{name: granularities}).json()
    assert ("segments" in answer, "words" in answer) == (has_segments, has_words)
    assert task.asked[-1].has_words == has_words
    if has_words:
        assert answer["words"] == [
            {"word": "The", "start": 0.0, "end": 0.5},
            {"word": "cat", "start": 0.5, "end": 1.5},
            {"word": "sat", "start": 1.5, "end": 2.25},
        ]


@pytest.mark.parametrize("name", ["include", "include[]"])
def test_logprobs_are_included_where_asked_for(transcribe, task, name):
    answer = transcribe(**{name: "logprobs"}).json()
    assert answer["logprobs"] == [
        {"token": " The", "logprob": -0.25, "bytes": list(b" The")},
        {"token": " cat", "logprob": -0.5, "bytes": list(b" cat")},
        {"token": " Über", "logprob": -0.125, "bytes": list(" Über".encode())},
    ]
    assert task.asked[-1].has_logprobs
    assert "logprobs" not in transcribe().json()
    assert not task.asked[-1].has_logprobs


@pytest.mark.parametrize("code", ["de", "yue"])
def test_language_has_its_english_name(transcribe, task, code):
    task.language = code
    try:
        answer = transcribe(response_format="verbose_json").json()
    finally:
        task.language = "en"
    assert answer["language"] == {"de": "german", "yue": "cantonese"}[code]


def test_translations_are_english_and_have_no_usage(transcribe, task):
    task.language = "de"
    try:
        assert transcribe(TRANSLATIONS).json() == {"text": SAID}
        assert task.asked[-1].task == "translate"
        assert task.transcripts[-1].id.startswith("translation-")
        answer = transcribe(TRANSLATIONS, response_format="verbose_json").json()
        assert (answer["task"], answer["language"], answer["duration"]) == ("translate", "english", 4.5)
        assert len(answer["segments"]) == 3
        assert transcribe(TRANSLATIONS, response_format="text").text == f"{SAID}\n"
        assert transcribe(TRANSLATIONS, response_format="srt").text.startswith("1\n")
        assert transcribe(TRANSLATIONS, response_format="vtt").text.startswith("WEBVTT\n")
    finally:
        task.language = "en"


def test_fields_of_transcriptions_mean_nothing_to_translations(transcribe, task):
    answer = transcribe(TRANSLATIONS, stream="true", include="logprobs", timestamp_granularities="word")
    assert answer.json() == {"text": SAID}
    assert not task.asked[-1].has_words


# Options


def test_options_are_the_defaults_where_nothing_is_said(transcribe, task):
    transcribe()
    assert task.asked[-1] == type(task.asked[-1])()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"language": "de"}, {"languages": ("de",)}),
        ({"language": "German"}, {"languages": ("de",)}),
        ({"language": "pt_BR"}, {"languages": ("pt",)}),
        ({"language": ""}, {"languages": ()}),
        ({"languages": ["en", "french"]}, {"languages": ("en", "fr")}),
        ({"languages[]": ["en", "deu"]}, {"languages": ("en", "de")}),
        ({"languages": "en"}, {"languages": ("en",)}),
        ({"prompt": "Umlaute: äöü"}, {"prompt": "Umlaute: äöü"}),
        ({"prompt": '{"a": 1}'}, {"prompt": '{"a": 1}'}),
        ({"prompt": "true"}, {"prompt": "true"}),
        ({"keywords": ["Sardonyx", "ONNX"]}, {"prompt": "Sardonyx, ONNX"}),
        ({"keywords[]": ["Sardonyx"], "prompt": "A talk."}, {"prompt": "Sardonyx A talk."}),
        ({"temperature": "0"}, {"temperatures": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)}),
        ({"temperature": "0.3"}, {"temperatures": (0.3,)}),
        ({"temperature": "1"}, {"temperatures": (1.0,)}),
        ({"seed": "12"}, {"seed": 12}),
        ({"condition_on_previous_text": "false"}, {"conditions_on_previous_text": False}),
        ({"condition_on_previous_text": "0"}, {"conditions_on_previous_text": False}),
        ({"chunking_strategy": "auto"}, {"chunking": VoiceOptions()}),
        ({"chunking_strategy": ""}, {"chunking": None}),
        ({"chunking_strategy": '{"type": "server_vad"}'}, {"chunking": VoiceOptions()}),
        (
            {"chunking_strategy": '{"type": "server_vad", "threshold": 0.25, "prefix_padding_ms": 0}'},
            {"chunking": VoiceOptions(threshold=0.25, speech_pad_ms=0)},
        ),
        (
            {"chunking_strategy[type]": "server_vad", "chunking_strategy[silence_duration_ms]": "750"},
            {"chunking": VoiceOptions(min_silence_ms=750)},
        ),
    ],
)
def test_fields_become_options(transcribe, task, fields, expected):
    answer = transcribe(**fields)
    assert answer.status_code == 200, answer.text
    asked = task.asked[-1]
    assert {name: getattr(asked, name) for name in expected} == expected
    assert msgspec.structs.replace(asked, **expected) == asked


def test_translations_may_be_told_the_language(transcribe, task):
    assert transcribe(TRANSLATIONS, language="german").status_code == 200
    assert task.asked[-1].languages == ("de",)


def test_unknown_fields_are_ignored(transcribe):
    assert transcribe(user="me", **{"something[else]": "1", "[": "x"}).status_code == 200


def test_callers_time_goes_along(transcribe, task):
    transcribe(headers={"X-Request-Timeout-Ms": "1500"})
    assert task.asked[-1].timeout_s == 1.5


# Models


@pytest.mark.parametrize("name", [None, "", "whisper-1", "whisper-tiny", "ears"])
def test_model_is_named_by_itself_an_alias_openais_name_or_not_at_all(transcribe, name):
    answer = transcribe(**({} if name is None else {"model": name}))
    assert answer.status_code == 200


def test_operators_whisper_1_goes_first():
    source = TaskSource(FakeTranscriber("a", FIRST), FakeTranscriber("b", LAST))
    with application(source, aliases={"whisper-1": "b"}) as api:
        answer = api.client.post(TRANSCRIPTIONS, data={"model": "whisper-1"}, files=FILE)
        assert answer.json()["text"] == "Über"


@pytest.mark.parametrize("path", [TRANSCRIPTIONS, TRANSLATIONS])
def test_unknown_model_is_not_found(transcribe, path):
    detail = error(transcribe(path, model="whisper-2"), 404)
    assert (detail["type"], detail["code"]) == ("invalid_request_error", "model_not_found")


def test_model_of_another_family_is_refused(transcribe):
    detail = error(transcribe(model="embedder"))
    assert detail["param"] == "model"
    assert "speech model" in detail["message"]


def test_server_without_a_speech_model_says_so():
    with application(TaskSource(FakeEmbedder("embedder"))) as api:
        for name in ("whisper-1", ""):
            answer = api.client.post(TRANSCRIPTIONS, data={"model": name}, files=FILE)
            assert "speech model" in error(answer, 404)["message"]


# Refusals


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": "xml"}, "response_format", "xml"),
        ({"response_format": "diarized_json"}, "response_format", "speakers"),
        ({"known_speaker_names": "Ann"}, "known_speaker_names", "speakers"),
        ({"known_speaker_references[]": "data:audio/wav;base64,"}, "known_speaker_references", "speakers"),
        ({"temperature": "1.5"}, "temperature", "<= 1"),
        ({"temperature": "-0.5"}, "temperature", ">= 0"),
        ({"temperature": "warm"}, "temperature", "float"),
        ({"temperature": "nan"}, "temperature", ""),
        ({"seed": "-1"}, "seed", ">= 0"),
        ({"seed": "1.5"}, "seed", "int"),
        ({"stream": "maybe"}, "stream", "bool"),
        ({"language": "Klingon"}, "language", "'Klingon'"),
        ({"language": "{"}, "language", ""),
        ({"languages": ["en", "Klingon"]}, "languages", "'Klingon'"),
        ({"language": "en", "languages": "de"}, "languages", "together with language"),
        ({"language": ["en", "de"]}, "language", "given twice"),
        ({"prompt": ["a", "b"]}, "prompt", "given twice"),
        ({"keywords": ["x"] * 101}, "keywords", "at most 100"),
        ({"keywords": "x" * 201}, "keywords.0", "length"),
        ({"timestamp_granularities": "word"}, "timestamp_granularities", "verbose_json"),
        ({"timestamp_granularities": "letter", "response_format": "verbose_json"}, "timestamp_granularities.0", ""),
        ({"include": "logprobs", "response_format": "text"}, "include", "json"),
        ({"include": "logprobs", "response_format": "verbose_json"}, "include", "json"),
        ({"include": "usage"}, "include.0", ""),
        ({"stream": "true", "response_format": "srt"}, "stream", "json or text"),
        ({"stream": "true", "response_format": "verbose_json"}, "stream", "json or text"),
        ({"chunking_strategy": "manual"}, "chunking_strategy", ""),
        ({"chunking_strategy": "{"}, "chunking_strategy", "JSON"),
        ({"chunking_strategy": "{}"}, "chunking_strategy.type", "is required"),
        ({"chunking_strategy": '{"type": "client_vad"}'}, "chunking_strategy.type", ""),
        ({"chunking_strategy": '{"type": "server_vad", "threshold": 2}'}, "chunking_strategy.threshold", "<= 1"),
        ({"chunking_strategy": '{"a":' * 2000}, "chunking_strategy", "nested"),
        ({"chunking_strategy": "auto", "chunking_strategy[type]": "server_vad"}, "chunking_strategy", "two ways"),
        ({"chunking_strategy[type]": ["server_vad"] * 2}, "chunking_strategy", "given twice"),
        ({"file": "sound"}, "file", "as a file"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(transcribe, fields, param, words):
    files = {"prompt": (None, "x")} if "file" in fields else FILE
    detail = error(transcribe(files=files, **fields))
    assert detail["param"] == param, detail
    assert words in detail["message"]
    assert detail["message"].startswith(f"{param}: ")
    assert detail["type"] == "invalid_request_error"


@pytest.mark.parametrize("field", ["response_format", "language"])
def test_translations_refuse_the_same(transcribe, field):
    value = {"response_format": "diarized_json", "language": "Klingon"}[field]
    assert error(transcribe(TRANSLATIONS, **{field: value}))["param"] == field


def test_missing_file_is_named(transcribe):
    detail = error(transcribe(files={"model": (None, "ears")}))
    assert (detail["param"], detail["message"]) == ("file", "file: is required")


def test_two_files_are_too_many(transcribe):
    assert "given twice" in error(transcribe(files=[("file", FILE["file"])] * 2))["message"]


def test_text_that_comes_as_a_file_is_refused(transcribe):
    detail = error(transcribe(files={**FILE, "prompt": ("prompt.txt", b"a")}))
    assert (detail["param"], detail["message"]) == ("prompt", "prompt: must be text, not a file")


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded", "audio/wav", ""])
@pytest.mark.parametrize("path", [TRANSCRIPTIONS, TRANSLATIONS])
def test_other_bodies_than_forms_are_refused(api, path, kind):
    answer = api.client.post(path, content=b'{"file": "x"}', headers={"Content-Type": kind})
    assert "multipart/form-data" in error(answer, 415)["message"]


def raw(api, body, content_type="multipart/form-data; boundary=edge"):
    return api.client.post(TRANSCRIPTIONS, content=body, headers={"Content-Type": content_type})


def part(disposition, value=b"x", more=b""):
    return b"--edge\r\nContent-Disposition: form-data; " + disposition + b"\r\n" + more + b"\r\n" + value + b"\r\n"


SOUND_PART = part(b'name="file"; filename="a.wav"')
END = b"--edge--\r\n"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"--edge",
        SOUND_PART,
        SOUND_PART[:-20],
        SOUND_PART + b"--edge\r\n",
        part(b'filename="a.wav"') + END,
        b"--edge\r\nContent-Disposition: attachment\r\n\r\nx\r\n" + END,
        b"--edge\r\n\r\nx\r\n" + END,
        b"--edge\r\n" + b"x" * 100_000 + END,
        b"--other\r\n" + SOUND_PART.replace(b"edge", b"other") + b"--other--\r\n",
    ],
)
def test_broken_forms_are_refused(api, body):
    assert error(raw(api, body))["type"] == "invalid_request_error"


def test_form_as_it_should_be(api):
    assert raw(api, SOUND_PART + END).status_code == 200


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary="])
def test_form_without_a_boundary_is_refused(api, kind):
    assert "boundary" in error(raw(api, SOUND_PART + END, kind))["message"]


def test_boundary_in_quotes_and_a_media_type_in_capitals_are_read(api):
    assert raw(api, SOUND_PART + END, 'Multipart/Form-Data; charset=utf-8; boundary="edge"').status_code == 200


@pytest.mark.parametrize(
    ("value", "charset"),
    [
        (b"\xff", b"utf-8"),
        (b"x", b"klingon"),
        (b"x", b"zlib"),
        (b"x", b"undefined"),
        (b"\xff.x", b"idna"),
        (b"\\ud800", b"unicode_escape"),
        (b"+2AA-", b"utf-7"),
    ],
)
@pytest.mark.parametrize("name", [b"prompt", b"model", b"language", b"chunking_strategy"])
def test_value_that_is_no_text_in_its_charset_is_refused(api, value, charset, name):
    more = b"Content-Type: text/plain; charset=" + charset + b"\r\n"
    detail = error(raw(api, SOUND_PART + part(b'name="' + name + b'"', value, more) + END))
    assert "charset" in detail["message"]


def test_value_in_a_charset_of_its_own_is_read(api, task):
    more = b"Content-Type: text/plain; charset=latin-1\r\n"
    assert raw(api, SOUND_PART + part(b'name="prompt"', b"\xfcber", more) + END).status_code == 200
    assert task.asked[-1].prompt == "über"


def test_sound_without_a_file_name_is_no_file(api):
    detail = error(raw(api, part(b'name="file"', b"x") + END))
    assert "file name" in detail["message"]
    assert "file name" in error(raw(api, part(b'name="file"; filename=""', b"\xff\xfe") + END))["message"]


def test_value_of_a_megabyte_is_too_long(api):
    assert error(raw(api, SOUND_PART + part(b'name="prompt"', b"x" * (1 << 20 | 1)) + END), 413)["param"] == "prompt"
    assert raw(api, SOUND_PART + part(b'name="prompt"', b"x" * (1 << 20)) + END).status_code == 200
    # What nobody asked for may be as long as it likes.
    assert raw(api, SOUND_PART + part(b'name="other"', b"\xff" * (1 << 20 | 1)) + END).status_code == 200


def test_too_many_parts_are_refused(api):
    detail = error(raw(api, SOUND_PART + part(b'name="keywords"') * 128 + END))
    assert "128 parts" in detail["message"]
    assert raw(api, SOUND_PART + part(b'name="keywords"') * 100 + part(b'name="x"') * 27 + END).status_code == 200


# Errors of the model


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (PayloadTooLarge("file: too long", param="file"), 413, "payload_too_large"),
        (Overloaded("full", retry_after_s=3), 429, "rate_limit_exceeded"),
        (EngineError("it broke"), 500, "engine_error"),
        (ModelNotReady("it goes"), 503, "model_not_ready"),
        (EngineDead("it is dead"), 503, "engine_dead"),
        (DeadlineExceeded("too late"), 504, "deadline_exceeded"),
    ],
)
@pytest.mark.parametrize("place", ["start", "window"])
@pytest.mark.parametrize("stream", ["false", "true"])
def test_errors_have_their_status_until_the_answer_has_begun(raised, status, code, place, stream):
    task = FakeTranscriber("whisper", raised)
    if place == "start":
        task.error = raised
    with application(TaskSource(task)) as api:
        answer = api.client.post(TRANSCRIPTIONS, data={"stream": stream}, files=FILE)
        assert error(answer, status)["code"] == code
        if status == 429:
            assert answer.headers["retry-after"] == "3"
        if place == "window" and stream == "true":
            assert task.transcripts[-1].is_aborted


def test_bug_of_ours_tells_nothing(caplog):
    with application(TaskSource(FakeTranscriber("whisper", ValueError("a secret")))) as api:
        detail = error(api.client.post(TRANSCRIPTIONS, files=FILE), 500)
    assert "secret" not in detail["message"]
    assert "a secret" in caplog.text


# Streams


def stream_of(answer):
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = frames(answer.text)
    assert done == "[DONE]"
    return events


@pytest.mark.parametrize("response_format", ["json", "text"])
def test_stream_tells_each_window_and_then_the_whole(transcribe, task, response_format):
    events = stream_of(transcribe(stream="true", response_format=response_format))
    assert [event["type"] for event in events] == ["transcript.text.delta"] * 2 + ["transcript.text.done"]
    assert [event.get("delta") for event in events] == ["The cat sat <down> & so on.", " Über", None]
    assert events[-1] == {
        "type": "transcript.text.done",
        "text": SAID,
        "usage": {"type": "duration", "seconds": 4.5},
    }
    assert task.transcripts[-1].is_aborted  # whatever is left of it


def test_stream_has_logprobs_where_asked_for(transcribe):
    *deltas, done = stream_of(transcribe(stream="true", include="logprobs"))
    assert [[each["token"] for each in delta["logprobs"]] for delta in deltas] == [[" The", " cat"], [" Über"]]
    assert done["logprobs"] == [each for delta in deltas for each in delta["logprobs"]]


@pytest.mark.parametrize(
    "texts",
    [
        [[" a"], [" b"], [" c "], [" d"]],
        [["  a  "], ["  "], ["b"]],
        [[" a "], [" "]],
        [["\n"], [" a\n"], ["\n\nb\n"]],
        [[" "]],
        [["a", " b ", " c"], ["d"]],
    ],
)
def test_deltas_joined_are_the_text(texts):
    windows = [HeardWindow([segment(0, 1, text) for text in each], [], 1) for each in texts]
    with application(TaskSource(FakeTranscriber("whisper", *windows))) as api:
        *deltas, done = stream_of(api.client.post(TRANSCRIPTIONS, data={"stream": "true"}, files=FILE))
        plain = api.client.post(TRANSCRIPTIONS, files=FILE).json()["text"]
    assert "".join(event["delta"] for event in deltas) == done["text"] == plain
    assert all(event["delta"] for event in deltas)


@pytest.mark.parametrize("windows", [[], [SILENT]])
def test_stream_of_silence_has_an_end_and_nothing_else(windows):
    with application(TaskSource(FakeTranscriber("whisper", *windows))) as api:
        [done] = stream_of(api.client.post(TRANSCRIPTIONS, data={"stream": "true"}, files=FILE))
        assert done["text"] == ""
        assert api.client.post(TRANSCRIPTIONS, files=FILE).json()["text"] == ""
        assert api.client.post(TRANSCRIPTIONS, data={"response_format": "srt"}, files=FILE).text == ""
        assert api.client.post(TRANSCRIPTIONS, data={"response_format": "vtt"}, files=FILE).text == "WEBVTT\n\n"
        assert api.client.post(TRANSCRIPTIONS, data={"response_format": "text"}, files=FILE).text == "\n"


def test_error_in_a_stream_is_an_event():
    with application(TaskSource(FakeTranscriber("whisper", FIRST, EngineError("it broke")))) as api:
        events = stream_of(api.client.post(TRANSCRIPTIONS, data={"stream": "true"}, files=FILE))
    assert events[0]["type"] == "transcript.text.delta"
    assert events[1] == {
        "error": {"message": "it broke", "type": "server_error", "param": None, "code": "engine_error"}
    }
    assert len(events) == 2


# Clients that leave


def form_bytes(**fields):
    body = SOUND_PART + b"".join(part(b'name="%s"' % name.encode(), value.encode()) for name, value in fields.items())
    body += END
    head = [
        f"POST {TRANSCRIPTIONS} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: multipart/form-data; boundary=edge",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


@pytest.mark.parametrize("stream", ["false", "true"])
def test_client_that_leaves_while_its_sound_waits(stream):
    task = FakeTranscriber("whisper", FIRST)
    with listening(TaskSource(task)) as server:
        task.gate = asyncio.Event()
        client = server.connect()
        client.sendall(form_bytes(stream=stream))
        eventually(lambda: task.num_under_way)
        client.close()
        eventually(lambda: task.num_cancelled)
        assert task.num_under_way == 0


def test_client_that_leaves_its_stream_ends_the_transcript():
    task = FakeTranscriber("whisper", FIRST, LAST)
    task.window_gate = asyncio.Semaphore(1)
    with listening(TaskSource(task)) as server:
        client = server.connect()
        client.sendall(form_bytes(stream="true"))
        data = b""
        while b"transcript.text.delta" not in data:
            data += client.recv(65536)
        assert not task.transcripts[-1].is_aborted
        client.close()
        eventually(lambda: task.transcripts[-1].is_aborted)


# A model that hears


@contextmanager
def hearing(root, **settings):
    values = Settings(**{"repository": root, "allow_grpc": False, "num_threads": 2} | settings)
    metrics = Metrics("test")
    app = create_app(values, build_registry(values, metrics), metrics)
    with TestClient(app, base_url=BASE_URL) as client:
        eventually(lambda: client.get("/ready").status_code == 200)
        yield client


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("speech")
    make_speech_model(root, "tiny")
    make_speech_model(root, "tiny-en", is_multilingual=False, has_aligner=False)
    return root


@pytest.fixture(scope="module")
def client(repository):
    with hearing(repository, max_audio_bytes=200_000, max_body_bytes=2_000, max_audio_s=5) as client:
        yield client


def post(client, sound=None, path=TRANSCRIPTIONS, **fields):
    files = {"file": ("a.wav", wav() if sound is None else sound)}
    return client.post(path, data={"model": "tiny"} | fields, files=files)


def test_sound_is_heard(client):
    """A sound is longer than other bodies may be."""
    assert post(client).json() == {"text": TEXT, "usage": {"type": "duration", "seconds": 2.0}}
    assert post(client, path=TRANSLATIONS).json() == {"text": TRANSLATION}
    answer = post(client, response_format="verbose_json").json()
    assert [(each["start"], each["end"], each["text"]) for each in answer["segments"]] == list(SEGMENTS)
    answer = post(client, response_format="verbose_json", **{"timestamp_granularities[]": ["segment", "word"]}).json()
    assert [each["text"] for each in answer["segments"]] == [text for _, _, text in SEGMENTS]
    assert [each["word"] for each in answer["words"]] == ["one", "two", "three"]
    done = stream_of(post(client, stream="true", include="logprobs", chunking_strategy="auto"))[-1]
    assert done["text"] == TEXT
    assert len(done["logprobs"]) == 3


def test_silence_is_heard_as_nothing_where_it_is_looked_for(client):
    answer = post(client, wav(is_silent=True), chunking_strategy="auto", response_format="verbose_json").json()
    assert (answer["text"], answer["segments"], answer["duration"]) == ("", [], 2.0)


@pytest.mark.parametrize(
    ("sound", "words"),
    [(b"", "empty"), (b"no sound at all", "no sound that can be read"), (wav()[:-500], "incomplete")],
)
@pytest.mark.parametrize("stream", ["false", "true"])
def test_file_that_is_no_sound_is_refused(client, sound, words, stream):
    detail = error(post(client, sound, stream=stream))
    assert detail["param"] == "file"
    assert words in detail["message"]


def test_too_long_a_sound_is_refused(client):
    detail = error(post(client, wav(5.5)), 413)
    assert (detail["param"], detail["code"]) == ("file", "payload_too_large")


def test_too_large_a_body_is_refused(client):
    assert error(post(client, b"x" * 200_001), 413)["code"] == "payload_too_large"
    # And the limit of other bodies stays as it is.
    assert client.post("/v1/completions", json={"prompt": "x" * 2_000}).status_code == 413


@pytest.mark.parametrize(
    ("fields", "path", "param"),
    [
        ({"language": "de"}, TRANSCRIPTIONS, "language"),
        ({}, TRANSLATIONS, "model"),
        (
            {"timestamp_granularities[]": "word", "response_format": "verbose_json"},
            TRANSCRIPTIONS,
            "timestamp_granularities",
        ),
    ],
)
def test_english_only_models_say_what_they_cannot_do(client, fields, path, param):
    assert post(client, model="tiny-en").json()["text"] == TEXT
    assert error(post(client, path=path, model="tiny-en", **fields))["param"] == param


def test_languages_that_the_model_does_not_know_are_named(client):
    detail = error(post(client, language="Welsh"))
    assert detail["param"] == "language"
    assert "de, en, fr" in detail["message"]


def test_language_is_among_the_candidates(client):
    answer = post(client, response_format="verbose_json", languages=["de", "fr"]).json()
    assert answer["language"] == "german"


def test_models_of_speech_are_listed(client):
    assert {"tiny", "tiny-en"} <= {each["id"] for each in client.get("/v1/models").json()["data"]}


def test_nothing_that_was_said_is_in_the_log(client, caplog):
    with caplog.at_level(logging.DEBUG):
        post(client, prompt="hush hush")
    assert "three" not in caplog.text
    assert "hush" not in caplog.text
    assert "request ended" in caplog.text
