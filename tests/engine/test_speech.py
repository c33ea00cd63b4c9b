import itertools
from collections import Counter

import numpy as np
import pytest
from tests.engine.speech_driver import LIMITS, SpeechDriver, complete, language_probs, make_window, no_speech_prob, talk

from sardonyx.core import FinishReason, RunnerLimits, SequenceState
from sardonyx.engine.speech import SpeechOptions, SpeechPolicy
from sardonyx.errors import ConfigError, ContextLengthExceeded, EngineError, InvalidRequest
from sardonyx.speech import Placement, SpeechTask

NEVER = {"max_tokens": 1000}


def broken(kind: str):
    """A step of one kind fails as a whole."""

    def on_step(batch):
        parts = {"encode": batch.windows, "align": batch.aligned, "pass": batch.rows}
        if parts[kind]:
            raise EngineError(f"no {kind} today")
        return {}

    return on_step


def test_tokens_are_those_of_the_request_alone():
    driver = SpeechDriver()
    for i in range(9):
        driver.submit(f"r{i}", max_tokens=3 + 2 * i, prompt_ids=[5] * (1 + i % 3))
    driver.run()
    for request_id, request in driver.requests.items():
        assert (driver.events[request_id].token_ids, driver.reason(request_id)) == complete(request)


def test_window_that_requests_share_is_encoded_once():
    driver, window = SpeechDriver(), make_window()
    driver.submit("first", window, max_tokens=3)
    driver.submit("beside", window, max_tokens=3)
    driver.run()
    driver.submit("after", window, max_tokens=3)
    driver.submit("words", window, task=SpeechTask.ALIGNMENT)
    driver.run()
    assert driver.kinds().count("encode") == 1


def test_encoder_steps_hold_as_many_windows_as_the_operator_says():
    driver = SpeechDriver(max_batch_windows=3)
    for i in range(4):
        driver.submit(f"r{i}")
    driver.run()
    assert [len(batch.windows) for batch in driver.batches if batch.windows] == [3, 1]


def test_windows_are_encoded_only_when_there_is_a_place_for_them():
    driver = SpeechDriver(max_num_seqs=2)
    for i in range(5):
        driver.submit(f"r{i}", **NEVER)
    for _ in range(20):
        driver.step()
    assert sum(request.window.cross is not None for request in driver.requests.values()) == 2


def test_running_sequences_have_a_pass_between_any_two_encodings():
    driver = SpeechDriver()
    driver.submit("running", **NEVER)
    for _ in range(2):
        driver.step()
    for i in range(30):
        driver.submit(f"r{i}", max_tokens=1)
    for _ in range(40):
        driver.step()
    assert ("encode", "encode") not in itertools.pairwise(driver.kinds())


def test_running_sequences_have_a_pass_between_any_two_alignments():
    driver, window = SpeechDriver(), make_window()
    driver.submit("running", window, **NEVER)
    for _ in range(2):
        driver.step()
    for i in range(10):
        driver.submit(f"r{i}", window, task=SpeechTask.ALIGNMENT)
    for _ in range(20):
        driver.step()
    assert driver.kinds()[2:] == ["align", "pass"] * 10


def test_alignments_that_never_cease_keep_nobody_from_starting():
    driver, window = SpeechDriver(), make_window()
    driver.submit("w0", window, task=SpeechTask.ALIGNMENT)
    driver.submit("text", max_tokens=1)
    for i in range(1, 12):
        driver.submit(f"w{i}", window, task=SpeechTask.ALIGNMENT)
        driver.step()
    assert driver.reason("text") is FinishReason.LENGTH


def test_encodings_that_never_cease_keep_no_alignment_waiting():
    driver = SpeechDriver()
    driver.submit("words", task=SpeechTask.ALIGNMENT)
    for i in range(12):
        driver.submit(f"r{i}", max_tokens=1)
        driver.step()
    assert driver.reason("words") is FinishReason.STOP


