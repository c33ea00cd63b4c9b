import asyncio
import queue

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from tests.api.kserve.grpc_live import WAIT_S, FakeService, Live, integers, numbers, serving
from tests.api.live import eventually
from tritonclient.grpc import service_pb2 as pb

from sardonyx.api.kserve.grpc_lingering import Lingering
from sardonyx.api.kserve.grpc_stream import MAX_IN_FLIGHT, InferStream


@pytest.fixture
def live():
    with serving() as live:
        yield live


class Requests:
    """The caller's side of a stream: an iterator that other threads feed."""

    def __init__(self, *first):
        self._queue = queue.SimpleQueue()
        for each in first:
            self._queue.put(each)

    def put(self, request):
        self._queue.put(request)

    def half_close(self):
        self._queue.put(None)

    def __iter__(self):
        return self

    def __next__(self):
        request = self._queue.get()
        if request is None:
            raise StopIteration
        return request


def is_final(answer):
    return answer.infer_response.parameters["triton_final_response"].bool_param


def summary(answer):
    """Id, values and finality; the message of a refusal."""
    response = answer.infer_response
    return response.id, answer.error_message or numbers(response), is_final(answer)


def test_every_request_is_answered_in_order_and_the_half_close_ends_it(live: Live):
    with live.stub() as stub:
        call = stub.ModelStreamInfer(iter([integers(number, id=str(number)) for number in range(300)]))
        assert [summary(each) for each in call] == [(str(number), [number], True) for number in range(300)]
        assert call.code() is grpc.StatusCode.OK


def test_requests_of_a_stream_run_at_once_and_answers_keep_their_order(live: Live):
    requests = Requests(integers(1, id="a", wait=True), integers(2, id="b"), integers(3, id="c", wait=True))
    with live.stub() as stub:
        call = stub.ModelStreamInfer(requests, timeout=WAIT_S)
        eventually(lambda: live.service.num_waiting == 2 and len(live.service.requests) == 3)
        live.open_gate()
        requests.half_close()
        assert [summary(each)[0] for each in call] == ["a", "b", "c"]


def test_answers_of_decoupled_models_overtake(live: Live):
    requests = Requests(integers(1, id="slow", wait=True), integers(7, 8, model="repeat", id="many"))
    with live.stub() as stub:
        call = stub.ModelStreamInfer(requests, timeout=WAIT_S)
        assert [summary(next(call)) for _ in range(2)] == [("many", [7], False), ("many", [8], False)]
        live.open_gate()
        requests.half_close()
        assert [summary(each) for each in call] == [("slow", [1], True)]


def test_decoupled_requests_interleave(live: Live):
    requests = Requests(integers(1, model="repeat", id="slow", wait=True), integers(2, model="repeat", id="quick"))
    with live.stub() as stub:
        call = stub.ModelStreamInfer(requests, timeout=WAIT_S)
        assert summary(next(call)) == ("quick", [2], False)
        live.open_gate()
        assert summary(next(call)) == ("slow", [1], False)
        call.cancel()


def test_an_empty_final_answer_is_sent_to_those_who_want_it(live: Live):
    request = integers(5, model="repeat", id="x", triton_enable_empty_final_response=True)
    with live.stub() as stub:
        first, last = stub.ModelStreamInfer(iter([request]))
    assert summary(first) == ("x", [5], False)
    assert is_final(last)
    assert not last.infer_response.outputs
    assert (last.infer_response.id, last.infer_response.model_name, last.infer_response.model_version) == (
        "x",
        "repeat",
        "3",
    )


def test_a_refusal_is_an_answer_in_its_turn_and_the_stream_goes_on(live: Live):
    wrong = integers(1, id="b")
    wrong.inputs[0].shape[0] = 9
    unknown = integers(1, model="none", id="c")
    unknown.model_version = "2"
    requests = Requests(integers(1, id="a", wait=True), wrong, unknown, integers(4, id="d"))
    with live.stub() as stub:
        call = stub.ModelStreamInfer(requests, timeout=WAIT_S)
        eventually(lambda: len(live.service.requests) == 2)
        live.open_gate()
        requests.half_close()
        first, second, third, last = call
    assert summary(first) == ("a", [1], True)
    assert second.error_message.startswith("[request id: b] ")
    assert third.error_message == "Request for unknown model: 'none' is not found"
    response = third.infer_response
    assert (response.id, response.model_name, response.model_version) == ("c", "none", "2")
    assert is_final(third)
    assert summary(last) == ("d", [4], True)


