"""What all samplers have in common: a schedule, a position in it, and an estimate of the clean image."""

import abc
import itertools
import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from sardonyx.errors import InvalidRequest

Floats = npt.NDArray[np.float32]
Prediction = Literal["epsilon", "v_prediction", "sample"]


class Sampler(abc.ABC):
    """The state of one request's way from noise to an image. Not to be shared between requests, nor threads.

    Latents are (c, y, x) float32 of one image. One round is `scale_input`, the model at `timestep`, `step`; it repeats
    until `is_done`. Before the first round the latents are ``noise * init_noise_sigma``, or ``add_noise(image, noise)``
    where the request brings an image.
    """

    init_noise_sigma: float = 1.0

    def __init__(self, prediction_type: Prediction, timesteps: npt.NDArray[np.floating], signals: list[float]) -> None:
        """Args: `signals` are those of the timesteps; see `noise_schedule`."""
        self.timesteps: Floats = timesteps.astype(np.float32)
        """(num_steps): what the model is told in each round, falling. Whole numbers except those of Euler samplers."""
        self.timesteps.setflags(write=False)
        self.step_index = 0
        """Rounds that are over."""
        self.x0: Floats | None = None
        """What the last round's model output says of the clean image, for previews."""
        self._prediction_type = prediction_type
        self._signals = signals
        self._noise_levels = [math.sqrt(1 - signal * signal) for signal in signals]

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def is_done(self) -> bool:
        return self.step_index == self.num_steps

    @property
    def has_distinct_steps(self) -> bool:
        """Each round begins with less noise than the one before."""
        return all(before < after for before, after in itertools.pairwise(self._signals))

    @property
    def timestep(self) -> float:
        """Of the next round."""
        return float(self.timesteps[self.step_index])

    @property
    def needs_noise(self) -> bool:
        """The next `step` draws from its generator."""
        return False

    def scale_input(self, latents: Floats) -> Floats:
        """What the model is given of the latents in this round."""
        return latents

    def step(self, model_output: Floats, latents: Floats, generator: np.random.Generator) -> Floats:
        """The latents of the next round; both arguments stay as they are.

        Args:
            model_output: (c, y, x), guidance applied.
            latents: those that `scale_input` was given.
            generator: the request's own, so that an image does not depend on its neighbours. Used once if
                `needs_noise`, else not at all.
        """
        assert not self.is_done
        x0 = self._estimate(model_output, self.scale_input(latents))
        latents = self._advance(x0, model_output, latents, generator)
        self.x0 = x0
        self.step_index += 1
        return latents

    def add_noise(self, image: Floats, noise: Floats) -> Floats:
        """A clean image as noisy as this round's latents; after the last round the image itself.

        For images to begin with, and for the part of an image that a mask keeps.
        """
        if self.is_done:
            return image
        return self._signals[self.step_index] * image + self._noise_levels[self.step_index] * noise

    @abc.abstractmethod
    def _advance(self, x0: Floats, model_output: Floats, latents: Floats, generator: np.random.Generator) -> Floats:
        """The latents of the next round."""

    def _estimate(self, model_output: Floats, scaled: Floats) -> Floats:
        """The clean image, from what the model was given and what it gave."""
        signal, noise_level = self._signals[self.step_index], self._noise_levels[self.step_index]
        if self._prediction_type == "sample":
            return model_output.copy()  # kept until the next round, and may lie in the session's own memory
        if self._prediction_type == "v_prediction":
            return signal * scaled - noise_level * model_output
        # No signal at all: the noise says nothing of the image. As little as float16 can hold, as in Euler samplers.
        gain = 1 / (signal or 2.0**-12)
        return gain * scaled - (gain * noise_level) * model_output


def noise_generator(seed: int) -> np.random.Generator:
    """A request's source of noise: the first latents, then the draws of its steps, in order.

    Args:
        seed: not negative, of any size.
    """
    return np.random.Generator(np.random.Philox(seed))


def num_run_steps(num_steps: int, strength: float) -> int:
    """Steps of a schedule that a request with an image runs, the last ones of it.

    Args:
        strength: how much of the image is given up: 1 runs all steps, beginning with almost nothing of it.

    Raises:
        InvalidRequest: not above 0 and up to 1, or so little that no step is left.
    """
    if not 0 < strength <= 1:
        raise InvalidRequest("strength has to be above 0 and at most 1", param="strength")
    num_left = min(int(num_steps * strength), num_steps)
    if num_left == 0:
        raise InvalidRequest(
            f"strength {strength:g} of {num_steps} steps leaves no step to run; raise one of them", param="strength"
        )
    return num_left
