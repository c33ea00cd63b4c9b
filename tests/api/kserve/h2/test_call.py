"""What a call is told, for each way in which it may begin, go on and end."""

import asyncio
import base64
import gzip
import zlib

import grpc
import hpack
import pytest
from tests.api.kserve.h2.peer import STREAM, UNARY, Answer, Peer, Requests, message, read_answers

from sardonyx.api.auth import Gatekeeper
from sardonyx.api.kserve.grpc_routes import INFERENCE
from sardonyx.api.kserve.h2 import frames
from sardonyx.api.kserve.h2.frames import ErrorCode
from sardonyx.errors import Overloaded

R = Requests


def answer_to(send, **options) -> Answer:
    """What the stream 1 gets for what `send` makes of a peer."""

    async def main():
        peer = Peer(**options)
        peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 30}), frames.window_update(0, 1 << 30))
        peer.send(send(peer))
        await peer.settle()
        assert not peer.pipe.is_closed
        return peer.answers[1]

    return asyncio.run(main())


def test_a_unary_answer_has_headers_a_message_and_trailers():
    answer = answer_to(lambda peer: peer.call(1, b"hello"))
    assert answer.headers == {
        ":status": "200",
        "content-type": "application/grpc",
        "grpc-accept-encoding": "identity,deflate,gzip",
    }
    assert answer.messages == [b"hello"]
    assert answer.trailers == {"grpc-status": "0"}
    assert answer.is_ended
    assert answer.reset is None


def test_an_answer_is_one_write(monkeypatch):
    async def main():
        peer = Peer()
        writes = []
        peer.pipe.write = writes.append
        peer.send(peer.call(1, b"hello"))
        await peer.settle()
        assert len(writes) == 1

    asyncio.run(main())


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_380, 50_000])
def test_messages_of_all_sizes_come_back(size):
    data = bytes(range(256)) * (size // 256 + 1)
    assert answer_to(lambda peer: peer.headers(1) + cut(1, message(data[:size]))).messages == [data[:size]]


def cut(stream_id, data, size=16_384):
    """DATA frames of a client that keeps to the usual frame size."""
    parts = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
    return b"".join(R.data(stream_id, part, ends=part is parts[-1]) for part in parts)


def test_a_stream_answers_each_message_and_ends_with_the_request():
    many = b"".join(message(b"%d" % number) for number in range(50))
    answer = answer_to(lambda peer: peer.headers(1, STREAM) + cut(1, many, 7))
    assert answer.messages == [b"%d" % number for number in range(50)]
    assert answer.trailers == {"grpc-status": "0"}


def test_trailers_may_end_a_request():
    answer = answer_to(lambda peer: peer.headers(1) + R.data(1, message(b"a")) + peer.headers(1, ends=True))
    assert answer.messages == [b"a"]


def test_padding_and_priority_are_passed_over():
    def send(peer):
        block = b"\x03" + bytes(5) + peer.block() + bytes(3)
        flags = frames.END_HEADERS | frames.PADDED | frames.HAS_PRIORITY
        data = bytes([200]) + message(b"abc") + bytes(200)
        return frames.frame(frames.HEADERS, flags, 1, block) + frames.frame(frames.DATA, 9, 1, data)

    assert answer_to(send).messages == [b"abc"]


def test_a_header_block_may_be_cut():
    def send(peer):
        block = peer.block()
        parts = frames.frame(frames.HEADERS, 0, 1, block[:5]) + frames.frame(frames.CONTINUATION, 0, 1, block[5:9])
        return parts + frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, block[9:]) + cut(1, message(b"abc"))

    assert answer_to(send).messages == [b"abc"]


@pytest.mark.parametrize(
    ("body", "code", "details"),
    [
        (b"", 12, "the method takes exactly one message"),
        (message(b"a") + message(b"b"), 12, "the method takes exactly one message"),
        (message(b"abc")[:-1], 3, "the message is cut off"),
        (b"\0\0\0", 3, "the message is cut off"),
        (b"\2" + message(b"a")[1:], 3, "the message has unknown flags"),
        (message(b"a", is_compressed=True), 3, "the message is compressed, and grpc-encoding is missing"),
    ],
)
@pytest.mark.parametrize("size", [2, 1000])
def test_a_request_that_is_not_one_message_is_refused(body, code, details, size):
    answer = answer_to(lambda peer: peer.headers(1) + cut(1, body, size))
    assert answer.status == code
    assert answer.headers["grpc-message"] == details
    assert not answer.data
    assert answer.is_ended


