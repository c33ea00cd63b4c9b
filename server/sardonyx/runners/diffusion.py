"""Runs diffusion models: prompts to what the unet takes, latents a round further, latents to pictures.

Floor 3. Owns the model's sessions. Which picture has its turn, and with whom, is the engine's decision.
"""

import logging
import time
from dataclasses import dataclass
from operator import is_

import numpy as np

from sardonyx.core import RunnerLimits
from sardonyx.diffusion import (
    DenoiseBatch,
    DenoiseOutput,
    DenoiseRow,
    EncodedPrompt,
    Floats,
    Picture,
    Pixels,
    Prompt,
    SourceImage,
)
from sardonyx.errors import ConfigError, EngineError
from sardonyx.processing.samplers import guidance_embedding
from sardonyx.repository.families import Diffusion, PromptEncoder
from sardonyx.runtime.session import KeptInputs, Session

_logger = logging.getLogger(__name__)

NOT_FINITE = "the model's output for this picture is not finite"


@dataclass(slots=True, frozen=True)
class DiffusionSessions:
    """The graphs of one version; closed together."""

    encoders: list[Session]
    """In the manifest's order."""
    unet: Session
    vae_decoder: Session
    vae_encoder: Session | None

    def close(self) -> None:
        """Free all of them."""
        for session in (*self.encoders, self.unet, self.vae_decoder, self.vae_encoder):
            if session is not None:
                session.close()


@dataclass(slots=True, frozen=True)
class _Conditions:
    """What the rows of a unet call are drawn by. It stays the same from round to round while nobody joins or leaves."""

    prompts: list[EncodedPrompt]
    time_ids: Floats | None
    guidances: list[float]

    def is_same(self, other: "_Conditions") -> bool:
        """Of the same prompts, row by row, and the same numbers."""
        are_prompts_same = len(self.prompts) == len(other.prompts) and all(map(is_, self.prompts, other.prompts))
        has_same_ids = self.time_ids is None or np.array_equal(self.time_ids, other.time_ids)  # type: ignore[arg-type]  # both or none
        return are_prompts_same and has_same_ids and self.guidances == other.guidances

    def tensors(self, guidance_width: int | None) -> dict[str, Floats]:
        """Of the unet, by name."""
        made = {"encoder_hidden_states": np.stack([prompt.hidden for prompt in self.prompts])}
        if self.time_ids is not None:
            made["text_embeds"] = np.stack([prompt.pooled for prompt in self.prompts if prompt.pooled is not None])
            made["time_ids"] = self.time_ids
        if guidance_width is not None:
            made["timestep_cond"] = np.stack([guidance_embedding(each, guidance_width) for each in self.guidances])
        return made


