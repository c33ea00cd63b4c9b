"""The nouns of image generation that every floor shares: a picture under way, its prompts, what a step does.

Floor 0, above `core`: no ONNX Runtime, no HTTP, no clock. Shapes: latents (c, y, x) of one picture; Y and X are the
picture's height and width in pixels; S tokens of a prompt, E their width.
"""

from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sardonyx.core import Request, Sequence, SequenceEvent

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


class Sampler(Protocol):
    """How the latents of one picture lose their noise; `sardonyx.processing.samplers` has them."""

    init_noise_sigma: float
    step_index: int
    """Rounds that are over."""
    x0: Floats | None
    """What the last round says of the clean latents."""

    @property
    def num_steps(self) -> int: ...
    @property
    def is_done(self) -> bool: ...
    @property
    def timestep(self) -> float: ...

    def scale_input(self, latents: Floats) -> Floats: ...
    def step(self, model_output: Floats, latents: Floats, generator: np.random.Generator) -> Floats: ...
    def add_noise(self, image: Floats, noise: Floats) -> Floats: ...


@dataclass(slots=True, frozen=True)
class EncodedPrompt:
    """What the unet takes of a prompt."""

    hidden: Floats
    """(S, E)."""
    pooled: Floats | None = None
    """Of models with a second text encoder's summary."""


@dataclass(slots=True, eq=False)
class Prompt:
    """A text as tokens. Whoever keeps it keeps its encoding: it is encoded once, for all pictures that share it.

    `encoded` is written by the runner only, once.
    """

    token_ids: tuple[Series[int], ...]
    """By encoder; filled up to its length."""
    is_zeroed: bool = False
    """Its encoding is all zeros."""
    encoded: EncodedPrompt | None = None


@dataclass(slots=True, eq=False)
class SourceImage:
    """A picture to begin with. `latents` are written by the runner only, once."""

    pixels: Floats
    """(3, Y, X) between -1 and 1."""
    mask: Floats | None = None
    """(y, x) between 0 and 1: where the picture is to change; ``None``: everywhere."""
    latents: Floats | None = None


@dataclass(slots=True, eq=False)
class Picture:
    """A picture under way. Made by callers; what follows `generator` belongs to the runner."""

    prompt: Prompt
    negative: Prompt | None
    """``None``: there is no guidance by a second prompt, so the picture takes one row of a unet call instead of two."""
    guidance: float
    sampler: Sampler
    size: tuple[int, int, int]
    """Of its latents, (c, y, x)."""
    generator: np.random.Generator
    """The source of its first noise and of what its sampler draws."""
    source: SourceImage | None = None
    time_ids: tuple[float, ...] | None = None
    """Of SDXL: original size, cropping and target size."""
    preview_steps: frozenset[int] = frozenset()
    """Rounds after which a preview is wanted."""
    latents: Floats | None = None
    noise: Floats | None = None
    """That a source with a mask was hidden by."""

    @property
    def num_rows(self) -> int:
        """Of a unet call."""
        return 1 if self.negative is None else 2

    @property
    def num_rows_left(self) -> int:
        """Of all unet calls to come."""
        return self.num_rows * (self.sampler.num_steps - self.sampler.step_index)


class ImageRequest(Request, frozen=True, kw_only=True):
    """One picture asked of a step loop. Nothing of `core.Request` counts but id and times."""

    picture: Picture


class ImageEvent(SequenceEvent, kw_only=True):
    """A preview, or the end of a request."""

    preview: Pixels | None = None
    """(y, x, 3): a rough picture, one pixel for each of the latents."""
    num_steps_done: int = 0
    image: Pixels | None = None
    """(Y, X, 3): the picture, with FinishReason.STOP."""


@dataclass(slots=True)
class DenoiseRow:
    """A picture in a unet call."""

    sequence: Sequence
    picture: Picture


@dataclass(slots=True)
class DenoiseBatch:
    """What one step executes: exactly one of the four kinds of work."""

    prompts: list[Prompt] = field(default_factory=list)
    """To encode."""
    source: SourceImage | None = None
    """To encode."""
    rows: list[DenoiseRow] = field(default_factory=list)
    """To bring a round further; latents of one size."""
    finished: list[DenoiseRow] = field(default_factory=list)
    """To decode; latents of one size."""

    @property
    def num_tokens(self) -> int:
        """Rows of the unet call: what this family counts instead of tokens."""
        return sum(row.picture.num_rows for row in self.rows)


@dataclass(slots=True)
class DenoiseOutput:
    """What a runner made of a batch; the pictures themselves hold the rest."""

    previews: dict[int, Pixels] = field(default_factory=dict)
    """By index of the row."""
    images: list[Pixels] = field(default_factory=list)
    """Of `DenoiseBatch.finished`."""
    failed: dict[int, str] = field(default_factory=dict)
    """By index of the row: why this picture alone has no answer, as a sentence for its caller."""
