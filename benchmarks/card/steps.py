"""Our own step loop over a model on a card, with a record of every step. No HTTP, no tokenizer."""

import queue
import statistics
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from card.timed_device import CardClock, Span, TimedDevice
from sardonyx.core import Batch, Request, RunnerLimits, SamplingParams, SequenceEvent, StepOutput
from sardonyx.engine.continuous import ContinuousOptions, ContinuousPolicy
from sardonyx.engine.loop import StepLoop
from sardonyx.repository.manifest import FILE_NAME, parse
from sardonyx.runners.paged_decoder import PagedRunner
from sardonyx.runtime.device import Device
from sardonyx.runtime.device_cuda import open_cuda_device
from sardonyx.runtime.device_memory import DeviceMemory, measure_device
from sardonyx.serving.capacity import EngineLimits
from sardonyx.serving.memory import DeviceBudgets
from sardonyx.serving.text_device import Cards, DeviceTexts
from sardonyx.settings import Settings

_FRACTION = 0.9
_PATIENCE_S = 300.0
"""For one event: longer means that the step loop is stuck."""


@dataclass(slots=True)
class Step:
    """One step that was collected."""

    end_s: float
    num_rows: int
    num_tokens: int
    waited_s: float
    """Of the loop's time, in all until now, for the card."""
    span: Span | None


class WatchedRunner:
    """A `core.AsyncRunner` around ours that may be told to launch no step ahead."""

    def __init__(self, runner: PagedRunner, device: TimedDevice) -> None:
        self._runner = runner
        self._device = device
        self._out: deque[tuple[Batch, Span | None]] = deque()
        self.is_overlapped = True
        self.steps: list[Step] = []

    @property
    def limits(self) -> RunnerLimits:
        return self._runner.limits

    def can_follow(self, batch: Batch) -> bool:
        return self.is_overlapped and self._runner.can_follow(batch)

    def execute(self, batch: Batch) -> StepOutput:
        self.launch(batch)
        return self.collect()

    def launch(self, batch: Batch) -> None:
        self._device.begin_step()
        self._runner.launch(batch)
        self._out.append((batch, self._device.end_step()))

    def collect(self) -> StepOutput:
        batch, span = self._out.popleft()
        output = self._runner.collect()
        step = Step(time.perf_counter(), len(batch.rows), batch.num_tokens, self._device.waited_s, span)
        self.steps.append(step)
        return output

    def close(self) -> None:
        self._runner.close()


class CardModel:
    """A version folder, loaded as the server loads it, and its step loop. Close it.

    Args:
        folder: with the manifest.
        limits: what the operator wants.
        is_capturing: as `TimedDevice`'s.
        is_rehearsal: on a device of numpy instead of a card.
    """

    def __init__(self, folder: Path, limits: EngineLimits, *, is_capturing: bool, is_rehearsal: bool) -> None:
        opener, measure = (_open_rehearsed, _measure_rehearsed) if is_rehearsal else (open_cuda_device, measure_device)
        devices: list[TimedDevice] = []

        def open_device(gpu: int) -> Device:
            devices.append(TimedDevice(opener(gpu), is_capturing=is_capturing))
            return devices[-1]

        cards = Cards(count=lambda: 1, open=open_device, free_bytes=lambda gpu: measure(gpu).free_bytes)
        free_bytes = measure(0).free_bytes
        started_s = time.perf_counter()
        with ExitStack() as undo:
            texts = DeviceTexts(Settings(), DeviceBudgets(_FRACTION, measure=measure), cards)
            text = texts.open(0, "card", folder, parse((folder / FILE_NAME).read_bytes()), limits, undo)
            self.runner = WatchedRunner(text.runner, devices[0])
            options = ContinuousOptions(
                max_num_seqs=limits.max_num_seqs,
                max_batch_tokens=limits.max_batch_tokens,
                max_step_ms=limits.max_step_ms,
            )
            policy = ContinuousPolicy(self.runner.limits, options)
            self._events: queue.SimpleQueue[list[SequenceEvent]] = queue.SimpleQueue()
            self._loop = StepLoop("card", policy, self.runner, self._events.put, prepare=text.runner.capture)
            self._loop.start()
            undo.pop_all()
        self._clock = devices[0].clock
        self._number = 0
        self.load = {
            "load_s": round(time.perf_counter() - started_s, 1),
            "num_blocks": self.runner.limits.num_blocks,
            "taken_bytes": free_bytes - measure(0).free_bytes,
        }

    def close(self) -> None:
        self._loop.close()

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> "Run":
        """Complete prompts that are submitted at once, greedily and to the last token.

        Raises:
            SystemExit: one failed.
        """
        self.runner.steps = []
        submitted_s = time.perf_counter()
        tokens: dict[str, list[int]] = {}
        first_token_s: dict[str, float] = {}
        for prompt in prompts:
            self._number += 1
            name, sampling = str(self._number), SamplingParams(temperature=0.0)
            tokens[name] = []
            self._loop.submit(Request(id=name, prompt_ids=prompt, max_tokens=max_tokens, sampling=sampling))
        num_left = len(tokens)
        while num_left:
            for event in self._events.get(timeout=_PATIENCE_S):
                if event.error is not None:
                    raise SystemExit(f"a request failed: {event.error}")
                if event.token_ids:
                    first_token_s.setdefault(event.request_id, time.perf_counter() - submitted_s)
                tokens[event.request_id] += event.token_ids
                num_left -= event.finish_reason is not None
        return Run(self.runner.steps, list(tokens.values()), list(first_token_s.values()), self._clock)


