"""Whatever arrives, is aborted, late or fails: every picture gets exactly one end, and none waits for ever."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from tests.engine.denoise_driver import DenoiseDriver, make_prompt, make_source

from sardonyx.core import FinishReason, SequenceState
from sardonyx.errors import EngineError

SIZES = [(1, 1, 1), (1, 1, 1), (1, 2, 2)]
MAX_STEPS = 12


class Denoise(RuleBasedStateMachine):
    """The driver checks one end a picture; its runner that everything is encoded once, and sizes within a call."""

    @initialize(
        max_num_seqs=st.sampled_from([1, 2, 3, 9]),
        max_batch_rows=st.integers(1, 5),
        max_batch_prompts=st.integers(1, 3),
    )
    def start(self, max_num_seqs, max_batch_rows, max_batch_prompts):
        self.max_num_seqs = max_num_seqs
        self.max_batch_rows = max_batch_rows
        self.max_batch_prompts = max_batch_prompts
        self.driver = DenoiseDriver(
            on_step=self.on_step,
            max_num_seqs=max_num_seqs,
            max_batch_rows=max_batch_rows,
            max_batch_prompts=max_batch_prompts,
        )
        self.prompts = [make_prompt()]
        self.source = make_source()
        self.fault: tuple[str | None, int] = (None, 0)
        self.rounds_missed: dict[str, int] = {}
        """Of those that run, since they last had one."""
        self.shortest: tuple[str | None, bool] = (None, False)
        """Who had least left before the last round, and whether it had that."""

    @rule(
        count=st.sampled_from([1, 1, 2, 6]),
        num_steps=st.integers(1, MAX_STEPS),
        has_new_prompt=st.booleans(),
        is_guided=st.booleans(),
        has_source=st.booleans(),
        size=st.sampled_from(SIZES),
        previews=st.frozensets(st.integers(1, MAX_STEPS - 1), max_size=3),
        timeout_s=st.sampled_from([None, None, None, 1.0, 9.0]),
    )
    def submit(self, count, num_steps, has_new_prompt, is_guided, has_source, size, previews, timeout_s):
        for _ in range(count):
            if has_new_prompt:
                self.prompts.append(make_prompt())
            self.driver.submit(
                f"r{len(self.driver.requests)}",
                num_steps,
                prompt=self.prompts[-1],
                negative=self.prompts[0] if is_guided else None,
                source=self.source if has_source else None,
                size=size,
                preview_steps=previews,
                deadline_s=None if timeout_s is None else self.driver.now_s + timeout_s,
                start_by_s=None if timeout_s is None else self.driver.now_s + timeout_s / 2,
            )

    @rule()
    def renew_source(self):
        self.source = make_source()

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data())
    def abort(self, data):
        self.driver.policy.abort(data.draw(st.sampled_from(sorted(self.driver.requests))))

    @rule(
        num_steps=st.sampled_from([1, 2, 5, 20]),
        fault=st.sampled_from([None, None, None, None, "step", "row", "late"]),
        row=st.integers(0, 3),
    )
    def steps(self, num_steps, fault, row):
        if fault == "late":
            self.driver.now_s += 3.0
        for i in range(num_steps):
            self.fault = (fault, row) if i == num_steps - 1 else (None, 0)
            self.step()
        self.fault = (None, 0)

    def step(self):
        if not self.driver.step():
            assert len(self.driver.ends) == len(self.driver.requests), "work stops only when there is none"
            return
        running = self.running()
        assert len(running) <= self.max_num_seqs
        self.rounds_missed = {name: self.rounds_missed.get(name, 0) for name in running}

    def on_step(self, batch):
        """Look at what was scheduled, then fail where the step is to fail."""
        assert len(batch.prompts) <= self.max_batch_prompts
        if batch.rows:
            self.look_at_round(batch)
        fault, index = self.fault
        if fault == "step":
            raise EngineError("the step failed")
        return {index: "the row failed"} if fault == "row" and index < len(batch.rows or batch.finished) else {}

    def look_at_round(self, batch):
        assert batch.num_tokens <= self.max_batch_rows or len(batch.rows) == 1
        chosen = {row.sequence.request.id for row in batch.rows}
        running = self.running()
        # Who has waited longest is left out three times at most, so nobody misses more than four times their number.
        for name in running:
            missed = 0 if name in chosen else self.rounds_missed.get(name, 0) + 1
            assert missed <= 4 * self.max_num_seqs
            self.rounds_missed[name] = missed
        left = {name: self.driver.requests[name].picture.num_rows_left for name in running}
        shortest = min(left.values())
        had_it = any(left[name] == shortest for name in chosen)
        last_name, last_had_it = self.shortest
        if last_name is not None and not had_it:
            assert last_had_it, "what has least left gets at least every other round"
        self.shortest = (min(left, key=left.__getitem__), had_it)

    def running(self):
        return [name for name, each in self.driver.sequences.items() if each.state is SequenceState.RUNNING]

    def teardown(self):
        if not hasattr(self, "driver"):
            return
        driver = self.driver
        for _ in range((MAX_STEPS + 4) * (len(driver.requests) + 1)):
            if len(driver.ends) == len(driver.requests):
                break
            self.step()
        assert not driver.step()
        assert driver.ends.keys() == driver.requests.keys()
        for name, request in driver.requests.items():
            self.check_end(name, request.picture)
        stats = driver.policy.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)

    def check_end(self, name, picture):
        event = self.driver.ends[name]
        is_complete = event.finish_reason is FinishReason.STOP
        assert is_complete == (event.image is not None)
        assert (event.error is None) or not is_complete
        if is_complete:
            assert picture.sampler.is_done
            assert event.image[0, 0, 0] == event.num_steps_done == picture.sampler.num_steps
        wanted = [each for each in sorted(picture.preview_steps) if each <= picture.sampler.num_steps]
        seen = self.driver.previews.get(name, [])
        assert seen == (wanted if is_complete else wanted[: len(seen)])


def run(max_examples):
    examples = settings(
        max_examples=max_examples, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Denoise, settings=examples)


def test_any_history_gives_every_picture_one_end():
    run(80)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_more_histories_give_every_picture_one_end():
    run(5000)
