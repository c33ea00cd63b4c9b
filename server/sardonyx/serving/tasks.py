"""What the endpoints beyond text generation ask of models: the task of each family, and what passes to and fro.

Floor 4. `serving.embeddings`, `serving.reranker`, `serving.classifier` and `serving.image_classifier` carry them out;
`api` sees no more than this.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

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