@pytest.mark.parametrize("body", [message(b"abc")[:-1], b"\0\0\0"])
def test_a_stream_that_ends_within_a_message_is_refused(body):
    answer = answer_to(lambda peer: peer.headers(1, STREAM) + R.data(1, message(b"a") + body, ends=True))
    assert answer.messages == [b"a"]
    assert answer.trailers == {"grpc-status": "3", "grpc-message": "the last message is cut off"}


@pytest.mark.parametrize("path", [UNARY, STREAM])
def test_a_message_over_the_limit_is_refused_before_it_is_there(path):
    answer = answer_to(lambda peer: peer.headers(1, path) + R.data(1, message(bytes(101))[:20]), max_message_bytes=100)
    assert answer.status == 8
    assert answer.headers["grpc-message"] == "the message is larger than 100 bytes: it has 101"
    assert answer.reset == ErrorCode.NO_ERROR


def test_a_large_message_does_not_spoil_those_before_it():
    many = message(b"a") + message(b"b") + message(bytes(101))
    answer = answer_to(lambda peer: peer.headers(1, STREAM) + R.data(1, many), max_message_bytes=100)
    assert answer.messages == [b"a", b"b"]
    assert answer.status == 8


@pytest.mark.parametrize("path", [UNARY, STREAM])
@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
@pytest.mark.parametrize("size", [10, 500_000])
def test_compressed_requests_are_read(path, encoding, compress, size):
    data = b"abcdefghij" * (size // 10)
    body = message(compress(data), is_compressed=True)
    answer = answer_to(lambda peer: peer.headers(1, path, grpc_encoding=encoding) + R.data(1, body, ends=True))
    assert answer.messages == [data]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_message_that_was_compressed_in_another_way_is_refused(encoding):
    for data in (b"not compressed", gzip.compress(b"abc")[:-2], zlib.compress(b"abc")[:-2]):
        body = message(data, is_compressed=True)
        answer = answer_to(lambda peer: peer.headers(1, grpc_encoding=encoding) + R.data(1, body, ends=True))  # noqa: B023
        assert answer.status == 3
        assert answer.headers["grpc-message"] == f"the message cannot be decompressed as {encoding}"


def test_an_unknown_encoding_is_unimplemented_and_those_there_are_named():
    body = message(b"x", is_compressed=True)
    answer = answer_to(lambda peer: peer.headers(1, grpc_encoding="snappy") + R.data(1, body, ends=True))
    assert answer.status == 12
    assert answer.headers["grpc-accept-encoding"] == "identity,deflate,gzip"


@pytest.mark.parametrize("size", [2000, 1 << 20, 100 << 20])
def test_a_message_that_is_too_large_once_decompressed_is_refused(size):
    body = message(gzip.compress(bytes(size), 9), is_compressed=True)
    answer = answer_to(
        lambda peer: peer.headers(1, grpc_encoding="gzip") + cut(1, body), max_message_bytes=max(1000, size // 500)
    )
    assert answer.status == 8
    assert "is larger than" in answer.headers["grpc-message"]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"method": "GET"}, "405"),
        ({"content_type": "application/json"}, "415"),
        ({"content_type": ""}, "415"),
        ({"content_type": "application/grpc-web"}, "415"),
        ({"content_type": "application/grpcx"}, "415"),
    ],
)
def test_what_is_no_grpc_is_refused_as_http(fields, status):
    answer = answer_to(lambda peer: peer.headers(1, ends=True, **fields))
    assert answer.headers == {":status": status}
    assert answer.is_ended


@pytest.mark.parametrize("content_type", ["application/grpc+proto", "application/grpc; charset=utf-8"])
def test_grpc_may_name_its_messages(content_type):
    assert answer_to(lambda peer: peer.call(1, b"a", content_type=content_type)).messages == [b"a"]


def test_te_may_be_left_out():
    assert answer_to(lambda peer: peer.call(1, b"a", te="")).messages == [b"a"]


