"""A language model as tensors: ``text_input`` in, ``text_output`` out, as Triton's own language-model backends have it.

Floor 4. What a caller may set beside the text comes as request parameters (so ``/generate`` takes them as JSON keys),
or together in the tensor ``sampling_parameters``.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.core import SamplingParams
from sardonyx.errors import InvalidRequest, ServeError, UnsupportedFeature
from sardonyx.serving.call_parameters import convert_parameters
from sardonyx.serving.generation import Generation
from sardonyx.serving.options import GenerationOptions
from sardonyx.serving.served import InferAnswer, InferCall
from sardonyx.serving.task_tensors import completed
from sardonyx.serving.text import TextModel
from sardonyx.statistics import InferenceStatistics, failure_reason
from sardonyx.tensors import InferenceTimes, Parameter, Tensor, TensorMetadata

INPUTS = (
    TensorMetadata(name="text_input", datatype="BYTES", shape=(1,)),
    TensorMetadata(name="stream", datatype="BOOL", shape=(1,), is_optional=True),
    TensorMetadata(name="sampling_parameters", datatype="BYTES", shape=(1,), is_optional=True),
    TensorMetadata(name="exclude_input_in_output", datatype="BOOL", shape=(1,), is_optional=True),
)
OUTPUTS = (TensorMetadata(name="text_output", datatype="BYTES", shape=(-1,)),)

Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-100, le=100)]
# Keeps one token, as 0 should; the sampler's range is (0, 1].
_SMALLEST_SHARE = 1e-9


class TextParameters(msgspec.Struct, frozen=True, kw_only=True):
    """What a call may set. A misspelt name is refused: it would change the answer in silence."""

    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 16
    """Completion tokens at most; the default is OpenAI's of completions."""
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_p: Share = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = 0
    min_p: Share = 0.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=16)] | None = None
    ignore_eos: bool = False


class TextTensorModel:
    """A `served.ServedModel`: what `text` does, as tensors.

    Args:
        text: the model.
        config: what the operator wrote, completed here.
        statistics: of this version; they outlive it.
    """

    is_decoupled = True
    inputs = INPUTS
    outputs = OUTPUTS

    def __init__(self, text: TextModel, config: ModelConfig, statistics: InferenceStatistics) -> None:
        self.text = text
        self.config = completed(config, INPUTS, OUTPUTS)
        self.config.model_transaction_policy.decoupled = True
        self.statistics = statistics

    @property
    def name(self) -> str:
        """As the text model's."""
        return self.text.name

    @property
    def version(self) -> int:
        """As the text model's."""
        return self.text.version

    @property
    def created(self) -> int:
        """As the text model's."""
        return self.text.created

    @property
    def size_bytes(self) -> int:
        """As the text model's."""
        return self.text.size_bytes

    @property
    def is_alive(self) -> bool:
        """As the text model's."""
        return self.text.is_alive

    @property
    def task(self) -> TextModel:
        """The text model."""
        return self.text

    @property
    def stalled_s(self) -> float:
        """As the text model's."""
        return self.text.stats().stalled_s

    def labels(self, output: str) -> list[str]:
        """Text has no classes."""
        return []

    async def infer(self, call: InferCall) -> InferAnswer:
        """The whole completion. Triton refuses decoupled models here; a call that need not stream does no harm.

        Raises:
            UnsupportedFeature: the call asks for a stream.
        """
        asked = _Asked(call, self.name)
        if asked.is_streaming:
            raise UnsupportedFeature(
                "HTTP end point doesn't support models with decoupled transaction policy: leave out stream, or use "
                "generate_stream or ModelStreamInfer",
                param="stream",
            )
        # To the end: what comes after the answer is counted.
        (answer,) = [each async for each in self._answers(asked)]
        return answer

    async def stream(self, call: InferCall) -> AsyncIterator[InferAnswer]:
        """The completion in pieces where the call says ``stream``, else as a whole."""
        async with aclosing(self._answers(_Asked(call, self.name))) as answers:
            async for answer in answers:
                yield answer

    def stop_generation(self, request_id: str | None = None) -> int:
        """End one call, or all of them."""
        return self.text.stop_generation(request_id)

    async def drain(self, timeout_s: float) -> None:
        """See `TextModel.drain`."""
        await self.text.drain(timeout_s)

    async def close(self) -> None:
        """See `TextModel.close`."""
        await self.text.close()

    async def _answers(self, asked: "_Asked") -> AsyncGenerator[InferAnswer, None]:
        started_ns = time.perf_counter_ns()
        self.statistics.num_pending += 1
        try:
            generation = await self.text.start([asked.text], asked.options, request_id=f"v2-{uuid.uuid4().hex}")
            try:
                async for answer in _read(generation, asked, self.statistics):
                    yield answer
            finally:
                generation.abort()
        except ServeError as error:
            self.statistics.observe_failure(failure_reason(error), time.perf_counter_ns() - started_ns)
            raise
        except (asyncio.CancelledError, GeneratorExit):  # the caller left, within an answer or between two
            self.statistics.observe_failure("CANCELED", time.perf_counter_ns() - started_ns)
            raise
        finally:
            self.statistics.num_pending -= 1
        times = InferenceTimes(compute_infer_ns=time.perf_counter_ns() - started_ns)
        self.statistics.observe_success(total_ns=times.compute_infer_ns, queue_ns=0, times=times, batch_size=1)
        self.statistics.observe_execution(1, times)


