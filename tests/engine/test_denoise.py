import pytest
from tests.engine.denoise_driver import DenoiseDriver, make_prompt, make_source

from sardonyx.core import FinishReason, SequenceState
from sardonyx.engine.denoise import DenoiseOptions, DenoisePolicy
from sardonyx.errors import ConfigError, EngineError

LARGE = (1, 2, 2)


def test_picture_is_encoded_denoised_and_decoded():
    driver = DenoiseDriver()
    driver.submit("a", 3)
    driver.run()
    assert driver.kinds() == ["prompts", "round", "round", "round", "decode"]
    end = driver.ends["a"]
    assert (end.finish_reason, end.error, end.num_steps_done, end.started_s) == (FinishReason.STOP, None, 3, 100.0)
    assert end.image[0, 0, 0] == 3
    assert driver.sequences["a"].state is SequenceState.FINISHED


def test_picture_to_begin_with_is_encoded_once_for_all_that_share_it():
    driver = DenoiseDriver()
    source = make_source()
    for name in "abc":
        driver.submit(name, 1, source=source)
    driver.submit("d", 1, source=make_source())
    driver.run()
    assert driver.kinds().count("source") == 2
    assert {driver.reason(name) for name in "abcd"} == {FinishReason.STOP}


def test_prompts_are_encoded_once_together_and_shared():
    driver = DenoiseDriver()
    prompt, negative = make_prompt(), make_prompt()
    for name in "abc":
        driver.submit(name, 2, prompt=prompt, negative=negative)
    driver.run()
    assert driver.kinds().count("prompts") == 1
    assert driver.runner.num_encoded == 2
    driver.submit("later", 2, prompt=prompt, negative=make_prompt())
    driver.run()
    assert driver.runner.num_encoded == 3


def test_no_more_prompts_than_allowed_are_encoded_at_once():
    driver = DenoiseDriver(max_batch_prompts=2)
    for name in "abcde":
        driver.submit(name, 1)
    driver.run()
    assert [len(batch.prompts) for batch in driver.batches if batch.prompts] == [2, 2, 1]


@pytest.mark.parametrize(("max_rows", "most"), [(1, 1), (2, 2), (3, 3), (100, 5)])
def test_pictures_share_rounds_up_to_the_number_of_rows(max_rows, most):
    driver = DenoiseDriver(max_batch_rows=max_rows)
    for name in "abcde":
        driver.submit(name, 4)
    driver.run()
    assert max(map(len, driver.rounds())) == most


