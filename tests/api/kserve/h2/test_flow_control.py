"""Small windows, both ways."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.api.kserve.h2.peer import STREAM, UNARY, Peer, Requests, message

from sardonyx.api.kserve.h2 import frames, intake, stream
from sardonyx.api.kserve.h2.intake import WINDOW_BYTES

R = Requests


def window(stream_id, more):
    return frames.frame(frames.WINDOW_UPDATE, 0, stream_id, more.to_bytes(4, "big"))


def small(**options):
    """A peer whose streams take nothing at first."""
    peer = Peer(greets=False, **options)
    peer.send(peer.greeting(initial_window_size=0))
    peer.seen()
    return peer


def updates(found, stream_id):
    """Room that was given."""
    wanted = [each for each in found if each.kind == frames.WINDOW_UPDATE and each.stream_id == stream_id]
    return sum(int.from_bytes(each.payload, "big") for each in wanted)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.sampled_from([UNARY, STREAM]))
def test_an_answer_goes_out_as_the_client_gives_room(steps, path):
    async def main():
        peer = small()
        peer.send(peer.call(1, b"x" * 95, path))
        given = 0
        for more in steps:
            await peer.turn(8)
            peer.send(window(1, more))
            given += more
            await peer.turn(8)
            assert len(peer.answers[1].data) == min(given, 100)
        peer.send(window(1, 1000))
        await peer.settle()
        assert peer.answers[1].messages == [b"x" * 95]
        assert peer.answers[1].trailers == {"grpc-status": "0"}

    asyncio.run(main())


def test_the_connections_window_binds_all_streams_and_they_take_turns():
    async def main():
        peer = Peer()
        peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 20}))
        for stream_id in (1, 3, 5):
            peer.send(peer.headers(stream_id), R.data(stream_id, message(bytes(49_995)), ends=True))
        await peer.turn()
        assert sum(len(each.data) for each in peer.answers.values()) == 65_535
        for _ in range(100):
            peer.send(window(0, 900))
            await peer.turn(4)
        await peer.settle()
        assert {id: len(each.data) for id, each in peer.answers.items()} == {1: 50_000, 3: 50_000, 5: 50_000}
        assert all(each.is_ended for each in peer.answers.values())

    asyncio.run(main())


def test_a_later_setting_changes_the_streams_that_are_open():
    async def main():
        peer = small()
        peer.send(peer.call(1, b"x" * 95))
        await peer.turn()
        peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 60}))
        await peer.turn()
        peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 50}), window(1, 10))
        await peer.turn()
        assert len(peer.answers[1].data) == 60
        peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 100}))
        await peer.settle()
        assert peer.answers[1].messages == [b"x" * 95]

    asyncio.run(main())


def test_a_setting_that_makes_a_window_too_large_ends_the_connection():
    async def main():
        peer = Peer()
        peer.send(peer.headers(1, STREAM), window(1, 1 << 30), window(1, (1 << 30) - 70_000))
        peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 20}))
        assert peer.fault == frames.ErrorCode.FLOW_CONTROL_ERROR
        await peer.settle()

    asyncio.run(main())


def test_frames_are_no_larger_than_the_client_takes():
    async def main(size):
        peer = Peer(greets=False)
        peer.send(peer.greeting(initial_window_size=1 << 20, max_frame_size=size), window(0, 1 << 20))
        peer.send(peer.headers(1), R.data(1, message(bytes(100_000)), ends=True))
        await peer.settle()
        assert peer.answers[1].messages == [bytes(100_000)]
        return max(len(each.payload) for each in peer.frames if each.kind == frames.DATA)

    assert asyncio.run(main(16_384)) == 16_384
    assert asyncio.run(main(50_000)) == 50_000


def test_a_method_waits_while_its_client_takes_nothing():
    async def main():
        peer = small()
        made = []

        async def endless(questions, context):
            while True:
                made.append(None)
                await context.write(b"x" * 95)

        peer.echo.stream = endless
        peer.send(peer.headers(1, STREAM))
        await peer.turn()
        assert len(made) == 1
        peer.send(window(1, 1000))
        await peer.turn(50)
        assert len(made) == 11
        peer.send(frames.rst_stream(1, frames.ErrorCode.CANCEL))
        await peer.settle()

    asyncio.run(main())


def test_methods_wait_while_the_transport_is_full_and_go_on_after_that():
    async def main():
        peer = Peer()
        peer.connection.pause_writing()
        assert not peer.pipe.is_reading
        peer.send(peer.call(1, b"a"), peer.call(3, b"b", STREAM))
        await peer.turn()
        assert not peer.answers
        peer.connection.resume_writing()
        assert peer.pipe.is_reading
        await peer.settle()
        assert peer.answers[1].messages == [b"a"]
        assert peer.answers[3].messages == [b"b"]

    asyncio.run(main())


def test_a_cancelled_call_leaves_its_turn_to_the_next():
    async def main():
        peer = Peer()
        peer.connection.pause_writing()
        for stream_id in (1, 3, 5):
            peer.send(peer.call(stream_id, b"a"))
        await peer.turn()
        peer.connection.resume_writing()
        # It has the turn, and ends before it can use it.
        peer.send(frames.rst_stream(1, frames.ErrorCode.CANCEL))
        await peer.settle()
        assert {id: each.messages for id, each in peer.answers.items()} == {3: [b"a"], 5: [b"a"]}

    asyncio.run(main())


def test_a_stream_without_room_leaves_its_turn_to_the_next():
    async def main():
        peer = Peer()
        peer.connection.pause_writing()
        peer.send(peer.call(1, b"a"), peer.call(3, b"b"))
        await peer.turn()
        peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 0}), window(3, 100))
        peer.connection.resume_writing()
        await peer.turn()
        assert {id: each.messages for id, each in peer.answers.items()} == {3: [b"b"]}
        peer.send(window(1, 100))
        await peer.settle()
        assert peer.answers[1].messages == [b"a"]

    asyncio.run(main())


def test_a_deadline_in_the_middle_of_a_message_resets_the_stream():
    async def main():
        peer = small()
        peer.send(peer.call(1, b"x" * 95, grpc_timeout="20m"), window(1, 50))
        await peer.settle()
        assert len(peer.answers[1].data) == 50
        assert peer.answers[1].reset == frames.ErrorCode.CANCEL
        assert not peer.answers[1].trailers

    asyncio.run(main())


@pytest.mark.parametrize("path", [UNARY, STREAM])
@pytest.mark.parametrize("taken", [0, 50])
def test_a_client_that_lives_and_takes_nothing_loses_its_call(monkeypatch, caplog, path, taken):
    monkeypatch.setattr(stream, "ROOM_TIMEOUT_S", 0.01)

    async def main():
        peer = small()
        peer.send(peer.call(1, b"x" * 95, path))
        if taken:
            peer.send(window(1, taken))
        await peer.settle()
        answer = peer.answers[1]
        assert len(answer.data) == taken
        if taken:
            assert answer.reset == frames.ErrorCode.CANCEL
        else:
            assert answer.status == 1
        assert not peer.pipe.is_closed

    asyncio.run(main())
    assert not caplog.records


def test_a_client_is_given_more_room_for_what_was_taken_and_seldom():
    async def main():
        peer = Peer(max_message_bytes=1 << 20)
        size = 1 << 20
        for number in range(32):
            peer.send(peer.headers(2 * number + 1), R.data(2 * number + 1, message(bytes(size - 5)), ends=True))
            await peer.turn(2)
        room = [each for each in peer.frames if each.kind == frames.WINDOW_UPDATE and not each.stream_id]
        assert len(room) == 4  # with the first, at the greeting
        assert updates(peer.frames, 0) >= 16 << 20
        await peer.leave()

    asyncio.run(main())


def test_a_message_larger_than_the_window_is_received():
    async def main():
        peer = Peer(max_message_bytes=100 << 20)
        got = []

        async def keep(data, context):
            got.append(data)
            return b""

        peer.echo.infer = keep
        data = message(bytes(3 * WINDOW_BYTES))
        peer.send(peer.headers(1))
        step = 1 << 20
        for at in range(0, len(data), step):
            peer.send(R.data(1, data[at : at + step], ends=at + step >= len(data)))
        await peer.settle()
        assert len(got[0]) == 3 * WINDOW_BYTES
        assert updates(peer.frames, 1) >= 2 * WINDOW_BYTES
        assert peer.answers[1].messages == [b""]

    asyncio.run(main())


def test_a_stream_that_nobody_reads_gets_no_more_room_until_it_is_read():
    async def main():
        peer = Peer(max_message_bytes=8 << 20)
        gate = asyncio.Event()

        async def late(questions, context):
            await gate.wait()
            async for _ in questions:
                peer.echo.num_read += 1

        peer.echo.stream = late
        peer.send(peer.headers(1, STREAM))
        for _ in range(16):
            peer.send(R.data(1, message(bytes((1 << 20) - 5))))
            await peer.turn(2)
        assert updates(peer.frames, 1) == 0
        gate.set()
        await peer.turn(60)
        assert peer.echo.num_read == 16
        assert updates(peer.frames, 1) >= 8 << 20
        assert peer.connection._intake.held_bytes == 0
        await peer.leave()

    asyncio.run(main())


def test_a_connection_whose_messages_wait_gets_no_more_room_until_they_are_taken(monkeypatch):
    monkeypatch.setattr(intake, "MAX_WAITING_BYTES", 10 << 20)

    async def main():
        peer = Peer()
        gate = asyncio.Event()

        async def late(questions, context):
            await gate.wait()
            async for _ in questions:
                pass

        peer.echo.stream = late
        for stream_id in (1, 3, 5, 7, 9):
            # 20 MiB in all: more than the limit, and less than would be allowed without it.
            peer.send(peer.headers(stream_id, STREAM))
            for _ in range(4):
                peer.send(R.data(stream_id, message(bytes((1 << 20) - 5))))
        given = updates(peer.seen(), 0)
        assert given <= 10 << 20
        gate.set()
        await peer.turn(60)
        assert updates(peer.seen(), 0) > 8 << 20
        await peer.leave()

    asyncio.run(main())


@pytest.mark.parametrize("path", [UNARY, STREAM])
def test_unfinished_messages_of_one_connection_have_a_limit(monkeypatch, path):
    monkeypatch.setattr(intake, "MAX_WAITING_BYTES", 4 << 20)

    async def main():
        peer = Peer(max_message_bytes=8 << 20)
        for stream_id in range(1, 20, 2):
            peer.send(peer.headers(stream_id, path), R.data(stream_id, message(bytes(8 << 20))[: 1 << 20]))
            peer.send(R.data(stream_id, bytes(1 << 20)))
        statuses = {id: each.status for id, each in peer.answers.items() if each.is_ended}
        assert set(statuses.values()) == {8}
        assert peer.connection._intake.held_bytes <= 12 << 20
        assert 0 < len(statuses) < 10
        await peer.leave()
        assert peer.connection._intake.held_bytes == 0
        assert peer.connection._intake.num_readable == 0

    asyncio.run(main())
