"""What the endpoints beyond text generation ask of models: the task of each family, and what passes to and fro.

Floor 4. `serving.embeddings`, `serving.reranker`, `serving.classifier` and `serving.image_classifier` carry them out;
`api` sees no more than this.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

from sardonyx.errors import ServeError
from sardonyx.processing.transcript import Segment, Thresholds
from sardonyx.processing.voice_activity import VoiceOptions
from sardonyx.serving.options import TokenInfo

TextInput = str | list[int]
"""A text, or its token ids as the caller's tokeniser gave them: they are taken as they are, nothing is put around."""


class EncodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller may say about how texts become rows of a model."""

    truncate: int | bool | None = None
    """Cut longer texts: to so many tokens, special ones among them, or where true to what the model takes. False:
    refuse them. ``None``: as the model's config says, which refuses them by default."""
    truncation_side: Literal["right", "left"] = "right"
    """The side that is cut off."""
    add_special_tokens: bool = True
    timeout_s: float | None = None
    """Most time for the whole call; ``None``: the server's."""


class Encoded(msgspec.Struct, frozen=True, kw_only=True):
    """What a model made of a call's items, in their order."""

    values: npt.NDArray[np.float32]
    """(items, width), finite."""
    num_tokens: int
    """That the model read, of all items."""


@runtime_checkable
class EmbeddingTask(Protocol):
    """Texts become vectors. Every method raises what `Task` says."""

    name: str
    max_model_len: int
    size: int
    """Numbers of an embedding."""
    is_normalized: bool
    """Embeddings have length 1."""
    similarity: Literal["cosine", "dot", "euclidean", "manhattan"]
    """What the model was trained to be compared with."""
    prompts: Mapping[str, str]
    default_prompt: str | None
    """A name of `prompts`."""
    matryoshka_dims: Sequence[int]
    allows_any_dimensions: bool
    """The operator lets callers cut embeddings to any size."""

    async def embed(self, inputs: Sequence[TextInput], *, prompt: str = "", options: EncodeOptions) -> Encoded:
        """An embedding of each input.

        Args:
            inputs: at least one.
            prompt: a text to put in front of each input, the words and not the name. Not with token ids.
            options: see there.

        Raises:
            InvalidRequest: an input that is empty or holds a token id outside of the vocabulary; `param` is "input".
            ContextLengthExceeded: an input is too long.
            Overloaded: the queue is full.
            DeadlineExceeded: the time was over.
            ModelNotReady: the model is being unloaded.
            EngineError: the model failed, or gave a number that is not finite.
        """
        ...


@runtime_checkable
class RerankTask(Protocol):
    """A text is judged against a query (a cross-encoder)."""

    name: str
    max_model_len: int

    async def rerank(self, pairs: Sequence[tuple[str, str]], *, options: EncodeOptions) -> Encoded:
        """A score in [0, 1] (or a bare logit where the model has no activation) of each (query, text): (pairs, 1).

        Of a pair that is too long the text is cut, never the query. Raises as `EmbeddingTask.embed`.
        """
        ...


@runtime_checkable
class ClassifyTask(Protocol):
    """Texts get a score for each label."""

    name: str
    max_model_len: int
    labels: Sequence[str]
    moderation: "Mapping[str, Sequence[CategoryRule]]"
    """Rules by label: what a label says about OpenAI's moderation categories. Empty: the model is no moderator."""

    async def classify(self, texts: Sequence[str], *, options: EncodeOptions) -> Encoded:
        """Scores in [0, 1] of each text: (texts, labels). An empty text scores as the model says.

        With ``options.truncate`` at its default, long texts are judged in overlapping windows, and each label's highest
        score counts. Raises as `EmbeddingTask.embed`.
        """
        ...


@runtime_checkable
class ImageClassifyTask(Protocol):
    """Pictures get a score for each label."""

    name: str
    labels: Sequence[str]
    moderation: "Mapping[str, Sequence[CategoryRule]]"

    async def classify_images(self, images: Sequence[bytes], *, timeout_s: float | None = None) -> Encoded:
        """Scores in [0, 1] of each encoded picture (PNG, JPEG, WebP, GIF's first frame): (images, labels).

        Raises:
            InvalidRequest: no picture, a damaged one, one with too many pixels; says which by its index.
            Overloaded, DeadlineExceeded, ModelNotReady, EngineError: as `EmbeddingTask.embed`.
        """
        ...


class CategoryRule(msgspec.Struct, frozen=True):
    """One label speaks for one moderation category."""

    category: str
    """``harassment/threatening``."""
    threshold: float
    """A score of so much or more flags it."""


class TranscriptionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller may say about how a sound becomes text."""

    task: Literal["transcribe", "translate"] = "transcribe"
    """Translations are into English."""
    languages: tuple[str, ...] = ()
    """Codes. One: that is spoken. More: one of them is; none: any. Then the first thirty seconds tell which."""
    prompt: str = ""
    """A text as if it came before the sound: it sets names, spelling and style."""
    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Tried one after the other, until a window's result is good enough."""
    has_timestamps: bool = True
    """Segments have times; without, a window is one."""
    has_words: bool = False
    """Words have times."""
    has_logprobs: bool = False
    """Tokens have log-probabilities."""
    chunking: VoiceOptions | None = None
    """Cut the sound where nobody speaks, and decode the parts at once; ``None``: from begin to end, each window with
    the text before it."""
    conditions_on_previous_text: bool = True
    thresholds: Thresholds = Thresholds()
    seed: int | None = None
    timeout_s: float | None = None
    """Most time for the whole call; ``None``: the server's."""


