"""What the device is given for a step, and in which order."""

import logging

import numpy as np
import pytest
from tests.reference_device import ReferenceDevice, bytes_at, tensor_at
from tests.runners.test_paged_decoder import (
    BLOCK_SIZE,
    GREEDY,
    SIZES,
    make_limits,
    make_requests,
    make_sequence,
    open_runner,
    run,
    tokens_of,
)
from tests.tiny_paged import make_paged_model

from sardonyx.core import Batch, BatchRow, Request, Sequence
from sardonyx.errors import EngineError
from sardonyx.runtime.device import EAGER, DeviceTensor


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_paged_model(tmp_path_factory.mktemp("paged"), SIZES)


def calls_of(runner):
    return runner._graphs.device.calls


def decodes(lengths, first_block=1):
    """Sequences that decode behind so many tokens, each with blocks of its own."""
    sequences = []
    for index, length in enumerate(lengths):
        prompt = [1 + (index + place) % 60 for place in range(length)]
        num_blocks = -(-length // BLOCK_SIZE)
        blocks = list(range(first_block, first_block + num_blocks))
        first_block += num_blocks
        sequences.append(
            Sequence(
                Request(id=str(index), prompt_ids=prompt, sampling=GREEDY),
                seed=0,
                arrival_s=0.0,
                token_ids=prompt,
                num_computed_tokens=length - 1,
                slot=index,
                blocks=blocks,
            )
        )
    return sequences


def decode_batch(lengths):
    return Batch([BatchRow(sequence, 1) for sequence in decodes(lengths)])


def test_a_step_is_written_run_and_read_back_in_one_copy_each(paths):
    runner = open_runner(paths)
    calls_of(runner).clear()
    runner.execute(decode_batch([5, 20]))
    assert [(call.what, call.graph) for call in calls_of(runner)] == [
        ("write", ""),
        ("run", "feed"),
        ("run", "decoder"),
        ("run", "sampler"),
        ("read", ""),
        ("mark", ""),
        ("wait", ""),
    ]


def test_the_next_step_is_launched_before_the_last_is_waited_for(paths):
    runner = open_runner(paths)
    calls_of(runner).clear()
    run(runner, make_requests(3, max_tokens=12))
    marks = [(call.what, call.mark) for call in calls_of(runner) if call.what in ("mark", "wait")]
    num_ahead = sum(
        ("mark", number + 1) in marks[: marks.index(("wait", number))] for what, number in marks if what == "wait"
    )
    assert num_ahead > 8
    # Steps are waited for in the order of their launch, and two are out at most.
    waited = [number for what, number in marks if what == "wait"]
    assert waited == sorted(waited)
    out = 0
    for what, _ in marks:
        out += 1 if what == "mark" else -1
        assert 0 <= out <= 2


def test_no_host_memory_is_used_again_while_a_step_that_uses_it_is_out(paths):
    runner = open_runner(paths, max_graphs=100)
    calls_of(runner).clear()
    run(runner, make_requests(3, max_tokens=12))
    out: dict[int, set[int]] = {}
    used: set[int] = set()
    for call in calls_of(runner):
        if call.what in ("write", "read"):
            assert not any(call.host_address in addresses for addresses in out.values())
            used.add(call.host_address)
        elif call.what == "mark":
            out[call.mark], used = used, set()
        elif call.what == "wait":
            del out[call.mark]


def test_buckets_have_graphs_of_their_own_and_other_steps_none(paths):
    runner = open_runner(paths, max_graphs=100)
    captures = [(call.graph, call.graph_id) for call in calls_of(runner) if call.what == "capture"]
    # 6 sequences of 6 blocks: rows 1, 2, 4 and 8, and 8 columns.
    assert sorted(captures) == [(graph, number) for graph in ("decoder", "feed", "sampler") for number in (1, 2, 3, 4)]
    ids = []
    for lengths in ([3], [3, 40], [3, 4, 5], [3, 4, 5, 90], [3, 4, 5, 6, 7]):
        calls_of(runner).clear()
        runner.execute(decode_batch(lengths))
        ids.append({call.graph: call.graph_id for call in calls_of(runner) if call.what == "run"})
    assert ids == [{"feed": number, "decoder": number, "sampler": number} for number in (1, 2, 3, 3, 4)]
    calls_of(runner).clear()
    runner.execute(Batch([BatchRow(make_sequence([1, 2, 3], [1]), 3)]))
    assert {call.graph_id for call in calls_of(runner) if call.what == "run"} == {EAGER}


def test_rows_that_fill_a_bucket_write_to_block_0_and_see_one_token(paths):
    runner = open_runner(paths, max_graphs=100)
    before = {name: tensor_bytes(tensor) for name, tensor in runner._pass._memory.cache.items()}
    calls_of(runner).clear()
    runner.execute(decode_batch([5, 20, 33]))
    (call,) = [call for call in calls_of(runner) if call.what == "run" and call.graph == "decoder"]
    inputs = {name: read(each) for name, each in call.inputs.items() if not name.startswith("past_key")}
    assert inputs["block_table"].tolist() == [
        [1, *[-1] * 7],
        [2, 3, *[-1] * 6],
        [4, 5, 6, *[-1] * 5],
        [0, *[-1] * 7],
    ]
    assert inputs["past_seqlens"].tolist() == [4, 19, 32, 0]
    assert inputs["cumulative_sequence_length"].tolist() == [0, 1, 2, 3, 4]
    assert inputs["slot_mapping"].tolist() == [1 * 16 + 4, 3 * 16 + 3, 6 * 16 + 0, 0]
    assert inputs["attention_metadata"].tolist() == [1, 8 * BLOCK_SIZE, 1]
    written = {1, 3, 6, 0}
    for name, tensor in runner._pass._memory.cache.items():
        changed = (tensor_bytes(tensor) != before[name]).reshape(40, -1).any(axis=1)
        assert set(np.flatnonzero(changed)) <= written


def test_bounds_of_a_step_that_is_not_captured_are_its_own(paths):
    runner = open_runner(paths)
    calls_of(runner).clear()
    runner.execute(decode_batch([5, 20, 33]))
    (call,) = [call for call in calls_of(runner) if call.graph == "decoder"]
    assert call.inputs["attention_metadata"].tolist() == [1, 33, 33]
    assert read(call.inputs["block_table"]).shape == (3, 3)


def test_fewer_graphs_than_buckets_leave_the_others_uncaptured(paths):
    runner = open_runner(paths, max_graphs=2)
    calls_of(runner).clear()
    runner.execute(decode_batch([3, 4]))
    runner.execute(decode_batch([3, 4, 5]))
    assert [call.graph_id for call in calls_of(runner) if call.graph == "decoder"] == [2, EAGER]


def test_a_bucket_that_cannot_be_captured_runs_as_any_step(paths, caplog):
    device = ReferenceDevice()

    def refuse(graph, graph_id):
        if (graph, graph_id) == ("decoder", 2):
            raise EngineError("memory was taken meanwhile")

    device.on_capture = refuse
    with caplog.at_level(logging.INFO):
        runner = open_runner(paths, device=device, max_graphs=100)
    assert "steps of 2 rows and 8 columns cannot be captured: memory was taken meanwhile" in caplog.text
    assert "1 of 4 shapes of steps captured" in caplog.text
    expected = run(open_runner(paths), make_requests(3))[0]
    found = run(runner, make_requests(3))[0]
    assert {each: tokens_of(events) for each, events in found.items()} == {
        each: tokens_of(events) for each, events in expected.items()
    }


def test_a_launch_that_is_not_taken_waits_before_its_memory_is_used_again(paths):
    runner = open_runner(paths)
    device = runner._graphs.device
    binding = runner._pass._eager.decoder
    run_decoder, fails = type(binding).run, [True]

    def fail_once(self, graph_id=EAGER):
        if self is binding and fails and fails.pop():
            raise EngineError("not taken")
        run_decoder(self, graph_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(binding), "run", fail_once)
        calls_of(runner).clear()
        with pytest.raises(EngineError, match="not taken"):
            runner.launch(decode_batch([5]))
    assert [call.what for call in calls_of(runner)][-2:] == ["mark", "wait"]
    assert not device._queue
    assert runner.execute(decode_batch([5])).token_ids[0] is not None


def test_closing_gives_everything_back_and_nothing_runs_afterwards(paths):
    runner = open_runner(paths, max_graphs=100)
    graphs = runner._graphs
    runner.execute(decode_batch([5]))
    runner.close()
    runner.close()
    assert not graphs.device.allocated
    assert graphs.device.is_closed
    assert graphs.decoder.is_closed
    with pytest.raises(EngineError, match="model tiny is unloaded"):
        runner.launch(decode_batch([5]))


def test_buckets_are_wide_enough_for_the_longest_sequence_and_bounded_from_below(paths):
    limits = make_limits()
    runner = open_runner(paths, limits=limits, max_graphs=100)
    buckets = runner._pass._buckets
    assert buckets.find(1, 1) == (1, 8)
    assert buckets.find(5, 6) == (8, 8)
    assert buckets.find(5, 9) is None


def read(tensor):
    if not isinstance(tensor, DeviceTensor):
        return tensor
    return tensor_at(tensor).copy()


def tensor_bytes(tensor):
    return bytes_at(tensor.address, tensor.num_bytes).copy()