def test_an_unknown_method_is_unimplemented_and_the_rest_of_the_request_passed_over():
    answer = answer_to(lambda peer: peer.headers(1, "/a/B") + R.data(1, message(b"a")) + R.data(1, b"", ends=True))
    assert answer.headers == {
        ":status": "200",
        "content-type": "application/grpc",
        "grpc-accept-encoding": "identity,deflate,gzip",
        "grpc-status": "12",
        "grpc-message": "Method not found!",
    }
    assert answer.reset == ErrorCode.NO_ERROR


def test_a_caller_without_a_key_is_refused_before_the_message_is_there():
    answer = answer_to(lambda peer: peer.headers(1), keeper=Gatekeeper(api_keys=["sk-one"]))
    assert answer.status == 16
    assert answer.is_ended


def test_metadata_reaches_the_method():
    async def main():
        peer = Peer()
        binary = base64.b64encode(b"\0\xff\1").decode().rstrip("=")
        fields = {"user_agent": "x", "a": "\xe9", "key_bin": f"{binary},{binary}=", "grpc_timeout": "1H"}
        fields |= {"grpc_accept_encoding": "gzip", "content_length": "6", "host": "h"}
        peer.send(peer.call(1, b"a", **fields))
        await peer.settle()
        assert dict(peer.echo.metadata)["a"].encode("latin-1").decode() == "\xe9"
        assert [each for each in peer.echo.metadata if each[0] != "a"] == [
            ("user-agent", "x"),
            ("key-bin", b"\0\xff\1"),
            ("key-bin", b"\0\xff\1"),
        ]
        assert peer.answers[1].status == 0

    asyncio.run(main())


def test_a_refusal_has_no_body_and_its_message_is_escaped():
    async def end(data, context):
        await context.abort(grpc.StatusCode.NOT_FOUND, "50 % of ü\n", (("a-bin", b"\0\1"), ("b", "c")))

    async def main():
        peer = Peer()
        peer.echo.infer = end
        peer.send(peer.call(1))
        await peer.settle()
        return peer.answers[1]

    answer = asyncio.run(main())
    assert answer.headers == {
        ":status": "200",
        "content-type": "application/grpc",
        "grpc-accept-encoding": "identity,deflate,gzip",
        "grpc-status": "5",
        "grpc-message": "50 %25 of %C3%BC%0A",
        "a-bin": "AAE",
        "b": "c",
    }
    assert answer.is_ended
    assert not answer.data


def test_an_error_of_a_method_has_its_status_and_its_pushback():
    async def end(data, context):
        raise Overloaded("full", retry_after_s=0.25)

    async def main():
        peer = Peer()
        peer.echo.infer = end
        peer.send(peer.call(1))
        await peer.settle()
        assert peer.answers[1].status == 14
        assert peer.answers[1].headers["grpc-retry-pushback-ms"] == "250"

    asyncio.run(main())


@pytest.mark.parametrize("path", [UNARY, STREAM])
def test_what_was_not_foreseen_is_logged_and_not_told(path, caplog):
    answer = answer_to(lambda peer: peer.call(1, b"raise", path))
    assert answer.status == 13
    assert answer.headers["grpc-message"] == "internal error"
    assert "secret" in caplog.text


@pytest.mark.parametrize("path", [UNARY, STREAM])
def test_a_deadline_ends_the_call_and_cancels_its_method(path):
    async def main():
        peer = Peer()
        peer.send(peer.call(1, b"wait", path, grpc_timeout="1m"))
        await peer.settle()
        assert peer.answers[1].status == 4
        assert peer.echo.num_cancelled == 1
        assert peer.answers[1].is_ended

    asyncio.run(main())


def test_a_deadline_holds_for_the_request_as_well():
    async def main():
        peer = Peer()
        written = asyncio.Event()
        write = peer.pipe.write
        peer.pipe.write = lambda data: (write(data), written.set())
        peer.send(peer.headers(1, grpc_timeout="1m"))
        await written.wait()
        assert peer.answers[1].status == 4
        assert peer.answers[1].reset == ErrorCode.NO_ERROR

    asyncio.run(main())


@pytest.mark.parametrize("timeout", ["99999999H", "1S", "500000u", "99999999n", "10M"])
def test_a_call_that_ends_in_time_is_not_troubled_by_its_deadline(timeout):
    assert answer_to(lambda peer: peer.call(1, b"a", grpc_timeout=timeout)).messages == [b"a"]


