"""How a diffusion model was trained to be sampled: what its `scheduler_config.json` says, as the manifest keeps it.

Floor 1. The file belongs to diffusers and names one of its classes. Here it becomes facts of the model and the name of
the sampler that serves requests which name none. What changes a picture and cannot be honoured is refused by name.

A field that the file leaves out gets the default of the class that the file names. Only `timestep_spacing` stays open
then, because each sampler is at home in another one.
"""

import json
import math
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from sardonyx.errors import ConfigError

FILE_NAME = "scheduler_config.json"

SamplerName = Literal["ddim", "euler", "euler_karras", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "lcm"]
SAMPLER_NAMES: tuple[SamplerName, ...] = get_args(SamplerName)

Spacing = Literal["linspace", "leading", "trailing"]

_Beta = Annotated[float, Meta(gt=0, lt=1)]
_Count = Annotated[int, Meta(ge=1, le=100_000)]
_Positive = Annotated[float, Meta(gt=0, le=1e6)]

_SAMPLERS: dict[str, SamplerName] = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "LCMScheduler": "lcm",
    "PNDMScheduler": "dpmpp_2m_karras",
    "UniPCMultistepScheduler": "dpmpp_2m_karras",
}
"""PNDM and UniPC are multistep solvers of the equation that DPM++ 2M solves. Measured against 999 steps of DDIM, on a
mixture of 32 Gaussians with the betas of Stable Diffusion 1.5, 25 steps end at an RMS distance of 0.007 with PNDM,
0.009 with DPM++ 2M Karras, 0.049 with DPM++ 2M, 0.086 with DDIM and 0.098 with Euler. DDPM is a rule of training;
models that name it are sampled without its noise."""
_KARRAS: dict[SamplerName, SamplerName] = {"euler": "euler_karras", "dpmpp_2m": "dpmpp_2m_karras"}

_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {  # Any: values of JSON
    "DDIMScheduler": {"clip_sample": True},
    "DDPMScheduler": {"clip_sample": True},
    "LCMScheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "PNDMScheduler": {"set_alpha_to_one": False},
}
"""Where they differ from those of `SchedulerConfig`."""

