"""Image models: a prompt becomes pictures. Floor 4. An `tasks.ImageTask`."""

import asyncio
import math
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sardonyx.diffusion import Picture, Pixels, Prompt, SourceImage
from sardonyx.errors import DeadlineExceeded, InvalidRequest, ServeError, UnsupportedFeature
from sardonyx.processing.picture import read_mask, read_source, size_of
from sardonyx.processing.prompt_tokens import PromptTokenizer
from sardonyx.processing.samplers import make_sampler, noise_generator
from sardonyx.repository.families import Diffusion
from sardonyx.repository.scheduler_config import SchedulerConfig
from sardonyx.serving.dispatch import EventDispatch
from sardonyx.serving.image_generation import ImageCall, ImageGeneration
from sardonyx.serving.loop_calls import LoopCalls
from sardonyx.serving.picture_moderation import PictureModerator
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.tasks import ImageOptions, ImageUsage

_MAX_PROMPTS = 64
"""Encodings that are kept for prompts to come: 0.2 MB each of Stable Diffusion's, 0.6 MB of SDXL's."""
_MOST_RATIO = 3.0
"""Of the sides of a picture whose size nobody asked for."""

Ids = tuple[tuple[int, ...], ...]
"""Of a prompt, by encoder."""


@dataclass(slots=True, frozen=True)
class ImageLimits:
    """Of every call."""

    max_pixels: int
    max_steps: int
    timeout_s: float
    queue_timeout_s: float
    max_side: int | None = None
    """Of height and width; ``None``: no limit but `max_pixels`."""

    def allow(self, height: int, width: int) -> bool:
        """A picture may be so large."""
        return height * width <= self.max_pixels and (self.max_side is None or max(height, width) <= self.max_side)


@dataclass(slots=True, frozen=True)
class ImageVersion:
    """What a version's folder holds, read."""

    name: str
    model: Diffusion
    scheduler: SchedulerConfig
    tokenizers: list[PromptTokenizer]
    has_vae_encoder: bool


