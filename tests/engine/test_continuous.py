import random

import pytest
from tests.engine.driver import Driver, make_limits
from tests.engine.fake_runner import complete, next_token, prompt_logprob

from sardonyx.core import Batch, FinishReason, Request, SamplingParams, SequenceState, SlotCopy
from sardonyx.engine.continuous import ContinuousOptions, ContinuousPolicy
from sardonyx.errors import ConfigError, ContextLengthExceeded, EngineError, InvalidRequest

PROMPT = list(range(1, 101))


def batch_s(batch: Batch) -> float:
    """A step on a small CPU: a constant, decodes, prompt tokens."""
    num_decodes = sum(row.num_new_tokens == 1 for row in batch.rows)
    return 0.01 + 0.002 * num_decodes + 0.0015 * (batch.num_tokens - num_decodes)


def slow_batch_s(batch: Batch) -> float:
    """Decodes alone take more than any target."""
    return 1.0 + 0.001 * batch.num_tokens


def test_tokens_are_those_of_the_request_alone():
    driver = Driver()
    requests = [driver.submit(f"r{i}", PROMPT[i:], max_tokens=5 + i) for i in range(6)]
    driver.run()
    for request in requests:
        assert (driver.tokens(request.id), driver.finish_reason(request.id)) == complete(request, driver.limits)


def test_long_prompt_is_computed_in_chunks_beside_decodes():
    driver = Driver()
    driver.submit("decoding", [1, 2, 3], max_tokens=50)
    driver.step()
    driver.submit("long", PROMPT)
    driver.step()
    assert driver.chunks() == {"decoding": 1, "long": 32}


def test_decodes_are_in_every_step_when_a_long_prompt_arrives():
    driver = Driver(make_limits(max_model_len=4096), step_s=batch_s, max_step_ms=100.0)
    for i in range(3):
        driver.submit(f"decoding{i}", [i] * 30, max_tokens=400)
    while not all(driver.tokens(f"decoding{i}") for i in range(3)):
        driver.step()
    driver.submit("long", [7] * 3000, max_tokens=1)
    while not driver.tokens("long"):
        driver.step()
        assert all(driver.chunks()[f"decoding{i}"] == 1 for i in range(3))


def test_steps_with_decodes_keep_to_the_target_time():
    limits = make_limits(max_model_len=8192, max_chunk_tokens=256, num_slots=8)
    random.seed(0)
    driver = Driver(limits, step_s=lambda batch: batch_s(batch) * random.uniform(0.9, 1.1), max_step_ms=150.0)
    for i in range(7):
        driver.submit(f"decoding{i}", [i] * 40, max_tokens=400)
    for _ in range(30):
        driver.step()
    driver.submit("long", [9] * 4000, max_tokens=1)
    durations_s = []
    while not driver.tokens("long"):
        start_s = driver.now_s
        driver.step()
        durations_s.append(driver.now_s - start_s)
    assert max(durations_s) < 1.3 * 0.150
    assert sum(durations_s) / len(durations_s) > 0.8 * 0.150


def test_whole_token_budget_is_used_when_nobody_decodes():
    limits = make_limits(max_model_len=4096, max_chunk_tokens=256)
    driver = Driver(limits, step_s=batch_s, max_step_ms=1.0)
    for i in range(4):
        driver.submit(f"r{i}", [i] * 2000)
    driver.step()
    assert driver.batch is not None
    assert driver.batch.num_tokens == 512


def test_prompt_advances_by_the_floor_when_decodes_take_all_the_time():
    driver = Driver(step_s=slow_batch_s)
    driver.submit("decoding", [1, 2, 3], max_tokens=100)
    for _ in range(5):
        driver.step()
    driver.submit("prompt", PROMPT)
    driver.step()
    assert driver.chunks() == {"decoding": 1, "prompt": 16}


def test_prompt_older_than_its_guard_gets_more_than_the_time_allows():
    driver = Driver(make_limits(max_model_len=1000, max_chunk_tokens=128), step_s=slow_batch_s)
    driver.submit("decoding", [1, 2, 3], max_tokens=100)
    for _ in range(5):
        driver.step()
    driver.submit("prompt", [9] * 900)
    driver.now_s += 16
    driver.step()
    assert driver.chunks()["prompt"] == 32


