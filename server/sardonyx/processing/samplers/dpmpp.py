"""DPM-Solver++ of second order, which draws a line through the estimates of the last two rounds.

Source: C. Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models" (2022),
algorithm 2, with differences taken at the midpoint.
"""

import math

import numpy as np
import numpy.typing as npt

from sardonyx.processing.noise_schedule import (
    Doubles,
    karras_sigmas,
    sigmas_at,
    spaced_timesteps,
    timesteps_of,
    trailing_timesteps,
    training_sigmas,
)
from sardonyx.processing.samplers.sampler import Floats, Sampler, num_run_steps
from sardonyx.repository.scheduler_config import SchedulerConfig

_FEW_STEPS = 15
"""A schedule of fewer ends with a round of first order where the config asks for that."""


class Dpmpp2M(Sampler):
    def __init__(self, config: SchedulerConfig, num_steps: int, strength: float, *, has_karras_sigmas: bool) -> None:
        if has_karras_sigmas:
            timesteps, sigmas = _karras_schedule(config, num_steps)
        else:
            timesteps = _spaced_schedule(config, num_steps)
            sigmas = sigmas_at(timesteps, config)
        last = float(training_sigmas(config)[0]) if config.final_sigmas_type == "sigma_min" else 0.0
        num_steps = len(timesteps)
        first = num_steps - num_run_steps(num_steps, strength)
        sigmas = sigmas[first:].astype(np.float32).astype(np.float64)
        super().__init__(config.prediction_type, timesteps[first:], (1 / np.sqrt(sigmas**2 + 1)).tolist())
        self._sigmas: list[float] = [*sigmas.tolist(), last]
        self._is_last_simple = (
            config.euler_at_final or last == 0 or (config.lower_order_final and num_steps < _FEW_STEPS)
        )

    def _advance(self, x0: Floats, model_output: Floats, latents: Floats, generator: np.random.Generator) -> Floats:
        index = self.step_index
        sigma, sigma_next = self._sigmas[index : index + 2]
        signal_next = 1 / math.sqrt(sigma_next**2 + 1)
        target = x0
        if self.x0 is not None and not (self._is_last_simple and index == self.num_steps - 1):
            # Logarithms of 1 / sigma are the equation's time; the change since the last round is halved: the midpoint.
            passed, ahead = math.log(self._sigmas[index - 1] / sigma), math.log(sigma / sigma_next)
            target = x0 + (0.5 * ahead / passed) * (x0 - self.x0)
        kept = sigma_next / sigma
        return (kept * signal_next / self._signals[index]) * latents + (signal_next * (1 - kept)) * target


def _karras_schedule(config: SchedulerConfig, num_steps: int) -> tuple[Doubles, Doubles]:
    """Timesteps and sigmas over the whole range of the training, whatever the spacing."""
    trained = training_sigmas(config)
    sigmas = karras_sigmas(float(trained[-1]), float(trained[0]), num_steps)
    timesteps = timesteps_of(sigmas, config)
    if config.beta_schedule != "squaredcos_cap_v2":
        timesteps = timesteps.round()
    return np.trunc(timesteps), sigmas


def _spaced_schedule(config: SchedulerConfig, num_steps: int) -> Doubles:
    """Of one timestep more than there are steps, the last is where the schedule ends, not begins a round."""
    highest = _num_timesteps(config)
    spacing = config.timestep_spacing or "linspace"
    if spacing == "trailing":
        return trailing_timesteps(num_steps, highest, config.num_train_timesteps / num_steps)
    return spaced_timesteps(spacing, num_steps + 1, highest, config.steps_offset).round()[:-1]


def _num_timesteps(config: SchedulerConfig) -> int:
    """Those whose signal is not below what the config wants to see."""
    if config.lambda_min_clipped is None:
        return config.num_train_timesteps
    lambdas: npt.NDArray[np.float32] = -np.log(training_sigmas(config))
    return max(1, int(np.count_nonzero(lambdas >= config.lambda_min_clipped)))
