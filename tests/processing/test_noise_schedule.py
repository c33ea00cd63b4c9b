"""Noise of the training against diffusers' schedulers."""

from typing import Any

import numpy as np
import pytest
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from sardonyx.errors import ConfigError
from sardonyx.processing.noise_schedule import (
    alpha_bars,
    karras_sigmas,
    sigmas_at,
    spaced_timesteps,
    timesteps_of,
    training_sigmas,
)
from sardonyx.repository.scheduler_config import SchedulerConfig

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


def config_of(**fields: Any) -> SchedulerConfig:
    return SchedulerConfig(sampler="ddim", **{"beta_start": 0.00085, "beta_end": 0.012} | fields)


@pytest.mark.parametrize("has_zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [50, 1000])
def test_what_is_kept_of_the_image_is_as_in_diffusers(
    num_timesteps: int, beta_schedule: str, has_zero_snr: bool
) -> None:
    fields = {
        "num_train_timesteps": num_timesteps,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": beta_schedule,
        "rescale_betas_zero_snr": has_zero_snr,
    }
    expected = DDIMScheduler(**fields).alphas_cumprod.numpy()
    np.testing.assert_allclose(alpha_bars(config_of(**fields)), expected, atol=2e-6)


def test_stable_diffusions_sigmas_are_the_known_ones() -> None:
    sigmas = training_sigmas(config_of(beta_schedule="scaled_linear"))
    assert sigmas[[0, -1]] == pytest.approx([0.0292, 14.6146], abs=1e-4)


def test_the_last_timestep_has_no_signal_where_the_config_says_so() -> None:
    config = config_of(rescale_betas_zero_snr=True)
    assert alpha_bars(config)[-1] == 0
    assert alpha_bars(config)[0] == pytest.approx(alpha_bars(config_of())[0], abs=1e-6)
    assert training_sigmas(config)[-1] == pytest.approx(4096, abs=1)


@pytest.mark.parametrize(
    ("spacing", "offset", "expected"),
    [
        ("linspace", 1, [9, 4.5, 0]),
        ("leading", 0, [6, 3, 0]),
        ("leading", 1, [7, 4, 1]),
        ("trailing", 1, [9, 6, 2]),
    ],
)
def test_timesteps_lie_as_the_spacing_says(spacing: Any, offset: int, expected: list[float]) -> None:
    assert spaced_timesteps(spacing, 3, 10, offset).tolist() == expected


def test_trailing_timesteps_are_as_many_as_asked_for_whatever_the_stride() -> None:
    for num_timesteps in (10, 100, 1000):
        for num_steps in range(1, num_timesteps + 1):
            timesteps = spaced_timesteps("trailing", num_steps, num_timesteps, 0)
            assert len(timesteps) == num_steps
            assert timesteps[0] == num_timesteps - 1
            assert (np.diff(timesteps) < 0).all()


def test_karras_sigmas_reach_from_end_to_end_and_crowd_at_the_low_one() -> None:
    sigmas = karras_sigmas(14.6, 0.03, 20)
    assert sigmas[[0, -1]] == pytest.approx([14.6, 0.03])
    assert (np.diff(np.diff(sigmas)) > 0).all()


def test_timesteps_are_found_again_from_their_sigmas() -> None:
    config = config_of(beta_schedule="scaled_linear")
    timesteps = np.array([999.0, 500.0, 1.0, 0.0])
    np.testing.assert_allclose(timesteps_of(sigmas_at(timesteps, config), config), timesteps, atol=1e-3)


def test_nothing_that_is_shared_between_samplers_can_be_written_to() -> None:
    for array in (alpha_bars(config_of()), training_sigmas(config_of())):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize(
    "fields",
    [
        {"num_train_timesteps": 20_000, "beta_end": 0.5},
        {"num_train_timesteps": 20_000, "beta_end": 0.5, "rescale_betas_zero_snr": True},
        {"beta_start": 1e-12},
    ],
)
def test_betas_that_float32_cannot_tell_apart_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="beta_") as caught:
        alpha_bars(config_of(**fields))
    assert caught.value.field in ("beta_start", "beta_end")
