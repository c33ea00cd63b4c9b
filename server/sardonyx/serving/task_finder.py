"""Which model a request to an endpoint beyond text generation means.

Floor 4. The registry knows names and families; this knows what each family's models can be asked for.
"""

import re

from sardonyx.errors import InvalidRequest, ModelNotFound, ModelNotReady
from sardonyx.serving.entry import DIFFUSION_FAMILY, IMAGE_CLASSIFIER, SPEECH_FAMILY
from sardonyx.serving.registry import ModelState, Registry
from sardonyx.serving.tasks import (
    ClassifyTask,
    EmbeddingTask,
    ImageClassifyTask,
    ImageTask,
    RerankTask,
    TranscriptionTask,
)

_EMBEDDINGS = frozenset({"embeddings"})
_SCORING = frozenset({"embeddings", "reranker"})
_IMAGES = frozenset({DIFFUSION_FAMILY})
_SPEECH = frozenset({SPEECH_FAMILY})
_JUDGING = frozenset({"classifier", IMAGE_CLASSIFIER})

ANY_PAINTER = re.compile(r"dall-e-[23]|gpt-image-[\w.-]+|chatgpt-image-latest")
"""Operators' aliases of these names go first."""
ANY_TRANSCRIBER = "whisper-1"
"""An operator's alias of this name goes first."""

Judge = ClassifyTask | ImageClassifyTask


class TaskFinder:
    """Finds tasks by the names of models. Every method raises what `Registry.newest` does."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def embedder(self, name: str | None) -> EmbeddingTask:
        """For ``/v1/embeddings``."""
        task = self._registry.newest(name, _EMBEDDINGS, "embedding model").task
        assert isinstance(task, EmbeddingTask)
        return task

    def scorer(self, name: str | None) -> RerankTask | EmbeddingTask:
        """For ``/v1/rerank`` and ``/v1/score``: a reranker, or an embedding model, whose embeddings are compared.

        Of several a reranker comes first where none is named.
        """
        families = _SCORING
        if not name and self._registry.of_families(frozenset({"reranker"})):
            families = frozenset({"reranker"})
        task = self._registry.newest(name, families, "reranker or embedding model").task
        assert isinstance(task, RerankTask | EmbeddingTask)
        return task

    def transcriber(self, name: str | None) -> TranscriptionTask:
        """For ``/v1/audio/transcriptions`` and ``/translations``. OpenAI's name, `ANY_TRANSCRIBER`, means any."""
        try:
            task = self._registry.newest(name, _SPEECH, "speech model").task
        except ModelNotFound:
            if name != ANY_TRANSCRIBER:
                raise
            task = self._registry.newest(None, _SPEECH, "speech model").task
        assert isinstance(task, TranscriptionTask)
        return task

    def painter(self, name: str | None) -> ImageTask:
        """For ``/v1/images/``. OpenAI's names, `ANY_PAINTER`, mean any."""
        try:
            task = self._registry.newest(name, _IMAGES, "image model").task
        except ModelNotFound:
            if name is None or not ANY_PAINTER.fullmatch(name):
                raise
            task = self._registry.newest(None, _IMAGES, "image model").task
        assert isinstance(task, ImageTask)
        return task

    def judge(self, name: str) -> Judge:
        """A moderator by its name.

        Raises:
            InvalidRequest: also where the model's config maps none of its labels to a category.
        """
        model = self._registry.newest(name, _JUDGING, "moderation model")
        task = model.task
        assert isinstance(task, ClassifyTask | ImageClassifyTask)
        if not task.moderation:
            raise InvalidRequest(
                f"model {model.name} judges no moderation category: its config has no parameter moderation.<label>",
                param="model",
            )
        return task

    def judges(self) -> list[Judge]:
        """Every moderator of the repository, by name.

        Raises:
            ModelNotReady: one of them is loading or failed. Without it the answer would be milder than it should be.
        """
        found: list[Judge] = []
        for status in self._registry.of_families(_JUDGING):
            if status.state is not ModelState.READY:
                if status.reason in {"unloaded", "not loaded"}:
                    continue
                reason = f": {status.reason}" if status.reason else ""
                raise ModelNotReady(f"model {status.name} is {status.state.lower()}{reason}")
            task = self._registry.newest(status.name, _JUDGING, "moderation model").task
            assert isinstance(task, ClassifyTask | ImageClassifyTask)
            if task.moderation:
                found.append(task)
        return found