def test_sequence_starts_right_after_its_window_is_encoded_though_others_wait():
    driver = SpeechDriver()
    driver.submit("gone")
    driver.step()
    driver.policy.abort("gone")
    for i in range(3):
        driver.submit(f"r{i}", **NEVER)
    for _ in range(4):
        driver.step()
    assert driver.kinds() == ["encode", "encode", "pass", "encode", "pass"]


def test_call_with_one_window_is_not_kept_waiting_by_one_with_thirty():
    driver = SpeechDriver(max_num_seqs=4)
    for i in range(30):
        driver.submit(f"long{i}", flow=1, max_tokens=10)
    for _ in range(8):
        driver.step()
    assert len(driver.rows()) == 4
    driver.submit("short", flow=2, max_tokens=10)
    while "short" not in driver.rows():
        driver.step()
    assert sum(request_id.startswith("long") and request_id in driver.events for request_id in driver.requests) <= 4


def test_places_are_shared_evenly_between_calls():
    driver = SpeechDriver(max_num_seqs=4)
    for flow in (1, 2):
        for i in range(6):
            driver.submit(f"{flow}.{i}", flow=flow, **NEVER)
    for _ in range(8):
        driver.step()
    assert sorted(driver.rows()) == ["1.0", "1.1", "2.0", "2.1"]


@pytest.mark.parametrize("num_places", [1, 2, 4])
def test_short_call_waits_for_one_turn_of_each_long_one(num_places):
    driver, window = SpeechDriver(max_num_seqs=num_places), make_window()
    for flow in range(4):
        for i in range(30):
            driver.submit(f"long{flow}.{i}", window, flow=flow, max_tokens=10)
    driver.step()
    driver.step()
    driver.submit("short", window, flow=9, max_tokens=10)
    while "short" not in driver.rows():
        driver.step()
    num_ended = Counter(request_id.partition(".")[0] for request_id in driver.events)
    assert max(num_ended.values()) <= 2, "one that ran, and one turn"


def test_of_calls_with_as_many_running_the_one_starts_that_has_waited_longer():
    driver, window = SpeechDriver(max_num_seqs=3), make_window()
    driver.submit("b0", window, flow=2, **NEVER)
    driver.step()
    driver.step()
    driver.submit("a0", window, flow=1, **NEVER)
    driver.submit("b1", window, flow=2, **NEVER)
    driver.submit("a1", window, flow=1, **NEVER)
    driver.step()
    assert driver.rows() == ["b0", "a0", "b1"]


def test_call_without_a_running_sequence_goes_before_an_older_request():
    driver, window = SpeechDriver(max_num_seqs=2), make_window()
    driver.submit("b0", window, flow=2, **NEVER)
    driver.step()
    driver.step()
    driver.submit("b1", window, flow=2, **NEVER)
    driver.submit("a0", window, flow=1, **NEVER)
    driver.step()
    assert driver.rows() == ["b0", "a0"]


def test_never_more_run_than_the_operator_and_the_runner_allow():
    for wanted, num_slots, expected in [(2, 4, 2), (9, 4, 4), (1, 1, 1)]:
        driver = SpeechDriver(RunnerLimits(num_slots, 200, 200, 1000), max_num_seqs=wanted)
        for i in range(8):
            driver.submit(f"r{i}", max_tokens=20)
        driver.run()
        assert max(len(batch.rows) for batch in driver.batches) == expected


def test_sequence_that_ends_leaves_its_slot_to_the_last_one():
    driver = SpeechDriver()
    for i, max_tokens in enumerate([12, 5, 12, 12]):
        driver.submit(f"r{i}", max_tokens=max_tokens, prompt_ids=[7] * (i + 1))
    while "r1" not in driver.events:
        driver.step()
    num_computed = driver.sequences["r3"].num_computed_tokens
    driver.step()
    assert driver.rows() == ["r0", "r3", "r2"]
    assert driver.batches[-1].placements == [Placement(1, driver.requests["r3"].window, 3, num_computed)]
    assert [driver.sequences[f"r{i}"].slot for i in (0, 3, 2)] == [0, 1, 2]
    assert driver.sequences["r1"].slot == -1


