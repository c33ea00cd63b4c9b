"""What the `openai` package and Triton's clients make of sounds, and of what is refused."""

import json
import threading

import numpy as np
import openai
import pytest
import tritonclient.grpc
from openai.types.audio import TranscriptionVerbose
from tests.conformance.process import serve
from tests.tiny_models import make_language_model
from tests.tiny_speech import SEGMENTS, TEXT, TRANSLATION, make_speech_model, wav


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("speech")
    repository = root / "repository"
    make_speech_model(repository, "tiny")
    make_speech_model(repository, "endless", script="endless")
    make_language_model(repository, "talk")
    flags = ["--aliases", "gpt-4o-transcribe=tiny,whisper-1=tiny", "--max-audio-bytes", "64MiB"]
    with serve(repository, root / "log", *flags) as server:
        yield server
        assert "Traceback" not in server.log()


@pytest.fixture
def transcribe(client):
    def create(sound=None, **options):
        file = ("speech.wav", wav() if sound is None else sound)
        return client.audio.transcriptions.create(**({"file": file, "model": "whisper-1"} | options))

    return create


@pytest.mark.parametrize("model", ["whisper-1", "gpt-4o-transcribe", "tiny"])
def test_sound_becomes_text(transcribe, model):
    answer = transcribe(model=model)
    assert answer.text == TEXT
    assert answer.usage.type == "duration"
    assert answer.usage.seconds == 2


@pytest.mark.parametrize("spell", ["bytes", "file", "name"])
def test_files_come_in_every_way(transcribe, client, tmp_path, spell):
    path = tmp_path / "speech.wav"
    path.write_bytes(wav())
    with path.open("rb") as opened:
        file = {"bytes": wav(), "file": opened, "name": path}[spell]
        assert client.audio.transcriptions.create(file=file, model="whisper-1").text == TEXT


def test_plain_formats_are_strings(transcribe):
    assert transcribe(response_format="text") == f"{TEXT}\n"
    assert transcribe(response_format="srt") == (
        "1\n00:00:00,000 --> 00:00:01,000\none two\n\n2\n00:00:01,000 --> 00:00:02,000\nthree\n\n"
    )
    assert transcribe(response_format="vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\none two\n\n00:00:01.000 --> 00:00:02.000\nthree\n\n"
    )


def test_verbose_json_has_segments_as_the_package_knows_them(transcribe):
    answer = transcribe(response_format="verbose_json")
    assert isinstance(answer, TranscriptionVerbose)
    assert (answer.language, answer.duration, answer.text) == ("english", 2.0, TEXT)
    assert [(each.start, each.end, each.text) for each in answer.segments] == list(SEGMENTS)
    for number, segment in enumerate(answer.segments):
        assert segment.id == number
        assert segment.temperature == 0
        assert -0.1 < segment.avg_logprob < 0
        assert segment.no_speech_prob < 0.1
        assert 0 < segment.compression_ratio < 2.4
        assert all(isinstance(token, int) for token in segment.tokens)
    assert answer.words is None
    assert answer.usage.seconds == 2


def test_words_have_times(transcribe):
    answer = transcribe(response_format="verbose_json", timestamp_granularities=["word"])
    assert answer.segments is None
    assert [each.word for each in answer.words] == ["one", "two", "three"]
    times = [time for each in answer.words for time in (each.start, each.end)]
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] <= 2
    both = transcribe(response_format="verbose_json", timestamp_granularities=["segment", "word"])
    assert len(both.segments) == 2
    assert both.words == answer.words


def test_logprobs_are_of_the_text(transcribe):
    answer = transcribe(include=["logprobs"])
    assert "".join(each.token for each in answer.logprobs).strip() == TEXT
    assert all(bytes(map(int, each.bytes)).decode() == each.token for each in answer.logprobs)
    assert all(-1 < each.logprob <= 0 for each in answer.logprobs)


