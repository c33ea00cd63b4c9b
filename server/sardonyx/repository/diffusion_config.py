"""What an operator decides about a diffusion model: its config.pbtxt.

Floor 1.
"""

from typing import Annotated

import msgspec
from msgspec import Meta
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.repository.config import FILE_NAME
from sardonyx.repository.model_options import read_options


class DiffusionModelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """``parameters`` of such a model."""

    max_num_seqs: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Pictures under way at once."""
    max_batch_rows: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Rows of a unet call at most; a picture with guidance takes two."""
    max_pixels: Annotated[int, Meta(ge=64, le=1 << 26)] | None = None
    """Of a picture at most; by default four times those of the size that the model was trained for."""
    max_side: Annotated[int, Meta(ge=64, le=1 << 16)] | None = None
    """Height and width of a picture at most; never below the size that the model was trained for. Without it there is
    no limit but `max_pixels`; on TensorRT, whose engines have to know one, it is the side of a square of so many."""
    max_steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    """Of a picture at most; by default 100."""
    default_steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    """For requests that name none; by default the manifest's, and never more than `max_steps`."""
    default_guidance: Annotated[float, Meta(ge=0, le=100)] | None = None
    """Likewise."""
    moderator: str | None = None
    """An image classifier: pictures that it flags are not given out."""


def diffusion_model_options(config: ModelConfig, *, file: str = FILE_NAME) -> DiffusionModelOptions:
    """Read the parameters of a diffusion model.

    Raises:
        ConfigError: an unknown parameter, a value of the wrong type or out of range, or a field of ModelConfig that a
            diffusion model does not honour.
    """
    return read_options(config, DiffusionModelOptions, owner="a diffusion model", file=file)