def test_gap_goes_to_one_that_begins_before_anybody_moves():
    driver = SpeechDriver()
    window = make_window()
    for i, max_tokens in enumerate([2, 12, 2, 12]):
        driver.submit(f"r{i}", window, max_tokens=max_tokens)
    while "r2" not in driver.events:
        driver.step()
    driver.submit("new", window, **NEVER)
    driver.step()
    assert driver.rows() == ["new", "r1", "r3"]
    assert driver.batches[-1].placements == [
        Placement(0, window),
        Placement(2, window, 3, driver.sequences["r3"].num_computed_tokens - 1),
    ]


def test_last_one_that_ends_moves_nobody():
    driver = SpeechDriver()
    window = make_window()
    driver.submit("r0", window, **NEVER)
    driver.submit("r1", window, max_tokens=1)
    driver.step()
    driver.step()
    assert driver.step()
    assert (driver.rows(), driver.batches[-1].placements) == (["r0"], [])


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_abort_ends_a_request_in_whatever_state_it_is(num_steps):
    driver = SpeechDriver()
    driver.submit("r", **NEVER)
    for _ in range(num_steps):
        driver.step()
    driver.policy.abort("r")
    driver.policy.abort("r")
    assert not driver.step()
    event = driver.events["r"]
    assert (event.finish_reason, event.error) == (FinishReason.CANCELLED, None)
    assert event.token_ids == complete(driver.requests["r"])[0][: max(0, num_steps - 1)]
    assert (event.started_s is None) == (num_steps < 2)
    assert driver.policy.stats().num_running == driver.policy.stats().num_waiting == 0


@pytest.mark.parametrize("num_steps", [0, 1])
def test_abort_ends_an_alignment_before_and_after_its_window_is_encoded(num_steps):
    driver = SpeechDriver()
    driver.submit("r", task=SpeechTask.ALIGNMENT)
    driver.submit("other", task=SpeechTask.ALIGNMENT)
    for _ in range(num_steps):
        driver.step()
    driver.policy.abort("r")
    driver.run()
    assert (driver.reason("r"), driver.reason("other")) == (FinishReason.CANCELLED, FinishReason.STOP)
    assert driver.events["r"].alignment is None


def test_abort_of_an_unknown_request_is_ignored():
    driver = SpeechDriver()
    driver.policy.abort("nobody")
    assert not driver.step()


def test_window_of_an_aborted_request_stays_encoded():
    driver, window = SpeechDriver(), make_window()
    driver.submit("r", window)
    driver.step()
    driver.policy.abort("r")
    driver.submit("again", window, max_tokens=1)
    driver.run()
    assert driver.kinds() == ["encode", "pass"]


def test_deadline_ends_whoever_is_late_and_says_so():
    driver = SpeechDriver(max_num_seqs=1)
    window = make_window()
    driver.submit("running", window, deadline_s=105.0, **NEVER)
    driver.step()
    driver.step()
    driver.submit("waiting", window, deadline_s=105.0)
    driver.submit("words", window, task=SpeechTask.ALIGNMENT, deadline_s=105.0)
    driver.submit("patient", window, max_tokens=1, deadline_s=107.0)
    driver.now_s = 106.0
    driver.run()
    for request_id in ("running", "waiting", "words"):
        event = driver.events[request_id]
        assert (event.finish_reason, event.error) == (FinishReason.CANCELLED, "deadline")
    assert driver.reason("patient") is FinishReason.LENGTH


def test_start_deadline_ends_only_what_never_began():
    driver = SpeechDriver(max_num_seqs=1)
    driver.submit("running", start_by_s=105.0, max_tokens=9)
    driver.submit("waiting", start_by_s=105.0)
    driver.step()
    driver.step()
    driver.now_s = 106.0
    driver.run()
    assert driver.reason("running") is FinishReason.LENGTH
    assert (driver.reason("waiting"), driver.events["waiting"].error) == (FinishReason.CANCELLED, "queue")


def test_deadline_comes_before_the_start_deadline_that_passed_with_it():
    driver = SpeechDriver()
    driver.submit("r", start_by_s=102.0, deadline_s=101.0)
    driver.now_s = 106.0
    assert not driver.step()
    assert driver.events["r"].error == "deadline"


