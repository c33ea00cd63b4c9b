"""Compressed bodies over HTTP, in both directions."""

import gzip
import json
import zlib

import msgspec
import numpy as np
import pytest
import tritonclient.http.aio
from tests.conformance.triton import address, check_sums, inputs, pair, post, run

ALGORITHMS = ["gzip", "deflate"]
COMPRESS = {"gzip": gzip.compress, "deflate": zlib.compress}
DECOMPRESS = {"gzip": gzip.decompress, "deflate": zlib.decompress}
PATH = "/v2/models/simple/infer"


def json_body():
    tensors = pair(rows=8)
    rows = [
        {"name": name, "datatype": "INT32", "shape": [8, 16], "data": array.ravel().tolist()}
        for name, array in tensors.items()
    ]
    return msgspec.json.encode({"inputs": rows})


@pytest.mark.parametrize("is_binary", [False, True])
@pytest.mark.parametrize("answered", [None, *ALGORITHMS])
@pytest.mark.parametrize("asked", [None, *ALGORITHMS])
def test_requests_and_answers_may_be_compressed(http, asked, answered, is_binary):
    tensors = pair(rows=8)
    result = http.client.infer(
        "simple",
        http.inputs(tensors, binary_data=is_binary),
        outputs=http.outputs("OUTPUT0", "OUTPUT1", binary_data=is_binary),
        request_compression_algorithm=asked,
        response_compression_algorithm=answered,
    )
    check_sums(result, tensors)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_requests_and_answers_may_be_compressed_with_asyncio(triton, algorithm):
    tensors = pair(rows=8)
    api = tritonclient.http.aio

    async def infer():
        async with api.InferenceServerClient(address(triton, "http")) as client:
            return await client.infer(
                "simple",
                inputs(api, tensors),
                request_compression_algorithm=algorithm,
                response_compression_algorithm=algorithm,
            )

    check_sums(run(infer()), tensors)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_answer_is_compressed_when_it_is_asked_for(triton, algorithm):
    status, headers, body = post(triton, PATH, json_body(), Accept_Encoding=algorithm)
    assert (status, headers["content-encoding"]) == (200, algorithm)
    assert json.loads(DECOMPRESS[algorithm](body))["outputs"][0]["shape"] == [8, 16]


def test_a_callers_preference_counts(triton):
    _, headers, _ = post(triton, PATH, json_body(), Accept_Encoding="gzip;q=0.2, deflate;q=0.9")
    assert headers["content-encoding"] == "deflate"
    _, headers, _ = post(triton, PATH, json_body(), Accept_Encoding="gzip;q=0")
    assert "content-encoding" not in headers


def test_the_length_of_the_header_is_that_of_the_decompressed_body(http):
    tensors = pair()
    client = tritonclient.http.InferenceServerClient
    body, length = client.generate_request_body(http.inputs(tensors))
    headers = {"Inference_Header_Content_Length": str(length), "Content_Encoding": "gzip", "Accept_Encoding": "gzip"}
    status, answered, answer = post(http.server, PATH, gzip.compress(body), **headers)
    assert status == 200
    if answered.get("content-encoding") == "gzip":
        answer = gzip.decompress(answer)
    length = int(answered["inference-header-content-length"])
    check_sums(client.parse_response_body(answer, header_length=length), tensors)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, deflate"])
def test_other_encodings_are_refused_with_those_that_there_are(triton, encoding):
    status, headers, body = post(triton, PATH, json_body(), Content_Encoding=encoding)
    assert (status, json.loads(body)["error"]) == (501, "Unsupported compression type")
    assert headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "damage", [lambda body: body[:-10], lambda body: b"x" + body, lambda body: b"", lambda b: b + b"x"]
)
def test_what_is_not_of_its_encoding_is_refused(triton, algorithm, damage):
    body = damage(COMPRESS[algorithm](json_body()))
    status, _, answer = post(triton, PATH, body, Content_Encoding=algorithm)
    assert status == 400
    assert json.loads(answer)["error"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_limit_holds_for_what_comes_out(guarded, algorithm):
    """A megabyte of zeros is a kilobyte on the wire."""
    bomb = COMPRESS[algorithm](bytes(1 << 20))
    assert len(bomb) < 65536
    headers = {"Content_Encoding": algorithm, "Authorization": "Bearer user-key"}
    status, _, answer = post(guarded, PATH, bomb, **headers)
    assert status == 400
    assert "exceeds the maximum allowed" in json.loads(answer)["error"]


def test_large_tensors_survive_compression(http):
    array = np.random.default_rng(0).integers(0, 9, (4, 30_000)).astype(np.float32)
    result = http.infer(
        "identity_fp32",
        {"INPUT0": array},
        request_compression_algorithm="gzip",
        response_compression_algorithm="deflate",
    )
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), array)