@pytest.mark.parametrize(("max_rows", "most"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_guidance_takes_two_rows(max_rows, most):
    driver = DenoiseDriver(max_batch_rows=max_rows)
    for name in "abc":
        driver.submit(name, 4, negative=make_prompt())
    driver.run()
    assert max(map(len, driver.rounds())) == most
    assert max(batch.num_tokens for batch in driver.batches) == 2 * most


def test_pictures_with_and_without_guidance_fill_a_call_up():
    driver = DenoiseDriver(max_batch_rows=3)
    driver.submit("guided", 4, negative=make_prompt())
    driver.submit("plain", 4)
    driver.run()
    assert [sorted(each) for each in driver.rounds()] == [["guided", "plain"]] * 4


def test_sizes_do_not_share_rounds_and_both_go_on():
    driver = DenoiseDriver(max_batch_rows=8)
    driver.submit("small", 5)
    driver.submit("large", 5, size=LARGE)
    driver.run()
    assert sorted(driver.rounds()) == [["large"]] * 5 + [["small"]] * 5
    assert ["large"] in driver.rounds()[:5]


def test_short_picture_among_long_ones_gets_three_rounds_of_four():
    driver = DenoiseDriver(max_batch_rows=1)
    for name in ("long-1", "long-2", "long-3"):
        driver.submit(name, 100)
    for _ in range(20):
        driver.step()
    num_before = len(driver.rounds())
    driver.submit("short", 4)
    while driver.reason("short") is None:
        driver.step()
    assert len(driver.rounds()) - num_before <= 4 + 2
    driver.run()
    assert len(driver.rounds()) == 304


@pytest.mark.parametrize("num_rounds", range(8, 12))
def test_short_picture_begins_before_long_ones_that_were_not_passed_over(num_rounds):
    driver = DenoiseDriver(max_batch_rows=2, short_runs_alone=True)
    for name in ("long-1", "long-2", "long-3", "long-4"):
        driver.submit(name, 100)
    while len(driver.rounds()) < num_rounds:
        driver.step()
    driver.submit("short", 4)
    while driver.reason("short") is None:
        driver.step()
    begun = driver.rounds()[num_rounds:]
    assert [each == ["short"] for each in begun] == [True, True, True, False, True]


def test_short_picture_takes_much_longer_ones_along_only_where_rows_cost_nothing():
    def calls_of_short(*, short_runs_alone):
        driver = DenoiseDriver(max_batch_rows=4, short_runs_alone=short_runs_alone)
        driver.submit("long", 17)
        driver.submit("longer", 40)
        driver.submit("short", 4)
        driver.run()
        return [each for each in driver.rounds() if "short" in each]

    assert calls_of_short(short_runs_alone=True)[:3] == [["short"], ["short"], ["short"]]
    assert all(len(each) == 3 for each in calls_of_short(short_runs_alone=False))


def test_pictures_of_about_one_length_share_rounds():
    driver = DenoiseDriver(max_batch_rows=4)
    driver.submit("long", 16)
    driver.submit("short", 4)
    driver.step()
    driver.step()
    assert driver.rounds()[0] == ["short", "long"]


def test_long_picture_is_not_forgotten_among_short_ones_that_keep_coming():
    driver = DenoiseDriver(max_batch_rows=1)
    driver.submit("long", 10)
    num = 0
    while driver.reason("long") is None:
        if f"short-{num}" not in driver.requests or driver.reason(f"short-{num}"):
            num += 1
            driver.submit(f"short-{num}", 1)
        driver.step()
        assert len(driver.rounds()) < 60
    assert driver.reason("long") is FinishReason.STOP


def test_finished_picture_is_decoded_before_the_next_round():
    driver = DenoiseDriver(max_batch_rows=1)
    driver.submit("short", 1)
    driver.submit("long", 5)
    driver.run()
    index = driver.kinds().index("decode")
    assert driver.batches[index - 1].rows[0].sequence.request.id == "short"


def test_previews_come_after_their_rounds():
    driver = DenoiseDriver()
    driver.submit("a", 5, preview_steps=frozenset({2, 4}))
    driver.submit("b", 5)
    driver.run()
    assert driver.previews == {"a": [2, 4]}


def test_no_more_pictures_than_allowed_run_at_once():
    driver = DenoiseDriver(max_num_seqs=2)
    for name in "abc":
        driver.submit(name, 3)
    driver.step()
    stats = driver.policy.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (2, 1, 1.0)
    driver.run()
    assert driver.reason("c") is FinishReason.STOP
    assert driver.policy.stats().generated_tokens == 9


@pytest.mark.parametrize("num_steps_before", [0, 1, 2, 4])
def test_aborted_picture_ends_and_others_go_on(num_steps_before):
    driver = DenoiseDriver(max_num_seqs=2)
    for name in "abc":
        driver.submit(name, 3)
    for _ in range(num_steps_before):
        driver.step()
    for name in "ac":  # one that runs, once it does, and one that waits
        driver.policy.abort(name)
    driver.run()
    assert [driver.reason(name) for name in "abc"] == [
        FinishReason.CANCELLED,
        FinishReason.STOP,
        FinishReason.CANCELLED,
    ]
    assert driver.ends["a"].error is None


def test_unknown_and_ended_pictures_are_not_aborted():
    driver = DenoiseDriver()
    driver.submit("a", 1)
    driver.run()
    driver.policy.abort("a")
    driver.policy.abort("nobody")
    assert driver.policy.take_events() == []


def test_picture_whose_time_is_over_ends():
    driver = DenoiseDriver(max_num_seqs=1)
    driver.submit("runs", 50, deadline_s=110.0)
    driver.submit("waits", 50, deadline_s=110.0)
    driver.submit("queues", 50, start_by_s=105.0)
    driver.submit("stays", 2)
    driver.step()
    driver.now_s = 106.0
    driver.step()
    assert (driver.reason("queues"), driver.ends["queues"].error) == (FinishReason.CANCELLED, "queue")
    driver.now_s = 111.0
    driver.run()
    for name in ("runs", "waits"):
        assert (driver.reason(name), driver.ends[name].error) == (FinishReason.CANCELLED, "deadline")
    assert driver.reason("stays") is FinishReason.STOP


def test_picture_that_has_begun_may_go_on_after_its_start_by():
    driver = DenoiseDriver()
    driver.submit("a", 3, start_by_s=105.0)
    driver.step()
    driver.now_s = 200.0
    driver.run()
    assert driver.reason("a") is FinishReason.STOP


def test_picture_that_failed_alone_leaves_the_others():
    failed = iter([{}, {1: "it is not finite"}])
    driver = DenoiseDriver(max_batch_rows=4, on_step=lambda batch: next(failed, {}))
    for name in "abc":
        driver.submit(name, 3)
    driver.run()
    ends = [(driver.reason(name), driver.ends[name].error) for name in "abc"]
    assert sorted(ends, key=str) == [(FinishReason.ERROR, "it is not finite")] + [(FinishReason.STOP, None)] * 2


def test_picture_that_cannot_be_decoded_ends_with_the_reason():
    driver = DenoiseDriver(on_step=lambda batch: {0: "it is not finite"} if batch.finished else {})
    driver.submit("a", 1)
    driver.run()
    assert (driver.reason("a"), driver.ends["a"].error) == (FinishReason.ERROR, "it is not finite")
    assert driver.ends["a"].image is None


@pytest.mark.parametrize("kind", ["prompts", "source", "round", "decode"])
def test_step_that_failed_ends_all_that_had_a_part_in_it(kind):
    def on_step(batch):
        now = "prompts" if batch.prompts else "source" if batch.source else "round" if batch.rows else "decode"
        if now == kind and not has_failed:
            has_failed.append(kind)
            raise EngineError("the step failed")
        return {}

    has_failed = []
    driver = DenoiseDriver(max_batch_rows=1, max_batch_prompts=1, on_step=on_step)
    source, prompt = make_source(), make_prompt()
    driver.submit("a", 2, prompt=prompt, source=source)
    driver.submit("b", 2, prompt=prompt, source=source)
    driver.submit("c", 2)
    driver.run()
    shared = {"prompts", "source"}
    assert driver.reason("a") is FinishReason.ERROR
    assert driver.ends["a"].error == "the step failed"
    assert driver.reason("b") is (FinishReason.ERROR if kind in shared else FinishReason.STOP)
    assert driver.reason("c") is FinishReason.STOP


def test_prompt_whose_encoding_failed_is_tried_again_by_the_next_picture():
    faults = [EngineError("the step failed")]

    def on_step(batch):
        if batch.prompts and faults:
            raise faults.pop()
        return {}

    driver = DenoiseDriver(on_step=on_step)
    prompt = make_prompt()
    driver.submit("a", 1, prompt=prompt)
    driver.run()
    driver.submit("b", 1, prompt=prompt)
    driver.run()
    assert [driver.reason(name) for name in "ab"] == [FinishReason.ERROR, FinishReason.STOP]


@pytest.mark.parametrize("name", ["max_num_seqs", "max_batch_rows", "max_batch_prompts"])
def test_options_that_ask_for_nothing_are_refused(name):
    with pytest.raises(ConfigError, match="at least 1") as caught:
        DenoisePolicy(DenoiseOptions(**{name: 0}))
    assert caught.value.field == name