def test_stream_tells_each_window_and_then_the_whole(transcribe):
    events = list(transcribe(wav(65), stream=True, include=["logprobs"]))
    assert [event.type for event in events] == ["transcript.text.delta"] * 3 + ["transcript.text.done"]
    *deltas, done = events
    assert "".join(event.delta for event in deltas) == done.text == " ".join([TEXT] * 3)
    logprobs = [each.to_dict() for event in deltas for each in event.logprobs]
    assert logprobs == [each.to_dict() for each in done.logprobs]


@pytest.mark.parametrize(
    "chunking", ["auto", {"type": "server_vad", "threshold": 0.4, "prefix_padding_ms": 100, "silence_duration_ms": 300}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_sound_is_cut_at_pauses(transcribe, chunking, stream):
    answer = transcribe(wav(25, pauses_at_s=(5, 15)), chunking_strategy=chunking, stream=stream)
    text = list(answer)[-1].text if stream else answer.text
    assert text == " ".join([TEXT] * 3)


def test_every_option_of_the_package_is_taken(transcribe):
    answer = transcribe(
        language="en",
        prompt="A counting rhyme.",
        temperature=0.2,
        response_format="verbose_json",
        extra_body={"keywords": ["one", "two"], "seed": 1, "condition_on_previous_text": False},
    )
    assert answer.text == TEXT


def test_language_is_heard_among_candidates(transcribe):
    answer = transcribe(response_format="verbose_json", extra_body={"languages": ["de", "fr"]})
    assert answer.language == "german"


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # what the package says of its own method
def test_translation_is_english(client):
    file = ("speech.wav", wav())
    assert client.audio.translations.create(file=file, model="whisper-1").text == TRANSLATION
    answer = client.audio.translations.create(file=file, model="whisper-1", response_format="verbose_json")
    assert (answer.language, answer.duration, answer.text) == ("english", 2.0, TRANSLATION)
    assert answer.segments[0].text == f" {TRANSLATION}"
    text = client.audio.translations.create(file=file, model="whisper-1", response_format="text", prompt="x")
    assert text == f"{TRANSLATION}\n"


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"sound": b""}, "file", None),
        ({"sound": b"no sound"}, "file", None),
        ({"response_format": "diarized_json"}, "response_format", "unsupported_parameter"),
        ({"temperature": 2}, "temperature", None),
        ({"language": "Klingon"}, "language", None),
        ({"language": "cy"}, "language", None),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities", None),
        ({"stream": True, "response_format": "vtt"}, "stream", None),
        ({"known_speaker_names": ["Ann"]}, "known_speaker_names", "unsupported_parameter"),
        ({"model": "talk"}, "model", None),
    ],
)
def test_what_makes_no_sense_is_a_bad_request_that_names_the_field(transcribe, options, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        transcribe(**options)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


def test_unknown_model_is_not_found(transcribe):
    with pytest.raises(openai.NotFoundError) as caught:
        transcribe(model="gpt-4o-mini-transcribe")
    assert caught.value.code == "model_not_found"


def test_too_large_a_sound_has_its_own_status(transcribe):
    with pytest.raises(openai.APIStatusError) as caught:
        transcribe(b"x" * (65 << 20))
    assert caught.value.status_code == 413
    assert caught.value.code == "payload_too_large"


def test_time_that_is_over_is_an_error_that_is_not_tried_again(client, server):
    patient = client.with_options(max_retries=2)
    num_before = num_failed(server)
    with pytest.raises(openai.InternalServerError) as caught:
        patient.audio.transcriptions.create(
            file=("a.wav", wav(200)), model="endless", extra_headers={"X-Request-Timeout-Ms": "200"}
        )
    assert num_failed(server) == num_before + 1
    assert caught.value.status_code == 504
    assert caught.value.code == "deadline_exceeded"
    server.wait_for(server.is_idle)


def test_many_clients_at_once_get_the_same(transcribe):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(transcribe(wav(35)).text)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [f"{TEXT} {TEXT}"] * 12


@pytest.mark.parametrize(("stream", "chunking"), [(False, ""), (True, ""), (False, "auto")])
def test_client_that_leaves_ends_its_request(server, stream, chunking):
    """Five minutes whose every window is tried at each temperature: seconds of work."""
    before = server.metric("sardonyx_generation_tokens_total")
    body, content_type = form_of(wav(300), model="endless", stream=str(stream).lower(), chunking_strategy=chunking)
    head = [
        "POST /v1/audio/transcriptions HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
    ]
    num_ended = num_failed(server)
    with server.connect() as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode() + body)
        server.wait_for(lambda: server.metric("sardonyx_num_requests_running"))
        if stream:
            assert connection.recv(10)
        assert server.metric("nv_inference_pending_request_count") == 1
    server.wait_for(server.is_idle)
    assert server.metric("nv_inference_pending_request_count") == 0
    assert num_failed(server) == num_ended + 1
    # Of ten windows with six tries each hardly any had been done.
    assert server.metric("sardonyx_generation_tokens_total") - before < 10 * 6 * 64 / 2


