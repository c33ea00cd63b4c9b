"""The graphs of a Whisper model for cards, and what they have to be.

Floor 3.
"""

from dataclasses import dataclass

from sardonyx.errors import ConfigError
from sardonyx.repository.families import Whisper
from sardonyx.runners.paged_inputs import METADATA
from sardonyx.runners.whisper_inputs import STEP_INPUTS
from sardonyx.runtime.device import Device, DeviceSession
from sardonyx.runtime.dtypes import KV_DATATYPES
from sardonyx.runtime.kv_cache import cache_names


@dataclass(slots=True, frozen=True)
class WhisperGraphs:
    """The open graphs of one model. Whoever opens them closes them, or the runner that takes them over."""

    model_name: str
    device: Device
    encoder: DeviceSession
    decoder: DeviceSession
    aligner: DeviceSession | None

    def close(self) -> None:
        """Give back the sessions, then the device's stream and what is left on it."""
        for session in (self.encoder, self.decoder, self.aligner):
            if session is not None:
                session.close()
        self.device.close()


def check_graphs(graphs: WhisperGraphs, model: Whisper) -> None:
    """Raise ConfigError unless the graphs have the tensors that the manifest's docstring names, in its sizes."""
    sides, kv = cache_names(model.kv), model.kv
    cross = {f"cross.{side}" for side in sides}
    past, present = ({f"{part}.{side}" for side in sides} for part in ("past_key_values", "present"))
    expected = {
        "encoder": (graphs.encoder, {"mel"}, cross),
        "decoder": (graphs.decoder, {*STEP_INPUTS, METADATA} | past | cross, {"logits"} | present),
    }
    if graphs.aligner is not None:
        inputs = {"input_ids", "position_ids"} | cross
        expected["aligner"] = (graphs.aligner, inputs, {"attention", "logprobs"})
    for role, (session, inputs, outputs) in expected.items():
        odd = sorted((inputs ^ session.inputs.keys()) | (outputs ^ session.outputs.keys()))
        if odd:
            raise ConfigError(
                f"is no {role} of a Whisper model for cards: see {', '.join(odd[:4])}", file=f"{role}.onnx"
            )
    window = (kv.num_kv_heads, model.num_frames // 2, kv.head_size)
    for name, shape in (
        ("cross.0.key", window),
        ("past_key_values.0.key", (kv.block_size, kv.num_kv_heads, kv.head_size)),
    ):
        spec = graphs.decoder.inputs[name]
        if spec.datatype != KV_DATATYPES[kv.datatype] or spec.shape[1:] != shape:
            raise ConfigError(
                f"has {name} of {spec.datatype.name} {spec.shape}, unlike the manifest", file="decoder.onnx", field="kv"
            )
    if graphs.decoder.outputs["logits"].shape[-1] != model.vocab_size:
        raise ConfigError("is not the manifest's vocabulary", file="decoder.onnx", field="logits")
    if graphs.encoder.inputs["mel"].shape[1:] != (model.num_mels, model.num_frames):
        raise ConfigError("is not the manifest's window", file="encoder.onnx", field="mel")
