"""A diffusion pipeline's graphs, run as the server will run them, against the torch modules they were traced from.

Every part is tried at three shapes, each row of a batch at a timestep of its own. Then the graphs make a whole picture
in a plain loop, which has to be the one that diffusers makes of the same noise.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from sardonyx.repository.families import Diffusion, PromptEncoder
from sardonyx.repository.manifest import Parity
from sardonyx.runtime.session import open_session
from sardonyx_export.errors import ExportError
from sardonyx_export.families.diffusion import DiffusionSpec
from sardonyx_export.traced import quiet
from sardonyx_export.traced_diffusion import Components, component_module, sample_inputs

Array = npt.NDArray[Any]

MAX_RELATIVE_ERROR = {"fp32": 1e-4, "fp16": 2e-2}
"""Of a part, as a share of the largest number."""
MAX_PICTURE_ERROR = {"fp32": 1e-3, "fp16": 2e-2}
"""Of a picture between 0 and 1, the mean over all numbers."""

_SIZES = ((1, 8, 8), (2, 7, 12), (3, 13, 6))
"""Rows, height and width in latents."""
_PICTURE = (16, 24)
"""Height and width in latents."""
_STEPS = 4
_PROMPT = "a lighthouse on a rocky coast at dusk, oil painting"
_SEED = 7


@dataclass(slots=True, frozen=True)
class Trial:
    """One run of a part."""

    inputs: dict[str, Array]
    expected: list[Array]
    """In the order of the graph's outputs."""


def make_trials(role: str, components: Components, spec: DiffusionSpec) -> list[Trial]:
    """Inputs of three shapes, and what the part makes of them in float32."""
    import torch

    trials = []
    for number, sizes in enumerate(_SIZES):
        inputs = sample_inputs(role, components, spec, sizes, seed=number + 1)
        module = component_module(role, components, spec, torch.float32, list(inputs))
        with torch.no_grad(), quiet():
            found = module(*inputs.values())
        outputs = found if isinstance(found, tuple) else (found,)
        trials.append(
            Trial({name: value.numpy() for name, value in inputs.items()}, [value.numpy() for value in outputs])
        )
    return trials


def compare_part(role: str, path: Path, trials: Sequence[Trial], precision: str, reference: str) -> Parity:
    """Run a graph on the trials of its part.

    Raises:
        ExportError: farther from the part than its precision allows.
        EngineError: it does not run at every shape.
    """
    limit = MAX_RELATIVE_ERROR[precision]
    error = relative = 0.0
    session = open_session(path, model_name=role)
    try:
        for trial in trials:
            for expected, actual in zip(trial.expected, session.run(trial.inputs).values(), strict=True):
                if expected.shape != actual.shape:
                    raise ExportError(f"the {role} gives {actual.shape} where the source gives {expected.shape}")
                difference = float(np.abs(expected - actual).max())
                error = max(error, difference)
                # NaN wins a maximum of numpy's, and fails below.
                relative = float(np.maximum(relative, difference / max(float(np.abs(expected).max()), 1e-12)))
    finally:
        session.close()
    if not relative <= limit:
        raise ExportError(
            f"the {role} is not what its source says: off by {relative:.3g} of the largest number; {precision} has to "
            f"keep {limit:g}. Nothing was published"
        )
    return Parity(
        reference=f"{reference}, {role} at {len(trials)} shapes",
        max_abs_error=error,
        num_positions=sum(len(trial.expected[0]) for trial in trials),
        tolerance=f"max_abs_error <= {limit:g} * largest",
    )


def library_picture(components: Components, spec: DiffusionSpec) -> Array:
    """A picture (Y, X, 3) between 0 and 1 as diffusers makes it, in float32.

    Raises:
        ExportError: diffusers cannot run the pipeline, its scheduler among the reasons.
    """
    import diffusers
    import torch

    parts = {"vae": components.vae, "unet": components.unet, **components.text_encoders}
    parts |= {file.removesuffix(".json"): each for file, each in components.tokenizers.items()}
    parts["scheduler"] = _scheduler(spec)
    if spec.layout == "sdxl":
        name = "StableDiffusionXLPipeline"
        parts |= {"force_zeros_for_empty_prompt": spec.facts.zeroes_empty_prompt, "add_watermarker": False}
    else:
        is_lcm = spec.pipeline.startswith("LatentConsistency")
        name = "LatentConsistencyModelPipeline" if is_lcm else "StableDiffusionPipeline"
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    height, width = (edge * spec.facts.pixels_per_latent for edge in _PICTURE)
    try:
        with quiet(), torch.no_grad():
            pipeline = getattr(diffusers, name)(**parts)
            pipeline.set_progress_bar_config(disable=True)
            made = pipeline(
                _PROMPT,
                height=height,
                width=width,
                num_inference_steps=_STEPS,
                guidance_scale=spec.facts.default_guidance,
                latents=_noise(spec.facts),
                generator=torch.Generator().manual_seed(_SEED),
                output_type="np",
            )
    except Exception as error:  # whatever a foreign library says of a pipeline that it does not run
        line = str(error).strip().partition("\n")[0]
        raise ExportError(f"diffusers cannot run the pipeline: {type(error).__name__}: {line:.300}") from error
    picture: Array = np.asarray(made.images[0])
    return picture


