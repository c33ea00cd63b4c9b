"""What a connection does by itself: settings, pings, and its end."""

import asyncio
import struct

import pytest
from tests.api.kserve.h2.peer import STREAM, Peer, Requests, message

from sardonyx.api.kserve.h2 import connection, frames
from sardonyx.api.kserve.h2.frames import ErrorCode, frame

R = Requests


def run(test):
    return asyncio.run(test())


def pings(found):
    return [each for each in found if each.kind == frames.PING]


def goaways(found):
    """Last stream and code of each."""
    return [
        (int.from_bytes(each.payload[:4], "big"), int.from_bytes(each.payload[4:8], "big"))
        for each in found
        if each.kind == frames.GOAWAY
    ]


def test_limits_are_told_first():
    async def main():
        peer = Peer(greets=False)
        settings, window = peer.frames
        assert settings.kind == frames.SETTINGS
        values = dict(struct.iter_unpack(">HI", settings.payload))
        assert values == {
            frames.MAX_CONCURRENT_STREAMS: 1024,
            frames.INITIAL_WINDOW_SIZE: 16 << 20,
            frames.MAX_FRAME_SIZE: 1 << 20,
            frames.MAX_HEADER_LIST_SIZE: 16 << 10,
        }
        assert window.kind == frames.WINDOW_UPDATE
        assert int.from_bytes(window.payload, "big") + 65_535 == 16 << 20

    run(main)


def test_settings_and_pings_are_acknowledged():
    async def main():
        peer = Peer()
        peer.send(frames.settings({99: 5}), frame(frames.PING, 0, 0, b"12345678"))
        settings, ping = peer.seen()
        assert (settings.kind, settings.flags, settings.payload) == (frames.SETTINGS, frames.ACK, b"")
        assert (ping.kind, ping.flags, ping.payload) == (frames.PING, frames.ACK, b"12345678")
        peer.send(frame(frames.SETTINGS, frames.ACK, 0), frame(frames.PING, frames.ACK, 0, b"12345678"))
        assert not peer.seen()

    run(main)


def test_a_draining_connection_lets_calls_end_and_then_closes():
    async def main():
        peer = Peer()
        peer.send(peer.call(1, b"wait"))
        await peer.turn()
        peer.connection.drain()
        assert goaways(peer.frames) == [(frames.MAX_STREAM_ID, ErrorCode.NO_ERROR)]
        # The client has not heard of it yet.
        peer.send(peer.call(3, b"b"))
        (ping,) = pings(peer.frames)
        peer.send(frame(frames.PING, frames.ACK, 0, ping.payload))
        assert goaways(peer.frames)[1:] == [(3, ErrorCode.NO_ERROR)]
        peer.send(peer.call(5, b"late"), R.data(5, b"x"), frames.rst_stream(5, ErrorCode.CANCEL))
        assert not peer.pipe.is_closed
        peer.echo.gate.set()
        await peer.settle()
        assert peer.pipe.is_closed
        assert {id: each.messages for id, each in peer.answers.items()} == {1: [b"wait"], 3: [b"b"]}
        assert goaways(peer.frames)[-1] == (3, ErrorCode.NO_ERROR)

    run(main)


def test_a_draining_connection_without_calls_closes_when_its_client_has_heard_it():
    async def main():
        peer = Peer()
        peer.connection.drain()
        assert not peer.pipe.is_closed
        peer.send(frame(frames.PING, frames.ACK, 0, pings(peer.frames)[0].payload))
        assert peer.fault == ErrorCode.NO_ERROR

    run(main)


def test_a_client_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(connection, "DRAIN_TIMEOUT_S", 0.001)

    async def main():
        peer = Peer()
        closed = asyncio.Event()
        peer.pipe.close = closed.set
        peer.connection.drain()
        await asyncio.wait_for(closed.wait(), 10)

    run(main)


def test_a_connection_that_is_cut_short_ends_its_calls_with_a_status():
    async def main():
        peer = Peer()
        peer.send(peer.call(1, b"wait"), peer.headers(3, STREAM), peer.headers(5))
        await peer.turn()
        peer.connection.cut_short()
        await peer.settle()
        assert [each.status for each in peer.answers.values()] == [14, 14, 14]
        assert peer.fault == ErrorCode.NO_ERROR
        assert peer.echo.num_cancelled == 2

    run(main)


def test_a_client_that_leaves_politely_gets_what_it_asked_for():
    async def main():
        peer = Peer()
        peer.send(peer.call(1, b"wait"), frame(frames.GOAWAY, 0, 0, bytes(8)))
        await peer.turn()
        assert not peer.pipe.is_closed
        peer.echo.gate.set()
        await peer.settle()
        assert peer.answers[1].messages == [b"wait"]
        assert peer.pipe.is_closed

    run(main)


@pytest.mark.parametrize("stage", ["reading", "opening"])
def test_a_fault_of_ours_ends_the_connection_and_is_logged(monkeypatch, caplog, stage):
    async def main():
        peer = Peer()

        def fail(*_):
            raise RuntimeError("ours")

        if stage == "reading":
            peer.connection.take_frame = fail
        else:
            peer.connection._routes.service = fail
        peer.send(frame(frames.PING, 0, 0, bytes(8)), peer.call(1))
        assert peer.fault == ErrorCode.INTERNAL_ERROR
        await peer.leave()

    run(main)
    assert "ours" in caplog.text


def test_streams_take_turns_with_everything_else():
    async def main():
        peer = Peer()
        peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 30}), frames.frame(8, 0, 0, (1 << 30).to_bytes(4)))

        async def endless(questions, context):
            while True:
                await context.write(b"x")

        peer.echo.stream = endless
        peer.send(peer.headers(1, STREAM), peer.call(3, b"b"))
        await peer.turn()
        assert peer.answers[3].messages == [b"b"]
        await peer.leave()

    run(main)


def test_a_call_may_be_answered_before_its_request_is_whole():
    async def main():
        peer = Peer()

        async def at_once(questions, context):
            await context.write(await context.read())

        peer.echo.stream = at_once
        peer.send(peer.headers(1, STREAM), R.data(1, message(b"a") + message(b"b") + b"\0"))
        await peer.settle()
        assert peer.answers[1].messages == [b"a"]
        assert peer.answers[1].trailers == {"grpc-status": "0"}
        assert peer.answers[1].reset == ErrorCode.NO_ERROR
        intake = peer.connection._intake
        assert (intake.held_bytes, intake.num_readable) == (0, 0)

    run(main)
