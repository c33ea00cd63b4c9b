"""Speech models as tensors: an encoded sound in, its text out, as KServe-v2 has them.

Floor 4. One sound a call: a batch would have to wait for its longest.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInput, ModelOutput

from sardonyx.errors import InvalidRequest
from sardonyx.processing.languages import language_code
from sardonyx.serving.call_parameters import convert_parameters
from sardonyx.serving.served import InferAnswer, InferCall
from sardonyx.serving.speech import SpeechModel
from sardonyx.serving.strings import has_many
from sardonyx.serving.tasks import HeardWindow, TranscriptionOptions
from sardonyx.serving.tensor_checks import TensorSignature
from sardonyx.statistics import InferenceStatistics
from sardonyx.tensors import Parameter, Tensor, TensorMetadata

INPUTS = (TensorMetadata(name="audio", datatype="BYTES", shape=(1,)),)
OUTPUTS = (
    TensorMetadata(name="text", datatype="BYTES", shape=(1,)),
    TensorMetadata(name="language", datatype="BYTES", shape=(1,)),
    TensorMetadata(name="segments", datatype="BYTES", shape=(1,)),
)
"""``segments`` is a JSON list of objects with ``start``, ``end`` (seconds) and ``text``."""


class SpeechCallParameters(msgspec.Struct, frozen=True, kw_only=True):
    """What a call to a speech model may set."""

    task: Literal["transcribe", "translate"] = "transcribe"
    language: str | None = None
    """That is spoken; without it, the first thirty seconds tell."""
    prompt: str = ""
    """A text as if it came before the sound."""
    temperature: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """0: higher ones are tried where the result is not good enough."""


class _SegmentReply(msgspec.Struct, frozen=True):
    start: float
    end: float
    text: str


class SpeechTensorModel:
    """A `served.ServedModel`: what a speech model does, as tensors.

    Args:
        task: the model.
        config: what the operator wrote, completed here.
        version: of the model.
        created: Unix time.
        size_bytes: of its files.
    """

    is_decoupled = False
    inputs = INPUTS
    outputs = OUTPUTS

    def __init__(
        self, task: SpeechModel, config: ModelConfig, *, version: int, created: int = 0, size_bytes: int = 0
    ) -> None:
        self.task = task
        self.name = task.name
        self.config = completed(config)
        self.version = version
        self.created = created
        self.size_bytes = size_bytes
        self._signature = TensorSignature(self.name, INPUTS, OUTPUTS, 0)

    @property
    def statistics(self) -> InferenceStatistics:
        """Of this version; they outlive it."""
        return self.task.statistics

    @property
    def is_alive(self) -> bool:
        """Its loop takes requests."""
        return self.task.is_alive

    @property
    def stalled_s(self) -> float:
        """For how long its loop has had work and finished no step."""
        return self.task.stats().stalled_s

    def labels(self, output: str) -> list[str]:
        """Text has no classes."""
        return []

    async def infer(self, call: InferCall) -> InferAnswer:
        """See `served.ServedModel.infer`."""
        bound = (
            await asyncio.to_thread(self._signature.bind, call, as_text=False)
            if has_many(call.inputs)
            else self._signature.bind(call, as_text=False)
        )
        options = _options(call.parameters)
        sound = bytes(bound.inputs["audio"].reshape(-1)[0])
        transcript = await self.task.start(sound, options, request_id=f"v2-{uuid.uuid4().hex}")
        windows = await transcript.collect()
        outputs = {
            "text": _text(windows).encode(),
            "language": transcript.language.encode(),
            "segments": msgspec.json.encode(
                [_SegmentReply(each.start_s, each.end_s, each.text) for window in windows for each in window.segments]
            ),
        }
        return InferAnswer(
            outputs=[Tensor(name, "BYTES", np.array([outputs[name]], dtype=np.object_)) for name in bound.outputs]
        )

    async def stream(self, call: InferCall) -> AsyncIterator[InferAnswer]:
        """See `served.ServedModel.stream`."""
        yield await self.infer(call)

    def stop_generation(self, request_id: str | None = None) -> int:
        """End one call, or all of them."""
        return self.task.stop(request_id)

    async def drain(self, timeout_s: float) -> None:
        """Take no more calls, and wait until the accepted ones have ended, so long at most."""
        await self.task.drain(timeout_s)

    async def close(self) -> None:
        """End what is left with ModelNotReady, and free the engine. Idempotent."""
        await self.task.close()

    def discard(self) -> None:
        """Free what was never put in place. Blocks."""
        self.task.discard()


def completed(config: ModelConfig) -> ModelConfig:
    """What the config endpoint shows of a speech model."""
    result = ModelConfig()
    result.CopyFrom(config)
    result.platform, result.backend = "onnxruntime_onnx", "onnxruntime"
    if not result.HasField("version_policy"):
        result.version_policy.latest.num_versions = 1
    for tensor in INPUTS:
        result.input.append(ModelInput(name=tensor.name, data_type="TYPE_STRING", dims=tensor.shape))
    for tensor in OUTPUTS:
        result.output.append(ModelOutput(name=tensor.name, data_type="TYPE_STRING", dims=tensor.shape))
    return result


def _options(parameters: Mapping[str, Parameter]) -> TranscriptionOptions:
    asked = convert_parameters(parameters, SpeechCallParameters, "a speech model")
    languages: tuple[str, ...] = ()
    if asked.language:
        code = language_code(asked.language)
        if code is None:
            raise InvalidRequest(f"language: {asked.language[:80]!r} is no language that is known", param="language")
        languages = (code,)
    options = TranscriptionOptions(task=asked.task, languages=languages, prompt=asked.prompt)
    return msgspec.structs.replace(options, temperatures=(asked.temperature,)) if asked.temperature else options


def _text(windows: list[HeardWindow]) -> str:
    return "".join(segment.text for window in windows for segment in window.segments).strip()