class DiffusionRunner:
    """A `core.Runner` of `DenoiseBatch`es. Used by one thread.

    Latents and samplers are on the host, in float32, whatever the graphs compute in and where. What rows are drawn by
    crosses to the unet's device when a picture joins or leaves; latents, timesteps and noise in every round.

    Args:
        sessions: closed with the runner.
        model: the manifest's part, which the graphs are checked against.

    Raises:
        ConfigError: a graph is not what the manifest says.
    """

    def __init__(self, sessions: DiffusionSessions, model: Diffusion) -> None:
        _check_graphs(sessions, model)
        self._sessions = sessions
        self._model = model
        self._unet = KeptInputs(sessions.unet)
        self._conditions: _Conditions | None = None
        self._preview = np.array(model.preview, np.float32) if model.preview else None

    @property
    def limits(self) -> RunnerLimits:
        """None that a policy has to respect: rows have no slots."""
        return RunnerLimits(num_slots=1, max_model_len=1, max_chunk_tokens=1, vocab_size=1)

    def execute(self, batch: DenoiseBatch) -> DenoiseOutput:
        """Do what one step asks for.

        Returns:
            Previews that were wanted, and finished pictures. Pictures whose numbers are not finite are in `failed`.

        Raises:
            EngineError: a session failed; the message names the model, and ONNX Runtime's text goes to the log.
        """
        output = DenoiseOutput()
        if batch.prompts:
            self._encode(batch.prompts)
        if batch.source is not None:
            self._encode_source(batch.source)
        if batch.rows:
            self._denoise(batch.rows, output)
        if batch.finished:
            self._decode(batch.finished, output)
        return output

    def warm_up(self) -> None:
        """Encode nothing and run the unet once at the model's own size, before the first step."""
        started_s = time.perf_counter()
        model = self._model
        prompt = Prompt(tuple([encoder.pad_token_id] * encoder.max_tokens for encoder in model.encoders))
        self._encode([prompt])
        assert prompt.encoded is not None
        height, width = (side // model.pixels_per_latent for side in model.size)
        latents = np.zeros((1, model.latent_channels, height, width), np.float32)
        time_ids = None if model.pooled_width is None else np.zeros((1, 6), np.float32)
        self._run_unet(latents, np.ones(1, np.float32), [prompt.encoded], time_ids, [1.0])
        _logger.info("%s: warmed up in %.2f s", self._sessions.unet.model_name, time.perf_counter() - started_s)

    def close(self) -> None:
        """Give back the sessions. Nothing may be executed afterwards."""
        self._unet.close()
        self._sessions.close()

    def _encode(self, prompts: list[Prompt]) -> None:
        """Every prompt through every encoder; their results lie side by side."""
        hidden, pooled = [], None
        for index, (encoder, session) in enumerate(zip(self._model.encoders, self._sessions.encoders, strict=True)):
            ids = np.array([prompt.token_ids[index] for prompt in prompts], np.int64)
            found = session.run({"input_ids": ids})
            hidden.append(found["hidden"])
            pooled = found["pooled"] if encoder.has_pooled else pooled
        joined = np.concatenate(hidden, axis=-1)
        for index, prompt in enumerate(prompts):
            own = joined[index].copy()
            summary = None if pooled is None else pooled[index].copy()
            if prompt.is_zeroed:
                own[:] = 0
                summary = None if summary is None else np.zeros_like(summary)
            prompt.encoded = EncodedPrompt(own, summary)

    def _encode_source(self, source: SourceImage) -> None:
        """The middle of what the picture may be: nothing is drawn, so a picture has no other noise than its own."""
        if self._sessions.vae_encoder is None:
            raise EngineError(f"model {self._sessions.unet.model_name} has no graph for pictures to begin with")
        source.latents = self._sessions.vae_encoder.run({"image": source.pixels[None]}, ["mean"])["mean"][0].copy()

    def _denoise(self, rows: list[DenoiseRow], output: DenoiseOutput) -> None:
        """One unet call for all pictures, then one round of each one's sampler.

        Tensors: see `sardonyx.repository.families.Diffusion`. A picture with guidance has two rows, the negative
        prompt's and then the prompt's; ``negative + guidance * (prompt - negative)`` is its model output.
        """
        pictures = [row.picture for row in rows]
        samples, timesteps, prompts, time_ids, guidances = [], [], [], [], []
        for picture in pictures:
            latents = _begun(picture)
            scaled = picture.sampler.scale_input(latents)
            for prompt in (picture.negative, picture.prompt):
                if prompt is None:
                    continue
                assert prompt.encoded is not None, "the engine has prompts encoded first"
                samples.append(scaled)
                timesteps.append(picture.sampler.timestep)
                prompts.append(prompt.encoded)
                time_ids.append(picture.time_ids)
                guidances.append(picture.guidance)
        ids = None if self._model.pooled_width is None else np.array(time_ids, np.float32)
        noise = self._run_unet(np.stack(samples), np.array(timesteps, np.float32), prompts, ids, guidances)
        place = 0
        for index, picture in enumerate(pictures):
            found = noise[place]
            if picture.negative is not None:
                found = found + np.float32(picture.guidance) * (noise[place + 1] - found)
            place += picture.num_rows
            if not np.isfinite(found).all():
                output.failed[index] = NOT_FINITE
                continue
            self._step(picture, found)
            if picture.sampler.step_index in picture.preview_steps and self._preview is not None:
                output.previews[index] = self._preview_of(picture)

    def _run_unet(
        self,
        samples: Floats,
        timesteps: Floats,
        prompts: list[EncodedPrompt],
        time_ids: Floats | None,
        guidances: list[float],
    ) -> Floats:
        conditions = _Conditions(prompts, time_ids, guidances)
        if self._conditions is None or not conditions.is_same(self._conditions):
            # Not known until all of them are bound.
            self._conditions = None
            for name, array in conditions.tensors(self._model.guidance_width).items():
                self._unet.keep(name, array)
            self._conditions = conditions
        return self._unet.run({"sample": samples, "timestep": timesteps}, "noise_pred")

    def _step(self, picture: Picture, model_output: Floats) -> None:
        assert picture.latents is not None
        picture.latents = picture.sampler.step(model_output, picture.latents, picture.generator)
        source = picture.source
        if source is not None and source.mask is not None:
            assert source.latents is not None
            assert picture.noise is not None
            # What the mask keeps is the source at every round, as noisy as the rest.
            kept = picture.sampler.add_noise(source.latents, picture.noise)
            picture.latents = source.mask * picture.latents + (1 - source.mask) * kept

    def _preview_of(self, picture: Picture) -> Pixels:
        assert self._preview is not None
        clean = picture.sampler.x0
        assert clean is not None, "a round is over"
        colours = np.tensordot(clean, self._preview[:-1], axes=(0, 0)) + self._preview[-1]
        return _pixels(colours)

    def _decode(self, rows: list[DenoiseRow], output: DenoiseOutput) -> None:
        latents = [row.picture.latents for row in rows]
        assert all(each is not None for each in latents), "finished pictures have latents"
        images = self._sessions.vae_decoder.run({"latents": np.stack([e for e in latents if e is not None])})["image"]
        for index, image in enumerate(images):
            if not np.isfinite(image).all():
                output.failed[index] = NOT_FINITE
            output.images.append(_pixels(np.nan_to_num(image.transpose(1, 2, 0))))


def _begun(picture: Picture) -> Floats:
    """The picture's latents; of one that begins, its noise, over its source where it has one."""
    if picture.latents is None:
        noise = picture.generator.standard_normal(picture.size, dtype=np.float32)
        if picture.source is None:
            picture.latents = noise * np.float32(picture.sampler.init_noise_sigma)
        else:
            assert picture.source.latents is not None, "the engine has sources encoded first"
            picture.latents = picture.sampler.add_noise(picture.source.latents, noise)
            picture.noise = noise
    return picture.latents


def _pixels(image: Floats) -> Pixels:
    """(Y, X, 3) between 0 and 1, to whole numbers."""
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def _check_graphs(sessions: DiffusionSessions, model: Diffusion) -> None:
    """Raise ConfigError unless the graphs have the tensors that the manifest's docstring names."""
    unet = {"sample", "timestep", "encoder_hidden_states"}
    if model.pooled_width is not None:
        unet |= {"text_embeds", "time_ids"}
    if model.guidance_width is not None:
        unet |= {"timestep_cond"}
    _check(sessions.unet, "unet", unet, {"noise_pred"})
    _check(sessions.vae_decoder, "vae_decoder", {"latents"}, {"image"})
    if sessions.vae_encoder is not None:
        _check(sessions.vae_encoder, "vae_encoder", {"image"}, {"mean", "std"})
    for encoder, session in zip(model.encoders, sessions.encoders, strict=True):
        _check_encoder(session, encoder)
    _check_widths(sessions, model)
    _check_facts(model)


def _check_encoder(session: Session, encoder: PromptEncoder) -> None:
    _check(session, encoder.graph, {"input_ids"}, {"hidden", "pooled"} if encoder.has_pooled else {"hidden"})
    _check_size(session, encoder.graph, "input_ids", -1, encoder.max_tokens)


def _check(session: Session, role: str, inputs: set[str], outputs: set[str]) -> None:
    odd = sorted((inputs ^ session.inputs.keys()) | (outputs - session.outputs.keys()))
    if odd:
        raise ConfigError(f"is no {role} of a diffusion model: see {', '.join(odd[:4])}", file=f"{role}.onnx")


def _check_widths(sessions: DiffusionSessions, model: Diffusion) -> None:
    """What the graphs give each other fits, as far as they say how wide it is."""
    sizes = {"sample": model.latent_channels, "text_embeds": model.pooled_width, "time_ids": 6}
    sizes |= {"timestep_cond": model.guidance_width}
    widths = [session.outputs["hidden"].shape[-1] for session in sessions.encoders]
    if all(isinstance(width, int) for width in widths):
        sizes["encoder_hidden_states"] = sum(width for width in widths if isinstance(width, int))
    for name in sizes.keys() & sessions.unet.inputs.keys():
        size = sizes[name]
        assert size is not None, "its inputs are those that the manifest asks for"
        _check_size(sessions.unet, "unet", name, -1 if name == "encoder_hidden_states" else 1, size)
    _check_size(sessions.vae_decoder, "vae_decoder", "latents", 1, model.latent_channels)


def _check_size(session: Session, role: str, name: str, axis: int, wanted: int) -> None:
    size = session.inputs[name].shape[axis]
    if isinstance(size, int) and size != wanted:
        raise ConfigError(f"takes {name} of size {size}, not {wanted} as the rest of the model", file=f"{role}.onnx")


def _check_facts(model: Diffusion) -> None:
    """The manifest's numbers fit each other."""
    if model.preview and len(model.preview) != model.latent_channels + 1:
        reason = f"has {len(model.preview)} rows; {model.latent_channels} channels and a constant are needed"
        raise _wrong("preview", reason)
    if (model.pooled_width is not None) != any(encoder.has_pooled for encoder in model.encoders):
        raise _wrong("pooled_width", "is there where an encoder has_pooled, and only there")
    if model.size_multiple % model.pixels_per_latent:
        raise _wrong("size_multiple", f"is no multiple of pixels_per_latent, {model.pixels_per_latent}")
    if any(side % model.size_multiple for side in model.size):
        raise _wrong("size", f"is no multiple of size_multiple, {model.size_multiple}")


def _wrong(field: str, reason: str) -> ConfigError:
    return ConfigError(reason, file="manifest.json", field=f"diffusion.{field}")
