"""The continuous policy over blocks: what differs from slots."""

import pytest
from tests.engine.driver import Driver
from tests.engine.fake_runner import complete, next_token
from tests.engine.paged_driver import PagedDriver, make_paged_limits

from sardonyx.core import Batch, BatchRow, FinishReason, Request, RunnerLimits, Sequence, SequenceState
from sardonyx.engine.continuous import ContinuousOptions, ContinuousPolicy
from sardonyx.errors import ConfigError, EngineError

PROMPT = list(range(1, 101))
LONG = 48
"""Three blocks."""


def start_step(driver: PagedDriver) -> Batch:
    """Schedule a step as the loop does, without bringing it to its end."""
    batch = driver.policy.schedule(driver.now_s)
    assert batch is not None
    driver.runner.launch(batch)
    return batch


def finish_step(driver: PagedDriver, batch: Batch) -> None:
    driver.policy.update(batch, driver.runner.collect(), driver.now_s)
    driver.take_events()


@pytest.mark.parametrize("is_overlapped", [False, True])
def test_tokens_are_those_of_the_request_alone(is_overlapped):
    driver = PagedDriver(is_overlapped=is_overlapped)
    requests = [driver.submit(f"r{i}", PROMPT[i:], max_tokens=5 + 9 * i) for i in range(6)]
    driver.run()
    for request in requests:
        assert (driver.tokens(request.id), driver.finish_reason(request.id)) == complete(request, driver.limits)
    assert bool(driver.num_ahead_steps) == is_overlapped


def test_next_step_is_launched_behind_each_that_does_not_end_everything():
    driver = PagedDriver()
    driver.submit("r", [1, 2, 3], max_tokens=10)
    driver.run()
    assert driver.runner.log == ["launch", *["launch", "collect"] * 9, "collect"]


def test_decode_ahead_is_fed_by_the_row_before_it():
    driver = PagedDriver()
    driver.submit("long", [7] * 100, max_tokens=5)
    driver.submit("short", [1, 2, 3], max_tokens=5)
    batch = start_step(driver)
    assert [row.sequence.request.id for row in batch.rows] == ["long", "short"]
    ahead = driver.policy.schedule_ahead(batch, driver.now_s)
    assert ahead is not None
    decode, chunk = ahead.rows
    assert (decode.sequence.request.id, decode.num_new_tokens, decode.num_past, decode.fed_by) == ("short", 1, 3, 1)
    assert (chunk.sequence.request.id, chunk.num_new_tokens, chunk.num_past, chunk.fed_by) == ("long", 16, 32, -1)


def test_prompts_that_are_scored_share_their_room_in_order_of_arrival():
    driver = PagedDriver(make_paged_limits(max_scored_tokens=20), max_batch_tokens=64)
    for request_id, num_tokens in (("a", 30), ("b", 16), ("c", 8)):
        driver.submit(request_id, PROMPT[:num_tokens], max_tokens=1, num_prompt_logprobs=0)
    driver.submit("free", PROMPT[40:80], max_tokens=1)
    expected = [{"a": 20, "free": 32}, {"a": 10, "b": 10, "free": 8}, {"b": 6, "c": 8}]
    assert [driver.step() and driver.chunks() for _ in expected] == expected
    assert not driver.step()
    assert [len(driver.events[each][-1].prompt_logprobs or []) for each in "abc"] == [29, 15, 7]


def test_row_is_what_it_was_when_made_though_the_step_before_moves_its_sequence_on():
    sequence = Sequence(Request(id="r", prompt_ids=[1] * 10), 0, 0.0, token_ids=[1] * 10)
    row = BatchRow(sequence, 4, num_ahead=4)
    assert (row.num_past, row.is_sampled) == (4, False)
    sequence.num_computed_tokens = 4
    assert (row.num_past, row.is_sampled) == (4, False)


