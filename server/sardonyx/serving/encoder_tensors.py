"""Encoder models and image classifiers as tensors: strings in, numbers out, as KServe-v2 has them.

Floor 4. Each model has one face. The batch axis holds the items of a call: each goes its own way through the steps.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sardonyx.errors import InvalidRequest
from sardonyx.serving.call_parameters import convert_parameters
from sardonyx.serving.classifier import TextClassifier
from sardonyx.serving.embeddings import EmbeddingModel
from sardonyx.serving.reranker import RerankerModel
from sardonyx.serving.task_tensors import Face
from sardonyx.serving.tasks import Encoded, EncodeOptions, ImageClassifyTask
from sardonyx.serving.tensor_checks import BoundCall
from sardonyx.tensors import Parameter, Tensor, TensorMetadata

MAX_BATCH_SIZE = 2048
"""Items of a call, where the operator's config does not say; as many as OpenAI takes."""


class TextCallParameters(msgspec.Struct, frozen=True, kw_only=True):
    """What a call to a text model may set. A misspelt name is refused: it would change the answer in silence."""

    truncate: bool | Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    """See `EncodeOptions`."""


class EmbeddingCallParameters(TextCallParameters, frozen=True, kw_only=True):
    """What a call to an embedding model may set."""

    prompt_name: str | None = None
    """Of the model's prompts; without it the default prompt is put in front, where the model has one."""


class ImageCallParameters(msgspec.Struct, frozen=True, kw_only=True):
    """A call to an image classifier has nothing to set."""


def embedding_face(model: EmbeddingModel) -> Face:
    """``text`` to ``embeddings``."""

    async def answer(columns: list[list[Any]], parameters: Mapping[str, Parameter]) -> Encoded:
        asked = convert_parameters(parameters, EmbeddingCallParameters, "an embedding model")
        name = model.default_prompt if asked.prompt_name is None else asked.prompt_name
        if name is not None and name not in model.prompts:
            known = f"has {', '.join(model.prompts)}" if model.prompts else "has none"
            raise InvalidRequest(f"prompt_name: the model has no prompt {name[:80]!r}; it {known}", param="prompt_name")
        prompt = "" if name is None else model.prompts[name]
        return await model.embed(columns[0], prompt=prompt, options=EncodeOptions(truncate=asked.truncate))

    return _face(("text",), "embeddings", model.size, answer)


def reranker_face(model: RerankerModel) -> Face:
    """``query`` and ``text`` to ``score``."""

    async def answer(columns: list[list[Any]], parameters: Mapping[str, Parameter]) -> Encoded:
        asked = convert_parameters(parameters, TextCallParameters, "a reranker")
        pairs = list(zip(*columns, strict=True))
        return await model.rerank(pairs, options=EncodeOptions(truncate=asked.truncate))

    return _face(("query", "text"), "score", 1, answer)


def classifier_face(model: TextClassifier) -> Face:
    """``text`` to ``scores``."""

    async def answer(columns: list[list[Any]], parameters: Mapping[str, Parameter]) -> Encoded:
        asked = convert_parameters(parameters, TextCallParameters, "a classifier")
        return await model.classify(columns[0], options=EncodeOptions(truncate=asked.truncate))

    return _face(("text",), "scores", len(model.labels), answer, labels=model.labels)


def image_face(model: ImageClassifyTask, *, max_batch_size: int) -> Face:
    """``image``, an encoded picture an element, to ``scores``; so many at once, where the config does not say."""

    async def answer(columns: list[list[Any]], parameters: Mapping[str, Parameter]) -> Encoded:
        convert_parameters(parameters, ImageCallParameters, "an image classifier")
        return await model.classify_images(columns[0])

    width = len(model.labels)
    return _face(
        ("image",), "scores", width, answer, are_texts=False, labels=model.labels, max_batch_size=max_batch_size
    )


def _face(
    inputs: tuple[str, ...],
    output: str,
    width: int,
    answer: Callable[[list[list[Any]], Mapping[str, Parameter]], Awaitable[Encoded]],
    *,
    are_texts: bool = True,
    labels: Sequence[str] = (),
    max_batch_size: int = MAX_BATCH_SIZE,
) -> Face:
    """From an item of each input to so many numbers of the output; `answer` gets the items of each input."""

    async def tensors(bound: BoundCall, parameters: Mapping[str, Parameter]) -> list[Tensor]:
        columns = [bound.inputs[name].reshape(-1).tolist() for name in inputs]
        encoded = await answer(columns, parameters)
        return [Tensor(output, "FP32", encoded.values)]

    return Face(
        inputs=tuple(TensorMetadata(name=name, datatype="BYTES", shape=(-1, 1)) for name in inputs),
        outputs=(TensorMetadata(name=output, datatype="FP32", shape=(-1, width)),),
        are_texts=are_texts,
        max_batch_size=max_batch_size,
        labels=labels,
        answer=tensors,
    )
