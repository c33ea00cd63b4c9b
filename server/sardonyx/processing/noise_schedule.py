"""How much noise a diffusion model saw at each timestep of its training, and which timesteps a schedule visits.

Floor 2. Pure numpy. A noisy image is ``signal * image + noise_level * noise``, the squares of the two adding up to 1;
that of the signal is the product of all ``1 - beta`` so far, called alpha bar. Samplers of the Euler kind divide by the
signal and call ``noise_level / signal`` sigma.

Numbers are rounded to float32 where diffusers rounds them, so that timesteps which are rounded from them are the same.

Source: J. Ho et al., "Denoising Diffusion Probabilistic Models" (2020); S. Lin et al., "Common Diffusion Noise
Schedules and Sample Steps are Flawed" (2023), for spacings and zero signal; T. Karras et al., "Elucidating the Design
Space of Diffusion-Based Generative Models" (2022), equation 5.
"""

import functools
import itertools
import math

import numpy as np
import numpy.typing as npt

from sardonyx.errors import ConfigError
from sardonyx.repository.scheduler_config import SchedulerConfig, Spacing

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_LEAST_ALPHA_BAR = 2.0**-24
"""Stands for none at all where something is divided by it; diffusers' choice."""
_MOST_BETA = 0.999
_KARRAS_RHO = 7.0


@functools.lru_cache(maxsize=64)
def alpha_bars(config: SchedulerConfig) -> Floats:
    """(num_train_timesteps): falling from nearly 1; the last is 0 if the config says so. Read-only.

    Raises:
        ConfigError: so much noise that float32 cannot tell the last timesteps apart.
    """
    kept = _running_product(1 - _betas(config))
    if config.rescale_betas_zero_snr:
        kept = _without_last_signal(kept)
    if (np.diff(kept) >= 0).any() or (kept[:-1] <= 0).any() or (kept[-1] <= 0 and not config.rescale_betas_zero_snr):
        raise ConfigError("leaves no signal long before the last timestep", field="beta_end")
    kept.setflags(write=False)
    return kept


@functools.lru_cache(maxsize=64)
def training_sigmas(config: SchedulerConfig) -> Floats:
    """(num_train_timesteps): rising, and finite where there is no signal. Read-only."""
    kept = alpha_bars(config).copy()
    if kept[-1] == 0:
        kept[-1] = _LEAST_ALPHA_BAR
    sigmas: Floats = np.sqrt((1 - kept) / kept)
    sigmas.setflags(write=False)
    return sigmas


def spaced_timesteps(spacing: Spacing, num_steps: int, num_timesteps: int, steps_offset: int) -> Doubles:
    """(num_steps): falling; whole numbers but for ``linspace``.

    ``linspace`` reaches from the last timestep to 0; ``leading`` holds the first timestep of each of `num_steps` equal
    parts, plus the offset, so not the noisiest ones; ``trailing`` holds the last of each part.
    """
    if spacing == "linspace":
        return np.linspace(0, num_timesteps - 1, num_steps)[::-1]
    if spacing == "leading":
        return (np.arange(num_steps)[::-1] * (num_timesteps // num_steps) + steps_offset).astype(np.float64)
    return trailing_timesteps(num_steps, num_timesteps, num_timesteps / num_steps)


def trailing_timesteps(num_steps: int, num_timesteps: int, stride: float) -> Doubles:
    """(at most num_steps): from `num_timesteps` - 1 downwards."""
    # Where the stride is not exact, the range has one number more than was asked for.
    timesteps: Doubles = np.arange(num_timesteps, 0, -stride)[:num_steps].round() - 1
    return timesteps


def sigmas_at(timesteps: npt.NDArray[np.floating], config: SchedulerConfig) -> Doubles:
    """Sigmas of timesteps, on straight lines between those of the training."""
    trained = training_sigmas(config)
    sigmas: Doubles = np.interp(timesteps, np.arange(len(trained)), trained)
    return sigmas


def karras_sigmas(highest: float, lowest: float, num_steps: int) -> Doubles:
    """(num_steps): falling, closest to each other near `lowest`."""
    ramp = np.linspace(0, 1, num_steps)
    start, stop = highest ** (1 / _KARRAS_RHO), lowest ** (1 / _KARRAS_RHO)
    sigmas: Doubles = (start + ramp * (stop - start)) ** _KARRAS_RHO
    return sigmas


def timesteps_of(sigmas: Doubles, config: SchedulerConfig) -> Doubles:
    """Timesteps of sigmas, on straight lines between the logarithms of those of the training; not rounded."""
    logarithms = np.log(training_sigmas(config))
    return np.interp(np.log(sigmas), logarithms, np.arange(len(logarithms)))


def _betas(config: SchedulerConfig) -> Floats:
    num_timesteps = config.num_train_timesteps
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, num_timesteps, dtype=np.float32)
    if config.beta_schedule == "scaled_linear":
        roots = np.linspace(config.beta_start**0.5, config.beta_end**0.5, num_timesteps, dtype=np.float32)
        return roots**2
    kept = [math.cos((n / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for n in range(num_timesteps + 1)]
    lost = [1 - after / before for before, after in itertools.pairwise(kept)]
    return np.minimum(lost, _MOST_BETA).astype(np.float32)


def _running_product(factors: Floats) -> Floats:
    return np.cumprod(factors, dtype=np.float64).astype(np.float32)


def _without_last_signal(kept: Floats) -> Floats:
    """Shifted and stretched so that the first signal stays and the last becomes none.

    Source: Lin et al., algorithm 1.
    """
    signals = np.sqrt(kept)
    first, last = signals[0], signals[-1]
    signals = (signals - last) * (first / (first - last))
    # Through the betas, as they are what diffusers keeps.
    kept = signals**2
    return _running_product(1 - (1 - np.concatenate([kept[:1], kept[1:] / kept[:-1]])))
