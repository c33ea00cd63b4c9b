"""Inference as the example programs of Triton's clients do it: synchronous, with callbacks, with asyncio."""

import asyncio
import queue

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tests.conformance.triton import INVALID, Caller, address, check_sums, inputs, pair, post, run, texts
from tritonclient.utils import InferenceServerException


def test_sum_and_difference_come_back(caller):
    tensors = pair()
    result = caller.infer("simple", tensors, outputs=caller.outputs("OUTPUT0", "OUTPUT1"))
    check_sums(result, tensors)


def test_every_output_comes_back_where_none_is_named(caller):
    tensors = pair(5)
    check_sums(caller.infer("simple", tensors), tensors)


def test_an_output_that_is_not_named_stays_out(caller):
    result = caller.infer("simple", pair(), outputs=caller.outputs("OUTPUT1"))
    assert result.as_numpy("OUTPUT0") is None
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), np.arange(16)[None] - 1)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_every_row_of_a_batch_is_computed(caller, rows):
    tensors = pair(-7, rows=rows)
    check_sums(caller.infer("simple", tensors), tensors)


@pytest.mark.parametrize("is_binary_in", [False, True])
@pytest.mark.parametrize("is_binary_out", [False, True])
def test_tensors_travel_as_json_or_as_bytes_in_either_direction(http, is_binary_in, is_binary_out):
    tensors = pair(3)
    result = http.client.infer(
        "simple",
        http.inputs(tensors, binary_data=is_binary_in),
        outputs=http.outputs("OUTPUT0", "OUTPUT1", binary_data=is_binary_out),
    )
    check_sums(result, tensors)
    assert ("data" in result.get_output("OUTPUT0")) is not is_binary_out


def test_one_input_may_be_json_and_the_other_bytes(http):
    tensors = pair()
    first = http.inputs({"INPUT0": tensors["INPUT0"]}, binary_data=False)
    second = http.inputs({"INPUT1": tensors["INPUT1"]}, binary_data=True)
    outputs = http.outputs("OUTPUT0", binary_data=True) + http.outputs("OUTPUT1", binary_data=False)
    check_sums(http.client.infer("simple", first + second, outputs=outputs), tensors)


def test_the_callers_own_id_comes_back(caller):
    answer = caller.infer("simple", pair(), request_id="mine").get_response()
    assert (answer["id"] if caller.protocol == "http" else answer.id) == "mine"


def test_an_answer_without_an_id_has_none(http):
    assert "id" not in http.infer("simple", pair()).get_response()


def test_a_version_may_be_named(caller):
    tensors = pair()
    result = caller.infer("simple", tensors, model_version="1")
    check_sums(result, tensors)


def test_headers_and_query_parameters_do_no_harm(http):
    tensors = pair()
    more = {"headers": {"X-Test": "yes"}, "query_params": {"test_1": 1, "test_2": 2}}
    check_sums(http.infer("simple", tensors, **more), tensors)


def test_parameters_of_a_request_do_no_harm(caller):
    tensors = pair()
    result = caller.infer("simple", tensors, priority=1, timeout=30_000_000, parameters={"colour": "red", "size": 3})
    check_sums(result, tensors)


def test_headers_do_no_harm_over_grpc(grpc):
    tensors = pair()
    check_sums(grpc.infer("simple", tensors, headers={"x-test": "yes"}), tensors)


def test_inputs_and_outputs_may_be_used_again(caller):
    """With other data, and without asking for outputs in between."""
    first, second = pair(), pair(40)
    made, wanted = caller.inputs(first), caller.outputs("OUTPUT0", "OUTPUT1")
    check_sums(caller.client.infer("simple", made, outputs=wanted), first)
    check_sums(caller.client.infer("simple", made), first)
    for each in made:
        each.set_data_from_numpy(second[each.name()])
    check_sums(caller.client.infer("simple", made, outputs=wanted), second)


def test_many_requests_are_in_flight_at_once_over_http(triton):
    with Caller("http", triton, concurrency=8) as caller:
        batches = [pair(index) for index in range(24)]
        requests = [caller.client.async_infer("simple", caller.inputs(tensors)) for tensors in batches]
        for request, tensors in zip(requests, batches, strict=True):
            check_sums(request.get_result(), tensors)


def test_callbacks_get_their_own_answers_over_grpc(grpc):
    answers: queue.Queue = queue.Queue()
    batches = {str(index): pair(index) for index in range(24)}
    for number, tensors in batches.items():

        def keep(result, error, number=number):
            answers.put((number, result, error))

        grpc.client.async_infer("simple", grpc.inputs(tensors), keep)
    for _ in range(len(batches)):
        number, result, error = answers.get(timeout=30)
        assert error is None
        check_sums(result, batches.pop(number))
    assert not batches


