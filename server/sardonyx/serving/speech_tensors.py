"""Speech models as tensors: an encoded sound in, its text out, as KServe-v2 has them.

Floor 4. One sound a call: a batch would have to wait for its longest.
"""

import uuid
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from sardonyx.errors import InvalidRequest
from sardonyx.processing.languages import language_code
from sardonyx.serving.call_parameters import convert_parameters
from sardonyx.serving.speech import SpeechModel
from sardonyx.serving.task_tensors import Face
from sardonyx.serving.tasks import HeardWindow, TranscriptionOptions
from sardonyx.serving.tensor_checks import BoundCall
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


def speech_face(model: SpeechModel) -> Face:
    """``audio`` to ``text``, ``language`` and ``segments``."""

    async def answer(bound: BoundCall, parameters: Mapping[str, Parameter]) -> list[Tensor]:
        options = _options(parameters)
        sound = bytes(bound.inputs["audio"].reshape(-1)[0])
        transcript = await model.start(sound, options, request_id=f"v2-{uuid.uuid4().hex}")
        windows = await transcript.collect()
        outputs = {
            "text": _text(windows).encode(),
            "language": transcript.language.encode(),
            "segments": msgspec.json.encode(
                [_SegmentReply(each.start_s, each.end_s, each.text) for window in windows for each in window.segments]
            ),
        }
        return [Tensor(name, "BYTES", np.array([outputs[name]], dtype=np.object_)) for name in bound.outputs]

    return Face(inputs=INPUTS, outputs=OUTPUTS, are_texts=False, answer=answer)


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
