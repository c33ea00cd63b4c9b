"""Tiny diffusion pipelines with random weights, in diffusers' layout, as their publishers would save them."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from tokenizers import pre_tokenizers

torch = pytest.importorskip("torch", reason="the extra `export-torch` is not installed")
diffusers = pytest.importorskip("diffusers", reason="the extra `export-torch` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `export-torch` is not installed")

Layout = Literal["sd", "sdxl", "lcm"]
MAX_TOKENS = 12
"""Of a prompt, the two at its ends among them."""
TEXT_WIDTH = 16
TEXT_WIDTH_2 = 24
POOLED_WIDTH = 12
TIME_WIDTH = 8
"""Of each of SDXL's six numbers, embedded."""
GUIDANCE_WIDTH = 6
LATENT_SIZE = 8
PIXELS_PER_LATENT = 4

_CLASSES: dict[str, str] = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "lcm": "LatentConsistencyModelPipeline",
}
_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("PNDMScheduler", {"skip_prk_steps": True}),
    "sdxl": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    "lcm": ("LCMScheduler", {"original_inference_steps": 50}),
}
_TRAINED = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
_MERGES = ("t h", "th e</w>", "c a", "ca t</w>", "d o", "do g</w>")


def make_pipeline(
    folder: Path,
    layout: Layout = "sd",
    *,
    scheduler: tuple[str, dict[str, Any]] | None = None,
    unet: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    index: dict[str, Any] | None = None,
) -> Path:
    """Write a whole pipeline. The same in every call with the same arguments.

    Args:
        folder: is made if it does not exist.
        layout: Stable Diffusion's, SDXL's, or a latent consistency model's.
        scheduler: class and what of its configuration differs from the layout's.
        unet: fields of the UNet's configuration that differ.
        vae: of the VAE's.
        text: of the text encoders'.
        index: of model_index.json.

    Returns:
        The folder.
    """
    is_xl = layout == "sdxl"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(7)
    _save(diffusers.UNet2DConditionModel(**_unet_fields(layout) | (unet or {})), folder / "unet")
    _save(diffusers.AutoencoderKL(**_vae_fields(is_xl=is_xl) | (vae or {})), folder / "vae")
    _write_text_side(folder, "", TEXT_WIDTH, transformers.CLIPTextModel, pad="<|endoftext|>", changes=text)
    if is_xl:
        _write_text_side(folder, "_2", TEXT_WIDTH_2, transformers.CLIPTextModelWithProjection, pad="!", changes=text)
    name, fields = scheduler or _SCHEDULERS[layout]
    (folder / "scheduler").mkdir(exist_ok=True)
    given = {"_class_name": name, **_TRAINED, **fields}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(given, indent=2))
    _write_index(folder, layout, name, index or {})
    return folder


def _unet_fields(layout: Layout) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "sample_size": LATENT_SIZE,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    if layout == "lcm":
        fields["time_cond_proj_dim"] = GUIDANCE_WIDTH
    if layout == "sdxl":
        fields |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (1, 2),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "cross_attention_dim": TEXT_WIDTH + TEXT_WIDTH_2,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_WIDTH,
            "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * TIME_WIDTH,
        }
    return fields


def _vae_fields(*, is_xl: bool) -> dict[str, Any]:
    num_blocks = PIXELS_PER_LATENT.bit_length()
    return {
        "block_out_channels": (4,) * (num_blocks - 1) + (8,),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * num_blocks,
        "up_block_types": ("UpDecoderBlock2D",) * num_blocks,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": LATENT_SIZE * PIXELS_PER_LATENT,
        "scaling_factor": 0.13025 if is_xl else 0.18215,
    }


def _write_text_side(
    folder: Path, suffix: str, width: int, model_class: Any, *, pad: str, changes: dict[str, Any] | None
) -> None:
    """A text encoder and its tokenizer, as two files without a tokenizer.json."""
    vocabulary = _vocabulary()
    fields = {
        "vocab_size": len(vocabulary),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": POOLED_WIDTH,
        "hidden_act": "gelu" if suffix else "quick_gelu",
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": 2,  # as published, whatever the tokenizer says
    }
    _save(model_class(transformers.CLIPTextConfig(**fields | (changes or {}))), folder / f"text_encoder{suffix}")
    tokenizer = folder / f"tokenizer{suffix}"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (tokenizer / "merges.txt").write_text("#version: 0.2\n" + "\n".join(_MERGES) + "\n")
    named = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
        "model_max_length": MAX_TOKENS,
        "tokenizer_class": "CLIPTokenizer",
    }
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(named))


def _vocabulary() -> dict[str, int]:
    """Every byte alone and at a word's end, in CLIP's order but for "!" which comes first, then merges and ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    pieces += [merge.replace(" ", "") for merge in _MERGES]
    return {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}


def _save(model: Any, folder: Path) -> None:
    """Spread weights so that every part moves the result, norms and biases among them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * torch.randn_like(parameter))
            elif "embedding.weight" in name:
                parameter.copy_(torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder, safe_serialization=True)


def _write_index(folder: Path, layout: Layout, scheduler: str, changes: dict[str, Any]) -> None:
    named: dict[str, Any] = {
        "_class_name": _CLASSES[layout],
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if layout == "sdxl":
        named |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,
        }
    else:
        named |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(named | changes, indent=2))
