"""Samplers of diffusion models: one object for each image that is being made.

Floor 2. Pure numpy, some 0.1 ms a step for a picture of 512 by 512. What they compute is what the classes of diffusers
do that `repository.scheduler_config` names; they know neither the model nor guidance.
"""

from sardonyx.errors import InvalidRequest
from sardonyx.processing.samplers.ddim import Ddim
from sardonyx.processing.samplers.dpmpp import Dpmpp2M
from sardonyx.processing.samplers.euler import Euler, EulerAncestral
from sardonyx.processing.samplers.lcm import Lcm, guidance_embedding
from sardonyx.processing.samplers.sampler import Sampler, noise_generator
from sardonyx.repository.scheduler_config import SAMPLER_NAMES, SchedulerConfig

__all__ = ["Sampler", "guidance_embedding", "make_sampler", "noise_generator"]


def make_sampler(name: str, config: SchedulerConfig, num_steps: int, *, strength: float = 1.0) -> Sampler:
    """A sampler at its first round.

    Args:
        name: one of `SAMPLER_NAMES`; requests that name none get ``config.sampler``.
        num_steps: of the whole schedule, 1 or more.
        strength: the share of them that is run, the last ones, where the request brings an image.

    Raises:
        InvalidRequest: no such sampler, more steps than the model has timesteps for, or a strength that leaves none.
        ConfigError: the config's betas leave no signal.
    """
    if name not in SAMPLER_NAMES:
        raise InvalidRequest(f"no sampler {name!r}; there are {', '.join(SAMPLER_NAMES)}", param="sampler")
    if not 1 <= num_steps <= config.num_train_timesteps:
        raise InvalidRequest(f"steps has to be from 1 to {config.num_train_timesteps}", param="steps")
    sampler = _make(name, config, num_steps, strength)
    if not sampler.has_distinct_steps or sampler.timesteps[0] >= config.num_train_timesteps:
        raise InvalidRequest(f"{num_steps} steps are too many for {name} with this model; ask for fewer", param="steps")
    return sampler


def _make(name: str, config: SchedulerConfig, num_steps: int, strength: float) -> Sampler:
    has_karras_sigmas = name.endswith("_karras")
    match name.removesuffix("_karras"):
        case "ddim":
            return Ddim(config, num_steps, strength)
        case "euler":
            return Euler(config, num_steps, strength, has_karras_sigmas=has_karras_sigmas)
        case "euler_a":
            return EulerAncestral(config, num_steps, strength)
        case "dpmpp_2m":
            return Dpmpp2M(config, num_steps, strength, has_karras_sigmas=has_karras_sigmas)
        case _:
            return Lcm(config, num_steps, strength)