@pytest.mark.parametrize(("max_model_len", "max_tokens"), [(256, 1), (256, 0), (33, 9)])
def test_sequence_that_is_known_to_end_has_no_row_ahead(max_model_len, max_tokens):
    driver = PagedDriver(make_paged_limits(max_model_len=max_model_len))
    driver.submit("goes on", [1, 2, 3], max_tokens=9)
    driver.submit("ends", [3] * 32, max_tokens=max_tokens, num_prompt_logprobs=0)
    ahead = driver.policy.schedule_ahead(start_step(driver), driver.now_s)
    assert ahead is not None
    assert [row.sequence.request.id for row in ahead.rows] == ["goes on"]
    assert len(driver.sequences["ends"].blocks) == 2, "nor a block for it"


def test_no_step_is_ahead_where_everything_is_known_to_end():
    driver = PagedDriver()
    driver.submit("r", [1, 2, 3], max_tokens=1)
    assert driver.policy.schedule_ahead(start_step(driver), driver.now_s) is None


def test_new_sequence_starts_in_a_step_ahead():
    driver = PagedDriver()
    driver.submit("old", PROMPT, max_tokens=9)
    batch = start_step(driver)
    driver.submit("new", [500] * 10, max_tokens=9)
    ahead = driver.policy.schedule_ahead(batch, driver.now_s)
    assert ahead is not None
    assert {row.sequence.request.id for row in ahead.rows} == {"old", "new"}


def test_token_behind_a_stop_token_is_dropped_and_its_blocks_are_free_at_once():
    driver = PagedDriver()
    request = driver.submit("r", PROMPT[:20], max_tokens=9, stop_token_ids=frozenset({next_token(PROMPT[:20], 1000)}))
    driver.step()
    assert driver.ahead is not None
    assert driver.finish_reason("r") is FinishReason.STOP
    assert driver.policy.stats().kv_usage == 0.0
    driver.run()
    assert driver.tokens("r") == complete(request, driver.limits)[0]
    assert len(driver.events["r"]) == 1


def test_blocks_of_a_row_that_comes_to_nothing_serve_another_in_the_next_step():
    # One block is all there is, so the new sequence writes where the row ahead of it still does.
    driver = PagedDriver(make_paged_limits(max_model_len=16, num_blocks=2))
    driver.submit("r", PROMPT[:8], max_tokens=8, stop_token_ids=frozenset({next_token(PROMPT[:8], 1000)}))
    other = driver.submit("other", PROMPT[50:58], max_tokens=8)
    driver.step()
    assert driver.ahead is not None
    assert driver.finish_reason("r") is FinishReason.STOP
    batch, driver.ahead = driver.ahead, None
    behind = driver.policy.schedule_ahead(batch, driver.now_s)
    assert behind is not None
    driver.runner.launch(behind)
    assert driver.sequences["other"].blocks == [1]
    finish_step(driver, batch)
    finish_step(driver, behind)
    driver.run()
    assert driver.tokens("other") == complete(other, driver.limits)[0]


@pytest.mark.parametrize("how", ["abort", "deadline"])
def test_sequence_that_is_aborted_or_late_while_a_step_is_out_ends_once(how):
    driver = PagedDriver()
    driver.submit("r", PROMPT[:20], max_tokens=90, deadline_s=driver.now_s + 5)
    driver.submit("other", [7] * 20, max_tokens=9)
    driver.step()
    assert driver.ahead is not None
    if how == "abort":
        driver.policy.abort("r")
    else:
        driver.now_s += 6
    driver.step()
    assert driver.finish_reason("r") is FinishReason.CANCELLED
    assert len(driver.tokens("r")) == 1
    driver.run()
    assert driver.finish_reason("other") is FinishReason.LENGTH


def test_id_that_comes_again_while_a_row_of_the_first_is_out_is_another_sequence():
    driver = PagedDriver()
    driver.submit("r", PROMPT[:20], max_tokens=90)
    driver.step()
    assert driver.ahead is not None
    driver.policy.abort("r")
    driver.take_events()
    request = driver.submit("r", [7] * 40, max_tokens=9)
    driver.run()
    assert driver.tokens("r") == complete(request, driver.limits)[0]


