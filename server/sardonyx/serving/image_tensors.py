"""Image models as tensors: a prompt in, an encoded picture out, as KServe-v2 has them. Floor 4."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInput, ModelOutput

from sardonyx.errors import InvalidRequest
from sardonyx.processing.picture import encode_picture
from sardonyx.serving.call_parameters import convert_parameters
from sardonyx.serving.images import ImageModel
from sardonyx.serving.served import InferAnswer, InferCall
from sardonyx.serving.tasks import ImageOptions
from sardonyx.serving.tensor_checks import TensorSignature
from sardonyx.statistics import InferenceStatistics
from sardonyx.tensors import Tensor, TensorMetadata

INPUTS = (
    TensorMetadata(name="prompt", datatype="BYTES", shape=(1,)),
    TensorMetadata(name="negative_prompt", datatype="BYTES", shape=(1,), is_optional=True),
)
OUTPUTS = (TensorMetadata(name="image", datatype="BYTES", shape=(1,)),)
"""A PNG."""


class ImageCallOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a call to an image model may set."""

    height: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    width: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Meta(ge=0, le=100)] | None = None
    sampler: str | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None


class ImageTensorModel:
    """A `served.ServedModel`: what an image model does, as tensors.

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
        self, task: ImageModel, config: ModelConfig, *, version: int, created: int = 0, size_bytes: int = 0
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
        """Pictures have no classes."""
        return []

    async def infer(self, call: InferCall) -> InferAnswer:
        """See `served.ServedModel.infer`."""
        bound = self._signature.bind(call)
        texts = {name: str(array.reshape(-1)[0]) for name, array in bound.inputs.items()}
        asked = convert_parameters(call.parameters, ImageCallOptions, "an image model")
        if (asked.height is None) != (asked.width is None):
            raise InvalidRequest("height and width come together", param="width")
        options = ImageOptions(
            prompt=texts["prompt"],
            negative_prompt=texts.get("negative_prompt", ""),
            size=None if asked.height is None or asked.width is None else (asked.height, asked.width),
            steps=asked.steps,
            guidance=asked.guidance_scale,
            sampler=asked.sampler,
            seed=asked.seed,
        )
        pictures = await self.task.start(options, request_id=f"v2-{uuid.uuid4().hex}")
        (picture,) = await pictures.collect()
        file = await asyncio.to_thread(encode_picture, picture.pixels, "png", 100)
        return InferAnswer(outputs=[Tensor("image", "BYTES", np.array([file], dtype=np.object_))])

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
    """What the config endpoint shows of an image model."""
    result = ModelConfig()
    result.CopyFrom(config)
    result.platform, result.backend = "onnxruntime_onnx", "onnxruntime"
    if not result.HasField("version_policy"):
        result.version_policy.latest.num_versions = 1
    for tensor in INPUTS:
        result.input.append(
            ModelInput(name=tensor.name, data_type="TYPE_STRING", dims=tensor.shape, optional=tensor.is_optional)
        )
    for tensor in OUTPUTS:
        result.output.append(ModelOutput(name=tensor.name, data_type="TYPE_STRING", dims=tensor.shape))
    return result
