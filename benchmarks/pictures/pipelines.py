"""The pipelines that are measured, in diffusers' layout. Random weights: what a step costs does not depend on them."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from demo_diffusion.model import (
    make_autoencoder,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    save_pipeline,
)

_QUARTER_WIDTH = 192
_QUARTER_TOKENS = 77


def make_pipeline(name: str, folder: Path) -> Path:
    """Write a pipeline, unless it is there.

    Args:
        name: ``demo``: the demo model's networks, 64 x 64 pixels. ``quarter``: Stable Diffusion 1.5's layout at a
            quarter of its width, 256 x 256 pixels.
    """
    if not (folder / "model_index.json").exists():
        torch.manual_seed(0)
        {"demo": _save_demo, "quarter": _save_quarter}[name](folder)
    return folder


def _save_demo(folder: Path) -> None:
    tokenizer = make_tokenizer()
    save_pipeline(folder, make_autoencoder(), make_text_encoder(tokenizer), make_unet(), tokenizer)


def _save_quarter(folder: Path) -> None:
    tokenizer = make_tokenizer(_QUARTER_TOKENS)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_QUARTER_WIDTH,
            intermediate_size=4 * _QUARTER_WIDTH,
            projection_dim=_QUARTER_WIDTH,
            num_hidden_layers=12,
            num_attention_heads=3,
            max_position_embeddings=_QUARTER_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(80, 160, 320, 320),
        attention_head_dim=8,
        cross_attention_dim=_QUARTER_WIDTH,
        norm_num_groups=16,
    )
    autoencoder = AutoencoderKL(
        sample_size=256,
        latent_channels=4,
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=16,
    )
    save_pipeline(folder, autoencoder, text_encoder, unet, tokenizer)
