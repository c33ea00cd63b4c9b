"""Which model an endpoint gets: by name, by family, and what is said where there is none."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from tests.serving.fake_models import FakeSource, FakeVersion

from sardonyx.errors import ConfigError, InvalidRequest, ModelNotFound, ModelNotReady
from sardonyx.serving.registry import Registry
from sardonyx.serving.served import LoadedModel, ModelOverride
from sardonyx.serving.task_finder import TaskFinder
from sardonyx.serving.tasks import CategoryRule, Encoded, EncodeOptions, TextInput, Transcript, TranscriptionOptions

ZERO = Encoded(values=np.zeros((1, 1), np.float32), num_tokens=1)


class Embedder:
    name, max_model_len, size = "e", 8, 1
    is_normalized, similarity = True, "cosine"
    prompts: dict[str, str] = {}  # noqa: RUF012
    default_prompt = None
    matryoshka_dims = ()
    allows_any_dimensions = False

    async def embed(self, inputs: Sequence[TextInput], *, prompt: str = "", options: EncodeOptions) -> Encoded:
        return ZERO


class Reranker:
    name, max_model_len = "r", 8

    async def rerank(self, pairs: Sequence[tuple[str, str]], *, options: EncodeOptions) -> Encoded:
        return ZERO


class Classifier:
    name, max_model_len, labels = "c", 8, ("rude",)

    def __init__(self, *, moderates: bool = True) -> None:
        self.moderation = {"rude": [CategoryRule("harassment", 0.5)]} if moderates else {}

    async def classify(self, texts: Sequence[str], *, options: EncodeOptions) -> Encoded:
        return ZERO


class Source(FakeSource):
    """Each model has the task that the test says."""

    def __init__(self, **models: tuple[str, object]) -> None:
        super().__init__()
        self.tasks = {name: task for name, (_, task) in models.items()}
        for name, (family, _) in models.items():
            self.write(name, family=family)

    def load(self, name: str, override: ModelOverride | None = None) -> LoadedModel:
        loaded = super().load(name, override)
        for version in loaded.versions.values():
            assert isinstance(version, FakeVersion)
            version.task = self.tasks[name]
        return loaded


def started(source: Source, *unloaded: str) -> TaskFinder:
    """Looking for tasks needs no event loop, so the one that loaded the models is gone."""
    registry = source.registry = Registry(source, aliases={"alias": "a"})

    async def start() -> None:
        await registry.start()
        for name in unloaded:
            await registry.unload(name)

    asyncio.run(start())
    return TaskFinder(registry)


def test_first_model_of_the_family_serves_where_none_is_named():
    embedder = Embedder()
    finder = started(Source(a=("classifier", Classifier()), b=("embeddings", embedder), c=("embeddings", Embedder())))
    assert finder.embedder(None) is embedder
    assert finder.embedder("") is embedder


def test_alias_is_followed():
    embedder = Embedder()
    finder = started(Source(a=("embeddings", embedder)))
    assert finder.embedder("alias") is embedder


def test_model_of_another_family_is_refused_by_name():
    finder = started(Source(a=("classifier", Classifier())))
    with pytest.raises(InvalidRequest, match="model a is not an embedding model") as caught:
        finder.embedder("a")
    assert caught.value.param == "model"


def test_missing_model_is_told_with_its_code():
    finder = started(Source())
    with pytest.raises(ModelNotFound, match="there is no embedding model in the repository") as caught:
        finder.embedder(None)
    assert caught.value.code == "model_not_found"
    with pytest.raises(ModelNotFound, match="`gone` does not exist"):
        finder.embedder("gone")


def test_reranker_scores_before_an_embedding_model():
    reranker, embedder = Reranker(), Embedder()
    finder = started(Source(a=("embeddings", embedder), b=("reranker", reranker)))
    assert finder.scorer(None) is reranker
    assert finder.scorer("a") is embedder


def test_embedding_model_scores_where_there_is_no_reranker():
    embedder = Embedder()
    finder = started(Source(a=("embeddings", embedder)))
    assert finder.scorer(None) is embedder


def test_judges_are_the_models_with_moderation_rules():
    judge = Classifier()
    finder = started(
        Source(a=("classifier", judge), b=("classifier", Classifier(moderates=False)), c=("embeddings", Embedder()))
    )
    assert finder.judges() == [judge]
    assert finder.judge("a") is judge
    with pytest.raises(InvalidRequest, match="model b judges no moderation category"):
        finder.judge("b")


def test_failed_moderator_is_an_error_and_never_left_out():
    source = Source(a=("classifier", Classifier()), b=("classifier", Classifier()))
    source.errors["b"] = ConfigError("is broken", file="model.onnx")
    finder = started(source)
    with pytest.raises(ModelNotReady, match=r"model b is unavailable: model\.onnx: is broken"):
        finder.judges()


def test_unloaded_moderator_is_left_out():
    judge = Classifier()
    source = Source(a=("classifier", judge), b=("classifier", Classifier()))
    finder = started(source, "b")
    assert finder.judges() == [judge]


class Transcriber:
    name, languages, is_multilingual, has_words = "t", ("en",), False, False

    async def start(self, sound: bytes, options: TranscriptionOptions, *, request_id: str) -> Transcript:
        raise NotImplementedError


@pytest.mark.parametrize("name", [None, "", "b", "whisper-1"])
def test_openais_name_and_none_mean_the_first_speech_model(name):
    transcriber = Transcriber()
    finder = started(Source(a=("embeddings", Embedder()), b=("whisper", transcriber), c=("whisper", Transcriber())))
    assert finder.transcriber(name) is transcriber


def test_operators_model_of_openais_name_goes_first():
    transcriber = Transcriber()
    source = Source(a=("whisper", Transcriber()))
    source.write("whisper-1", family="whisper")
    source.tasks["whisper-1"] = transcriber
    assert started(source).transcriber("whisper-1") is transcriber


def test_other_names_of_openais_are_not_found():
    finder = started(Source(a=("whisper", Transcriber())))
    with pytest.raises(ModelNotFound, match="gpt-4o-transcribe"):
        finder.transcriber("gpt-4o-transcribe")


def test_model_that_hears_nothing_is_refused_by_name():
    finder = started(Source(a=("embeddings", Embedder()), b=("whisper", Transcriber())))
    with pytest.raises(InvalidRequest, match="model a is not a speech model"):
        finder.transcriber("a")


def test_speech_model_that_is_missing_or_unloaded_is_told():
    with pytest.raises(ModelNotFound, match="no speech model"):
        started(Source(a=("embeddings", Embedder()))).transcriber("whisper-1")
    with pytest.raises(ModelNotReady):
        started(Source(a=("whisper", Transcriber())), "a").transcriber("whisper-1")


class Painter:
    name = "painter"
    size = (512, 512)
    default_steps = 30
    max_steps = 100

    async def start(self, options, *, request_id):
        raise NotImplementedError


@pytest.mark.parametrize(
    "name", [None, "", "b", "dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-2-2026-04-21", "chatgpt-image-latest"]
)
def test_openais_names_and_none_mean_the_first_image_model(name):
    painter = Painter()
    finder = started(Source(a=("embeddings", Embedder()), b=("diffusion", painter), c=("diffusion", Painter())))
    assert finder.painter(name) is painter


def test_operators_model_of_openais_name_paints_first():
    painter = Painter()
    source = Source(a=("diffusion", Painter()))
    source.write("dall-e-3", family="diffusion")
    source.tasks["dall-e-3"] = painter
    assert started(source).painter("dall-e-3") is painter


@pytest.mark.parametrize("name", ["dall-e", "dall-e-30", "gpt-4o", "whisper-1", "xgpt-image-1"])
def test_names_of_other_models_paint_nothing(name):
    with pytest.raises(ModelNotFound):
        started(Source(a=("diffusion", Painter()))).painter(name)


def test_model_that_paints_nothing_is_refused_by_name():
    finder = started(Source(a=("embeddings", Embedder()), b=("diffusion", Painter())))
    with pytest.raises(InvalidRequest, match="model a is not an image model"):
        finder.painter("a")


def test_image_model_that_is_missing_or_unloaded_is_told():
    with pytest.raises(ModelNotFound, match="no image model"):
        started(Source(a=("embeddings", Embedder()))).painter("dall-e-3")
    with pytest.raises(ModelNotReady):
        started(Source(a=("diffusion", Painter())), "a").painter("dall-e-3")
