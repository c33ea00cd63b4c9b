"""Latent consistency models: each round jumps to the estimate and puts new noise in, less each time.

Source: S. Luo et al., "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference" (2023),
algorithm 3.
"""

import math

import numpy as np

from sardonyx.errors import InvalidRequest
from sardonyx.processing.noise_schedule import alpha_bars
from sardonyx.processing.samplers.sampler import Floats, Sampler, num_run_steps
from sardonyx.repository.scheduler_config import SchedulerConfig

_SIGMA_DATA = 0.5
"""Standard deviation that the paper assumes of images."""
_MOST_PERIOD = 10_000.0
_EMBEDDING_SCALE = 1000.0


class Lcm(Sampler):
    """A request with an image runs the last steps of the schedule, as in all samplers."""

    def __init__(self, config: SchedulerConfig, num_steps: int, strength: float) -> None:
        num_distilled = min(config.original_inference_steps, config.num_train_timesteps)
        if num_steps > num_distilled:
            raise InvalidRequest(f"this model takes at most {num_distilled} steps with lcm", param="steps")
        distilled = np.arange(num_distilled, 0, -1) * (config.num_train_timesteps // num_distilled) - 1
        chosen = np.floor(np.linspace(0, num_distilled, num_steps, endpoint=False)).astype(np.int64)
        timesteps = distilled[chosen][num_steps - num_run_steps(num_steps, strength) :]
        signals: list[float] = np.sqrt(alpha_bars(config)[timesteps].astype(np.float64)).tolist()
        super().__init__(config.prediction_type, timesteps.astype(np.float64), signals)
        self._scaling = config.timestep_scaling
        self._clip = config.clip_sample_range if config.clip_sample else None

    @property
    def needs_noise(self) -> bool:
        return self.step_index < self.num_steps - 1

    def _estimate(self, model_output: Floats, scaled: Floats) -> Floats:
        x0 = super()._estimate(model_output, scaled)
        if self._clip is not None:
            x0 = x0.clip(-self._clip, self._clip)
        # Towards timestep 0 the latents are the image, whatever the model says.
        time = self.timestep * self._scaling
        square = time**2 + _SIGMA_DATA**2
        return (time / math.sqrt(square)) * x0 + (_SIGMA_DATA**2 / square) * scaled

    def _advance(self, x0: Floats, model_output: Floats, latents: Floats, generator: np.random.Generator) -> Floats:
        if not self.needs_noise:
            return x0
        noise = generator.standard_normal(latents.shape, dtype=np.float32)
        return self._signals[self.step_index + 1] * x0 + self._noise_levels[self.step_index + 1] * noise


def guidance_embedding(guidance_scale: float, width: int) -> Floats:
    """(width): how models with guidance distilled into them are told its scale, instead of two rows for each image.

    Args:
        guidance_scale: as in other models, 1 for none.
        width: ``time_cond_proj_dim`` of the UNet's config.
    """
    half = width // 2
    periods = np.exp(np.arange(half) * (-np.log(_MOST_PERIOD) / (half - 1)))
    angles = (guidance_scale - 1) * _EMBEDDING_SCALE * periods
    embedding = np.zeros(width, np.float32)
    embedding[: 2 * half] = np.concatenate([np.sin(angles), np.cos(angles)])
    return embedding