class _Asked:
    """A call, read."""

    def __init__(self, call: InferCall, model_name: str) -> None:
        tensors = _check(call, model_name)
        self.text: str = _text(tensors["text_input"])
        self.is_streaming = _flag(tensors.get("stream"), call.parameters, "stream", default=False)
        self.is_echoing = not _flag(
            tensors.get("exclude_input_in_output"), call.parameters, "exclude_input_in_output", default=True
        )
        if self.is_streaming and self.is_echoing:
            raise InvalidRequest(
                "exclude_input_in_output: must not be false together with stream", param="exclude_input_in_output"
            )
        values: dict[str, Any] = {
            name: value for name, value in call.parameters.items() if name not in {"stream", "exclude_input_in_output"}
        }
        if "sampling_parameters" in tensors:
            values |= _decode(_text(tensors["sampling_parameters"]))
        self.options = _options(convert_parameters(values, TextParameters, "a language model"))


async def _read(generation: Generation, asked: _Asked, statistics: InferenceStatistics) -> AsyncIterator[InferAnswer]:
    if not asked.is_streaming:
        (choice,) = await generation.collect()
        text = asked.text + choice.text if asked.is_echoing else choice.text
        yield InferAnswer(outputs=[_output(text)], parameters={"finish_reason": str(choice.finish_reason)})
        return
    position, since_ns = 0, time.perf_counter_ns()
    async for chunk in generation:
        is_final = chunk.finish_reason is not None
        if not (chunk.text or is_final):
            continue
        now_ns = time.perf_counter_ns()
        statistics.observe_response(position, now_ns - since_ns)
        position, since_ns = position + 1, now_ns
        parameters: dict[str, Parameter] = {"finish_reason": str(chunk.finish_reason)} if is_final else {}
        yield InferAnswer(outputs=[_output(chunk.text)], parameters=parameters, is_final=is_final)


def _check(call: InferCall, model_name: str) -> dict[str, Tensor]:
    known = {each.name: each for each in INPUTS}
    tensors: dict[str, Tensor] = {}
    for tensor in call.inputs:
        wanted = known.get(tensor.name)
        if wanted is None:
            raise InvalidRequest(f"unexpected inference input '{tensor.name}' for model '{model_name}'", param="inputs")
        if tensor.datatype != wanted.datatype:
            raise InvalidRequest(
                f"inference input '{tensor.name}' data-type is '{tensor.datatype}', but model '{model_name}' expects "
                f"'{wanted.datatype}'",
                param="inputs",
            )
        if tensor.array.size != 1:
            raise InvalidRequest(
                f"unexpected shape for input '{tensor.name}' for model '{model_name}'. Expected [1], got "
                f"{list(tensor.array.shape)}.",
                param="inputs",
            )
        tensors[tensor.name] = tensor
    if "text_input" not in tensors:
        raise InvalidRequest(
            f"expected number of inputs between 1 and {len(INPUTS)} but got {len(tensors)} inputs for model "
            f"'{model_name}'. Got input(s) {list(tensors)}, but missing required input(s) ['text_input']. Please "
            "provide all required input(s).",
            param="inputs",
        )
    if unknown := [name for name in call.outputs if name != "text_output"]:
        raise InvalidRequest(f"unexpected inference output '{unknown[0]}' for model '{model_name}'", param="outputs")
    return tensors


def _flag(tensor: Tensor | None, parameters: Mapping[str, Parameter], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default) if tensor is None else bool(tensor.array.reshape(-1)[0])
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name}: expected bool", param=name)
    return value


def _text(tensor: Tensor) -> str:
    try:
        return bytes(tensor.array.reshape(-1)[0]).decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"input '{tensor.name}' is not UTF-8", param="inputs") from None


def _decode(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any]) if text.strip() else {}
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest("sampling_parameters: expected a JSON object", param="sampling_parameters") from None


def _options(parameters: TextParameters) -> GenerationOptions:
    stop = parameters.stop or []
    return GenerationOptions(
        sampling=SamplingParams(
            temperature=parameters.temperature,
            top_k=max(0, parameters.top_k),
            top_p=max(_SMALLEST_SHARE, parameters.top_p),
            min_p=parameters.min_p,
            repetition_penalty=parameters.repetition_penalty,
            presence_penalty=parameters.presence_penalty,
            frequency_penalty=parameters.frequency_penalty,
            seed=parameters.seed,
        ),
        max_tokens=parameters.max_tokens,
        min_tokens=parameters.min_tokens,
        stop=tuple(text for text in ([stop] if isinstance(stop, str) else stop) if text),
        ignore_eos=parameters.ignore_eos,
    )


def _output(text: str) -> Tensor:
    array = np.empty(1, object)
    array[0] = text.encode()
    return Tensor("text_output", "BYTES", array)
