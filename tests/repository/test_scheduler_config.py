"""Scheduler files of well-known models, and those that ask for what is not served."""

import json
from typing import Any

import msgspec
import pytest

from sardonyx.errors import ConfigError
from sardonyx.repository.scheduler_config import (
    SAMPLER_NAMES,
    SchedulerConfig,
    check_scheduler_config,
    read_scheduler_config,
)

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
STABLE_DIFFUSION_1 = LATENT | {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SDXL = LATENT | {
    "_class_name": "EulerDiscreteScheduler",
    "clip_sample": False,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
SDXL_TURBO = SDXL | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
DPM_SOLVER = LATENT | {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "final_sigmas_type": "sigma_min",
    "lambda_min_clipped": -5.1,
    "lower_order_final": False,
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
    "use_karras_sigmas": True,
    "use_lu_lambdas": False,
    "variance_type": None,
}
LCM = LATENT | {"_class_name": "LCMScheduler", "original_inference_steps": 40, "timestep_scaling": 9.0}


def read(fields: dict[str, Any]) -> SchedulerConfig:
    return read_scheduler_config(json.dumps(fields).encode())


def test_stable_diffusion_1_is_sampled_by_a_multistep_solver_of_the_same_equation():
    assert read(STABLE_DIFFUSION_1) == SchedulerConfig(
        sampler="dpmpp_2m_karras", **LATENT, steps_offset=1, set_alpha_to_one=False
    )


@pytest.mark.parametrize(("fields", "sampler"), [(SDXL, "euler"), (SDXL_TURBO, "euler_a"), (LCM, "lcm")])
def test_a_model_is_sampled_as_its_file_says(fields: dict[str, Any], sampler: str):
    assert read(fields).sampler == sampler


def test_the_spacing_of_the_file_is_kept():
    assert read(SDXL).timestep_spacing == "leading"
    assert read(SDXL_TURBO).timestep_spacing == "trailing"
    assert read(STABLE_DIFFUSION_1).timestep_spacing is None


@pytest.mark.parametrize(
    ("class_name", "sampler"),
    [("EulerDiscreteScheduler", "euler_karras"), ("DPMSolverMultistepScheduler", "dpmpp_2m_karras")],
)
def test_karras_sigmas_make_another_sampler(class_name: str, sampler: str):
    assert read(LATENT | {"_class_name": class_name, "use_karras_sigmas": True}).sampler == sampler
    assert read(LATENT | {"_class_name": class_name}).sampler == sampler.removesuffix("_karras")


def test_options_of_the_solver_are_read_of_its_own_class_only():
    config = read(DPM_SOLVER)
    assert (config.lower_order_final, config.final_sigmas_type, config.lambda_min_clipped) == (False, "sigma_min", -5.1)
    other = DPM_SOLVER | {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "solver_order": 3}
    config = read(other)
    assert (config.lower_order_final, config.final_sigmas_type, config.lambda_min_clipped) == (True, "zero", None)


def test_a_lambda_that_clips_nothing_is_none():
    text = json.dumps(DPM_SOLVER | {"lambda_min_clipped": float("-inf")})
    assert "-Infinity" in text
    assert read_scheduler_config(text.encode()).lambda_min_clipped is None


@pytest.mark.parametrize(
    ("class_name", "differs"),
    [
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDPMScheduler", {"clip_sample": True}),
        ("PNDMScheduler", {"set_alpha_to_one": False}),
        ("LCMScheduler", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}),
        ("EulerDiscreteScheduler", {}),
    ],
)
def test_what_a_file_leaves_out_is_as_its_class_has_it(class_name: str, differs: dict[str, Any]):
    config = read({"_class_name": class_name})
    assert config == SchedulerConfig(sampler=config.sampler, **differs)


@pytest.mark.parametrize("fields", [STABLE_DIFFUSION_1, SDXL, SDXL_TURBO, DPM_SOLVER, LCM])
def test_a_config_survives_the_manifest(fields: dict[str, Any]):
    config = read(fields)
    assert msgspec.json.decode(msgspec.json.encode(config), type=SchedulerConfig) == config
    assert hash(config) == hash(read(fields))
    assert config.sampler in SAMPLER_NAMES


@pytest.mark.parametrize(
    ("base", "field", "value"),
    [
        (SDXL, "_class_name", "HeunDiscreteScheduler"),
        (SDXL, "_class_name", None),
        (SDXL, "_class_name", ["EulerDiscreteScheduler"]),
        (SDXL, "trained_betas", [0.1, 0.2]),
        (SDXL, "thresholding", True),
        (SDXL, "use_exponential_sigmas", True),
        (SDXL, "sigma_max", 80.0),
        (SDXL, "sigma_min", 0),
        (SDXL, "interpolation_type", "log_linear"),
        (SDXL, "timestep_type", "continuous"),
        (SDXL, "variance_type", "learned_range"),
        (SDXL, "prediction_type", "flow_prediction"),
        (SDXL, "beta_schedule", "sigmoid"),
        (SDXL, "beta_start", 0),
        (SDXL, "beta_start", "0.1"),
        (SDXL, "beta_end", 0.0001),
        (SDXL, "beta_end", float("-inf")),
        (SDXL, "num_train_timesteps", 0),
        (SDXL, "num_train_timesteps", 10**400),
        (SDXL, "steps_offset", -1),
        (SDXL, "timestep_spacing", "quadratic"),
        (SDXL, "a_new_one", 1),
        (DPM_SOLVER, "algorithm_type", "sde-dpmsolver++"),
        (DPM_SOLVER, "solver_order", 3),
        (DPM_SOLVER, "solver_type", "heun"),
        (DPM_SOLVER, "use_lu_lambdas", True),
        (DPM_SOLVER, "use_flow_sigmas", True),
        (DPM_SOLVER, "lambda_min_clipped", 1e9),
        (LCM, "original_inference_steps", 1001),
        (LCM, "timestep_scaling", 0),
    ],
)
def test_what_is_not_served_is_refused_by_name(base: dict[str, Any], field: str, value: Any):
    with pytest.raises(ConfigError) as caught:
        read(base | {field: value})
    assert caught.value.field == field
    assert caught.value.file == "scheduler_config.json"


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"beta_end": NaN}', b"\xff", b"[" * 100_000])
def test_what_is_no_scheduler_file_is_refused(data: bytes):
    with pytest.raises(ConfigError, match=r"scheduler_config\.json"):
        read_scheduler_config(data)


def test_new_fields_that_are_off_are_passed_over():
    assert read(SDXL | {"a_new_one": False, "another": None, "_name": "x"}) == read(SDXL)


def test_one_timestep_cannot_be_the_first_and_the_last():
    config = SchedulerConfig(sampler="ddim", num_train_timesteps=1, rescale_betas_zero_snr=True)
    with pytest.raises(ConfigError, match=r"diffusion\.scheduler\.rescale_betas_zero_snr: needs more"):
        check_scheduler_config(config, file="manifest.json", prefix="diffusion.scheduler.")
