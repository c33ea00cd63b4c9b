"""ModelStreamInfer: many requests and their answers over one call."""

import queue
from contextlib import contextmanager

import numpy as np
import pytest
import tritonclient.grpc.aio
from tests.conformance.triton import Caller, address, check_sums, inputs, pair, pending, run, texts
from tritonclient.utils import InferenceServerException

ANSWERS_WITHIN_S = 30


class Stream:
    """An open stream, and what came over it."""

    def __init__(self, caller):
        self.caller = caller
        self.answers: queue.Queue = queue.Queue()

    def ask(self, model, tensors, **options):
        self.caller.client.async_stream_infer(model, self.caller.inputs(tensors), **options)

    def next(self):
        result, error = self.answers.get(timeout=ANSWERS_WITHIN_S)
        assert error is None, error
        return result

    def next_error(self):
        result, error = self.answers.get(timeout=ANSWERS_WITHIN_S)
        assert result is None
        return error


@contextmanager
def stream(caller, **options):
    opened = Stream(caller)
    caller.client.start_stream(lambda result, error: opened.answers.put((result, error)), **options)
    try:
        yield opened
    finally:
        caller.client.stop_stream(cancel_requests=True)


def is_final(result):
    return result.get_response().parameters["triton_final_response"].bool_param


def text_of(result):
    return b"".join(result.as_numpy("text_output").ravel().tolist()).decode()


def prompt(text, *, stream):
    return {"text_input": texts([text]), "stream": np.array([stream])}


def completion(caller, **parameters):
    body = {"model": "tiny", "prompt": "the cat", "temperature": 0, "ignore_eos": True, **parameters}
    status, answer = caller.server.request("POST", "/v1/completions", body)
    assert status == 200
    return answer["choices"][0]["text"]


def test_answers_come_in_the_order_of_the_requests(grpc):
    batches = [pair(index) for index in range(50)]
    with stream(grpc) as opened:
        for index, tensors in enumerate(batches):
            opened.ask("simple", tensors, request_id=str(index))
        for index, tensors in enumerate(batches):
            result = opened.next()
            assert result.get_response().id == str(index)
            check_sums(result, tensors)


def test_every_answer_of_an_ordinary_model_is_final(grpc):
    with stream(grpc) as opened:
        opened.ask("simple", pair())
        assert is_final(opened.next())


def test_models_share_a_stream(grpc):
    with stream(grpc) as opened:
        opened.ask("simple", pair(), request_id="first")
        opened.ask("simple_identity", {"INPUT0": texts(["a", "b"], 1, 2)}, request_id="second")
        check_sums(opened.next(), pair())
        assert opened.next().as_numpy("OUTPUT0").tolist() == [[b"a", b"b"]]


def test_an_error_is_an_answer_and_the_stream_goes_on(grpc):
    with stream(grpc) as opened:
        opened.ask("no_such", pair(), request_id="bad")
        opened.ask("simple", pair(), request_id="good")
        assert "Request for unknown model: 'no_such' is not found" in opened.next_error().message()
        assert opened.next().get_response().id == "good"


def test_an_error_does_not_overtake_the_answers_before_it(grpc):
    with stream(grpc) as opened:
        for index in range(10):
            opened.ask("simple", pair(index), request_id=str(index))
        opened.ask("simple", {"INPUT0": pair()["INPUT0"]}, request_id="incomplete")
        for index in range(10):
            assert opened.next().get_response().id == str(index)
        assert "[request id: incomplete] expected 2 inputs but got 1 inputs" in opened.next_error().message()


def test_an_error_ends_the_stream_of_a_caller_who_asked_for_it(grpc):
    with stream(grpc, headers={"triton_grpc_error": "true"}) as opened:
        opened.ask("no_such", pair())
        error = opened.next_error()
        assert error.status() == "StatusCode.NOT_FOUND"
        with pytest.raises(InferenceServerException):
            opened.ask("simple", pair())


def test_a_stream_may_be_closed_and_opened_again(grpc):
    for _ in range(2):
        with stream(grpc) as opened:
            opened.ask("simple", pair())
            check_sums(opened.next(), pair())


def test_requests_in_flight_are_answered_after_the_half_close(grpc):
    opened = Stream(grpc)
    grpc.client.start_stream(lambda result, error: opened.answers.put((result, error)))
    for index in range(20):
        opened.ask("simple", pair(index))
    grpc.client.stop_stream()
    for index in range(20):
        check_sums(opened.next(), pair(index))
    assert opened.answers.empty()


def test_a_stream_may_be_compressed(grpc):
    with stream(grpc, compression_algorithm="gzip") as opened:
        opened.ask("simple", pair())
        check_sums(opened.next(), pair())