@dataclass
class Run:
    """What happened."""

    steps: list[Step]
    tokens: list[list[int]]
    """Of each prompt."""
    first_token_s: list[float]
    """After all were submitted."""
    clock: CardClock | None
    """``None`` in a rehearsal."""

    def decodes(self, batch: int) -> dict[str, Any]:
        """Of the steps in which all sequences got one token, and nothing else happened.

        ``step_ms`` is from one step's end to the next one's. Of it ``host_ms`` is what the loop's thread does not wait
        for the card; ``idle_ms`` is what the card waits for the next step, by its own clock: what Python costs.

        Raises:
            SystemExit: there are none.
        """
        pairs = [
            (before, step)
            for before, step in zip(self.steps, self.steps[1:], strict=False)
            if before.num_rows == before.num_tokens == step.num_rows == step.num_tokens == batch
        ]
        if not pairs:
            raise SystemExit(f"no two steps of {batch} decodes followed each other")
        step_s = [step.end_s - before.end_s for before, step in pairs]
        waited_s = [step.waited_s - before.waited_s for before, step in pairs]
        host_s = [taken - waited for taken, waited in zip(step_s, waited_s, strict=True)]
        found = {
            "num_steps": len(pairs),
            "step_ms": _ms(step_s),
            "step_ms_p90": round(1e3 * sorted(step_s)[int(0.9 * len(step_s))], 3),
            "tokens_per_s": round(batch / statistics.median(step_s), 1),
            "host_ms": _ms(host_s),
            "host_share": round(sum(host_s) / sum(step_s), 4),
        }
        return found if self.clock is None else found | _on_card(pairs, self.clock)

    def forget(self) -> None:
        """Give the card's events back. Nothing can be asked of the run afterwards."""
        if self.clock is not None:
            for step in self.steps:
                for event in step.span or ():
                    self.clock.forget(event)


def _on_card(pairs: list[tuple[Step, Step]], clock: CardClock) -> dict[str, Any]:
    idle_s, busy_s = [], []
    for before, step in pairs:
        assert before.span is not None
        assert step.span is not None
        idle_s.append(max(0.0, clock.between_s(before.span[1], step.span[0])))
        busy_s.append(clock.between_s(*step.span))
    idle_share = sum(idle_s) / (sum(idle_s) + sum(busy_s))
    return {"idle_ms": _ms(idle_s), "idle_share": round(idle_share, 4), "card_ms": _ms(busy_s)}


def _ms(seconds: list[float]) -> float:
    return round(1e3 * statistics.median(seconds), 3)


def _open_rehearsed(_: int) -> Device:
    from tests.reference_device import ReferenceDevice

    return ReferenceDevice()


def _measure_rehearsed(_: int) -> DeviceMemory:
    return DeviceMemory(free_bytes=8 << 30, total_bytes=8 << 30)