def test_a_callback_gets_the_error_of_its_request(grpc):
    answers: queue.Queue = queue.Queue()
    grpc.client.async_infer("no_such", grpc.inputs(pair()), lambda result, error: answers.put((result, error)))
    result, error = answers.get(timeout=30)
    assert result is None
    assert "no_such" in error.message()


@pytest.mark.parametrize("api", [tritonclient.http.aio, tritonclient.grpc.aio], ids=["http", "grpc"])
def test_requests_run_side_by_side_with_asyncio(triton, api):
    batches = [pair(index) for index in range(16)]

    async def infer_all():
        protocol = "http" if api is tritonclient.http.aio else "grpc"
        async with api.InferenceServerClient(address(triton, protocol)) as client:
            assert await client.is_server_ready()
            wanted = [api.InferRequestedOutput(name) for name in ("OUTPUT0", "OUTPUT1")]
            calls = [client.infer("simple", inputs(api, tensors), outputs=wanted) for tensors in batches]
            return await asyncio.gather(*calls)

    for result, tensors in zip(run(infer_all()), batches, strict=True):
        check_sums(result, tensors)


@pytest.mark.parametrize("api", [tritonclient.http.aio, tritonclient.grpc.aio], ids=["http", "grpc"])
def test_errors_reach_asyncio_callers(triton, api):
    async def infer():
        protocol = "http" if api is tritonclient.http.aio else "grpc"
        async with api.InferenceServerClient(address(triton, protocol)) as client:
            await client.infer("no_such", inputs(api, pair()))

    with pytest.raises(InferenceServerException, match="unknown model"):
        run(infer())


@pytest.mark.parametrize("is_binary", [False, True])
def test_numbers_as_text_are_added(caller, is_binary):
    options = {"binary_data": is_binary} if caller.protocol == "http" else {}
    numbers = range(-8, 8)
    tensors = {"INPUT0": texts(map(str, numbers), 1, 16), "INPUT1": texts(["1"] * 16, 1, 16)}
    wanted = caller.outputs("OUTPUT0", "OUTPUT1", **options)
    result = caller.client.infer("simple_string", caller.inputs(tensors, **options), outputs=wanted)
    for output, expected in (("OUTPUT0", [n + 1 for n in numbers]), ("OUTPUT1", [n - 1 for n in numbers])):
        got = [int(text) for text in result.as_numpy(output)[0]]
        assert got == expected


def test_texts_come_back_as_they_were(caller):
    values = texts(["", "\x00\x01", "grüße", "日本", "a" * 5000], 1, 5)
    result = caller.infer("simple_identity", {"INPUT0": values})
    assert result.as_numpy("OUTPUT0").tolist() == values.tolist()


def test_bytes_that_are_no_text_are_refused(caller):
    """ONNX Runtime's string tensors are UTF-8."""
    refusal = caller.refusal("simple_identity", {"INPUT0": texts(["a", b"\xff"], 1, 2)})
    assert refusal.status in INVALID
    assert "element 1 of input 'INPUT0' is not UTF-8" in refusal.message


def test_text_comes_back_in_json_as_it_was(http):
    values = texts(['"quoted"', "tab\t\\", "日本", "", "\u2028"], 1, 5)
    result = http.client.infer(
        "simple_identity",
        http.inputs({"INPUT0": values}, binary_data=False),
        outputs=http.outputs("OUTPUT0", binary_data=False),
    )
    assert [text.encode() for text in result.as_numpy("OUTPUT0")[0]] == values[0].tolist()


def test_a_tensor_without_elements_comes_back_without_elements(caller):
    result = caller.infer("identity_fp32", {"INPUT0": np.empty((2, 0), np.float32)})
    assert result.as_numpy("OUTPUT0").shape == (2, 0)


def test_an_ensemble_is_a_model_like_others(caller):
    tensors = pair(9, rows=2)
    result = caller.infer("simple_ensemble", tensors)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), 2 * tensors["INPUT0"])
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), 2 * tensors["INPUT1"])


def test_bodies_may_be_made_and_read_without_the_client(http):
    """As programs do that have an HTTP library of their own."""
    tensors = pair(2)
    api = tritonclient.http.InferenceServerClient
    body, header_length = api.generate_request_body(http.inputs(tensors), outputs=http.outputs("OUTPUT0", "OUTPUT1"))
    length = {"Inference_Header_Content_Length": str(header_length)}
    status, headers, answer = post(http.server, "/v2/models/simple/infer", body, **length)
    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    head_length = int(headers["inference-header-content-length"])
    check_sums(api.parse_response_body(answer, header_length=head_length), tensors)