def test_short_prompt_does_not_wait_for_a_long_one():
    driver = Driver(make_limits(max_model_len=4096, max_chunk_tokens=256), step_s=batch_s, max_step_ms=150.0)
    driver.submit("decoding", [1, 2, 3], max_tokens=400)
    for _ in range(5):
        driver.step()
    driver.submit("long", [7] * 4000)
    driver.step()
    driver.submit("short", [8] * 60)
    for _ in range(2):
        driver.step()
        assert driver.chunks()["long"] > 0
    assert driver.tokens("short")


def test_equal_prompts_start_in_order_of_arrival():
    driver = Driver(make_limits(num_slots=2))
    for i in range(5):
        driver.submit(f"r{i}", [i] * 40, max_tokens=3)
    order = []
    while driver.step():
        order += [each for each, events in driver.events.items() if events and each not in order]
    assert order == [f"r{i}" for i in range(5)]


def test_choices_of_one_prompt_compute_it_once():
    driver = Driver(make_limits(num_slots=8))
    for i in range(8):
        driver.submit(f"r{i}", PROMPT, max_tokens=4)
    driver.run()
    assert driver.runner.num_computed_tokens == len(PROMPT) + 7 + 8 * 3
    assert driver.policy.stats().prefix_hit_tokens == 7 * 99
    assert driver.events["r1"][0].num_cached_tokens == 99


def test_waiting_prompt_copies_a_prefix_as_soon_as_it_is_computed():
    driver = Driver()
    driver.submit("first", PROMPT + [500] * 100)
    driver.submit("second", PROMPT[:50] + [600] * 3)
    driver.step()
    assert driver.chunks() == {"first": 32}
    driver.step()
    assert driver.chunks() == {"first": 32}
    driver.step()
    assert driver.batch is not None
    assert driver.batch.copies == [SlotCopy(0, 1, 50)]
    assert driver.chunks() == {"first": 32, "second": 3}


def test_waiting_prompt_holds_back_no_more_when_the_other_sits_a_step_out():
    driver = Driver(make_limits(num_slots=8), step_s=slow_batch_s)
    driver.submit("decoding", [1, 2, 3], max_tokens=100)
    for _ in range(5):
        driver.step()
    driver.submit("oldest", [7] * 200)
    driver.submit("first", PROMPT)
    driver.submit("second", PROMPT)
    driver.step()
    assert driver.chunks().keys() == {"decoding", "oldest", "first"}
    driver.submit("shorter", [8] * 60)
    driver.step()
    assert driver.chunks().keys() == {"decoding", "oldest", "shorter"}
    assert driver.sequences["second"].state is SequenceState.WAITING
    driver.step()
    assert driver.sequences["second"].state is SequenceState.RUNNING


def test_held_back_prompt_keeps_its_claim_on_a_slot():
    driver = Driver(make_limits(num_slots=2))
    driver.submit("first", PROMPT, max_tokens=20)
    driver.submit("second", PROMPT, max_tokens=20)
    driver.submit("third", [500] * 10)
    driver.step()
    assert driver.chunks() == {"first": 32}
    while not driver.tokens("second"):
        driver.step()
    assert driver.sequences["third"].state is SequenceState.WAITING


def test_next_turn_of_a_conversation_computes_only_what_is_new():
    driver = Driver()
    driver.submit("turn1", PROMPT, max_tokens=10)
    driver.run()
    history = PROMPT + driver.tokens("turn1")
    driver.submit("turn2", [*history, 7, 8, 9])
    driver.step()
    assert driver.chunks() == {"turn2": 4}
    assert driver.sequences["turn2"].num_cached_tokens == len(history) - 1


def test_prompt_logprobs_come_once_and_switch_reuse_off():
    driver = Driver()
    driver.submit("warm", PROMPT)
    driver.run()
    driver.submit("scored", PROMPT, num_prompt_logprobs=0, max_tokens=2)
    driver.run()
    first, last = driver.events["scored"]
    assert first.prompt_logprobs == [prompt_logprob(PROMPT, i) for i in range(1, 100)]
    assert last.prompt_logprobs is None
    assert first.num_cached_tokens == 0


def test_prompt_is_scored_without_a_token_when_max_tokens_is_zero():
    driver = Driver()
    driver.submit("scored", PROMPT, num_prompt_logprobs=0, max_tokens=0)
    driver.run()
    (event,) = driver.events["scored"]
    assert event.prompt_logprobs is not None
    assert len(event.prompt_logprobs) == 99
    assert (event.token_ids, event.finish_reason) == ([], FinishReason.LENGTH)