_ONLY_OFF = (
    "trained_betas",
    "thresholding",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_flow_sigmas",
    "use_lu_lambdas",
    "use_dynamic_shifting",
    "sigma_min",
    "sigma_max",
    "shift_terminal",
)
"""Fields that have to be null or false."""
_ONLY: dict[str, tuple[str, ...]] = {
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
"""Fields with the values that are served, null among them. A fixed variance is noise that no sampler here adds."""
_SOLVER: dict[str, tuple[Any, ...]] = {  # Any: as above
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
}
"""As `_ONLY`, where the file's class is DPMSolverMultistepScheduler; elsewhere another solver's, which is not used."""
_SOLVER_OPTIONS = ("lower_order_final", "euler_at_final", "final_sigmas_type", "lambda_min_clipped")
"""Of SchedulerConfig, and read of that class only."""
_IDLE = (
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "flow_shift",
    "time_shift_type",
    "skip_prk_steps",
    "predict_x0",
    "solver_p",
    "disable_corrector",
    "use_karras_sigmas",
)
"""Fields that mean nothing while the others are as asked, or that choose a sampler."""


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Facts that every sampler of a model is made from. Hashable."""

    sampler: SamplerName
    """Serves requests that name none."""
    num_train_timesteps: _Count = 1000
    beta_start: _Beta = 0.0001
    beta_end: _Beta = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    rescale_betas_zero_snr: bool = False
    """The last timestep is nothing but noise."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the model gives: the noise, the velocity, or the clean image."""
    timestep_spacing: Spacing | None = None
    """Where a schedule's timesteps lie; ``None``: as the sampler's own class has it in diffusers."""
    steps_offset: Annotated[int, Meta(ge=0, le=1000)] = 0
    """Added to timesteps of the spacing ``leading``."""
    set_alpha_to_one: bool = True
    """DDIM's last step ends without noise, not with that of timestep 0."""
    clip_sample: bool = False
    """DDIM and LCM hold their estimate of the clean image within `clip_sample_range`; for models of pixels."""
    clip_sample_range: _Positive = 1.0
    original_inference_steps: _Count = 50
    """LCM: timesteps that the model was distilled for; a schedule is some of them."""
    timestep_scaling: _Positive = 10.0
    """LCM: how fast the share of the noisy image in the result falls with the timestep."""
    lower_order_final: bool = True
    """DPM++ 2M: the last step of a schedule of fewer than 15 is one of first order."""
    euler_at_final: bool = False
    """DPM++ 2M: that of every schedule is."""
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    """Euler and DPM++ 2M: the last step ends without noise, or with that of timestep 0."""
    lambda_min_clipped: Annotated[float, Meta(ge=-1000, le=1000)] | None = None
    """DPM++ 2M: schedules begin where half the logarithm of the signal-to-noise ratio is not below this."""


def read_scheduler_config(data: bytes, *, file: str = FILE_NAME) -> SchedulerConfig:
    """Read diffusers' ``scheduler_config.json``.

    Raises:
        ConfigError: not such a file, a class or a field that is not served, a value of the wrong type or out of range.
    """
    try:
        # Not msgspec's: lambda_min_clipped is written as -Infinity.
        values = json.loads(data, parse_constant=_read_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError("is not JSON", file=file) from error
    if not isinstance(values, dict):
        raise ConfigError("is not an object", file=file)
    class_name = values.get("_class_name")
    values = {name: value for name, value in values.items() if value is not None and not name.startswith("_")}
    if not isinstance(class_name, str) or class_name not in _SAMPLERS:
        raise ConfigError(f"is {class_name!r}; served are {', '.join(_SAMPLERS)}", file=file, field="_class_name")
    _refuse_unserved(values, class_name, file)
    fields = {name: values[name] for name in SchedulerConfig.__struct_fields__ if name in values and name != "sampler"}
    if class_name != "DPMSolverMultistepScheduler":
        for name in _SOLVER_OPTIONS:
            if name != "final_sigmas_type" or class_name != "EulerDiscreteScheduler":
                fields.pop(name, None)
    if fields.get("lambda_min_clipped") == -math.inf:
        del fields["lambda_min_clipped"]
    sampler = _SAMPLERS[class_name]
    if values.get("use_karras_sigmas"):
        sampler = _KARRAS.get(sampler, sampler)
    try:
        config = msgspec.convert(_CLASS_DEFAULTS.get(class_name, {}) | fields | {"sampler": sampler}, SchedulerConfig)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        raise ConfigError(reason, file=file, field=path.strip("`.") or None) from error
    check_scheduler_config(config, file=file)
    return config


def check_scheduler_config(config: SchedulerConfig, *, file: str, prefix: str = "") -> None:
    """Its numbers fit each other.

    Args:
        prefix: of the field's name in messages, ``diffusion.scheduler.``.

    Raises:
        ConfigError: they do not.
    """
    if config.beta_end < config.beta_start:
        raise ConfigError(f"is below beta_start, {config.beta_start}", file=file, field=f"{prefix}beta_end")
    if config.original_inference_steps > config.num_train_timesteps and config.sampler == "lcm":
        limit = f"num_train_timesteps, {config.num_train_timesteps}"
        raise ConfigError(f"is above {limit}", file=file, field=f"{prefix}original_inference_steps")


def _read_constant(name: str) -> float:
    if name != "-Infinity":
        raise ValueError(name)
    return -math.inf


def _refuse_unserved(values: dict[str, Any], class_name: str, file: str) -> None:
    """Raise for the first field that would change pictures in a way that no sampler here can."""
    is_solver = class_name == "DPMSolverMultistepScheduler"
    for name, value in values.items():
        allowed = _ONLY.get(name) or (_SOLVER.get(name) if is_solver else None)
        if allowed is not None and value not in allowed:
            raise ConfigError(f"{value!r} is not served, only {', '.join(map(repr, allowed))}", file=file, field=name)
        if name in _ONLY_OFF and value is not False:
            raise ConfigError("is not served; it has to be null or false", file=file, field=name)
        known = name in SchedulerConfig.__struct_fields__ or name in _ONLY or name in _SOLVER or name in _IDLE
        if not known and name not in _ONLY_OFF and value is not False:
            raise ConfigError("is not a field that is known here", file=file, field=name)
