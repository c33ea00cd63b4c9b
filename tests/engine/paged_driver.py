"""Runs a policy over blocks step by step over a `FakeDevice`, as the loop does; only the test moves the clock."""

from collections.abc import Callable
from typing import Any

from tests.engine.driver import Driver, make_limits
from tests.engine.fake_device import FakeDevice

from sardonyx.core import Batch, RunnerLimits
from sardonyx.engine.continuous import ContinuousOptions, ContinuousPolicy
from sardonyx.engine.paged_roster import PagedRoster
from sardonyx.errors import EngineError


def make_paged_limits(**changes: int) -> RunnerLimits:
    return make_limits(**({"block_size": 16, "num_blocks": 65} | changes))


class PagedDriver(Driver):
    """A driver whose steps overlap, unless a test says otherwise; `batch` is the last one that came to its end."""

    runner: FakeDevice

    def __init__(
        self,
        limits: RunnerLimits | None = None,
        *,
        is_overlapped: bool = True,
        is_late: bool = True,
        step_s: Callable[[Batch], float] = lambda batch: 0.0,
        **options: Any,  # fields of ContinuousOptions
    ) -> None:
        self.limits = limits or make_paged_limits()
        self.policy = ContinuousPolicy(self.limits, ContinuousOptions(**options))
        self.runner = FakeDevice(self.limits, max_batch_tokens=options.get("max_batch_tokens", 512), is_late=is_late)
        self.is_overlapped = is_overlapped
        self.step_s = step_s
        self.now_s = 100.0
        self.sequences = {}
        self.events = {}
        self.batch = None
        self.ahead: Batch | None = None
        self.is_unstarted = False
        self.num_ahead_steps = 0

    @property
    def roster(self) -> PagedRoster:
        assert isinstance(self.policy._roster, PagedRoster)
        return self.policy._roster

    def step(self) -> bool:
        """Collect the step that is out, or the next one, with another launched behind it."""
        self.batch, self.ahead = self.ahead, None
        if self.batch is None:
            self.batch = self.policy.schedule(self.now_s)
            self._launch(self.batch)
        if self.batch is not None:
            self._finish(self.batch)
        self.take_events()
        return self.batch is not None

    def _launch(self, batch: Batch | None) -> None:
        self.is_unstarted = False
        if batch is not None:
            try:
                self.runner.launch(batch)
            except EngineError:
                self.is_unstarted = True

    def _finish(self, batch: Batch) -> None:
        if self.is_unstarted:
            self.policy.fail(batch, "the step was not started")
            return
        if self.is_overlapped and self.runner.can_follow(batch):
            self.ahead = self.policy.schedule_ahead(batch, self.now_s)
            self.num_ahead_steps += self.ahead is not None
            self._launch(self.ahead)
        try:
            output = self.runner.collect()
        except EngineError as error:
            self.policy.fail(batch, error.message)
            if self.ahead is not None:
                self.policy.fail(self.ahead, error.message)
                self.ahead = None
            return
        self.now_s += self.step_s(batch)
        self.policy.update(batch, output, self.now_s)