@pytest.mark.parametrize("path", [UNARY, STREAM])
@pytest.mark.parametrize("has_begun", [True, False])
def test_a_client_that_takes_back_its_call_cancels_the_method(path, has_begun):
    async def main():
        peer = Peer()
        peer.send(peer.call(1, b"wait", path))
        if has_begun:
            await peer.turn()
        peer.seen()
        peer.send(frames.rst_stream(1, ErrorCode.CANCEL))
        await peer.settle()
        assert peer.echo.num_cancelled == has_begun
        assert not peer.seen()
        peer.send(peer.call(3, b"b"))
        await peer.settle()
        assert peer.seen()

    asyncio.run(main())


def test_a_lost_connection_cancels_every_call():
    async def main():
        peer = Peer()
        peer.send(peer.call(1, b"wait"), peer.call(3, b"wait", STREAM), peer.headers(5, STREAM), peer.headers(7))
        await peer.turn()
        await peer.leave()
        assert peer.echo.num_cancelled == 3
        assert peer.lost == [peer.connection]

    asyncio.run(main())


def test_a_method_that_will_not_be_cancelled_writes_to_nobody():
    errors = []

    async def end(data, context):
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            for act in (context.write(b"x"), context.read()):
                try:
                    await act
                except grpc.aio.UsageError as error:
                    errors.append(error)
            raise

    async def main():
        peer = Peer()
        peer.echo.stream = end
        peer.send(peer.headers(1, STREAM))
        await peer.turn()
        peer.send(frames.rst_stream(1, ErrorCode.CANCEL))
        await peer.settle()
        assert set(peer.answers) == set()

    asyncio.run(main())
    assert len(errors) == 2


def test_a_cancellation_from_inside_ends_the_call():
    async def end(data, context):
        raise asyncio.CancelledError

    async def main():
        peer = Peer()
        peer.echo.stream = end
        peer.send(peer.headers(1, STREAM))
        await peer.settle()
        assert peer.answers[1].status == 1

    asyncio.run(main())


def test_further_calls_than_allowed_are_refused():
    async def main():
        peer = Peer()
        for stream_id in range(1, 2051, 2):
            peer.send(peer.call(stream_id, b"wait"))
        assert peer.answers[2049].reset == ErrorCode.REFUSED_STREAM
        assert set(peer.answers) == {2049}
        await peer.turn()
        peer.echo.gate.set()
        await peer.settle()
        assert read_answers(peer.frames)[2047].messages == [b"wait"]

    asyncio.run(main())


def test_calls_that_run_on_without_their_clients_count_as_well():
    async def main():
        gate = asyncio.Event()

        async def stubborn(data, context):
            try:
                await gate.wait()
            except asyncio.CancelledError:
                await gate.wait()

        peer = Peer()
        peer.echo.stream = stubborn
        for stream_id in range(1, 2049, 2):
            peer.send(peer.headers(stream_id, STREAM))
        await peer.turn()
        for stream_id in range(1, 2049, 2):
            peer.send(frames.rst_stream(stream_id, ErrorCode.CANCEL))
        peer.send(peer.call(2049))
        assert peer.answers[2049].reset == ErrorCode.REFUSED_STREAM
        await peer.turn()
        gate.set()
        await peer.settle()
        peer.send(peer.call(2051, b"a"))
        await peer.settle()
        assert peer.answers[2051].messages == [b"a"]

    asyncio.run(main())


def test_generated_methods_of_messages_are_served():
    async def main():
        peer = Peer()
        peer.send(peer.call(1, b"\xff", f"/{INFERENCE}/ServerLive"))
        await peer.settle()
        assert peer.answers[1].status == 3
        assert peer.answers[1].headers["grpc-message"] == "the message cannot be parsed"

    asyncio.run(main())


def test_a_client_that_wants_no_table_is_told_that_there_is_none():
    async def main():
        peer = Peer(greets=False)
        peer.send(peer.greeting(header_table_size=0))
        peer.send(peer.call(1, b"a"), peer.call(3, b"b"))
        await peer.settle()
        blocks = [each.payload for each in peer.frames if each.kind == frames.HEADERS]
        assert [block.startswith(b"\x20") for block in blocks] == [True, False, False, False]
        decoder = hpack.Decoder()
        decoder.max_allowed_table_size = 0
        assert (":status", "200") in decoder.decode(blocks[0])
        assert peer.answers[3].messages == [b"b"]

    asyncio.run(main())
