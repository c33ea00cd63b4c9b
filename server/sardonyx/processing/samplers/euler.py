"""Euler's method, and its ancestral kind, which goes too far in each round and puts new noise in.

Latents are ``image + sigma * noise`` here. Both samplers do for SD-Turbo and SDXL-Turbo with the spacing that their
files ask for, ``trailing``: one round goes from the last timestep to the estimate.

Source: T. Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), algorithm 1
without its second order; K. Crowson's k-diffusion for the ancestral step.
"""

import math

import numpy as np

from sardonyx.processing.noise_schedule import karras_sigmas, sigmas_at, spaced_timesteps, timesteps_of, training_sigmas
from sardonyx.processing.samplers.sampler import Floats, Sampler, num_run_steps
from sardonyx.repository.scheduler_config import SchedulerConfig


class Euler(Sampler):
    def __init__(self, config: SchedulerConfig, num_steps: int, strength: float, *, has_karras_sigmas: bool) -> None:
        spacing = config.timestep_spacing or "linspace"
        timesteps = spaced_timesteps(spacing, num_steps, config.num_train_timesteps, config.steps_offset)
        timesteps = timesteps.astype(np.float32).astype(np.float64)
        sigmas = sigmas_at(timesteps, config)
        if has_karras_sigmas:
            sigmas = karras_sigmas(float(sigmas[0]), float(sigmas[-1]), num_steps)
            timesteps = timesteps_of(sigmas, config)
        last = float(training_sigmas(config)[0]) if config.final_sigmas_type == "sigma_min" else 0.0
        # The noisiest of the whole schedule, wherever the request begins.
        highest = float(sigmas[0])
        self.init_noise_sigma = math.sqrt(highest**2 + 1) if spacing == "leading" else highest
        first = num_steps - num_run_steps(num_steps, strength)
        sigmas = sigmas[first:].astype(np.float32).astype(np.float64)
        super().__init__(config.prediction_type, timesteps[first:], (1 / np.sqrt(sigmas**2 + 1)).tolist())
        self._sigmas: list[float] = [*sigmas.tolist(), last]

    def scale_input(self, latents: Floats) -> Floats:
        return latents * self._signals[self.step_index]

    def add_noise(self, image: Floats, noise: Floats) -> Floats:
        return image if self.is_done else image + self._sigmas[self.step_index] * noise

    def _advance(self, x0: Floats, model_output: Floats, latents: Floats, generator: np.random.Generator) -> Floats:
        sigma, sigma_next = self._sigmas[self.step_index : self.step_index + 2]
        return x0 + sigma_next / sigma * (latents - x0)


class EulerAncestral(Euler):
    def __init__(self, config: SchedulerConfig, num_steps: int, strength: float) -> None:
        super().__init__(config, num_steps, strength, has_karras_sigmas=False)
        self._sigmas[-1] = 0.0

    @property
    def needs_noise(self) -> bool:
        return self.step_index < self.num_steps - 1

    def _advance(self, x0: Floats, model_output: Floats, latents: Floats, generator: np.random.Generator) -> Floats:
        sigma, sigma_next = self._sigmas[self.step_index : self.step_index + 2]
        new = sigma_next / sigma * math.sqrt(sigma**2 - sigma_next**2)
        # Of the two, this is what stays of the old noise: together they are sigma_next.
        old = sigma_next**2 / sigma
        stepped: Floats = x0 + old / sigma * (latents - x0)
        if not self.needs_noise:
            return stepped
        noise: Floats = generator.standard_normal(latents.shape, dtype=np.float32)
        return stepped + new * noise
