"""A diffusion pipeline's folder in diffusers' layout, read into what will be built.

Source: ``model_index.json`` and the configurations of ``UNet2DConditionModel``, ``AutoencoderKL`` and
``CLIPTextModel``, diffusers 0.42 and transformers 5.24.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from sardonyx.repository.families import Diffusion, PromptEncoder
from sardonyx.repository.scheduler_config import read_scheduler_config
from sardonyx_export.errors import ExportError
from sardonyx_export.sources.model_folder import ModelFolder

INDEX_FILE = "model_index.json"
SCHEDULER_FILE = "scheduler_config.json"
"""As in the version folder; in the source it lies in ``scheduler/``."""

_PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
    "LatentConsistencyModelPipeline": "sd",
    "LatentConsistencyModelImg2ImgPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
}
_BUILT = "Stable Diffusion 1.x and 2.x, SDXL, their Turbo and LCM relatives are"
_EXTRA_CHANNELS = {9: "an inpainting UNet", 8: "a UNet that takes a second picture, as InstructPix2Pix's"}
_PLAIN = {
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim_type": None,
    "encoder_hid_dim": None,
    "attention_type": "default",
    "time_embedding_type": "positional",
    "addition_embed_type_num_heads": 64,
}
"""Fields of a UNet that ask for a part which is not built unless they say this."""
_DEFAULT_GUIDANCE = {"sd": 7.5, "sdxl": 5.0}
_DEFAULT_STEPS = 30
_FEW_STEPS = 4
_LCM_GUIDANCE = 8.5
_NO_GUIDANCE = 1.0
_MAX_STORED_TOKENS = 1_000_000
"""tokenizer_config.json says a number of thirty digits where there is no limit."""


class DiffusionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a folder says."""

    layout: Literal["sd", "sdxl"]
    pipeline: str
    """Class that its publisher saved."""
    facts: Diffusion
    """Without `preview`; an encoder's `pad_token_id` is still 0, since its tokenizer names it."""
    tokenizers: dict[str, str]
    """Folders of the tokenizers by the file that each becomes."""
    keeps_vae_in_float32: bool
    """Its numbers leave the range of half precision."""
    scheduler: bytes
    """Diffusers' configuration, as it is."""
    has_safety_checker: bool

    @property
    def components(self) -> dict[str, str]:
        """Folders of weights, and the stem of the files in each."""
        named = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
        return named | {encoder.graph: "model" for encoder in self.facts.encoders}


def read_diffusion_spec(folder: ModelFolder) -> DiffusionSpec:
    """What the files of a pipeline say, weights aside.

    Raises:
        ExportError: a file or a field is missing, its parts do not fit each other, or it asks for what is not built.
    """
    index = folder.object(INDEX_FILE)
    pipeline = str(index.get("_class_name"))
    layout = _layout(index, pipeline)
    unet, vae = _config(folder, "unet"), _config(folder, "vae")
    scheduler, sampling = _read_scheduler(folder)
    _check_networks(unet, vae, layout)
    names = ["text_encoder", "text_encoder_2"] if layout == "sdxl" else ["text_encoder"]
    texts = [_config(folder, name) for name in names]
    encoders = [_encoder(folder, name, config, layout) for name, config in zip(names, texts, strict=True)]
    _check_widths(unet, texts, layout)
    steps, guidance = _defaults(sampling, unet, layout)
    scale = 2 ** (len(_list(vae, "vae", "block_out_channels")) - 1)
    facts = Diffusion(
        encoders=encoders,
        latent_channels=_count(vae, "vae", "latent_channels", 4),
        pixels_per_latent=scale,
        size=[edge * scale for edge in _latent_size(unet)],
        size_multiple=scale,
        pooled_width=_count(texts[-1], names[-1], "projection_dim", 512) if layout == "sdxl" else None,
        guidance_width=unet.get("time_cond_proj_dim"),
        zeroes_empty_prompt=layout == "sdxl" and index.get("force_zeros_for_empty_prompt", True) is True,
        default_steps=steps,
        default_guidance=guidance,
    )
    return DiffusionSpec(
        layout=layout,
        pipeline=pipeline,
        facts=facts,
        tokenizers={
            encoder.tokenizer: name.replace("text_encoder", "tokenizer")
            for encoder, name in zip(encoders, names, strict=True)
        },
        keeps_vae_in_float32=layout == "sdxl" and vae.get("force_upcast") is not False,
        scheduler=scheduler,
        has_safety_checker=any((index.get("safety_checker") or [None])[1:2]),
    )


