"""A model that is not trivial, and the way from noise to an image with our samplers and with diffusers' schedulers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler

from sardonyx.processing.noise_schedule import alpha_bars
from sardonyx.processing.samplers import Sampler, noise_generator
from sardonyx.repository.scheduler_config import SchedulerConfig

SHAPE = (4, 6, 5)
SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_karras": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "dpmpp_2m_karras": DPMSolverMultistepScheduler,
    "lcm": LCMScheduler,
}

Model = Callable[[np.ndarray, float], np.ndarray]


@dataclass
class Way:
    """What was seen on the way: the last latents, and the estimates of the clean image."""

    latents: np.ndarray
    estimates: list[np.ndarray]
    timesteps: list[float]
    largest: float = 0.0
    """Number of the latents."""


def normals(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def model_for(config: SchedulerConfig) -> Model:
    """The best guess for images of the standard deviation 0.5, disturbed by a layer of its own and by the time."""
    weights = np.random.default_rng(5).normal(0, 0.4, (SHAPE[2], SHAPE[2])).astype(np.float32)
    kept = alpha_bars(config)

    def model(scaled: np.ndarray, timestep: float) -> np.ndarray:
        square = float(np.interp(timestep, np.arange(len(kept)), kept))
        signal, noise_level = square**0.5, (1 - square) ** 0.5
        variance = 0.25 * square + 1 - square
        gain = {
            "epsilon": noise_level / variance,
            "sample": 0.25 * signal / variance,
            "v_prediction": 0.75 * signal * noise_level / variance,
        }[config.prediction_type]
        return gain * scaled + 0.1 * np.tanh(scaled @ weights) + np.float32(0.02 * np.sin(timestep / 100))

    return model


def run_ours(sampler: Sampler, model: Model, *, seed: int, image: np.ndarray | None = None) -> Way:
    generator = noise_generator(seed)
    noise = generator.standard_normal(SHAPE, dtype=np.float32)
    latents = noise * sampler.init_noise_sigma if image is None else sampler.add_noise(image, noise)
    way = Way(latents, [], [], float(np.abs(latents).max()))
    while not sampler.is_done:
        way.timesteps.append(sampler.timestep)
        output = model(sampler.scale_input(way.latents), sampler.timestep)
        way.latents = sampler.step(output, way.latents, generator)
        assert way.latents.dtype == np.float32
        way.largest = max(way.largest, float(np.abs(way.latents).max()))
        way.estimates.append(sampler.x0)
    return way


def run_theirs(
    scheduler: Any, model: Model, num_steps: int, *, seed: int, image: np.ndarray | None = None, strength: float = 1.0
) -> Way:
    """As diffusers' pipelines do, with our source of noise."""
    generator = noise_generator(seed)
    noise = torch.from_numpy(generator.standard_normal(SHAPE, dtype=np.float32))[None]
    scheduler.set_timesteps(num_steps)
    first = num_steps - min(int(num_steps * strength), num_steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    timesteps = scheduler.timesteps[first:]
    if image is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(torch.from_numpy(image)[None], noise, timesteps[:1])
    way = Way(latents.numpy()[0], [], [], float(latents.abs().max()))

    def draw(shape: Any, **_: Any) -> torch.Tensor:
        return torch.from_numpy(generator.standard_normal(tuple(shape[1:]), dtype=np.float32))[None]

    with pytest.MonkeyPatch.context() as patch:
        for module in (scheduling_euler_ancestral_discrete, scheduling_lcm):
            patch.setattr(module, "randn_tensor", draw)
        for timestep in timesteps:
            way.timesteps.append(float(timestep))
            scaled = scheduler.scale_model_input(latents, timestep)
            output = torch.from_numpy(model(scaled.numpy()[0], float(timestep)).astype(np.float32))[None]
            result = scheduler.step(output, timestep, latents)
            latents = result.prev_sample
            estimate = getattr(result, "pred_original_sample", getattr(result, "denoised", None))
            if estimate is not None:
                way.estimates.append(estimate.numpy()[0])
    way.latents = latents.numpy()[0]
    return way




def theirs(name: str, **fields: Any) -> Any:
    """diffusers' scheduler of one of our names; fields that its class does not have are left out."""
    if name.endswith("_karras"):
        fields["use_karras_sigmas"] = True
    known = SCHEDULERS[name].__init__.__wrapped__.__code__.co_varnames
    return SCHEDULERS[name](**{field: value for field, value in fields.items() if field in known})


def assert_same(ours: Way, reference: Way, *, tolerance: float = 1e-4) -> None:
    """Whole ways. Where latents are in the thousands, a few of float32's last digits are more than the tolerance."""
    np.testing.assert_allclose(ours.timesteps, reference.timesteps, rtol=1e-5, atol=1e-3)
    rounding = 4 * np.finfo(np.float32).eps * ours.largest
    assert_close(ours.latents, reference.latents, tolerance, rounding)
    for actual, expected in zip(ours.estimates, reference.estimates, strict=bool(reference.estimates)):
        assert_close(actual, expected, tolerance, rounding)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, rounding: float = 0.0) -> None:
    """Within the tolerance, of the largest number where that is above 1."""
    assert np.isfinite(expected).all()
    atol = tolerance * max(1.0, float(np.abs(expected).max())) + rounding
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)