def test_old_deadline_does_not_end_a_new_request_of_the_same_id():
    driver = SpeechDriver()
    driver.submit("r", max_tokens=1, deadline_s=105.0)
    driver.run()
    driver.submit("r", max_tokens=1, deadline_s=500.0)
    driver.now_s = 106.0
    driver.run()
    assert driver.reason("r") is FinishReason.LENGTH


def test_encoding_that_fails_ends_those_who_need_its_windows():
    driver, shared, other = SpeechDriver(on_step=broken("encode")), make_window(), make_window()
    driver.submit("first", shared)
    driver.submit("second", shared)
    driver.submit("words", shared, task=SpeechTask.ALIGNMENT)
    driver.submit("other", other, max_tokens=1)
    driver.step()
    assert {request_id: event.error for request_id, event in driver.events.items()} == dict.fromkeys(
        ["first", "second", "words"], "no encode today"
    )
    driver.runner.on_step = None
    driver.run()
    assert driver.reason("other") is FinishReason.LENGTH


def test_alignment_that_fails_ends_itself_alone():
    driver, window = SpeechDriver(on_step=broken("align")), make_window()
    driver.submit("words", window, task=SpeechTask.ALIGNMENT)
    driver.submit("text", window, max_tokens=2)
    driver.run()
    assert (driver.reason("words"), driver.events["words"].error) == (FinishReason.ERROR, "no align today")
    assert driver.reason("text") is FinishReason.LENGTH


def test_pass_that_fails_ends_all_its_rows_and_nobody_else():
    driver, window = SpeechDriver(on_step=broken("pass"), max_num_seqs=2), make_window()
    for i in range(3):
        driver.submit(f"r{i}", window, max_tokens=3)
    driver.step()
    driver.step()
    assert set(driver.events) == {"r0", "r1"}
    assert driver.reason("r0") is driver.reason("r1") is FinishReason.ERROR
    driver.runner.on_step = None
    driver.run()
    assert driver.events["r2"].token_ids == complete(driver.requests["r2"])[0]


def test_row_that_fails_ends_alone():
    driver, window = SpeechDriver(), make_window()
    for i in range(3):
        driver.submit(f"r{i}", window, max_tokens=5)
    driver.step()
    driver.step()
    driver.runner.on_step = lambda batch: {1: "not finite"}
    driver.step()
    driver.runner.on_step = None
    driver.run()
    assert (driver.reason("r1"), driver.events["r1"].error) == (FinishReason.ERROR, "not finite")
    for request_id in ("r0", "r2"):
        assert driver.events[request_id].token_ids == complete(driver.requests[request_id])[0]


def test_end_token_ends_the_text_and_is_not_among_it_though_its_logprob_is():
    driver, window = SpeechDriver(), make_window(3)
    said = [1, 2]
    for _ in range(3):
        said.append(talk(window, said))
    end = said[-1]
    driver.submit("r", window, stop_token_ids=frozenset({end}), max_tokens=50)
    driver.run()
    event = driver.events["r"]
    assert (event.finish_reason, event.token_ids) == (FinishReason.STOP, said[2:-1])
    assert event.token_logprobs == [-float(token_id) for token_id in said[2:]]


def test_no_speech_prob_is_that_of_the_first_pass():
    driver = SpeechDriver()
    request = driver.submit("r", max_tokens=5)
    driver.run()
    assert driver.events["r"].no_speech_prob == no_speech_prob(request)


def test_text_ends_at_the_models_limit():
    driver = SpeechDriver()
    driver.submit("r", prompt_ids=[1] * 190, **NEVER)
    driver.run()
    event = driver.events["r"]
    assert (event.finish_reason, len(event.token_ids), event.is_loop) == (FinishReason.LENGTH, 10, False)


def test_loop_is_ended_early():
    driver = SpeechDriver(talk=lambda window, prefix: 5 + len(prefix) % 3)
    driver.submit("loops", max_tokens=190)
    driver.run()
    event = driver.events["loops"]
    assert (event.finish_reason, event.is_loop) == (FinishReason.LENGTH, True)
    assert 50 <= len(event.token_ids) <= 80