def _layout(index: Mapping[str, Any], pipeline: str) -> Literal["sd", "sdxl"]:
    if "controlnet" in index or "ControlNet" in pipeline:
        raise _refusal(INDEX_FILE, "_class_name", f"is {pipeline}; ControlNet is not built")
    layout = _PIPELINES.get(pipeline)
    if layout is None:
        raise _refusal(INDEX_FILE, "_class_name", f"is {pipeline}, which is not built; {_BUILT}")
    wanted = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    if layout == "sdxl":
        if index.get("requires_aesthetics_score") or (index.get("text_encoder") or [None])[0] is None:
            raise _refusal(INDEX_FILE, "text_encoder", "is not there: an SDXL refiner is not built; its base model is")
        wanted["text_encoder_2"] = "CLIPTextModelWithProjection"
    for part, name in wanted.items():
        named = index.get(part)
        found = named[1] if isinstance(named, list) and len(named) == 2 else None
        if found != name:
            raise _refusal(INDEX_FILE, part, f"is {found}; {name} is built")
    for part in ("image_encoder", "adapter", "motion_adapter"):
        if any(index.get(part) or []):
            raise _refusal(INDEX_FILE, part, "is not built")
    return "sdxl" if layout == "sdxl" else "sd"


def _check_networks(unet: Mapping[str, Any], vae: Mapping[str, Any], layout: str) -> None:
    channels, latents = _count(unet, "unet", "in_channels", 4), _count(vae, "vae", "latent_channels", 4)
    if channels != latents:
        what = _EXTRA_CHANNELS.get(channels, "a UNet that takes more than latents")
        raise _refusal("unet/config.json", "in_channels", f"is {channels}: {what} is not built; {latents} are")
    if unet.get("out_channels", 4) != channels:
        raise _refusal("unet/config.json", "out_channels", f"is {unet['out_channels']}; {channels} are built")
    wanted = _PLAIN | {"addition_embed_type": "text_time" if layout == "sdxl" else None}
    for field, value in wanted.items():
        found = unet.get(field, value)
        if found != value:
            raise _refusal("unet/config.json", field, f"is {found!r}; {value!r} is built")
    # Diffusers' pipelines of these layouts do not look at what is refused here.
    unread = ("shift_factor",) if layout == "sdxl" else ("shift_factor", "latents_mean", "latents_std")
    for field in unread:
        if vae.get(field) is not None:
            raise _refusal("vae/config.json", field, "is set, which no pipeline of this layout honours")
    width = unet.get("time_cond_proj_dim")
    if width is not None and (not isinstance(width, int) or width < 1):
        raise _refusal("unet/config.json", "time_cond_proj_dim", "is no positive number")


def _encoder(folder: ModelFolder, name: str, config: Mapping[str, Any], layout: str) -> PromptEncoder:
    if config.get("use_attention_mask"):
        raise _refusal(f"{name}/config.json", "use_attention_mask", "is set; encoders without a mask are built")
    suffix = name.removeprefix("text_encoder")
    positions = _count(config, name, "max_position_embeddings", 77)
    stated = folder.object(f"tokenizer{suffix}/tokenizer_config.json").get("model_max_length")
    limit = stated if isinstance(stated, int) and 2 < stated < _MAX_STORED_TOKENS else positions
    return PromptEncoder(
        graph=name,
        tokenizer=f"tokenizer{suffix}.json",
        max_tokens=min(positions, limit),
        pad_token_id=0,
        has_pooled=layout == "sdxl" and suffix != "",
    )