def test_a_decoupled_request_may_be_refused(live: Live):
    live.service.overload()
    with live.stub() as stub:
        (answer,) = stub.ModelStreamInfer(iter([integers(1, model="repeat", id="x")]))
    assert summary(answer) == ("x", "[request id: x] Exceeds maximum queue size", True)


def test_what_was_not_foreseen_is_logged_and_not_told(live: Live, caplog):
    live.service.error = RuntimeError("secret")
    with live.stub() as stub:
        (answer,) = stub.ModelStreamInfer(iter([integers(1)]))
    assert answer.error_message == "internal error"
    assert "secret" in caplog.text


def test_refusals_end_the_stream_for_those_who_ask_for_it(live: Live):
    requests = Requests(integers(1, id="a", wait=True), integers(2, model="repeat", id="b", wait=True))
    with live.stub() as stub:
        call = stub.ModelStreamInfer(requests, metadata=(("triton_grpc_error", "true"),), timeout=WAIT_S)
        eventually(lambda: live.service.num_waiting == 2)
        live.loop.call_soon_threadsafe(live.service.overload)
        requests.put(integers(3, model="repeat", id="c"))
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert raised.value.details() == "[request id: c] Exceeds maximum queue size"
    eventually(lambda: live.service.num_cancelled == 2)


class BlockedContext:
    """Of a stream of `requests` whose caller asks for statuses; its first write waits for `gate`."""

    def __init__(self, requests):
        self.requests = [each.SerializeToString() for each in requests]
        self.all_read = asyncio.Event()
        self.gate = asyncio.Event()
        self.written = []
        self.code = None

    def invocation_metadata(self):
        return (("triton_grpc_error", "true"),)

    async def read(self):
        if self.requests:
            return self.requests.pop(0)
        self.all_read.set()
        return grpc.aio.EOF

    async def write(self, data):
        self.written.append(pb.ModelStreamInferResponse.FromString(data))
        await self.gate.wait()

    async def abort(self, code, details, trailers):
        self.code = code
        raise grpc.aio.AbortError


def test_nothing_is_written_once_a_status_is_due():
    async def main():
        requests = [integers(1, model="repeat", id="a"), integers(2, model="none"), integers(3, model="repeat")]
        context = BlockedContext(requests)
        stream = asyncio.ensure_future(InferStream(FakeService(), context, Lingering(), 1 << 20).run())
        await context.all_read.wait()
        context.gate.set()
        with pytest.raises(grpc.aio.AbortError):
            await stream
        return context

    context = asyncio.run(main())
    assert [summary(each) for each in context.written] == [("a", [1], False)]
    assert context.code is grpc.StatusCode.NOT_FOUND


def test_without_that_wish_the_header_means_nothing(live: Live):
    with live.stub() as stub:
        call = stub.ModelStreamInfer(iter([integers(1, model="none")]), metadata=(("triton_grpc_error", "false"),))
        assert len(list(call)) == 1


def test_bytes_that_are_no_message_end_the_stream(live: Live):
    with grpc.insecure_channel(live.address) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter([b"\xff"]))
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_half_close_waits_for_what_runs(live: Live):
    with live.stub() as stub:
        call = stub.ModelStreamInfer(iter([integers(number, wait=True) for number in range(5)]), timeout=WAIT_S)
        eventually(lambda: live.service.num_waiting == 5)
        live.open_gate()
        assert [numbers(each.infer_response) for each in call] == [[0], [1], [2], [3], [4]]


def test_a_caller_who_cancels_cancels_everything(live: Live):
    requests = Requests(integers(1, wait=True), integers(2, wait=True), integers(3, model="repeat", wait=True))
    with live.stub() as stub:
        call = stub.ModelStreamInfer(requests)
        eventually(lambda: live.service.num_waiting == 3)
        call.cancel()
        eventually(lambda: live.service.num_cancelled == 3)
        requests.half_close()