def test_choices_of_one_prompt_compute_its_full_blocks_once():
    driver = PagedDriver(make_paged_limits(num_slots=8))
    for i in range(8):
        driver.submit(f"r{i}", PROMPT, max_tokens=4)
    driver.run()
    assert driver.policy.stats().prefix_hit_tokens == 7 * 96
    assert driver.runner.num_computed_tokens == 100 + 7 * 4 + 8 * 3
    assert driver.events["r1"][0].num_cached_tokens == 96


def test_sharers_hold_the_same_blocks():
    driver = PagedDriver(is_overlapped=False)
    for i in range(3):
        driver.submit(f"r{i}", [*PROMPT[:LONG], 200 + i], max_tokens=9)
    while driver.sequences["r2"].state is not SequenceState.RUNNING:
        driver.step()
    tables = [driver.sequences[f"r{i}"].blocks for i in range(3)]
    assert tables[0][:3] == tables[1][:3] == tables[2][:3]
    assert len({table[3] for table in tables}) == 3
    assert driver.policy.stats().kv_usage == 6 / 64


def test_waiting_prompt_takes_blocks_in_the_step_after_the_one_that_fills_them():
    driver = PagedDriver(is_overlapped=False)
    driver.submit("first", PROMPT + [500] * 100)
    driver.submit("second", PROMPT[:50] + [600] * 60)
    driver.step()
    assert driver.chunks() == {"first": 32}
    driver.step()
    assert driver.chunks() == {"first": 32}
    driver.step()
    assert driver.chunks() == {"first": 32, "second": 32}


def test_prompt_that_comes_late_holds_back_for_what_is_still_to_be_computed():
    driver = PagedDriver(is_overlapped=False)
    driver.submit("first", PROMPT, max_tokens=1)
    driver.step()
    driver.submit("second", PROMPT, max_tokens=1)
    driver.run()
    assert driver.runner.num_computed_tokens == 100 + 4


def test_waiting_prompt_does_not_hold_back_for_its_last_token():
    driver = PagedDriver(make_paged_limits(max_chunk_tokens=16), is_overlapped=False)
    driver.submit("first", PROMPT[:32])
    driver.submit("second", PROMPT[:32])
    driver.step()
    driver.step()
    assert driver.chunks() == {"first": 16, "second": 16}


def test_waiting_prompt_holds_back_while_the_shared_tokens_are_on_their_way():
    driver = PagedDriver()
    driver.submit("first", PROMPT, max_tokens=1)
    driver.submit("second", PROMPT, max_tokens=1)
    driver.run()
    # The first one's last chunk is all that is left to launch, so the second waits for it to be collected.
    assert driver.runner.num_computed_tokens == 100 + 4


def test_waiting_prompt_does_not_hold_back_for_blocks_that_were_forgotten():
    driver = PagedDriver(make_paged_limits(max_chunk_tokens=16), is_overlapped=False)
    driver.submit("bad", PROMPT[:32], max_tokens=9)
    driver.submit("sharer", PROMPT[:64], max_tokens=9)
    while driver.sequences["sharer"].num_computed_tokens < 48:
        driver.step()
    driver.runner.on_step = lambda batch: {
        i: "not a number" for i, row in enumerate(batch.rows) if row.sequence.request.id == "bad"
    }
    driver.step()
    driver.submit("third", PROMPT[:90], max_tokens=9)
    driver.step()
    assert driver.sequences["third"].state is SequenceState.RUNNING


def test_held_back_prompt_keeps_its_claim_on_blocks():
    driver = PagedDriver(make_paged_limits(max_model_len=112, num_blocks=12), is_overlapped=False)
    driver.submit("first", PROMPT[:64], max_tokens=1)
    driver.submit("second", PROMPT[:64] + [600] * 40, max_tokens=1)
    driver.submit("third", [500] * 80, max_tokens=1)
    driver.step()
    assert driver.chunks() == {"first": 32}
    while not driver.tokens("second"):
        driver.step()
        assert "third" not in driver.chunks()
    assert driver.policy.stats().num_preemptions == 0


