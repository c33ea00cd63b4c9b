"""Forms and answers of the audio endpoints, as OpenAI defines them. Floor 5."""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

ResponseFormat = Literal["json", "text", "srt", "verbose_json", "vtt"]
Temperature = Annotated[float, Meta(ge=0, le=1)]
MAX_KEYWORDS = 100


class ServerVad(msgspec.Struct, frozen=True, kw_only=True):
    """How a sound is cut where nobody speaks."""

    type: Literal["server_vad"]
    threshold: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """How much speech has to stand out from the noise."""
    prefix_padding_ms: Annotated[int, Meta(ge=0, le=10_000)] = 300
    """Sound to keep before speech, and behind it."""
    silence_duration_ms: Annotated[int, Meta(ge=0, le=10_000)] = 500
    """A pause that ends speech."""


class AudioForm(msgspec.Struct, frozen=True, kw_only=True):
    """What transcriptions and translations have in common."""

    file: bytes
    """The sound: wav, flac, ogg, mp3 and whatever else libsndfile reads; m4a, mp4 and webm with PyAV installed."""
    model: str | None = None
    """A model or an alias; `whisper-1`, or none: the speech model."""
    prompt: str = ""
    """A text as if it came before the sound: it sets names, spelling and style. The end of a long one counts."""
    response_format: ResponseFormat | Literal["diarized_json"] = "json"
    temperature: Temperature = 0.0
    """0: higher ones are tried where a result repeats itself or is a guess. Others: that one only."""
    chunking_strategy: Literal["auto"] | ServerVad | None = None
    """Cut the sound where nobody speaks, and decode the parts at once. Without it windows follow each other."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """Same seed, same sound: same text, where temperatures above 0 are needed."""
    condition_on_previous_text: bool = True
    """Each window is decoded with the text before it."""


class TranslationForm(AudioForm, frozen=True, kw_only=True):
    """Body of ``/v1/audio/translations``."""

    language: str | None = None
    """That is spoken; without it, the first thirty seconds tell."""


class TranscriptionForm(AudioForm, frozen=True, kw_only=True):
    """Body of ``/v1/audio/transcriptions``."""

    language: str | None = None
    """That is spoken, as a code (`en`) or a name; without it, the first thirty seconds tell."""
    languages: list[str] = []
    """One of which is spoken."""
    keywords: list[Annotated[str, Meta(max_length=200)]] = []
    """Words to expect."""
    timestamp_granularities: list[Literal["word", "segment"]] = []
    """With `verbose_json`; `segment` where none is given."""
    include: list[Literal["logprobs"]] = []
    """With `json`: log-probabilities of the tokens."""
    stream: bool = False
    """With `json` and `text`: events as segments become final."""
    known_speaker_names: list[str] = []
    """Not supported."""
    known_speaker_references: list[str] = []
    """Not supported."""


class AudioUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a request cost."""

    seconds: float
    """Of sound."""
    type: Literal["duration"] = "duration"


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One token of a text."""

    token: str
    logprob: float
    bytes: list[int]


class TranscriptionReply(msgspec.Struct, frozen=True, kw_only=True):
    """Answer in the format ``json``."""

    text: str
    logprobs: list[TokenLogprob] | UnsetType = UNSET
    usage: AudioUsage | UnsetType = UNSET


class SegmentReply(msgspec.Struct, frozen=True, kw_only=True):
    """What was said between two moments."""

    id: int
    seek: int
    """Where its window begins, in hundredths of a second."""
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    """This and the next two are its window's."""
    compression_ratio: float
    no_speech_prob: float


class WordReply(msgspec.Struct, frozen=True, kw_only=True):
    """A word, and when it was said."""

    word: str
    start: float
    end: float


class VerboseReply(msgspec.Struct, frozen=True, kw_only=True):
    """Answer in the format ``verbose_json``."""

    task: Literal["transcribe", "translate"]
    language: str
    """Its English name; of a translation ``english``."""
    duration: float
    """Of the sound, in seconds."""
    text: str
    segments: list[SegmentReply] | UnsetType = UNSET
    words: list[WordReply] | UnsetType = UNSET
    usage: AudioUsage


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, tag="transcript.text.delta", tag_field="type"):
    """An event: more of the text."""

    delta: str
    logprobs: list[TokenLogprob] | UnsetType = UNSET


class TextDone(msgspec.Struct, frozen=True, kw_only=True, tag="transcript.text.done", tag_field="type"):
    """The last event: the whole text."""

    text: str
    logprobs: list[TokenLogprob] | UnsetType = UNSET
    usage: AudioUsage
