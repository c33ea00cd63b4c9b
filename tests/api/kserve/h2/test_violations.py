"""What a client must not do, and with which code it is told so."""

import asyncio

import pytest
from tests.api.kserve.h2.peer import STREAM, Peer, Requests, goaway_code, message

from sardonyx.api.kserve.h2 import frames
from sardonyx.api.kserve.h2.frames import ErrorCode, frame
from sardonyx.api.kserve.h2.intake import WINDOW_BYTES

R = Requests
MAX = frames.MAX_WINDOW_BYTES


def window(stream_id, more):
    return frame(frames.WINDOW_UPDATE, 0, stream_id, more.to_bytes(4, "big"))


def setting(number, value):
    return frames.settings({number: value})


def headers(payload, flags=frames.END_HEADERS, stream_id=1):
    return frame(frames.HEADERS, flags, stream_id, payload)


LONG_FIELD = b"\x40\x01a\x7f\xb9\x1e" + b"b" * 4024
"""Goes into HPACK's table, where a byte names it again."""

CONNECTION = {
    "data on stream 0": (R.data(0, b"x"), "PROTOCOL_ERROR"),
    "data on a stream that never was": (R.data(7, b"x"), "PROTOCOL_ERROR"),
    "data that is all padding and more": (frame(frames.DATA, frames.PADDED, 1, b"\x05abc"), "PROTOCOL_ERROR"),
    "data without its padding's length": (frame(frames.DATA, frames.PADDED, 1), "PROTOCOL_ERROR"),
    "data over the frame size": (b"\xff\xff\xff\0\0\0\0\0\1", "FRAME_SIZE_ERROR"),
    "another frame over the frame size": (b"\x00\x40\x01\x04\0\0\0\0\0", "FRAME_SIZE_ERROR"),
    "headers on stream 0": (headers(b"\x82", stream_id=0), "PROTOCOL_ERROR"),
    "headers on an even stream": (headers(b"\x82", stream_id=2), "PROTOCOL_ERROR"),
    "headers with too much padding": (headers(b"\xff", frames.PADDED | frames.END_HEADERS), "PROTOCOL_ERROR"),
    "headers without their priority": (headers(b"x", frames.HAS_PRIORITY | frames.END_HEADERS), "PROTOCOL_ERROR"),
    "a block with an index out of the table": (headers(b"\xfe"), "COMPRESSION_ERROR"),
    "a block with index 0": (headers(b"\x80"), "COMPRESSION_ERROR"),
    "a block that is cut off": (headers(b"\x40\x05ab"), "COMPRESSION_ERROR"),
    "a block with wrong Huffman code": (headers(b"\x40\x84\xff\xff\xff\xff\x00"), "COMPRESSION_ERROR"),
    "a table over its size": (headers(b"\x3f\xff\xff\x03"), "COMPRESSION_ERROR"),
    "a header list over the limit": (
        headers(b"\x40\x01a\x7f\xb9\x1e" + b"b" * 4024 + b"\xbe" * 5),
        "ENHANCE_YOUR_CALM",
    ),
    "continuation of nothing": (frame(frames.CONTINUATION, 0, 1), "PROTOCOL_ERROR"),
    "continuation of another stream": (headers(b"", 0) + frame(frames.CONTINUATION, 4, 3), "PROTOCOL_ERROR"),
    "another frame inside a block": (headers(b"", 0) + frame(frames.PING, 0, 0, bytes(8)), "PROTOCOL_ERROR"),
    "data inside a block": (headers(b"", 0) + R.data(1, b"x"), "PROTOCOL_ERROR"),
    "too many continuations": (headers(b"", 0) + frame(frames.CONTINUATION, 0, 1) * 17, "ENHANCE_YOUR_CALM"),
    "too long a block": (
        headers(bytes(16_384), 0) + frame(frames.CONTINUATION, 0, 1, b"x"),
        "ENHANCE_YOUR_CALM",
    ),
    "reset of stream 0": (frames.rst_stream(0, ErrorCode.CANCEL), "PROTOCOL_ERROR"),
    "reset of a stream that never was": (frames.rst_stream(9, ErrorCode.CANCEL), "PROTOCOL_ERROR"),
    "reset of the wrong size": (frame(frames.RST_STREAM, 0, 1, b"x"), "FRAME_SIZE_ERROR"),
    "settings of a stream": (frame(frames.SETTINGS, 0, 1), "PROTOCOL_ERROR"),
    "settings of the wrong size": (frame(frames.SETTINGS, 0, 0, b"x"), "FRAME_SIZE_ERROR"),
    "an acknowledgement with settings": (frame(frames.SETTINGS, frames.ACK, 0, bytes(6)), "FRAME_SIZE_ERROR"),
    "push that is neither": (setting(frames.ENABLE_PUSH, 2), "PROTOCOL_ERROR"),
    "a window setting over the limit": (setting(frames.INITIAL_WINDOW_SIZE, MAX + 1), "FLOW_CONTROL_ERROR"),
    "a frame size under the limit": (setting(frames.MAX_FRAME_SIZE, 16_383), "PROTOCOL_ERROR"),
    "a frame size over the limit": (setting(frames.MAX_FRAME_SIZE, 1 << 24), "PROTOCOL_ERROR"),
    "a push": (frame(frames.PUSH_PROMISE, 4, 1, bytes(4)), "PROTOCOL_ERROR"),
    "a ping of a stream": (frame(frames.PING, 0, 1, bytes(8)), "PROTOCOL_ERROR"),
    "a ping of the wrong size": (frame(frames.PING, 0, 0, bytes(7)), "FRAME_SIZE_ERROR"),
    "a goaway of a stream": (frame(frames.GOAWAY, 0, 1, bytes(8)), "PROTOCOL_ERROR"),
    "a goaway of the wrong size": (frame(frames.GOAWAY, 0, 0, bytes(7)), "FRAME_SIZE_ERROR"),
    "a priority of stream 0": (frame(frames.PRIORITY, 0, 0, bytes(5)), "PROTOCOL_ERROR"),
    "a priority of the wrong size": (frame(frames.PRIORITY, 0, 1, bytes(4)), "FRAME_SIZE_ERROR"),
    "a window that does not grow": (window(0, 0), "PROTOCOL_ERROR"),
    "a window over the limit": (window(0, MAX), "FLOW_CONTROL_ERROR"),
    "a window of a stream that never was": (window(5, 1), "PROTOCOL_ERROR"),
    "a window of the wrong size": (frame(frames.WINDOW_UPDATE, 0, 0, b"x"), "FRAME_SIZE_ERROR"),
}