def _check_widths(unet: Mapping[str, Any], texts: list[dict[str, Any]], layout: str) -> None:
    """The encoders' numbers fit the UNet's inputs."""
    width = sum(_count(config, "text_encoder", "hidden_size", 512) for config in texts)
    given = unet.get("cross_attention_dim")
    if given != width:
        raise _refusal("unet/config.json", "cross_attention_dim", f"is {given}; the text encoders give {width}")
    if layout == "sd":
        return
    pooled = _count(texts[-1], "text_encoder_2", "projection_dim", 512)
    wanted = pooled + 6 * _count(unet, "unet", "addition_time_embed_dim", 256)
    given = unet.get("projection_class_embeddings_input_dim")
    if given != wanted:
        raise _refusal(
            "unet/config.json",
            "projection_class_embeddings_input_dim",
            f"is {given}; a summary of {pooled} and six sizes make {wanted}",
        )


def _defaults(scheduler: Mapping[str, Any], unet: Mapping[str, Any], layout: str) -> tuple[int, float]:
    """Steps and guidance for requests that name none.

    Turbo models are known by their scheduler alone: one of Euler's that starts at the last timestep, without the
    rescaling to zero signal for which others do so too.
    """
    name = str(scheduler.get("_class_name"))
    if unet.get("time_cond_proj_dim") is not None:
        return _FEW_STEPS, _LCM_GUIDANCE
    is_turbo = (
        name.startswith("Euler")
        and scheduler.get("timestep_spacing") == "trailing"
        and not scheduler.get("rescale_betas_zero_snr")
        and scheduler.get("prediction_type", "epsilon") == "epsilon"
    )
    if is_turbo or name == "LCMScheduler":
        return _FEW_STEPS, _NO_GUIDANCE
    return _DEFAULT_STEPS, _DEFAULT_GUIDANCE[layout]


def _latent_size(unet: Mapping[str, Any]) -> list[int]:
    """Height and width that the model was trained for, in latents."""
    stated = unet.get("sample_size") or 64
    latents = list(stated) if isinstance(stated, list) else [stated, stated]
    if len(latents) != 2 or not all(isinstance(edge, int) and 0 < edge < 1 << 16 for edge in latents):
        raise _refusal("unet/config.json", "sample_size", f"is {stated!r}, no height and width of latents")
    return latents


def _read_scheduler(folder: ModelFolder) -> tuple[bytes, dict[str, Any]]:
    """The file as it is, and what it says.

    Raises:
        ConfigError: it is missing, or asks for what the server does not have.
    """
    path = f"scheduler/{SCHEDULER_FILE}"
    data = folder.read(path)
    if data is None:
        raise ExportError("is missing", file=path)
    read_scheduler_config(data, file=path)
    # Not msgspec's: diffusers writes numbers that are infinite.
    return data, json.loads(data)


def _config(folder: ModelFolder, part: str) -> dict[str, Any]:
    config = folder.object(f"{part}/config.json")
    if not config:
        raise ExportError("is missing", file=f"{part}/config.json")
    return config


def _count(config: Mapping[str, Any], part: str, field: str, default: int) -> int:
    value = config.get(field, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
        raise _refusal(f"{part}/config.json", field, f"is {value!r}, no positive number")
    return value


def _list(config: Mapping[str, Any], part: str, field: str) -> list[Any]:
    value = config.get(field)
    if not isinstance(value, list) or not 1 <= len(value) <= 8:
        raise _refusal(f"{part}/config.json", field, "is no list of one to eight numbers")
    return value


def _refusal(file: str, field: str, reason: str) -> ExportError:
    return ExportError(reason, file=file, field=field)