def test_logprobs_come_with_their_token():
    driver = Driver()
    driver.submit("r", [1, 2], max_tokens=2, sampling=SamplingParams(num_logprobs=0))
    driver.run()
    assert [len(event.logprobs) for event in driver.events["r"]] == [1, 1]


def test_stop_token_ends_the_sequence_and_is_delivered():
    driver = Driver()
    stop = next_token(PROMPT, 1000)
    driver.submit("r", PROMPT, stop_token_ids=frozenset({stop}), max_tokens=9)
    driver.run()
    assert driver.tokens("r") == [stop]
    assert driver.finish_reason("r") is FinishReason.STOP


def test_stop_token_below_min_tokens_does_not_end_the_sequence():
    driver = Driver(make_limits(vocab_size=1))
    driver.submit("r", [0], stop_token_ids=frozenset({0}), min_tokens=3, max_tokens=9)
    driver.run()
    assert len(driver.tokens("r")) == 4
    assert driver.finish_reason("r") is FinishReason.STOP


def test_sequence_ends_at_the_models_limit():
    driver = Driver(make_limits(max_model_len=110))
    driver.submit("r", PROMPT, max_tokens=50)
    driver.submit("full", list(range(110)), max_tokens=50)
    driver.run()
    assert len(driver.tokens("r")) == 10
    assert driver.tokens("full") == []
    assert {driver.finish_reason("r"), driver.finish_reason("full")} == {FinishReason.LENGTH}


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_abort_ends_a_sequence_before_the_next_step(num_steps):
    driver = Driver(make_limits(num_slots=1))
    driver.submit("other", PROMPT, max_tokens=3)
    driver.submit("r", PROMPT, max_tokens=100)
    for _ in range(num_steps):
        driver.step()
    driver.policy.abort("r")
    driver.policy.abort("r")
    driver.step()
    assert driver.finish_reason("r") is FinishReason.CANCELLED
    assert "r" not in driver.chunks()
    driver.run()
    assert driver.finish_reason("other") is FinishReason.LENGTH


def test_aborted_sequence_leaves_its_prefix_to_others():
    driver = Driver()
    driver.submit("r", PROMPT, max_tokens=100)
    for _ in range(5):
        driver.step()
    driver.policy.abort("r")
    driver.submit("again", PROMPT)
    driver.step()
    assert driver.chunks() == {"again": 1}


def test_deadline_ends_waiting_and_running_sequences():
    driver = Driver(make_limits(num_slots=1))
    driver.submit("running", PROMPT, max_tokens=100, deadline_s=driver.now_s + 5)
    driver.submit("waiting", [7] * 20, deadline_s=driver.now_s + 5)
    driver.step()
    driver.now_s += 6
    assert not driver.step()
    for request_id in ("running", "waiting"):
        (event,) = driver.events[request_id]
        assert (event.finish_reason, event.error) == (FinishReason.CANCELLED, "deadline")


def test_start_deadline_ends_only_what_never_had_a_slot():
    driver = Driver(make_limits(num_slots=1))
    driver.submit("running", PROMPT, max_tokens=10, start_by_s=driver.now_s + 5)
    driver.submit("waiting", [7] * 20, start_by_s=driver.now_s + 5)
    driver.step()
    driver.now_s += 6
    driver.run()
    assert driver.finish_reason("running") is FinishReason.LENGTH
    assert driver.events["waiting"][-1].error == "queue"


def test_old_deadline_does_not_end_a_new_request_of_the_same_id():
    driver = Driver()
    driver.submit("r", [1], max_tokens=1, deadline_s=driver.now_s + 5)
    driver.run()
    driver.submit("r", [1], max_tokens=100, deadline_s=driver.now_s + 500)
    driver.step()
    driver.now_s += 6
    driver.run()
    assert driver.finish_reason("r") is FinishReason.LENGTH


def test_youngest_sequence_is_preempted_when_the_kv_budget_is_exceeded():
    driver = Driver(make_limits(max_model_len=100), kv_budget_tokens=160)
    old = driver.submit("old", [1] * 20, max_tokens=79)
    young = driver.submit("young", [2] * 20, max_tokens=79)
    while driver.sequences["young"].num_preemptions == 0:
        assert driver.step()
    assert driver.sequences["old"].state is SequenceState.RUNNING
    assert driver.sequences["young"].state is SequenceState.PREEMPTED
    driver.run()
    for request in (old, young):
        assert driver.tokens(request.id) == complete(request, driver.limits)[0]


