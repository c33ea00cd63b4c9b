"""The model's parts in diffusers' and transformers' own classes, and the folder that holds them together.

A byte-level tokenizer whose merges make every caption word one token, a small CLIP text encoder, a UNet over 16x16x4
latents and an autoencoder of factor 4.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo_diffusion.captions import words
from demo_diffusion.scenes import SIDE

MAX_TOKENS = 32
LATENT_CHANNELS = 4
LATENT_SIDE = SIDE // 4
TEXT_WIDTH = 128
NUM_TIMESTEPS = 1000


def make_tokenizer(max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """All bytes, and merges that make each word of `captions.words` one token; other words fall into pieces.

    Args:
        max_tokens: of a prompt, the two at its ends among them.
    """
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learned.train_from_iterator([[word] for word in words()], trainer)
    merges = [(left, right) for left, right in json.loads(learned.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(f"{each}</w>" for each in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIDE,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        # Few groups: of a flat picture, a group of two channels would keep nothing but a sign.
        norm_num_groups=2,
        mid_block_add_attention=False,
        # `whiten` makes latents of mean 0 and deviation 1, so nothing is left to scale.
        scaling_factor=1.0,
        force_upcast=False,
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=4,
    )


def make_scheduler() -> DDIMScheduler:
    """v-prediction over linear betas: almost no signal is left at the last timestep, so backgrounds come out pure."""
    return DDIMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


@torch.no_grad()
def whiten(autoencoder: AutoencoderKL, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """Give latents mean 0 and deviation 1 by channel, through the 1x1 convolutions on both sides of them.

    Args:
        mean, deviation: what latents have now, (4,) each. Decoded pictures stay the same.
    """
    before, after = autoencoder.quant_conv, autoencoder.post_quant_conv
    count = LATENT_CHANNELS
    before.weight[:count] /= deviation[:, None, None, None]
    before.bias[:count] = (before.bias[:count] - mean) / deviation
    before.bias[count:] -= 2 * deviation.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= deviation[None, :, None, None]


def save_pipeline(
    folder: Path,
    autoencoder: AutoencoderKL,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Write the folder that ``StableDiffusionPipeline.from_pretrained`` reads, weights as fp32 safetensors."""
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
