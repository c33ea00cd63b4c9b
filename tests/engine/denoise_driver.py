"""Runs `DenoisePolicy` step by step over a runner that only counts, with a clock that only the test moves."""

from collections.abc import Callable

import numpy as np

from sardonyx.core import FinishReason, Sequence
from sardonyx.diffusion import (
    DenoiseBatch,
    DenoiseOutput,
    EncodedPrompt,
    Floats,
    ImageEvent,
    ImageRequest,
    Picture,
    Prompt,
    SourceImage,
)
from sardonyx.engine.denoise import DenoiseOptions, DenoisePolicy
from sardonyx.errors import EngineError

OnStep = Callable[[DenoiseBatch], dict[int, str]]


class CountingSampler:
    """A `diffusion.Sampler` that only knows how many rounds there are."""

    init_noise_sigma = 1.0

    def __init__(self, num_steps: int) -> None:
        self.step_index = 0
        self.x0: Floats | None = None
        self._num_steps = num_steps

    @property
    def num_steps(self) -> int:
        return self._num_steps

    @property
    def is_done(self) -> bool:
        return self.step_index == self._num_steps

    @property
    def timestep(self) -> float:
        return float(self._num_steps - self.step_index)

    def scale_input(self, latents: Floats) -> Floats:
        return latents

    def step(self, model_output: Floats, latents: Floats, generator: np.random.Generator) -> Floats:
        self.step_index += 1
        return latents

    def add_noise(self, image: Floats, noise: Floats) -> Floats:
        return image


def make_prompt() -> Prompt:
    return Prompt(((1, 2),))


def make_source() -> SourceImage:
    return SourceImage(np.zeros((3, 4, 4), np.float32))


class FakeDenoiseRunner:
    """Holds every batch against the contract, and counts rounds.

    Args:
        on_step: called before each step; may raise, or name rows that fail.
    """

    def __init__(self, on_step: OnStep | None) -> None:
        self.on_step = on_step
        self.num_encoded = 0

    def execute(self, batch: DenoiseBatch) -> DenoiseOutput:
        kinds = [bool(batch.prompts), batch.source is not None, bool(batch.rows), bool(batch.finished)]
        assert kinds.count(True) == 1, "a step does one thing"
        rows = batch.rows or batch.finished
        assert len({row.sequence.request.id for row in rows}) == len(rows)
        assert len({row.picture.size for row in rows}) <= 1, "rows of a call have one size"
        output = DenoiseOutput(failed=self.on_step(batch) if self.on_step else {})
        for prompt in batch.prompts:
            assert prompt.encoded is None, "no prompt is encoded twice"
            prompt.encoded = EncodedPrompt(np.zeros((2, 1), np.float32))
            self.num_encoded += 1
        if batch.source is not None:
            assert batch.source.latents is None, "no picture is encoded twice"
            batch.source.latents = np.zeros((1, 1, 1), np.float32)
        for index, row in enumerate(batch.rows):
            self._round(index, row.picture, output)
        for row in batch.finished:
            assert row.picture.sampler.is_done
            output.images.append(np.full((1, 1, 3), row.picture.sampler.num_steps % 256, np.uint8))
        return output

    def _round(self, index: int, picture: Picture, output: DenoiseOutput) -> None:
        assert not picture.sampler.is_done
        assert picture.prompt.encoded is not None
        assert picture.negative is None or picture.negative.encoded is not None
        assert picture.source is None or picture.source.latents is not None
        if index in output.failed:
            return
        picture.latents = np.zeros((1, 1, 1), np.float32)
        picture.sampler.step(picture.latents, picture.latents, picture.generator)
        if picture.sampler.step_index in picture.preview_steps:
            output.previews[index] = np.full((1, 1, 3), picture.sampler.step_index, np.uint8)

    def close(self) -> None:
        """Nothing to give back."""


class DenoiseDriver:
    """Holds what a test looks at: pictures and their events by id, and the batches so far."""

    def __init__(self, *, on_step: OnStep | None = None, **options: int) -> None:
        self.policy = DenoisePolicy(DenoiseOptions(**options))
        self.runner = FakeDenoiseRunner(on_step)
        self.now_s = 100.0
        self.requests: dict[str, ImageRequest] = {}
        self.sequences: dict[str, Sequence] = {}
        self.previews: dict[str, list[int]] = {}
        """Rounds after which there was one."""
        self.ends: dict[str, ImageEvent] = {}
        self.batches: list[DenoiseBatch] = []

    def submit(
        self,
        request_id: str,
        num_steps: int = 4,
        *,
        prompt: Prompt | None = None,
        negative: Prompt | None = None,
        source: SourceImage | None = None,
        size: tuple[int, int, int] = (1, 1, 1),
        preview_steps: frozenset[int] = frozenset(),
        deadline_s: float | None = None,
        start_by_s: float | None = None,
    ) -> Picture:
        picture = Picture(
            prompt=prompt or make_prompt(),
            negative=negative,
            guidance=2.0,
            sampler=CountingSampler(num_steps),
            size=size,
            generator=np.random.default_rng(0),
            source=source,
            preview_steps=preview_steps,
        )
        request = ImageRequest(
            id=request_id, prompt_ids=[0], picture=picture, deadline_s=deadline_s, start_by_s=start_by_s
        )
        self.policy.check(request)
        self.requests[request_id] = request
        self.sequences[request_id] = Sequence(request, 0, self.now_s, token_ids=[0])
        self.policy.add(self.sequences[request_id])
        return picture

    def step(self) -> bool:
        """Run one step; false when there was nothing to run."""
        batch = self.policy.schedule(self.now_s)
        if batch is not None:
            self.batches.append(batch)
            try:
                self.policy.update(batch, self.runner.execute(batch), self.now_s)
            except EngineError as error:
                self.policy.fail(batch, error.message)
        for event in self.policy.take_events():
            assert isinstance(event, ImageEvent)
            assert event.request_id not in self.ends, "nothing comes after the end"
            if event.finish_reason is None:
                assert event.preview is not None
                assert event.num_steps_done == int(event.preview[0, 0, 0])
                self.previews.setdefault(event.request_id, []).append(event.num_steps_done)
            else:
                self.ends[event.request_id] = event
        return batch is not None

    def run(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError(f"not done after {max_steps} steps")

    def rounds(self) -> list[list[str]]:
        """Ids of the pictures of each round so far."""
        return [[row.sequence.request.id for row in batch.rows] for batch in self.batches if batch.rows]

    def kinds(self) -> list[str]:
        """What each step so far did."""
        return [
            "prompts" if each.prompts else "source" if each.source else "round" if each.rows else "decode"
            for each in self.batches
        ]

    def reason(self, request_id: str) -> FinishReason | None:
        event = self.ends.get(request_id)
        return event and event.finish_reason
