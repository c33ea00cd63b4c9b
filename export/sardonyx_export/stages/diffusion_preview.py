"""The rough picture of latents: one linear step from their channels to red, green and blue."""

from typing import Any

import numpy as np

from sardonyx_export.families.diffusion import DiffusionSpec
from sardonyx_export.traced_diffusion import Components, component_module

_PICTURES = 8
_EDGE = 16
"""Of a picture, in latents."""
_SPOTS = (2, 4, 8)
"""Colours along an edge: broad, middling and small ones."""


def fit_preview(components: Components, spec: DiffusionSpec) -> list[list[float]]:
    """Least squares from latents to what the VAE makes of them, each latent's pixels averaged.

    The pictures are coloured clouds: soft fields of colour in three sizes. No photograph is needed, since the step is
    linear and clouds hold every colour.

    Returns:
        As `families.Diffusion.preview`: (C + 1, 3), the last row the constant, of pictures between 0 and 1.
    """
    import torch
    from torch.nn import functional

    scale = spec.facts.pixels_per_latent
    source = torch.Generator().manual_seed(0)
    edge = _EDGE * scale
    pictures = torch.zeros(_PICTURES, 3, edge, edge)
    for spots in _SPOTS:
        colours = torch.rand((_PICTURES, 3, spots, spots), generator=source) * 2 - 1
        pictures += functional.interpolate(colours, size=(edge, edge), mode="bicubic") / spots**0.5
    pictures = pictures.clamp(-1, 1)
    encode: Any = component_module("vae_encoder", components, spec, torch.float32, [])
    decode: Any = component_module("vae_decoder", components, spec, torch.float32, [])
    with torch.no_grad():
        latents = torch.cat([encode(picture[None])[0] for picture in pictures])
        small = torch.cat([functional.avg_pool2d(decode(each[None]), scale) for each in latents])
    columns = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).double().numpy()
    columns = np.concatenate([columns, np.ones((len(columns), 1))], axis=1)
    wanted = small.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
    found = np.linalg.lstsq(columns, wanted, rcond=1e-6)[0]
    return [[round(float(value), 5) for value in row] for row in found]