@runtime_checkable
class TranscriptionTask(Protocol):
    """Sound becomes text."""

    name: str
    languages: Sequence[str]
    """Codes that the model knows."""
    is_multilingual: bool
    has_words: bool
    """Words can have times."""

    async def start(self, sound: bytes, options: TranscriptionOptions, *, request_id: str) -> "Transcript":
        """Begin to transcribe an encoded sound. Whoever gets one must end it: read it to the end, or `abort`.

        Raises:
            InvalidRequest: the sound cannot be read, or the model does not know the language or the task.
            PayloadTooLarge: the sound is too long.
            Overloaded: the queue is full.
            ModelNotReady: the model is being unloaded.
            DeadlineExceeded: the time was over.
        """
        ...


class HeardWindow(msgspec.Struct, frozen=True):
    """What a window of a sound gave."""

    segments: list[Segment]
    """With text, in order; none where nobody speaks."""
    tokens: list[TokenInfo]
    """Of the segments' text, where log-probabilities were asked for."""
    num_tokens: int
    """That were generated."""


class Transcript(Protocol):
    """A transcription under way."""

    id: str
    duration_s: float
    """Of the sound."""
    language: str
    """Code of what is spoken; known from the first segments on."""
    num_tokens: int
    """Generated so far."""

    def __aiter__(self) -> AsyncIterator[HeardWindow]:
        """Windows with segments as they become final, in order.

        Raises:
            EngineError, EngineDead, DeadlineExceeded, Overloaded, ModelNotReady: before the end.
        """
        ...

    async def collect(self) -> list[HeardWindow]:
        """All of them. Raises what the iterator raises."""
        ...

    def abort(self, error: ServeError | None = None) -> None:
        """End it. Synchronous, idempotent."""
        ...


class ImageOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller may say about pictures."""

    prompt: str
    negative_prompt: str = ""
    """What the picture should not be like, where the model is guided."""
    n: int = 1
    size: tuple[int, int] | None = None
    """Height and width; ``None``: the model's own, or with `source` about as many pixels in that picture's shape."""
    steps: int | None = None
    """Rounds; ``None``: the model's own."""
    guidance: float | None = None
    """How strictly the prompt is followed; ``None``: the model's own."""
    sampler: str | None = None
    """A name of `repository.scheduler_config.SAMPLER_NAMES`; ``None``: the model's own."""
    seed: int | None = None
    """Of the first picture; the others have those that follow. Same seed, same wishes: same picture."""
    num_previews: int = 0
    """Of each picture, on its way."""
    source: bytes | None = None
    """An encoded picture to begin with."""
    mask: bytes | None = None
    """Where it is to change: see `processing.picture.read_mask`."""
    strength: float = 0.8
    """How much of the source is given up, above 0 and up to 1."""
    timeout_s: float | None = None
    """Most time for the whole call; ``None``: the server's."""


class ImageUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a picture costs, in tokens: of pictures, one for each place of their latents."""

    num_text_tokens: int
    """Of the prompt."""
    num_source_tokens: int
    """Of the picture to begin with."""
    num_picture_tokens: int


class PictureUpdate(msgspec.Struct, frozen=True):
    """News of one picture of a call."""

    index: int
    pixels: npt.NDArray[np.uint8]
    """(Y, X, 3); of a preview one for each of the latents."""
    is_final: bool


@runtime_checkable
class ImageTask(Protocol):
    """A prompt becomes pictures."""

    name: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of pictures for which nobody asks for another."""
        ...

    @property
    def default_steps(self) -> int:
        """Of a picture."""
        ...

    @property
    def max_steps(self) -> int:
        """Of a picture."""
        ...

    async def start(self, options: ImageOptions, *, request_id: str) -> "Pictures":
        """Begin to make pictures. Whoever gets them must end them: read them to the end, or `abort`.

        Raises:
            InvalidRequest: a size, number of steps or sampler that the model does not have, or a picture that cannot be
                read.
            ContextLengthExceeded: a prompt is too long.
            UnsupportedFeature: the model begins with no picture, or has no previews.
            Overloaded: the queue is full.
            ModelNotReady: the model is being unloaded.
            DeadlineExceeded: the time was over.
        """
        ...


class Pictures(Protocol):
    """Pictures under way."""

    id: str
    size: tuple[int, int]
    """Height and width."""
    usage: ImageUsage
    """Of each of them."""

    def __aiter__(self) -> AsyncIterator[PictureUpdate]:
        """Previews and finished pictures as they come.

        Raises:
            InvalidRequest: the model's moderator flagged one of them; code ``moderation_blocked``.
            EngineError, EngineDead, DeadlineExceeded, Overloaded, ModelNotReady: before the end.
        """
        ...

    async def collect(self) -> list[PictureUpdate]:
        """The finished pictures, by index. Raises what the iterator raises."""
        ...

    def abort(self, error: ServeError | None = None) -> None:
        """End them. Synchronous, idempotent."""
        ...
