"""Frames are found however bytes were cut, and nothing that comes is answered with an exception."""

import asyncio
import itertools
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.api.kserve.h2.peer import STREAM, Peer, Requests, message

from sardonyx.api.kserve.h2 import frames
from sardonyx.api.kserve.h2.frames import frame

R = Requests


def conversation():
    """A client's side of a few calls of every kind."""
    made = Requests()
    padded = frame(frames.DATA, frames.PADDED | frames.END_STREAM, 9, b"\x07" + message(b"padded") + bytes(7))
    return b"".join(
        [
            made.greeting(initial_window_size=1 << 20),
            made.call(1, b"one"),
            frame(frames.PRIORITY, 0, 1, bytes(5)),
            made.call(3, b"two", STREAM),
            made.headers(5, STREAM),
            frame(frames.PING, 0, 0, b"12345678"),
            R.data(5, message(b"a") + message(b"bc")[:4]),
            frame(frames.HEADERS, 0, 7, (block := made.block())[:4]),
            frame(frames.CONTINUATION, frames.END_HEADERS, 7, block[4:]),
            R.data(5, message(b"bc")[4:]),
            R.data(7, message(b"seven"), ends=True),
            frame(77, 3, 0, b"unknown"),
            made.headers(9),
            padded,
            frame(frames.DATA, frames.PADDED, 5, b"\x03" + bytes(3)),
            R.data(5, message(bytes(20_000))[:10_000]),
            R.data(5, message(bytes(20_000))[10_000:], ends=True),
            made.headers(11, "/unknown/Method"),
            R.data(11, b"x", ends=True),
            made.headers(13, ends=True),
        ]
    )


async def answers_to(chunks):
    peer = Peer(greets=False)
    for each in chunks:
        peer.send(each)
        await asyncio.sleep(0)
    await peer.settle()
    assert not peer.pipe.is_closed
    return {id: (each.headers, each.messages, each.trailers, each.is_ended) for id, each in peer.answers.items()}


WHOLE = conversation()


@pytest.fixture(scope="module")
def expected():
    answers = asyncio.run(answers_to([WHOLE]))
    assert [answers[id][1] for id in (1, 3, 5, 7, 9)] == [
        [b"one"],
        [b"two"],
        [b"a", b"bc", bytes(20_000)],
        [b"seven"],
        [b"padded"],
    ]
    assert answers[11][0]["grpc-status"] == answers[13][0]["grpc-status"] == "12"
    return answers


@settings(max_examples=150, deadline=None)
@given(cuts=st.lists(st.one_of(st.integers(0, 700), st.integers(0, len(WHOLE))), max_size=60))
def test_the_answers_do_not_depend_on_how_bytes_were_cut(expected, cuts):
    edges = [0, *sorted(cuts), len(WHOLE)]
    chunks = [WHOLE[begin:end] for begin, end in itertools.pairwise(edges)]
    assert asyncio.run(answers_to(chunks)) == expected


def test_bytes_may_come_one_by_one(expected):
    assert asyncio.run(answers_to([WHOLE[at : at + 1] for at in range(len(WHOLE))])) == expected


FRAMES = st.builds(
    frame,
    st.integers(0, 11),
    st.integers(0, 255),
    st.integers(0, 9),
    st.one_of(st.binary(max_size=40), st.sampled_from([Requests().block(), message(b"abc"), bytes(4), bytes(8)])),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(FRAMES, st.binary(max_size=30)), max_size=20), st.booleans())
def test_no_bytes_are_answered_with_an_exception(caplog_at_error, parts, greets):
    async def main():
        peer = Peer(greets=greets)
        for each in parts:
            peer.send(each)
            await asyncio.sleep(0)
        assert not peer.pipe.is_closed or peer.fault is not None
        await peer.leave()
        assert not peer.connection._streams
        intake = peer.connection._intake
        assert (intake.held_bytes, intake.num_readable) == (0, 0)

    asyncio.run(main())
    assert not caplog_at_error.records


@pytest.fixture(scope="module")
def caplog_at_error():
    """What was logged as an error by all examples together."""

    class Records(logging.Handler):
        def __init__(self):
            super().__init__(logging.ERROR)
            self.records = []

        def emit(self, record):
            self.records.append(record)

    handler = Records()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_valid_conversation_with_one_wrong_byte_does_no_harm(caplog_at_error, data):
    at = data.draw(st.integers(0, len(WHOLE) - 1))
    value = data.draw(st.integers(0, 255))

    async def main():
        peer = Peer(greets=False)
        peer.send(WHOLE[:at] + bytes([value]) + WHOLE[at + 1 :])
        await peer.turn(5)
        await peer.leave()

    asyncio.run(main())
    assert not caplog_at_error.records