@pytest.mark.parametrize(("data", "code"), CONNECTION.values(), ids=CONNECTION.keys())
def test_a_breach_of_the_protocol_ends_the_connection_and_its_calls(data, code, caplog):
    async def main():
        peer = Peer()
        peer.send(peer.call(1, b"wait"))
        await peer.turn()
        peer.send(data)
        assert peer.fault == ErrorCode[code]
        await peer.settle()
        assert peer.echo.num_cancelled == 1
        peer.send(peer.call(11))
        assert peer.pipe.is_closed

    asyncio.run(main())
    assert not caplog.records


STREAMS = {
    "a window that does not grow": (window(1, 0), "PROTOCOL_ERROR"),
    "a window over the limit": (window(1, MAX), "FLOW_CONTROL_ERROR"),
    "a second block that is not the last": (headers(b"\x82"), "PROTOCOL_ERROR"),
    "a body of another length": (R.data(1, b"abc", ends=True), "PROTOCOL_ERROR"),
}


@pytest.mark.parametrize(("data", "code"), STREAMS.values(), ids=STREAMS.keys())
def test_a_breach_on_one_stream_ends_that_stream_only(data, code):
    async def main():
        peer = Peer()
        peer.send(peer.headers(1, STREAM, content_length="7"), R.data(1, message(b"a")))
        await peer.turn()
        peer.send(data)
        await peer.settle()
        assert peer.answers[1].reset == ErrorCode[code]
        # What was on its way is passed over.
        peer.send(R.data(1, b"more"), R.data(1, b"", ends=True), peer.call(3, b"b"))
        await peer.settle()
        assert peer.answers[3].messages == [b"b"]
        assert not peer.pipe.is_closed

    asyncio.run(main())


