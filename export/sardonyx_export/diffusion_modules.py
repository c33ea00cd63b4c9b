"""What is traced of a pipeline: its parts behind the tensors of `sardonyx.repository.families.Diffusion`.

All take and give float32, whatever they compute in.
"""

from typing import Any

import torch
from torch import nn


class UnetModule(nn.Module):
    """Noise of latents, each row at a timestep of its own."""

    def __init__(self, unet: Any, dtype: torch.dtype, names: list[str]) -> None:
        super().__init__()
        self.unet = unet
        self.dtype = dtype
        self.names = names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """Of the inputs that `names` lists."""
        given = dict(zip(self.names, values, strict=True))
        added = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
        guidance = given.get("timestep_cond")
        noise: torch.Tensor = self.unet(
            given["sample"].to(self.dtype),
            given["timestep"],
            given["encoder_hidden_states"].to(self.dtype),
            timestep_cond=None if guidance is None else guidance.to(self.dtype),
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0]
        return noise.float()


class VaeDecoderModule(nn.Module):
    """Latents as pictures between 0 and 1."""

    def __init__(self, vae: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae = vae
        self.dtype = dtype
        self.scale, self.shift = latent_scale(vae)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, y, x) to (B, 3, Y, X)."""
        plain = latents * self.scale + self.shift
        image: torch.Tensor = self.vae.decode(plain.to(self.dtype), return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)


class VaeEncoderModule(nn.Module):
    """Pictures between -1 and 1 as the mean and spread of their latents."""

    def __init__(self, vae: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae = vae
        self.dtype = dtype
        self.scale, self.shift = latent_scale(vae)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, Y, X) to twice (B, C, y, x)."""
        found = self.vae.encode(image.to(self.dtype), return_dict=False)[0].parameters.float()
        mean, log_variance = found.chunk(2, dim=1)
        # The range is that of diffusers' own distribution.
        std = (0.5 * log_variance.clamp(-30.0, 20.0)).exp()
        return (mean - self.shift) / self.scale, std / self.scale


class PromptEncoderModule(nn.Module):
    """Tokens as the hidden states that a UNet was trained with, and their summary.

    Args:
        encoder: of transformers.
        is_penultimate: the states before the last layer, as SDXL takes them; else the last ones, normalised.
        has_pooled: give the summary too.
    """

    def __init__(self, encoder: Any, *, is_penultimate: bool, has_pooled: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.is_penultimate = is_penultimate
        self.has_pooled = has_pooled

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, S) to (B, S, E) and, where wanted, (B, width)."""
        found = self.encoder(input_ids=input_ids, output_hidden_states=self.is_penultimate)
        hidden = found.hidden_states[-2] if self.is_penultimate else found.last_hidden_state
        return (hidden.float(), found.text_embeds.float()) if self.has_pooled else (hidden.float(),)


def latent_scale(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """By what latents of a UNet are multiplied, and what is added then, to have the VAE's own. (1, C or 1, 1, 1)."""
    config = vae.config
    scale, shift = torch.tensor([1 / config.scaling_factor]), torch.zeros(1)
    if config.latents_mean is not None and config.latents_std is not None:
        scale, shift = torch.tensor(config.latents_std) * scale, torch.tensor(config.latents_mean)
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
