"""``POST /v1/audio/transcriptions`` and ``/v1/audio/translations``: sound becomes text.

Floor 5.
"""

import secrets
from typing import Any, Literal

import msgspec
from litestar import Controller, Request, Response

from sardonyx.api.dependencies import Tasks
from sardonyx.api.disconnect import while_connected
from sardonyx.api.form import read_form
from sardonyx.api.openai.audio_replies import Reply, TranscriptFrames
from sardonyx.api.openai.audio_schemas import (
    MAX_KEYWORDS,
    AudioForm,
    ServerVad,
    TranscriptionForm,
    TranscriptionReply,
    TranslationForm,
    VerboseReply,
)
from sardonyx.api.openai.options import request_timeout_s
from sardonyx.api.openai.sse import EventStream, OpenStream
from sardonyx.api.openapi import form_post
from sardonyx.errors import InvalidRequest, UnsupportedFeature
from sardonyx.processing.languages import language_code
from sardonyx.processing.voice_activity import VoiceOptions
from sardonyx.serving.tasks import HeardWindow, TranscriptionOptions, TranscriptionTask

_STREAMED = ("json", "text")
_TEXTS = ("text/plain", "text/vtt")
_NAMES = {"transcribe": "transcription", "translate": "translation"}


class AudioController(Controller):
    """Speech recognition by the Whisper models of the repository."""

    tags = ("Audio",)

    @form_post("/v1/audio/transcriptions", TranscriptionForm, TranscriptionReply | VerboseReply, media_types=_TEXTS)
    async def create_transcription(self, request: Request[Any, Any, Any], tasks: Tasks) -> Response[bytes]:
        """What is said in a sound, in its own language; as a whole or as events."""
        form = await read_form(request, TranscriptionForm)
        _check(form)
        return await _answer(form, _options(form, "transcribe", request), request, tasks)

    @form_post("/v1/audio/translations", TranslationForm, TranscriptionReply | VerboseReply, media_types=_TEXTS)
    async def create_translation(self, request: Request[Any, Any, Any], tasks: Tasks) -> Response[bytes]:
        """What is said in a sound, in English."""
        form = await read_form(request, TranslationForm)
        if form.response_format == "diarized_json":
            raise _no_speakers("response_format")
        return await _answer(form, _options(form, "translate", request), request, tasks)


async def _answer(
    form: AudioForm, options: TranscriptionOptions, request: "Request[Any, Any, Any]", tasks: Tasks
) -> Response[bytes]:
    task = tasks.transcriber(form.model)
    return await while_connected(request.receive, _transcribe(form, options, task))


async def _transcribe(form: AudioForm, options: TranscriptionOptions, task: TranscriptionTask) -> Response[bytes]:
    request_id = f"{_NAMES[options.task]}-{secrets.token_hex(12)}"
    transcript = await task.start(form.file, options, request_id=request_id)
    if isinstance(form, TranscriptionForm) and form.stream:
        stream: OpenStream[HeardWindow] = OpenStream(transcript)
        await stream.wait()
        frames = TranscriptFrames(transcript, has_logprobs=options.has_logprobs)
        return EventStream(stream, frame=frames.delta, last=frames.done)
    windows = await transcript.collect()
    reply = Reply(transcript, windows, options)
    granularities = form.timestamp_granularities if isinstance(form, TranscriptionForm) else []
    match form.response_format:
        case "verbose_json":
            return _json(reply.verbose(has_segments=set(granularities) != {"word"}))
        case "json":
            return _json(reply.short(has_usage=options.task == "transcribe"))
        case "text":
            return _text(f"{reply.text}\n", "text/plain")
        case "srt":
            return _text(reply.srt(), "text/plain")
        case _:
            return _text(reply.vtt(), "text/vtt")


def _json(reply: msgspec.Struct) -> Response[bytes]:
    return Response(msgspec.json.encode(reply), media_type="application/json", status_code=200)


def _text(text: str, media_type: str) -> Response[bytes]:
    # Litestar names the charset of whatever is text/*.
    return Response(text.encode(), media_type=media_type, status_code=200)


def _check(form: TranscriptionForm) -> None:
    """Refuse what we cannot do, and fields that contradict each other.

    Raises:
        UnsupportedFeature: telling speakers apart.
        InvalidRequest: timestamps, log-probabilities or events in a format that has no place for them.
    """
    for field in ("known_speaker_names", "known_speaker_references"):
        if getattr(form, field):
            raise _no_speakers(field)
    if form.response_format == "diarized_json":
        raise _no_speakers("response_format")
    if form.timestamp_granularities and form.response_format != "verbose_json":
        raise InvalidRequest(
            "timestamp_granularities: needs response_format verbose_json", param="timestamp_granularities"
        )
    if form.include and form.response_format != "json":
        raise InvalidRequest("include: logprobs need response_format json", param="include")
    if form.stream and form.response_format not in _STREAMED:
        raise InvalidRequest(f"stream: needs response_format {' or '.join(_STREAMED)}", param="stream")
    if len(form.keywords) > MAX_KEYWORDS:
        raise InvalidRequest(f"keywords: has {len(form.keywords)}; at most {MAX_KEYWORDS}", param="keywords")
    if form.language and form.languages:
        raise InvalidRequest("languages: cannot be given together with language", param="languages")


def _no_speakers(field: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"{field}: no model of this server tells speakers apart; leave it out", param=field)


def _options(
    form: TranscriptionForm | TranslationForm,
    task: Literal["transcribe", "translate"],
    request: "Request[Any, Any, Any]",
) -> TranscriptionOptions:
    languages: tuple[str, ...] = (_code(form.language, "language"),) if form.language else ()
    prompt, has_words, has_logprobs = form.prompt, False, False
    if isinstance(form, TranscriptionForm):
        languages = languages or tuple(_code(name, "languages") for name in form.languages)
        # As a text before the sound would have them: the model takes up words that it has just seen.
        prompt = " ".join(part for part in (", ".join(form.keywords), form.prompt) if part)
        has_words, has_logprobs = "word" in form.timestamp_granularities, bool(form.include)
    options = TranscriptionOptions(
        task=task,
        languages=languages,
        prompt=prompt,
        has_words=has_words,
        has_logprobs=has_logprobs,
        chunking=_chunking(form.chunking_strategy),
        conditions_on_previous_text=form.condition_on_previous_text,
        seed=form.seed,
        timeout_s=request_timeout_s(request),
    )
    return msgspec.structs.replace(options, temperatures=(form.temperature,)) if form.temperature else options


def _code(name: str, field: str) -> str:
    code = language_code(name)
    if code is None:
        raise InvalidRequest(
            f"{field}: {name[:80]!r} is no language that Whisper knows; send a code as en", param=field
        )
    return code


def _chunking(strategy: "Literal['auto'] | ServerVad | None") -> VoiceOptions | None:
    if strategy is None:
        return None
    if strategy == "auto":
        return VoiceOptions()
    return VoiceOptions(
        threshold=strategy.threshold,
        speech_pad_ms=strategy.prefix_padding_ms,
        min_silence_ms=strategy.silence_duration_ms,
    )