def test_prompt_logprobs_start_again_after_a_preemption():
    limits = make_limits(max_model_len=1000, max_chunk_tokens=1)
    driver = Driver(limits, kv_budget_tokens=1000)
    prompt = [2] * 530
    driver.submit("old", [1] * 400, max_tokens=200)
    while not driver.tokens("old"):
        driver.step()
    driver.submit("young", prompt, num_prompt_logprobs=0, max_tokens=2)
    driver.run()
    assert driver.sequences["young"].num_preemptions == 1
    assert driver.events["young"][0].prompt_logprobs == [prompt_logprob(prompt, i) for i in range(1, 530)]


def test_free_slots_forget_before_anybody_is_preempted():
    driver = Driver(make_limits(max_model_len=100), kv_budget_tokens=160)
    driver.submit("past", [1] * 90, max_tokens=1)
    driver.run()
    driver.submit("r", [2] * 20, max_tokens=70)
    driver.submit("s", [3] * 20, max_tokens=40)
    driver.run()
    assert driver.policy.stats().num_preemptions == 0
    assert driver.policy.stats().num_retained_tokens <= 160


def test_failed_row_ends_with_error_and_the_others_go_on():
    driver = Driver()
    bad = driver.submit("bad", PROMPT[:20])
    good = driver.submit("good", [7] * 20)
    driver.runner.on_step = lambda batch: {
        i: "not a number" for i, row in enumerate(batch.rows) if row.sequence.request == bad
    }
    driver.run()
    assert (driver.finish_reason("bad"), driver.events["bad"][-1].error) == (FinishReason.ERROR, "not a number")
    assert driver.tokens("good") == complete(good, driver.limits)[0]


def test_failed_step_ends_its_rows_and_computes_lost_copies_again():
    driver = Driver(step_s=slow_batch_s, max_num_seqs=4)
    driver.submit("decoding", [1, 2, 3], max_tokens=100)
    for _ in range(5):
        driver.step()
    driver.submit("source", [*PROMPT, 500], max_tokens=1)
    while driver.finish_reason("source") is None:
        driver.step()
    driver.submit("oldest", [7] * 200)
    driver.step()
    # It gets its prefix copied, but no row: the oldest and a shorter prompt take the floor.
    copied = driver.submit("copied", PROMPT[:60] + [600] * 30)
    driver.submit("shorter", [8] * 28)

    def fail(batch: Batch) -> None:
        assert [copy.num_tokens for copy in batch.copies] == [60]
        driver.runner.on_step = None
        raise EngineError("the session failed")

    driver.runner.on_step = fail
    driver.step()
    assert driver.chunks().keys() == {"decoding", "oldest", "shorter"}
    assert driver.sequences["copied"].num_computed_tokens == 0
    driver.run()
    assert driver.finish_reason("oldest") is FinishReason.ERROR
    assert driver.tokens("copied") == complete(copied, driver.limits)[0]


@pytest.mark.parametrize(
    ("prompt_ids", "error"),
    [([], InvalidRequest), ([1000], InvalidRequest), ([-1], InvalidRequest), ([1] * 257, ContextLengthExceeded)],
)
def test_request_that_can_never_run_is_refused(prompt_ids, error):
    with pytest.raises(error):
        Driver().policy.check(Request(id="r", prompt_ids=prompt_ids))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_seqs", 0),
        ("max_batch_tokens", 3),
        ("min_prefill_tokens", 0),
        ("max_step_ms", float("nan")),
        ("kv_budget_tokens", 255),
    ],
)
def test_options_that_contradict_the_runner_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        ContinuousPolicy(make_limits(), ContinuousOptions(**{field: value}))


def test_stats_count_each_prompt_once():
    driver = Driver(make_limits(max_model_len=100), kv_budget_tokens=160)
    driver.submit("old", [1] * 20, max_tokens=79)
    driver.submit("young", [2] * 20, max_tokens=79)
    driver.step()
    stats = driver.policy.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (2, 0, 40 / 160)
    driver.run()
    stats = driver.policy.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.num_running) == (40, 158, 0)
    assert stats.num_preemptions == 1
    assert stats.kv_usage == 0