def test_next_turn_of_a_conversation_computes_only_what_is_behind_its_full_blocks():
    driver = PagedDriver()
    driver.submit("turn1", PROMPT, max_tokens=20)
    driver.run()
    history = PROMPT + driver.tokens("turn1")
    driver.submit("turn2", [*history, 7, 8, 9])
    driver.step()
    assert driver.sequences["turn2"].num_cached_tokens == 112
    assert driver.chunks() == {"turn2": 123 - 112}


def test_aborted_sequence_leaves_its_full_blocks_to_others():
    driver = PagedDriver()
    driver.submit("r", PROMPT, max_tokens=100)
    for _ in range(5):
        driver.step()
    driver.policy.abort("r")
    driver.take_events()
    driver.submit("again", PROMPT)
    driver.run()
    assert driver.sequences["again"].num_cached_tokens == 96


def test_prompt_logprobs_switch_reuse_off():
    driver = PagedDriver()
    driver.submit("warm", PROMPT)
    driver.run()
    driver.submit("scored", PROMPT, num_prompt_logprobs=0, max_tokens=2)
    driver.run()
    assert driver.events["scored"][0].num_cached_tokens == 0
    scores = driver.events["scored"][0].prompt_logprobs
    assert scores is not None
    assert len(scores) == 99


@pytest.mark.parametrize("is_overlapped", [False, True])
def test_youngest_sequence_is_preempted_when_blocks_run_out(is_overlapped):
    driver = PagedDriver(make_paged_limits(max_model_len=128, num_blocks=10), is_overlapped=is_overlapped)
    old = driver.submit("old", [1] * 20, max_tokens=100)
    young = driver.submit("young", [2] * 20, max_tokens=100)
    while driver.sequences["young"].num_preemptions == 0:
        assert driver.step()
    assert driver.ahead is None or all(row.sequence.request.id == "old" for row in driver.ahead.rows)
    assert driver.sequences["old"].state is SequenceState.RUNNING
    driver.run()
    for request in (old, young):
        assert driver.tokens(request.id) == complete(request, driver.limits)[0]
    assert driver.policy.stats().num_preemptions == 1


def test_no_step_is_ahead_where_blocks_are_short_and_nobody_is_preempted_for_it(monkeypatch):
    monkeypatch.setattr("sardonyx.engine.paged_roster.GROWTH_TOKENS", 0)
    driver = PagedDriver(make_paged_limits(max_model_len=48, num_blocks=4))
    requests = [driver.submit(name, [i] * 16, max_tokens=30) for i, name in enumerate(("old", "young"))]
    batch = start_step(driver)
    assert len(batch.rows) == 2
    assert driver.policy.schedule_ahead(batch, driver.now_s) is None
    assert driver.policy.stats().num_preemptions == 0
    finish_step(driver, batch)
    driver.step()
    assert driver.sequences["young"].state is SequenceState.PREEMPTED
    driver.run()
    for request in requests:
        assert driver.tokens(request.id) == complete(request, driver.limits)[0]


def test_preempted_sequence_finds_its_full_blocks_again():
    driver = PagedDriver(make_paged_limits(max_model_len=128, num_blocks=10))
    driver.submit("old", [1] * 20, max_tokens=60)
    driver.submit("young", [2] * 20, max_tokens=100)
    while driver.sequences["young"].num_preemptions == 0:
        driver.step()
    driver.run()
    num_lost = driver.runner.num_computed_tokens - (20 + 59) - (20 + 99)
    assert num_lost < 16, "no more than what was in a block that was not full"


def test_sequence_waits_where_it_would_leave_no_block_to_grow():
    driver = PagedDriver(make_paged_limits(max_model_len=128, num_blocks=9))
    driver.submit("old", [1] * 20, max_tokens=100)
    driver.submit("young", [2] * 60, max_tokens=60)
    driver.step()
    assert driver.sequences["young"].state is SequenceState.WAITING
    driver.run()
    assert driver.policy.stats().num_preemptions == 0


