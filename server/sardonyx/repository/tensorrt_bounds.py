"""Which shapes a model's graphs meet: from a tensor model's config, and from the manifest and options of families.

Floor 1, pure. TensorRT's engines are built for these; see `tensorrt_shapes`. What nothing limits stays ``None``.
"""

import msgspec

from sardonyx.repository.families import Diffusion, Encoder, ImageInput
from sardonyx.repository.tensor_config import TensorConfig
from sardonyx.repository.tensorrt_shapes import Bounds, OpenBounds, between, fixed

_WARM_UP_ROWS = 2
"""Encoders and image classifiers are tried with so many before the first request."""
_USUAL_TOKENS = 128
"""Of a text: engines are tuned for it."""


class EncoderSteps(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds the steps of an encoder model."""

    max_batch_tokens: int
    """Of a step; a longer text runs alone."""
    max_batch_size: int
    max_model_len: int
    """Of a text."""


class DenoiseSteps(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds the steps of a diffusion model."""

    max_batch_rows: int
    """Of a unet call; a picture with guidance takes two, whatever this says."""
    max_batch_prompts: int
    max_side: int
    """Of a picture, in pixels."""


def tensor_bounds(config: TensorConfig) -> OpenBounds:
    """Of a plain tensor model: rows from `max_batch_size`, tuned for the largest preferred batch, and its dims."""
    rows = _rows(config)
    known = {}
    for spec in config.inputs:
        dims = spec.dims if spec.reshape is None else spec.reshape
        known[spec.name] = (*rows, *map(_dim, dims))
    if config.sequences is not None:
        for control in config.sequences.controls:
            known[control.name] = (*rows, fixed(1))
        for state in config.sequences.states:
            known[state.input_name] = (*rows, *map(_dim, state.dims))
    return known


def encoder_bounds(encoder: Encoder, steps: EncoderSteps) -> dict[str, OpenBounds]:
    """Of each graph of an encoder model, by role."""
    longest = max(_WARM_UP_ROWS, steps.max_model_len)
    length = between(1, _USUAL_TOKENS, longest)
    most_rows = max(_WARM_UP_ROWS, min(steps.max_batch_size, steps.max_batch_tokens))
    rows = between(1, steps.max_batch_tokens // length.opt, most_rows)
    tokens = between(1, steps.max_batch_tokens, max(steps.max_batch_tokens, longest, 2 * _WARM_UP_ROWS))
    if encoder.layout == "packed":
        by_token = dict.fromkeys(("input_ids", "token_type_ids", "position_ids", "row_scatter"), (tokens,))
        by_row = dict.fromkeys(("seqlens", "num_prompt_tokens"), (rows,))
        grids = dict.fromkeys(("row_gather", "token_offset"), (rows, length))
        ends = {"cumulative_sequence_length": (between(2, rows.opt + 1, rows.max + 1),)}
        return {"encoder": {**by_token, **by_row, **grids, **ends}}
    padded = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids", "position_ids"), (rows, length))
    head = {"token_embeddings": (rows, length, None), "seqlens": (rows,), "num_prompt_tokens": (rows,)}
    return {"encoder": padded, "head": head}


def image_bounds(image: ImageInput, max_batch_size: int) -> dict[str, OpenBounds]:
    """Of an image classifier's graph."""
    height, width = map(fixed, image.crop)
    rows = between(1, max_batch_size, max(_WARM_UP_ROWS, max_batch_size))
    sides = (height, width, fixed(3)) if image.layout == "NHWC" else (fixed(3), height, width)
    return {"model": {image.name: (rows, *sides)}}


def diffusion_bounds(model: Diffusion, steps: DenoiseSteps) -> dict[str, OpenBounds]:
    """Of each graph of a diffusion model, by role. Sizes reach from the smallest picture to `max_side` both ways."""
    height, width = (_side(model, steps.max_side, usual) for usual in model.size)
    y, x = (_shrunk(side, model.pixels_per_latent) for side in (height, width))
    rows = between(1, 2, max(2, steps.max_batch_rows))
    one, channels = fixed(1), fixed(model.latent_channels)
    prompts = between(1, 2, max(2, steps.max_batch_prompts))
    unet: dict[str, tuple[Bounds | None, ...]] = {
        "sample": (rows, channels, y, x),
        "timestep": (rows,),
        "encoder_hidden_states": (rows, fixed(model.encoders[0].max_tokens), None),
        "time_ids": (rows, fixed(6)),
        "text_embeds": (rows, _dim(model.pooled_width or -1)),
        "timestep_cond": (rows, _dim(model.guidance_width or -1)),
    }
    encoders: dict[str, OpenBounds] = {
        each.graph: {"input_ids": (prompts, fixed(each.max_tokens))} for each in model.encoders
    }
    return encoders | {
        "unet": unet,
        "vae_decoder": {"latents": (one, channels, y, x)},
        "vae_encoder": {"image": (one, fixed(3), height, width)},
    }


def _rows(config: TensorConfig) -> tuple[Bounds, ...]:
    if not config.max_batch_size:
        return ()
    batching = config.dynamic or config.sequences
    preferred = batching.preferred_batch_sizes if batching is not None else ()
    return (between(1, max(preferred, default=config.max_batch_size), config.max_batch_size),)


def _dim(size: int) -> Bounds | None:
    return None if size < 1 else fixed(size)


def _side(model: Diffusion, max_side: int, usual: int) -> Bounds:
    """Of pictures, in pixels."""
    most = max(max_side // model.size_multiple * model.size_multiple, *model.size)
    return between(model.size_multiple, usual, most)


def _shrunk(side: Bounds, pixels: int) -> Bounds:
    return Bounds(side.min // pixels, side.opt // pixels, side.max // pixels)