@pytest.mark.usefixtures("idle_slow")
def test_a_streams_time_limit_ends_it(triton, long_run):
    with Caller("grpc", triton) as caller:
        with stream(caller, stream_timeout=0.2) as opened:
            opened.ask("slow", long_run)
            assert opened.next_error().status() == "StatusCode.DEADLINE_EXCEEDED"
        triton.wait_for(lambda: pending(triton, "slow") == 0)


@pytest.mark.usefixtures("idle_slow")
def test_a_cancelled_stream_cancels_its_requests(triton, long_run):
    with Caller("grpc", triton) as caller:
        with stream(caller) as opened:
            opened.ask("slow", long_run)
            triton.wait_for(lambda: pending(triton, "slow") == 1)
        triton.wait_for(lambda: pending(triton, "slow") == 0)
        assert opened.next_error().status() in {"StatusCode.CANCELLED", "499"}


def test_a_language_model_streams_its_text(grpc):
    with stream(grpc) as opened:
        options = {"max_tokens": 500, "temperature": 0, "ignore_eos": True}
        opened.ask("tiny", prompt("the cat", stream=True), request_id="story", parameters=options)
        pieces = [opened.next()]
        while not is_final(pieces[-1]):
            pieces.append(opened.next())
    assert len(pieces) > 1
    assert {piece.get_response().id for piece in pieces} == {"story"}
    assert "".join(map(text_of, pieces)) == completion(grpc, max_tokens=500)


def test_a_language_model_answers_once_without_stream(grpc):
    with stream(grpc) as opened:
        options = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
        opened.ask("tiny", prompt("the cat", stream=False), parameters=options)
        result = opened.next()
    assert is_final(result)
    assert text_of(result) == completion(grpc, max_tokens=12)


def test_many_texts_stream_at_once_over_one_stream(grpc):
    options = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    got, ended = {}, set()
    with stream(grpc) as opened:
        for index in range(6):
            opened.ask("tiny", prompt("the cat" * index, stream=True), request_id=str(index), parameters=options)
        while len(ended) < 6:
            piece = opened.next()
            number = piece.get_response().id
            assert number not in ended
            got[number] = got.get(number, "") + text_of(piece)
            if is_final(piece):
                ended.add(number)
    assert got["1"] == completion(grpc, max_tokens=8)


def test_an_empty_final_answer_comes_to_those_who_want_it(grpc):
    """Exactly one answer says that it is final: the last piece of text, or one without outputs after it."""
    options = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    with stream(grpc) as opened:
        opened.ask(
            "tiny", prompt("the cat", stream=True), request_id="x", enable_empty_final_response=True, parameters=options
        )
        opened.ask("simple", pair(), request_id="next")
        finals = 0
        seen_next = False
        while not (finals and seen_next):
            result = opened.next()
            response = result.get_response()
            if response.id == "next":
                seen_next = True
                continue
            assert (response.model_name, response.model_version) == ("tiny", "1")
            finals += is_final(result)
    assert finals == 1


def test_errors_of_a_streaming_model_come_through_the_stream(grpc):
    with stream(grpc) as opened:
        opened.ask("tiny", prompt("x", stream=True), request_id="t", parameters={"temperature": -1})
        error = opened.next_error()
        assert "temperature" in error.message()
        opened.ask("simple", pair())
        check_sums(opened.next(), pair())


def test_a_reader_who_leaves_a_text_ends_it(triton):
    with Caller("grpc", triton) as caller:
        with stream(caller) as opened:
            options = {"max_tokens": 2000, "ignore_eos": True}
            opened.ask("tiny", prompt("the cat", stream=True), parameters=options)
            opened.next()
        triton.wait_for(triton.is_idle)
        triton.wait_for(lambda: pending(triton, "tiny") == 0)


def test_streams_work_with_asyncio(triton):
    api = tritonclient.grpc.aio
    batches = [pair(index) for index in range(10)]

    async def requests():
        for index, tensors in enumerate(batches):
            yield {"model_name": "simple", "inputs": inputs(api, tensors), "request_id": str(index)}
        yield {"model_name": "no_such", "inputs": inputs(api, pair()), "request_id": "bad"}

    async def read():
        async with api.InferenceServerClient(address(triton, "grpc")) as client:
            return [answer async for answer in client.stream_infer(requests())]

    *answers, (nothing, error) = run(read())
    for (result, no_error), tensors in zip(answers, batches, strict=True):
        assert no_error is None
        check_sums(result, tensors)
    assert nothing is None
    assert "no_such" in error.message()