class ImageModel:
    """See `tasks.ImageTask`.

    Args:
        version: what it serves.
        calls: belongs to the model from now on; its admission counts pictures and their steps.
        dispatch: connected to the calls' loop.
        pool: where pictures are decoded and prompts tokenised; shared.
        limits: of a call.
        moderator: looks at every picture before it is given out.
    """

    def __init__(
        self,
        version: ImageVersion,
        calls: LoopCalls[ImageGeneration],
        dispatch: EventDispatch,
        *,
        pool: WorkerPool,
        limits: ImageLimits,
        moderator: PictureModerator | None = None,
    ) -> None:
        self.name = version.name
        self.calls = calls
        self._version = version
        self._model = version.model
        self._dispatch = dispatch
        self._pool = pool
        self._limits = limits
        self._moderator = moderator
        self._prompts: OrderedDict[Ids, Prompt] = OrderedDict()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of pictures for which nobody asks for another."""
        return self._model.size[0], self._model.size[1]

    @property
    def default_steps(self) -> int:
        """Of a picture."""
        return self._model.default_steps

    @property
    def max_steps(self) -> int:
        """Of a picture."""
        return self._limits.max_steps

    @property
    def has_previews(self) -> bool:
        """Partial pictures can be given."""
        return bool(self._model.preview)

    async def start(self, options: ImageOptions, *, request_id: str) -> ImageGeneration:
        """See `tasks.ImageTask.start`."""
        self._check(options)
        if self._moderator is not None:
            self._moderator.judge()
        started_s = time.monotonic()
        deadline_s = started_s + min(options.timeout_s or math.inf, self._limits.timeout_s)
        steps = options.steps or self._model.default_steps
        with self.calls.accept(options.n, options.n * steps) as accepted:
            pictures, usage = await self._prepare(options, deadline_s)
        _, height, width = pictures[0].size
        scale = self._model.pixels_per_latent
        call = ImageGeneration(
            ImageCall(
                id=request_id,
                pictures=pictures,
                size=(height * scale, width * scale),
                usage=usage,
                deadline_s=deadline_s,
                start_by_s=started_s + self._limits.queue_timeout_s,
                check=self._moderation(deadline_s),
            ),
            dispatch=self._dispatch,
            reservation=accepted.reservation,
            retry_after_s=self.calls.admission.retry_after_s,
            on_end=lambda call, error: self._end(call, error, started_s),
        )
        self.calls.begin(call, accepted)
        # A call that cannot be submitted ends itself, and the rest with it.
        call.submit()
        return call

    def _end(self, call: ImageGeneration, error: ServeError | None, started_s: float) -> None:
        self.calls.end(call, error)
        self.calls.metrics.observe_request(
            call.finish_reason,
            e2e_s=time.monotonic() - started_s,
            num_prompt_tokens=call.usage.num_text_tokens,
            num_completion_tokens=0,
        )

    def _moderation(self, deadline_s: float) -> Callable[[Pixels], Awaitable[None]] | None:
        moderator = self._moderator
        if moderator is None:
            return None
        return lambda pixels: moderator.check(pixels, timeout_s=max(0.001, deadline_s - time.monotonic()))

    def _check(self, options: ImageOptions) -> None:
        """Refuse what this model cannot do."""
        height, width = options.size or self.size
        multiple = self._model.size_multiple
        if height % multiple or width % multiple or height < multiple or width < multiple:
            raise InvalidRequest(
                f"size: is {width}x{height}; width and height of {self.name} are multiples of {multiple}", param="size"
            )
        if height * width > self._limits.max_pixels:
            raise InvalidRequest(
                f"size: {width}x{height} has {height * width:,} pixels; {self.name} makes at most "
                f"{self._limits.max_pixels:,}",
                param="size",
            )
        if not self._limits.allow(height, width):
            raise InvalidRequest(
                f"size: is {width}x{height}; {self.name} makes sides of at most {self._limits.max_side:,}", param="size"
            )
        if (options.steps or 0) > self._limits.max_steps:
            raise InvalidRequest(f"steps: is {options.steps}; at most {self._limits.max_steps}", param="steps")
        if options.source is not None and not self._version.has_vae_encoder:
            raise UnsupportedFeature(
                f"model {self.name} was exported without what begins with a picture", param="image"
            )
        if options.num_previews and not self.has_previews:
            raise UnsupportedFeature(f"model {self.name} has no previews", param="partial_images")
        if options.negative_prompt and self._model.guidance_width is not None:
            raise UnsupportedFeature(f"model {self.name} takes no negative prompt", param="negative_prompt")

    async def _prepare(self, options: ImageOptions, deadline_s: float) -> tuple[list[Picture], ImageUsage]:
        """Everything that takes a thread's time."""
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                ids, num_text_tokens = await self._pool.run(self._tokens, options.prompt, "prompt")
                negative_ids, _ = await self._pool.run(self._tokens, options.negative_prompt, "negative_prompt")
                source = None
                if options.source is not None:
                    source = await self._pool.run(self._source, options)
        except TimeoutError:
            raise DeadlineExceeded("the request's time was over before its pictures were begun") from None
        prompt = self._prompt(ids)
        negative = self._negative(negative_ids, options, prompt)
        pictures = [self._picture(options, prompt, negative, source, index) for index in range(options.n)]
        _, height, width = pictures[0].size
        return pictures, ImageUsage(
            num_text_tokens=num_text_tokens,
            num_source_tokens=0 if source is None else height * width,
            num_picture_tokens=height * width,
        )

    def _tokens(self, text: str, param: str) -> tuple[Ids, int]:
        """Of each encoder, and how many the first one has of the text."""
        found = [tokenizer.encode(text, param=param) for tokenizer in self._version.tokenizers]
        return tuple(tuple(ids) for ids, _ in found), found[0][1]

    def _prompt(self, ids: Ids) -> Prompt:
        """The prompt with these tokens, maybe encoded already."""
        prompt = self._prompts.get(ids)
        if prompt is None:
            prompt = self._prompts[ids] = Prompt(ids)
            if len(self._prompts) > _MAX_PROMPTS:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(ids)
        return prompt

    def _negative(self, ids: Ids, options: ImageOptions, prompt: Prompt) -> Prompt | None:
        """``None``: guidance by it would change nothing, or there is none."""
        if self._guidance(options) <= 1 or self._model.guidance_width is not None:
            return None
        if self._model.zeroes_empty_prompt and not options.negative_prompt:
            return Prompt(ids, is_zeroed=True)
        negative = self._prompt(ids)
        return None if negative is prompt else negative

    def _guidance(self, options: ImageOptions) -> float:
        return self._model.default_guidance if options.guidance is None else options.guidance

    def _source(self, options: ImageOptions) -> SourceImage:
        assert options.source is not None
        try:
            height, width = options.size or self._size_like(options.source)
            pixels = read_source(options.source, height, width)
        except InvalidRequest as error:
            raise InvalidRequest(f"image: {error.message}", param="image") from None
        mask = None
        if options.mask is not None:
            try:
                mask = read_mask(options.mask, height, width, self._model.pixels_per_latent)
            except InvalidRequest as error:
                raise InvalidRequest(f"mask: {error.message}", param="mask") from None
        return SourceImage(pixels, mask)

    def _size_like(self, source: bytes) -> tuple[int, int]:
        """About as many pixels as the model was trained for, in the picture's shape."""
        height, width = size_of(source)
        ratio = min(max(width / height, 1 / _MOST_RATIO), _MOST_RATIO)
        side = math.sqrt(self.size[0] * self.size[1])
        multiple = self._model.size_multiple
        sides = (side / math.sqrt(ratio), side * math.sqrt(ratio))
        height, width = (max(multiple, round(each / multiple) * multiple) for each in sides)
        return (height, width) if self._limits.allow(height, width) else self.size

    def _picture(
        self, options: ImageOptions, prompt: Prompt, negative: Prompt | None, source: SourceImage | None, index: int
    ) -> Picture:
        model = self._model
        height, width = options.size or self.size
        if source is not None:
            height, width = source.pixels.shape[1:]
        sampler = make_sampler(
            options.sampler or self._version.scheduler.sampler,
            self._version.scheduler,
            options.steps or model.default_steps,
            strength=1.0 if source is None else options.strength,
        )
        seed = random.getrandbits(63) if options.seed is None else options.seed + index
        return Picture(
            prompt=prompt,
            negative=negative,
            guidance=self._guidance(options),
            sampler=sampler,
            size=(model.latent_channels, height // model.pixels_per_latent, width // model.pixels_per_latent),
            generator=noise_generator(seed),
            source=source,
            time_ids=None if model.pooled_width is None else (height, width, 0, 0, height, width),
            preview_steps=_preview_steps(sampler.num_steps, options.num_previews),
        )


def _preview_steps(num_steps: int, num_previews: int) -> frozenset[int]:
    """Rounds after which previews are given, evenly spread, the last round not among them."""
    wanted = (math.ceil(num_steps * (index + 1) / (num_previews + 1)) for index in range(num_previews))
    return frozenset(step for step in wanted if step < num_steps)
