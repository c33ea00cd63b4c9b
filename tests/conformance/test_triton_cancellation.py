"""Callers who leave, run out of time or come too many: what they held is free again.

A run that has begun goes on to its end, as with Triton; its caller and the queue need not wait for it.
"""

import asyncio
import queue
from contextlib import contextmanager

import msgspec
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from tests.api.live import post_head
from tests.conformance.triton import NOT_READY, Caller, address, check_sums, inputs, nv, pair, pending, run, texts

pytestmark = pytest.mark.usefixtures("idle_slow")


@pytest.fixture(scope="module")
def body(long_run):
    """The same over HTTP, as bytes."""
    data = long_run["INPUT"].ravel().tolist()
    return msgspec.json.encode({"inputs": [{"name": "INPUT", "datatype": "INT64", "shape": [1, 1], "data": data}]})


def start(caller, answers, tensors):
    """A call whose end comes into the queue."""
    return caller.client.async_infer("slow", caller.inputs(tensors), lambda result, error: answers.put((result, error)))


def wait_for_pending(triton, count):
    triton.wait_for(lambda: pending(triton, "slow") == count)


@contextmanager
def cancelled(triton, count=1, model="slow"):
    """So many requests are ended for their callers inside of the block, and all others are answered."""
    before = nv(triton, "nv_inference_request_failure", model, reason="CANCELED")
    yield
    triton.wait_for(lambda: pending(triton, model) == 0)
    assert nv(triton, "nv_inference_request_failure", model, reason="CANCELED") - before == count


def test_a_cancelled_call_is_over(triton, grpc, long_run):
    answers: queue.Queue = queue.Queue()
    with cancelled(triton):
        call = start(grpc, answers, long_run)
        wait_for_pending(triton, 1)
        call.cancel()
        _, error = answers.get(timeout=30)
    assert error.status() == "StatusCode.CANCELLED"


def test_a_cancelled_call_that_waits_leaves_the_queue_at_once(triton, grpc, long_run):
    answers: queue.Queue = queue.Queue()
    with cancelled(triton):
        start(grpc, answers, long_run)
        wait_for_pending(triton, 1)
        waiting = start(grpc, queue.Queue(), long_run)
        wait_for_pending(triton, 2)
        waiting.cancel()
        wait_for_pending(triton, 1)
        assert answers.empty()
        _, error = answers.get(timeout=60)
    assert error is None


def test_a_call_out_of_time_is_over(triton, grpc, long_run):
    with cancelled(triton):
        assert grpc.refusal("slow", long_run, client_timeout=0.2).status == "DEADLINE_EXCEEDED"


def test_a_cancelled_task_ends_its_call(triton, long_run):
    api = tritonclient.grpc.aio

    async def leave():
        async with api.InferenceServerClient(address(triton, "grpc")) as client:
            task = asyncio.create_task(client.infer("slow", inputs(api, long_run)))
            await asyncio.to_thread(wait_for_pending, triton, 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    with cancelled(triton):
        run(leave())


def test_a_lost_connection_ends_its_request(triton, body):
    with cancelled(triton), triton.connect() as connection:
        connection.sendall(post_head("/v2/models/slow/infer", body))
        wait_for_pending(triton, 1)


def test_a_lost_connection_frees_the_queue(triton, grpc, long_run, body):
    """The queue holds one: the second can only wait because the first is gone."""
    answers: queue.Queue = queue.Queue()
    with cancelled(triton, 2):
        start(grpc, answers, long_run)
        wait_for_pending(triton, 1)
        for _ in range(2):
            with triton.connect() as connection:
                connection.sendall(post_head("/v2/models/slow/infer", body))
                wait_for_pending(triton, 2)
            wait_for_pending(triton, 1)
        assert answers.empty()


def test_a_closed_channel_ends_its_calls(triton, long_run):
    with cancelled(triton), Caller("grpc", triton) as caller:
        start(caller, queue.Queue(), long_run)
        wait_for_pending(triton, 1)


def test_a_full_queue_refuses_at_once_over_both_protocols(triton, http, grpc, long_run):
    """One runs, one waits, and the queue holds no more."""
    answers: queue.Queue = queue.Queue()
    before = nv(triton, "nv_inference_request_failure", "slow", reason="REJECTED")
    with cancelled(triton, 2):
        calls = []
        for count in (1, 2):
            calls.append(start(grpc, answers, long_run))
            wait_for_pending(triton, count)
        for caller in (http, grpc):
            refusal = caller.refusal("slow", long_run)
            assert refusal.status in NOT_READY
            assert "Exceeds maximum queue size" in refusal.message
        for call in calls:
            call.cancel()
    assert nv(triton, "nv_inference_request_failure", "slow", reason="REJECTED") - before == 2


def test_the_other_models_do_not_notice(triton, grpc, long_run):
    answers: queue.Queue = queue.Queue()
    with cancelled(triton):
        call = start(grpc, answers, long_run)
        wait_for_pending(triton, 1)
        check_sums(grpc.infer("simple", pair()), pair())
        assert answers.empty()
        call.cancel()


def test_a_cancelled_text_frees_its_slot(triton, grpc):
    with cancelled(triton, model="tiny"):
        call = grpc.client.async_infer(
            "tiny",
            grpc.inputs({"text_input": texts(["the cat"])}),
            lambda result, error: None,
            parameters={"max_tokens": 2000, "ignore_eos": True},
        )
        triton.wait_for(lambda: pending(triton, "tiny"))
        call.cancel()
        triton.wait_for(triton.is_idle)
