"""DDIM: each round goes straight towards the estimate, without new noise.

Source: J. Song et al., "Denoising Diffusion Implicit Models" (2020), equation 12 with eta = 0.
"""

import math

import numpy as np

from sardonyx.processing.noise_schedule import alpha_bars, spaced_timesteps
from sardonyx.processing.samplers.sampler import Floats, Sampler, num_run_steps
from sardonyx.repository.scheduler_config import SchedulerConfig


class Ddim(Sampler):
    def __init__(self, config: SchedulerConfig, num_steps: int, strength: float) -> None:
        spacing = config.timestep_spacing or "leading"
        num_timesteps = config.num_train_timesteps
        timesteps = spaced_timesteps(spacing, num_steps, num_timesteps, config.steps_offset).round()
        timesteps = timesteps[num_steps - num_run_steps(num_steps, strength) :]
        kept = alpha_bars(config).astype(np.float64)
        # A round ends this far below its timestep, which is not always where the next one begins: so do diffusers'.
        ends = timesteps.astype(np.int64) - num_timesteps // num_steps
        last = 1.0 if config.set_alpha_to_one else kept[0]
        # Timesteps beyond the last are refused by who makes the sampler; here they must only not fail.
        starts = timesteps.astype(np.int64).clip(max=num_timesteps - 1)
        super().__init__(config.prediction_type, timesteps, np.sqrt(kept[starts]).tolist())
        self._kept_after: list[float] = np.where(ends >= 0, kept[ends.clip(0, num_timesteps - 1)], last).tolist()
        self._clip = config.clip_sample_range if config.clip_sample else None

    def _estimate(self, model_output: Floats, scaled: Floats) -> Floats:
        x0 = super()._estimate(model_output, scaled)
        return x0 if self._clip is None else x0.clip(-self._clip, self._clip)

    def _advance(self, x0: Floats, model_output: Floats, latents: Floats, generator: np.random.Generator) -> Floats:
        kept = self._kept_after[self.step_index]
        return math.sqrt(kept) * x0 + math.sqrt(1 - kept) * self._noise_of(model_output, latents)

    def _noise_of(self, model_output: Floats, latents: Floats) -> Floats:
        """What the model takes for noise; not from the estimate, which may have been clipped."""
        signal, noise_level = self._signals[self.step_index], self._noise_levels[self.step_index]
        if self._prediction_type == "epsilon":
            return model_output
        if self._prediction_type == "v_prediction":
            return signal * model_output + noise_level * latents
        return (1 / noise_level) * latents - (signal / noise_level) * model_output