def num_failed(server):
    status, answer = server.request("GET", "/v2/models/endless/stats")
    assert status == 200
    return answer["model_stats"][0]["inference_stats"]["fail"]["count"]


def form_of(sound, **fields):
    edge = "edge-of-the-form"
    parts = [
        f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    ]
    head = f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    body = "".join(parts).encode() + head.encode() + sound + f"\r\n--{edge}--\r\n".encode()
    return body, f"multipart/form-data; boundary={edge}"


# As tensors


def test_sound_as_a_tensor_becomes_text(tensor_client):
    module, client = tensor_client
    audio = module.InferInput("audio", [1], "BYTES")
    audio.set_data_from_numpy(np.array([wav()], np.object_))
    answer = client.infer("tiny", [audio])
    assert answer.as_numpy("text").tolist() == [TEXT.encode()]
    assert answer.as_numpy("language").tolist() == [b"en"]
    assert json.loads(answer.as_numpy("segments")[0]) == [
        {"start": start, "end": end, "text": text} for start, end, text in SEGMENTS
    ]
    answer = client.infer(
        "tiny",
        [audio],
        outputs=[module.InferRequestedOutput("text")],
        parameters={"task": "translate", "language": "de", "prompt": "x"},
    )
    assert answer.as_numpy("text").tolist() == [TRANSLATION.encode()]
    assert answer.as_numpy("segments") is None


def test_model_describes_its_tensors(tensor_client):
    module, client = tensor_client
    metadata = client.get_model_metadata("tiny")
    if module is tritonclient.grpc:
        inputs, outputs = (
            [(each.name, each.datatype) for each in part] for part in (metadata.inputs, metadata.outputs)
        )
    else:
        inputs, outputs = (
            [(each["name"], each["datatype"]) for each in metadata[part]] for part in ("inputs", "outputs")
        )
    assert inputs == [("audio", "BYTES")]
    assert outputs == [("text", "BYTES"), ("language", "BYTES"), ("segments", "BYTES")]
    assert client.is_model_ready("tiny")


@pytest.mark.parametrize(
    ("sound", "parameters", "words"),
    [(b"no sound", {}, "no sound that can be read"), (wav(), {"task": "sing"}, "task"), (wav(), {"beams": 5}, "beams")],
)
def test_what_makes_no_sense_as_tensors_is_refused(tensor_client, sound, parameters, words):
    module, client = tensor_client
    audio = module.InferInput("audio", [1], "BYTES")
    audio.set_data_from_numpy(np.array([sound], np.object_))
    with pytest.raises(Exception, match=words):
        client.infer("tiny", [audio], parameters=parameters)


def test_generate_takes_no_sound_but_says_so(server):
    """JSON has no bytes."""
    status, answer = server.request("POST", "/v2/models/tiny/generate", {"audio": "no sound"})
    assert status == 400
    assert "sound" in answer["error"]
