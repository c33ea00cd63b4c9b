"""Encoder models and image classifiers as tensors: strings in, numbers out, as KServe-v2 has them.

Floor 4. Each model has one face. The batch axis holds the items of a call: each goes its own way through the steps.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInput, ModelOutput

from sardonyx.errors import InvalidRequest
from sardonyx.serving.call_parameters import convert_parameters
from sardonyx.serving.classifier import TextClassifier
from sardonyx.serving.embeddings import EmbeddingModel
from sardonyx.serving.item_calls import ItemCalls
from sardonyx.serving.reranker import RerankerModel
from sardonyx.serving.served import InferAnswer, InferCall
from sardonyx.serving.strings import has_many
from sardonyx.serving.tasks import Encoded, EncodeOptions, ImageClassifyTask
from sardonyx.serving.tensor_checks import TensorSignature
from sardonyx.statistics import InferenceStatistics
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


class Face(msgspec.Struct, frozen=True, kw_only=True):
    """How a task looks as tensors."""

    inputs: tuple[str, ...]
    """Names; each BYTES of shape [-1, 1]."""
    are_texts: bool
    """They have to be UTF-8."""
    output: str
    """Its name; FP32 of shape [-1, width]."""
    width: int
    labels: Sequence[str] = ()
    """Of the output, by index."""
    answer: Callable[[list[list[Any]], Mapping[str, Parameter]], Awaitable[Encoded]]
    """From the elements of each input, and the call's parameters."""


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

    return Face(inputs=("text",), are_texts=True, output="embeddings", width=model.size, answer=answer)


def reranker_face(model: RerankerModel) -> Face:
    """``query`` and ``text`` to ``score``."""

    async def answer(columns: list[list[Any]], parameters: Mapping[str, Parameter]) -> Encoded:
        asked = convert_parameters(parameters, TextCallParameters, "a reranker")
        pairs = list(zip(*columns, strict=True))
        return await model.rerank(pairs, options=EncodeOptions(truncate=asked.truncate))

    return Face(inputs=("query", "text"), are_texts=True, output="score", width=1, answer=answer)


def classifier_face(model: TextClassifier) -> Face:
    """``text`` to ``scores``."""

    async def answer(columns: list[list[Any]], parameters: Mapping[str, Parameter]) -> Encoded:
        asked = convert_parameters(parameters, TextCallParameters, "a classifier")
        return await model.classify(columns[0], options=EncodeOptions(truncate=asked.truncate))

    width = len(model.labels)
    return Face(inputs=("text",), are_texts=True, output="scores", width=width, labels=model.labels, answer=answer)


def image_face(model: ImageClassifyTask) -> Face:
    """``image``, an encoded picture an element, to ``scores``."""

    async def answer(columns: list[list[Any]], parameters: Mapping[str, Parameter]) -> Encoded:
        convert_parameters(parameters, ImageCallParameters, "an image classifier")
        return await model.classify_images(columns[0])

    width = len(model.labels)
    return Face(inputs=("image",), are_texts=False, output="scores", width=width, labels=model.labels, answer=answer)


class EncoderTensorModel:
    """A `served.ServedModel`: what a task does, as tensors.

    Args:
        task: what the endpoints of the model's family use.
        face: of the task.
        calls: the task's.
        config: what the operator wrote, completed here.
        version: of the model.
        created: Unix time.
        size_bytes: of its files.
    """

    is_decoupled = False

    def __init__(
        self,
        task: object,
        face: Face,
        calls: ItemCalls,
        config: ModelConfig,
        *,
        version: int,
        created: int = 0,
        size_bytes: int = 0,
    ) -> None:
        self.task = task
        self.calls = calls
        self.name = calls.name
        self.version = version
        self.created = created
        self.size_bytes = size_bytes
        self.config = completed(config, face)
        self.inputs = tuple(TensorMetadata(name=name, datatype="BYTES", shape=(-1, 1)) for name in face.inputs)
        self.outputs = (TensorMetadata(name=face.output, datatype="FP32", shape=(-1, face.width)),)
        self._face = face
        self._signature = TensorSignature(self.name, self.inputs, self.outputs, self.config.max_batch_size)

    @property
    def statistics(self) -> InferenceStatistics:
        """Of this version; they outlive it."""
        return self.calls.statistics

    @property
    def is_alive(self) -> bool:
        """Its instances take requests."""
        return self.calls.is_alive

    @property
    def stalled_s(self) -> float:
        """For how long its instances have had work and finished none."""
        return self.calls.stalled_s

    def labels(self, output: str) -> list[str]:
        """Class names of an output."""
        return list(self._face.labels) if output == self._face.output else []

    async def infer(self, call: InferCall) -> InferAnswer:
        """See `served.ServedModel.infer`."""
        bind = functools.partial(self._signature.bind, call, as_text=self._face.are_texts)
        bound = await asyncio.to_thread(bind) if has_many(call.inputs) else bind()
        columns = [bound.inputs[name].reshape(-1).tolist() for name in self._face.inputs]
        encoded = await self._face.answer(columns, call.parameters)
        return InferAnswer(outputs=[Tensor(self._face.output, "FP32", encoded.values)])

    async def stream(self, call: InferCall) -> AsyncIterator[InferAnswer]:
        """See `served.ServedModel.stream`."""
        yield await self.infer(call)

    def stop_generation(self, request_id: str | None = None) -> int:
        """Encoder models generate nothing."""
        return 0

    async def drain(self, timeout_s: float) -> None:
        """Take no more calls, and wait until the accepted ones have ended, so long at most."""
        await self.calls.drain(timeout_s)

    async def close(self) -> None:
        """End what is left with ModelNotReady, and free the sessions. Idempotent."""
        await self.calls.close()

    def discard(self) -> None:
        """Free what was never put in place. Blocks."""
        self.calls.discard()


def completed(config: ModelConfig, face: Face) -> ModelConfig:
    """What the config endpoint shows of a model with such a face."""
    result = ModelConfig()
    result.CopyFrom(config)
    result.platform, result.backend = "onnxruntime_onnx", "onnxruntime"
    if not result.HasField("version_policy"):
        result.version_policy.latest.num_versions = 1
    result.max_batch_size = result.max_batch_size or MAX_BATCH_SIZE
    for name in face.inputs:
        result.input.append(ModelInput(name=name, data_type="TYPE_STRING", dims=[1]))
    result.output.append(ModelOutput(name=face.output, data_type="TYPE_FP32", dims=[face.width]))
    return result