MALFORMED = {
    "no method": {":method": ""},
    "no path": {":path": ""},
    "no scheme": {":scheme": ""},
    "an unknown pseudo-header": {":status": "200"},
    "upper case": {"Name": "x"},
    "a name with a space": {"na me": "x"},
    "a line break in a value": {"name": "x\r\ny"},
    "a field of HTTP/1": {"connection": "close"},
    "another te": {"te": "gzip"},
    "a timeout that is no time": {"grpc-timeout": "1x"},
    "a timeout of nine digits": {"grpc-timeout": "123456789S"},
    "a length that is no number": {"content-length": "-1"},
    "binary metadata that is not base64": {"key-bin": "!"},
}


@pytest.mark.parametrize("changes", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_request_is_reset(changes):
    async def main():
        peer = Peer()
        fields = {":method": "POST", ":scheme": "http", ":path": "/x", "te": "trailers"}
        fields |= {"content-type": "application/grpc", **changes}
        block = peer.encoder.encode([(name, value) for name, value in fields.items() if value])
        peer.send(headers(block), R.data(1, message(), ends=True), peer.call(3, b"b"))
        await peer.settle()
        assert peer.answers[1].reset == ErrorCode.PROTOCOL_ERROR
        assert peer.answers[3].messages == [b"b"]

    asyncio.run(main())


@pytest.mark.parametrize(
    "fields",
    [
        [(":method", "POST"), (":method", "POST"), (":scheme", "http"), (":path", "/x")],
        [(":method", "POST"), ("te", "trailers"), (":scheme", "http"), (":path", "/x")],
        [(":method", "POST"), (":scheme", "http"), (":path", "/x"), ("content-length", "1"), ("content-length", "2")],
    ],
)
def test_fields_that_come_twice_or_late_are_malformed(fields):
    async def main():
        peer = Peer()
        peer.send(headers(peer.encoder.encode(fields), frames.END_HEADERS | frames.END_STREAM))
        assert peer.answers[1].reset == ErrorCode.PROTOCOL_ERROR

    asyncio.run(main())


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSX",
        frames.PREFACE + frame(frames.PING, 0, 0, bytes(8)),
        frames.PREFACE + frame(frames.SETTINGS, frames.ACK, 0),
    ],
)
def test_what_does_not_begin_as_http2_is_refused(data):
    async def main():
        peer = Peer(greets=False)
        peer.send(data)
        assert peer.fault == ErrorCode.PROTOCOL_ERROR

    asyncio.run(main())


def test_a_stream_must_not_be_opened_again():
    async def main():
        peer = Peer()
        peer.send(peer.call(1, b"a"))
        await peer.settle()
        peer.send(peer.call(1, b"a"))
        assert peer.fault == ErrorCode.STREAM_CLOSED

    asyncio.run(main())


def test_a_lower_stream_must_not_be_opened_later():
    async def main():
        peer = Peer()
        peer.send(peer.call(5, b"a"), peer.call(3, b"a"))
        assert peer.fault == ErrorCode.STREAM_CLOSED
        await peer.settle()

    asyncio.run(main())