def test_room_to_grow_is_no_more_than_a_request_may_still_generate():
    driver = PagedDriver(make_paged_limits(max_model_len=64, num_blocks=5))
    driver.submit("old", [1] * 30, max_tokens=2)
    driver.submit("young", [2] * 31, max_tokens=1)
    driver.step()
    assert driver.sequences["young"].state is not SequenceState.WAITING


def test_failed_step_ends_the_rows_of_the_step_behind_it_too():
    driver = PagedDriver()
    driver.submit("r", PROMPT[:20], max_tokens=9)
    driver.step()
    driver.submit("new", [500] * 10, max_tokens=9)

    def fail(batch: Batch) -> None:
        driver.runner.on_step = None
        raise EngineError("the session failed")

    driver.runner.on_step = fail
    driver.step()
    assert (driver.finish_reason("r"), driver.finish_reason("new")) == (FinishReason.ERROR, FinishReason.ERROR)
    assert driver.policy.stats().kv_usage == 0.0
    request = driver.submit("again", PROMPT[:20], max_tokens=9)
    driver.run()
    assert driver.sequences["again"].num_cached_tokens == 0
    assert driver.tokens("again") == complete(request, driver.limits)[0]


def test_blocks_that_made_a_row_fail_are_computed_again_for_the_next_one():
    driver = PagedDriver()
    driver.submit("bad", PROMPT, max_tokens=9)
    driver.runner.on_step = lambda batch: {
        i: "not a number" for i, row in enumerate(batch.rows) if row.sequence.request.id == "bad" and row.is_sampled
    }
    driver.run()
    assert driver.events["bad"][-1].error == "not a number"
    assert driver.policy.stats().num_retained_tokens == 0
    request = driver.submit("good", PROMPT, max_tokens=9)
    driver.run()
    assert driver.sequences["good"].num_cached_tokens == 0
    assert driver.tokens("good") == complete(request, driver.limits)[0]


def test_stats_tell_of_blocks():
    driver = PagedDriver(is_overlapped=False)
    driver.submit("r", PROMPT, max_tokens=9)
    driver.step()
    assert driver.policy.stats().kv_usage == 7 / 64
    driver.run()
    stats = driver.policy.stats()
    assert (stats.kv_usage, stats.num_retained_tokens) == (0.0, 108 // 16 * 16)
    driver.submit("again", PROMPT, max_tokens=9)
    driver.run()
    stats = driver.policy.stats()
    assert (stats.prompt_tokens, stats.prefix_hit_tokens, stats.generated_tokens) == (200, 96, 18)


def test_step_ahead_is_measured_from_the_end_of_the_step_before():
    driver = PagedDriver(step_s=lambda batch: 0.05)
    observed = []
    observe = driver.policy._cost.observe
    driver.policy._cost.observe = lambda load, step_s: (observed.append(step_s), observe(load, step_s))
    driver.submit("r", PROMPT[:20], max_tokens=9)
    driver.run()
    assert observed == pytest.approx([0.05] * 9)


def test_slots_know_no_step_ahead():
    driver = Driver()
    driver.submit("r", PROMPT[:20], max_tokens=9)
    batch = driver.policy.schedule(driver.now_s)
    assert batch is not None
    assert driver.policy.schedule_ahead(batch, driver.now_s) is None


@pytest.mark.parametrize(
    ("limits", "options", "field"),
    [
        (make_paged_limits(num_blocks=16), {}, "num_blocks"),
        (make_paged_limits(), {"kv_budget_tokens": 1024}, "kv_budget_tokens"),
    ],
)
def test_limits_that_blocks_cannot_keep_are_refused(limits: RunnerLimits, options: dict[str, int], field: str):
    with pytest.raises(ConfigError, match=field):
        ContinuousPolicy(limits, ContinuousOptions(**options))


def test_blocks_that_just_hold_one_sequence_serve_one_after_the_other():
    driver = PagedDriver(make_paged_limits(num_blocks=17))
    requests = [driver.submit(f"r{i}", [i] * 100, max_tokens=200) for i in range(3)]
    driver.run()
    for request in requests:
        assert driver.tokens(request.id) == complete(request, driver.limits)[0]