def test_a_deadline_cancels_everything(live: Live):
    requests = Requests(integers(1, wait=True))
    with live.stub() as stub, pytest.raises(grpc.RpcError) as raised:
        list(stub.ModelStreamInfer(requests, timeout=0.2))
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: live.service.num_cancelled == 1)
    requests.half_close()


def test_a_stream_has_only_so_many_requests_in_flight(live: Live):
    pulled = []

    def endless():
        for number in range(10 * MAX_IN_FLIGHT):
            pulled.append(number)
            yield integers(number, wait=True)

    with live.stub() as stub:
        call = stub.ModelStreamInfer(endless(), timeout=WAIT_S)
        eventually(lambda: live.service.num_waiting == MAX_IN_FLIGHT and len(pulled) > MAX_IN_FLIGHT)
        assert len(live.service.requests) == MAX_IN_FLIGHT
        live.open_gate()
        assert sum(1 for _ in call) == 10 * MAX_IN_FLIGHT
        assert len(live.service.requests) == 10 * MAX_IN_FLIGHT


def test_a_caller_who_does_not_read_holds_up_the_model_and_not_our_memory(live: Live):
    request = integers(*range(1 << 20), model="repeat")
    with live.stub() as stub:
        call = stub.ModelStreamInfer(iter([request]), timeout=WAIT_S)
        next(call)
        # A model whose answers were queued would have made all of them before anyone else got a word in.
        for _ in range(50):
            stub.ServerLive(pb.ServerLiveRequest())
        assert live.service.num_repeated < 1 << 17
        call.cancel()
        eventually(lambda: live.service.num_cancelled == 1)


def test_an_answer_over_the_limit_is_refused():
    with serving(grpc_max_message_bytes=4096) as live, live.stub() as stub:
        request = integers(*range(600), model="add_sub")
        request.inputs.add(name="B", datatype="INT32", shape=[1])
        request.raw_input_contents.append(bytes(4))
        first, second = stub.ModelStreamInfer(iter([request, integers(1)]))
    assert first.error_message == "the answer is larger than 4,096 bytes"
    assert summary(second) == ("", [1], True)


@pytest.mark.parametrize("strings", [1, 100_000])
def test_strings_come_back_however_many(live: Live, strings):
    request = pb.ModelInferRequest(model_name="identity")
    request.inputs.add(name="IN", datatype="BYTES", shape=[strings])
    request.raw_input_contents.append(b"\2\0\0\0hi" * strings)
    with live.stub() as stub:
        first, second = stub.ModelStreamInfer(iter([request, integers(1)]))
    assert first.infer_response.raw_output_contents[0] == request.raw_input_contents[0]
    assert summary(second) == ("", [1], True)


def test_tritons_client_streams(live: Live):
    answers = queue.SimpleQueue()
    tensor = tritonclient.grpc.InferInput("IN", [3], "INT32")
    tensor.set_data_from_numpy(np.array([4, 5, 6], np.int32))
    with live.client() as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("repeat", [tensor], request_id="r", enable_empty_final_response=True)
        got = [answers.get(timeout=WAIT_S) for _ in range(4)]
        client.async_stream_infer("none", [tensor])
        _, error = answers.get(timeout=WAIT_S)
        client.stop_stream()
    assert [result.as_numpy("OUT").tolist() for result, _ in got[:3]] == [[4], [5], [6]]
    assert got[3][0].get_response().parameters["triton_final_response"].bool_param
    assert "unknown model" in str(error)


def test_tritons_asynchronous_client_streams(live: Live):
    async def requests():
        tensor = tritonclient.grpc.InferInput("IN", [1], "INT32")
        for number in range(3):
            tensor.set_data_from_numpy(np.array([number], np.int32))
            yield {"model_name": "identity", "inputs": [tensor]}

    async def main():
        async with tritonclient.grpc.aio.InferenceServerClient(live.address) as client:
            return [(result.as_numpy("OUT").tolist(), error) async for result, error in client.stream_infer(requests())]

    assert live.run(main()) == [([0], None), ([1], None), ([2], None)]