def compare_picture(
    expected: Array,
    paths: Mapping[str, Path],
    texts: Mapping[str, bytes],
    spec: DiffusionSpec,
    precision: str,
    name: str,
) -> Parity:
    """Make the picture of `library_picture` with the graphs.

    Args:
        expected: the picture.
        paths: of the graphs by role.
        texts: of the version folder, tokenizers among them.
        spec: of the pipeline, its encoders with their padding.
        precision: of the graphs.
        name: of the reference.

    Raises:
        ExportError: the pictures differ by more than the precision allows.
        EngineError: a graph failed.
    """
    with quiet():
        actual = _draw(paths, texts, spec)
    differences = np.abs(expected - actual)
    mean, limit = float(differences.mean()), MAX_PICTURE_ERROR[precision]
    if not mean <= limit:
        raise ExportError(
            f"the graphs draw another picture than {name}: its numbers differ by {mean:.3g} on average; {precision} "
            f"has to keep {limit:g}. Nothing was published"
        )
    return Parity(
        reference=f"{name}, a picture of {_STEPS} steps",
        max_abs_error=float(differences.max()),
        num_positions=1,
        tolerance=f"mean error <= {limit:g}",
    )


def _draw(paths: Mapping[str, Path], texts: Mapping[str, bytes], spec: DiffusionSpec) -> Array:
    """The picture (Y, X, 3) by graphs, diffusers' scheduler between them."""
    import torch

    facts = spec.facts
    is_guided = facts.default_guidance > 1 and facts.guidance_width is None
    given = _conditions(paths, texts, facts, is_guided=is_guided)
    scheduler = _scheduler(spec)
    source = torch.Generator().manual_seed(_SEED)
    scheduler.set_timesteps(_STEPS)
    extra = {"generator": source} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents = _noise(facts) * scheduler.init_noise_sigma
    session = open_session(paths["unet"], model_name="unet")
    try:
        for timestep in scheduler.timesteps:
            sample = scheduler.scale_model_input(torch.cat([latents] * (1 + is_guided)), timestep)
            rows = np.full(len(sample), float(timestep), np.float32)
            noise = session.run({"sample": sample.numpy(), "timestep": rows, **given})["noise_pred"]
            if is_guided:
                noise = noise[:1] + facts.default_guidance * (noise[1:] - noise[:1])
            latents = scheduler.step(torch.from_numpy(noise), timestep, latents, **extra, return_dict=False)
            # A consistency model's scheduler gives the picture without noise too, which is what its last step is for.
            final, latents = latents[-1 if spec.pipeline.startswith("LatentConsistency") else 0], latents[0]
    finally:
        session.close()
    session = open_session(paths["vae_decoder"], model_name="vae_decoder")
    try:
        picture: Array = session.run({"latents": final.numpy()})["image"][0].transpose(1, 2, 0)
    finally:
        session.close()
    return picture


def _conditions(
    paths: Mapping[str, Path], texts: Mapping[str, bytes], facts: Diffusion, *, is_guided: bool
) -> dict[str, Array]:
    """What the UNet takes beside latents and timesteps: of the prompt, and before it of an empty one where guided."""
    prompts = ["", _PROMPT] if is_guided else [_PROMPT]
    hidden, pooled = [], []
    for encoder in facts.encoders:
        ids = np.array([_token_ids(texts[encoder.tokenizer], encoder, prompt) for prompt in prompts], np.int64)
        session = open_session(paths[encoder.graph], model_name=encoder.graph)
        try:
            found = session.run({"input_ids": ids})
        finally:
            session.close()
        hidden.append(found["hidden"])
        pooled += [found["pooled"]] if encoder.has_pooled else []
    given = {"encoder_hidden_states": np.concatenate(hidden, axis=-1)}
    if facts.pooled_width is not None:
        height, width = (edge * facts.pixels_per_latent for edge in _PICTURE)
        sizes = np.array([[height, width, 0, 0, height, width]], np.float32)
        given |= {"text_embeds": pooled[-1], "time_ids": np.repeat(sizes, len(prompts), axis=0)}
    if is_guided and facts.zeroes_empty_prompt:
        for name in ("encoder_hidden_states", "text_embeds"):
            given[name][0] = 0
    if facts.guidance_width is not None:
        given["timestep_cond"] = _embedded_guidance(facts.default_guidance - 1, facts.guidance_width)
    return given


def _token_ids(data: bytes, encoder: PromptEncoder, prompt: str) -> list[int]:
    """As CLIP's models take a prompt: ends kept when it is cut, padding behind it."""
    ids = tokenizers.Tokenizer.from_buffer(data).encode(prompt).ids
    if len(ids) > encoder.max_tokens:
        ids = [*ids[: encoder.max_tokens - 1], ids[-1]]
    return [*ids, *[encoder.pad_token_id] * (encoder.max_tokens - len(ids))]


def _embedded_guidance(guidance: float, width: int) -> Array:
    """(1, width) float32: sines, then cosines, of a thousandfold guidance at falling frequencies.

    Source: Latent Consistency Models (arXiv 2310.04378), by its authors' ``guidance_scale_embedding``.
    """
    half = width // 2
    angles = 1000 * guidance * np.exp(np.arange(half) * -np.log(10000.0) / (half - 1))
    found = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2)])
    return found[None].astype(np.float32)


def _noise(facts: Diffusion) -> Any:
    import torch

    return torch.randn((1, facts.latent_channels, *_PICTURE), generator=torch.Generator().manual_seed(_SEED))


def _scheduler(spec: DiffusionSpec) -> Any:
    import diffusers

    config = json.loads(spec.scheduler)
    name = str(config.get("_class_name"))
    found = getattr(diffusers, name, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.SchedulerMixin)):
        raise ExportError(f"is {name}, no scheduler of diffusers", file="scheduler_config.json", field="_class_name")
    make: Any = found.from_config  # has no types
    with quiet():
        return make(config)