def test_languages_are_answered_by_one_pass_beside_text():
    driver = SpeechDriver()
    driver.submit("text", max_tokens=3)
    request = driver.submit("languages", task=SpeechTask.LANGUAGES, prompt_ids=[1])
    driver.run()
    event = driver.events["languages"]
    assert (event.finish_reason, event.token_ids) == (FinishReason.STOP, [])
    assert event.language_probs == language_probs(request)
    assert driver.events["text"].language_probs == {}


def test_alignment_is_of_its_window_and_tokens():
    driver = SpeechDriver()
    driver.submit("r", make_window(6), task=SpeechTask.ALIGNMENT, prompt_ids=[3, 4, 5])
    driver.run()
    event = driver.events["r"]
    assert event.alignment is not None
    assert np.array_equal(event.alignment.attention, np.full((1, 3, 1), 6))
    assert event.alignment.logprobs.tolist() == [4.0, 5.0]
    assert (event.finish_reason, event.token_ids) == (FinishReason.STOP, [])
    assert driver.kinds() == ["encode", "align"]
    assert [batch.num_tokens for batch in driver.batches] == [0, 3]


def test_start_is_the_time_of_the_first_step_that_works_for_the_request():
    driver = SpeechDriver(max_num_seqs=1)
    driver.submit("first", max_tokens=3)
    driver.submit("second", max_tokens=1)
    driver.submit("words", task=SpeechTask.ALIGNMENT)
    while driver.step():
        driver.now_s += 1.0
    assert driver.kinds() == ["encode", "align", "encode", "pass", "pass", "pass", "encode", "pass"]
    started = {request_id: event.started_s for request_id, event in driver.events.items()}
    assert started == {"words": 100.0, "first": 103.0, "second": 107.0}


def test_stats_count_what_waits_and_what_runs():
    driver = SpeechDriver(max_num_seqs=2)
    window = make_window()
    for i in range(3):
        driver.submit(f"r{i}", window, prompt_ids=[1] * 5, max_tokens=4)
    stats = driver.policy.stats()
    assert (stats.num_waiting, stats.num_running, stats.kv_usage) == (3, 0, 0.0)
    driver.step()
    driver.step()
    stats = driver.policy.stats()
    assert (stats.num_waiting, stats.num_running, stats.kv_usage) == (1, 2, 0.5)
    driver.run()
    stats = driver.policy.stats()
    assert (stats.num_waiting, stats.num_running, stats.kv_usage) == (0, 0, 0.0)
    assert (stats.prompt_tokens, stats.generated_tokens) == (15, 12)
    assert all(sequence.state is SequenceState.FINISHED for sequence in driver.sequences.values())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"prompt_ids": []}, InvalidRequest, "the prompt has no tokens"),
        ({"prompt_ids": [-1]}, InvalidRequest, "token ids must lie between 0 and 999"),
        ({"prompt_ids": [1000]}, InvalidRequest, "token ids must lie between 0 and 999"),
        ({"prompt_ids": [1] * 200}, ContextLengthExceeded, "the prompt has 200 tokens; the model accepts 199"),
        (
            {"prompt_ids": [1] * 201, "task": SpeechTask.ALIGNMENT},
            ContextLengthExceeded,
            "the prompt has 201 tokens; the model accepts 200",
        ),
    ],
)
def test_request_that_could_never_run_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        SpeechDriver().submit("r", **fields)


def test_longest_prompts_are_taken():
    driver = SpeechDriver()
    driver.submit("text", prompt_ids=[1] * 199, **NEVER)
    driver.submit("words", prompt_ids=[1] * 200, task=SpeechTask.ALIGNMENT)
    driver.run()
    assert len(driver.events["text"].token_ids) == 1


@pytest.mark.parametrize("name", ["max_num_seqs", "max_batch_windows"])
def test_options_that_ask_for_nothing_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name}: must be at least 1"):
        SpeechPolicy(LIMITS, SpeechOptions(**{name: 0}), end_id=5)