@pytest.mark.parametrize("follows", ["data", "headers"])
def test_nothing_may_follow_the_end_of_a_request(follows):
    async def main():
        peer = Peer()
        peer.send(peer.call(1, b"wait"))
        peer.send(R.data(1, b"x") if follows == "data" else peer.headers(1, ends=True))
        await peer.settle()
        assert peer.answers[1].reset == ErrorCode.STREAM_CLOSED
        assert not peer.pipe.is_closed

    asyncio.run(main())


def test_data_for_a_stream_that_has_ended_is_refused():
    async def main():
        peer = Peer()
        peer.send(peer.call(1, b"a"))
        await peer.settle()
        peer.send(R.data(1, b"x"))
        assert peer.answers[1].reset == ErrorCode.STREAM_CLOSED
        assert not peer.pipe.is_closed

    asyncio.run(main())


def test_the_streams_window_binds_the_client():
    async def main():
        peer = Peer(max_message_bytes=1 << 30)
        peer.send(peer.headers(1, STREAM))
        part = R.data(1, message(bytes(1 << 19)))
        peer.echo.infer = lambda data, context: peer.echo.gate.wait()  # takes one and no more
        for _ in range(WINDOW_BYTES // len(part) + 3):
            peer.send(part)
            await peer.turn(3)
        await peer.settle()
        assert peer.answers[1].reset == ErrorCode.FLOW_CONTROL_ERROR
        assert not peer.pipe.is_closed

    asyncio.run(main())


def test_the_connections_window_binds_the_client(monkeypatch):
    monkeypatch.setattr("sardonyx.api.kserve.h2.intake.MAX_WAITING_BYTES", 1)

    async def main():
        peer = Peer(max_message_bytes=1 << 30)
        peer.echo.infer = lambda data, context: peer.echo.gate.wait()
        part = message(bytes(1 << 19))
        for stream_id in (1, 3):
            peer.send(peer.headers(stream_id, STREAM), R.data(stream_id, message()))
            await peer.turn()
            for _ in range(20):
                peer.send(R.data(stream_id, part))
        assert peer.fault == ErrorCode.FLOW_CONTROL_ERROR
        await peer.settle()

    asyncio.run(main())


FLOODS = {
    "pings": frame(frames.PING, 0, 0, bytes(8)),
    "settings": frames.settings({}),
    "empty data": R.data(1, b""),
    "priorities": frame(frames.PRIORITY, 0, 1, bytes(5)),
    "unknown frames": frame(99, 0, 0),
    "resets of what has ended": frames.rst_stream(3, ErrorCode.CANCEL),
    "data of what has ended": R.data(3, b""),
}


@pytest.mark.parametrize("data", FLOODS.values(), ids=FLOODS.keys())
def test_floods_of_what_moves_nothing_end_the_connection(data):
    async def main():
        peer = Peer()
        peer.send(peer.headers(1, STREAM), peer.call(3))
        await peer.turn()
        peer.send(data * 100)
        assert not peer.pipe.is_closed
        peer.send(data * 20_000)
        assert peer.fault == ErrorCode.ENHANCE_YOUR_CALM
        await peer.settle()

    asyncio.run(main())


def test_clients_that_take_back_call_after_call_are_sent_away():
    async def main():
        peer = Peer()
        for stream_id in range(1, 40_001, 2):
            peer.send(peer.call(stream_id, b"wait"), frames.rst_stream(stream_id, ErrorCode.CANCEL))
            await asyncio.sleep(0)
            if peer.pipe.is_closed:
                break
        assert peer.fault == ErrorCode.ENHANCE_YOUR_CALM
        await peer.settle()
        assert not peer.connection.tasks

    asyncio.run(main())


def test_pings_for_what_we_send_are_no_flood():
    async def main():
        peer = Peer()
        for stream_id in range(1, 20_001, 2):
            peer.send(peer.call(stream_id, b"a"), frame(frames.PING, 0, 0, bytes(8)))
            await peer.settle()
        assert not peer.pipe.is_closed
        assert goaway_code(peer.frames) is None

    asyncio.run(main())
