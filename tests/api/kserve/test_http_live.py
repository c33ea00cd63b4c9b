"""What only a real connection shows: chunks, pieces, and clients that leave."""

import asyncio
import json
import socket
import threading

import ml_dtypes
import msgspec
import numpy as np
import pytest
from tests.api.kserve.fake_service import SUM, FakeService, create_app
from tests.api.live import eventually, post_head, read_answer
from tritonclient import http
from tritonclient.utils import InferenceServerException

from sardonyx.api.server import DrainingServer, bind
from sardonyx.runtime.dtypes import DATATYPES

SLOW = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1], "data": [1.0]}]}


class Listener:
    """The protocol on a port of its own, in a thread of this process."""

    def __init__(self, **options):
        self.service = FakeService()

        async def drain(with_grace):
            pass

        self._server = DrainingServer(create_app(self.service, **options), drain)
        self._socket = bind("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            self._loop = runner.get_loop()
            runner.run(self._server.serve(sockets=[self._socket]))

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def exchange(self, data):
        """Status and JSON of the answer to raw bytes."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_answer(connection)

    def __enter__(self):
        self._thread.start()
        eventually(lambda: self._server.started)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._server.request_exit)
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module", params=[False, True], ids=["mounted", "shortcut"])
def live(request):
    with Listener(is_short=request.param, http_max_input_size=50_000_000) as listener:
        yield listener


def chunked(path, *chunks, size=None):
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    return head.encode() + (f"{size}\r\n" if size else "").encode() + b"\r\n" + body


def test_a_body_may_come_in_chunks(live):
    body = msgspec.json.encode(SUM)
    halves = [body[:100], body[100:]]
    status, answer = live.exchange(chunked("/v2/models/simple/infer", *halves))
    assert (status, answer["outputs"][0]["data"]) == (200, [3] * 16)


def test_a_raw_tensor_may_come_in_one_chunk(live):
    data = np.arange(8, dtype=np.float32).tobytes()
    raw = chunked("/v2/models/identity_fp32/infer", data, size="Inference-Header-Content-Length: 0")
    with live.connect() as connection:
        connection.sendall(raw)
        received = b""
        while data not in received:
            piece = connection.recv(65536)
            assert piece, received
            received += piece
    assert received.startswith(b"HTTP/1.1 200 OK")


def test_a_chunked_body_over_the_limit_is_refused_with_the_size(live):
    status, answer = live.exchange(chunked("/v2/models/simple/infer", *[bytes(1 << 20)] * 50))
    assert status == 400
    assert "exceeds the maximum allowed value of 50000000 bytes" in answer["error"]


def test_a_large_answer_comes_whole(live):
    array = np.arange(5_000_000, dtype=np.float32)
    head = {
        "inputs": [
            {
                "name": "INPUT0",
                "datatype": "FP32",
                "shape": [1, array.size],
                "parameters": {"binary_data_size": array.nbytes},
            }
        ],
        "parameters": {"binary_data_output": True},
    }
    text = msgspec.json.encode(head)
    body = text + array.tobytes()
    extra = f"Inference-Header-Content-Length: {len(text)}"
    with live.connect() as connection:
        connection.sendall(post_head("/v2/models/identity_fp32/infer", body, extra))
        received = bytearray()
        while len(received) < array.nbytes or b"\r\n\r\n" not in received:
            piece = connection.recv(1 << 20)
            assert piece
            received += piece
        head_end = received.index(b"\r\n\r\n") + 4
        length = int(received.lower().split(b"content-length: ")[-1].split(b"\r\n")[0])
        while len(received) < head_end + length:
            received += connection.recv(1 << 20)
    assert received.endswith(array.tobytes())


@pytest.mark.parametrize("path", ["/v2/models/slow/infer", "/v2/models/llm/generate", "/v2/models/llm/generate_stream"])
def test_work_ends_when_its_client_leaves(live, path):
    service = live.service
    before, seen = service.num_aborted, len(service.requests)
    body = SLOW if "slow" in path else {"PROMPT": "a", "STREAM": True, "WAIT": True}
    with live.connect() as connection:
        connection.sendall(post_head(path, msgspec.json.encode(body)))
        eventually(lambda: len(service.requests) > seen)
    eventually(lambda: service.num_aborted > before)


def test_each_event_is_sent_when_it_is_there(live):
    body = msgspec.json.encode({"PROMPT": "a", "STREAM": True, "WAIT": True})
    with live.connect() as connection:
        connection.sendall(post_head("/v2/models/llm/generate_stream", body))
        received = b""
        while b"\n\n" not in received.partition(b"\r\n\r\n")[2]:
            piece = connection.recv(65536)
            assert piece, received
            received += piece
    assert json.loads(received.partition(b"data: ")[2].partition(b"\n\n")[0])["TEXT"] == "a"


def test_a_body_that_comes_too_slowly_is_given_up_in_this_protocols_envelope(live, monkeypatch):
    monkeypatch.setattr("sardonyx.api.front.BODY_GRACE_S", 0.05)
    whole = post_head("/v2/models/simple/infer", msgspec.json.encode(SUM))
    assert live.exchange(whole[:-1]) == (408, {"error": "the body came too slowly"})


@pytest.fixture(scope="module")
def triton(live):
    with http.InferenceServerClient(f"127.0.0.1:{live.port}") as client:
        yield client


CASES = [(datatype, True) for datatype in sorted(DATATYPES)] + [
    (datatype, False) for datatype in sorted(DATATYPES.keys() - {"BF16", "FP16"})
]


@pytest.mark.parametrize(("datatype", "is_binary"), CASES)
def test_tritons_own_client_reads_back_what_it_sent(triton, datatype, is_binary):
    array = np.array([[b"a", b"", "é".encode()]], object) if datatype == "BYTES" else np.array([[1, 0, 1]])
    array = array.astype(ml_dtypes.bfloat16 if datatype == "BF16" else DATATYPES[datatype].array)
    tensor = http.InferInput("INPUT0", array.shape, datatype)
    tensor.set_data_from_numpy(array, binary_data=is_binary)
    wanted = http.InferRequestedOutput("OUTPUT0", binary_data=is_binary)
    result = triton.infer(f"identity_{datatype.lower()}", [tensor], outputs=[wanted], request_id="7")
    answer = result.as_numpy("OUTPUT0")
    if datatype == "BYTES" and not is_binary:
        answer = np.frompyfunc(str.encode, 1, 1)(answer)
    np.testing.assert_array_equal(answer, array)
    assert result.get_response()["id"] == "7"


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_tritons_own_client_compresses_both_ways(triton, compression):
    array = np.arange(1000, dtype=np.float32).reshape(1, -1)
    tensor = http.InferInput("INPUT0", array.shape, "FP32")
    tensor.set_data_from_numpy(array)
    result = triton.infer(
        "identity_fp32",
        [tensor],
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), array)


def test_tritons_own_client_finds_what_it_asks_for(triton):
    assert triton.is_server_live()
    assert triton.is_model_ready("simple")
    assert triton.get_server_metadata()["name"] == "triton"
    assert triton.get_model_config("simple")["max_batch_size"] == 8
    assert triton.get_inference_statistics("simple")["model_stats"][0]["inference_count"] == 4
    assert triton.get_model_repository_index()[0]["name"] == "simple"
    triton.load_model("m", config='{"a":1}', files={"file:1/model.onnx": b"\x00"})
    triton.unload_model("m", unload_dependents=True)
    triton.register_system_shared_memory("r", "/r", 64)
    triton.unregister_cuda_shared_memory()
    assert triton.get_cuda_shared_memory_status() == []
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nope' is not found"):
        triton.get_model_metadata("nope")


def test_a_connection_serves_one_request_after_another(live):
    with live.connect() as connection:
        for _ in range(3):
            connection.sendall(post_head("/v2/models/simple/infer", msgspec.json.encode(SUM)))
            assert read_answer(connection)[0] == 200
            connection.sendall(post_head("/v2/models/nope/infer", msgspec.json.encode(SUM)))
            assert read_answer(connection)[0] == 404
