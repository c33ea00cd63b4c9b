"""Signs of life, full buffers and the end, by a clock of the tests' own."""

import asyncio
import heapq
import itertools

import pytest
from tests.api.kserve.h2.peer import Pipe, read_frames

from sardonyx.api.kserve.h2 import frames, link
from sardonyx.api.kserve.h2.frames import ErrorCode
from sardonyx.api.kserve.h2.link import Link


class Clock:
    """What a link uses of an event loop."""

    def __init__(self):
        self.now_s = 1000.0
        self._calls = []
        self._numbers = itertools.count()

    def time(self):
        return self.now_s

    def call_later(self, delay_s, callback):
        handle = asyncio.TimerHandle(self.now_s + delay_s, callback, (), self)
        heapq.heappush(self._calls, (handle.when(), next(self._numbers), handle))
        return handle

    def _timer_handle_cancelled(self, handle):
        pass

    def get_debug(self):
        return False

    def advance(self, seconds):
        end_s = self.now_s + seconds
        while self._calls and self._calls[0][0] <= end_s:
            self.now_s, _, handle = heapq.heappop(self._calls)
            if not handle.cancelled():
                handle._callback()
        self.now_s = end_s


class Speaker(Link):
    has_greeted = False

    def begin(self):
        self.has_begun = True

    def hear(self):
        self.has_greeted = True
        self._heard_at_s = self._loop.time()


class EncryptedPipe(Pipe):
    def __init__(self, protocol):
        super().__init__()
        self.selected_alpn_protocol = lambda: protocol

    def get_extra_info(self, name, default=None):
        return self if name == "ssl_object" else default


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pipe():
    return Pipe()


@pytest.fixture
def speaker(clock, pipe):
    speaker = Speaker(clock)
    speaker.connection_made(pipe)
    return speaker


def test_a_client_that_never_says_http2_is_cut_off(clock, pipe, speaker):
    clock.advance(link.PREFACE_TIMEOUT_S - 0.1)
    assert not pipe.is_aborted
    clock.advance(0.2)
    assert pipe.is_aborted


def test_a_silent_client_is_asked_and_then_cut_off(clock, pipe, speaker):
    speaker.hear()
    clock.advance(link.KEEPALIVE_INTERVAL_S + 0.1)
    (ping,) = read_frames(bytes(pipe.written))
    assert ping.kind == frames.PING
    assert not ping.flags
    clock.advance(link.KEEPALIVE_TIMEOUT_S - 0.2)
    assert not pipe.is_aborted
    clock.advance(0.2)
    assert pipe.is_aborted


def test_a_client_that_answers_is_asked_again(clock, pipe, speaker):
    speaker.hear()
    for number in range(1, 5):
        while len(read_frames(bytes(pipe.written))) < number:
            clock.advance(1)
        clock.advance(link.KEEPALIVE_TIMEOUT_S - 1)
        speaker.hear()
    assert not pipe.is_aborted


def test_a_client_that_talks_is_not_asked(clock, pipe, speaker):
    for _ in range(100):
        speaker.hear()
        clock.advance(link.KEEPALIVE_INTERVAL_S / 2)
    assert not pipe.written
    assert not pipe.is_aborted


def test_a_client_that_takes_nothing_is_cut_off(clock, pipe, speaker):
    speaker.hear()
    speaker.pause_writing()
    clock.advance(link.CHOKED_TIMEOUT_S - 0.1)
    assert not pipe.is_aborted
    clock.advance(0.2)
    assert pipe.is_aborted


def test_a_client_that_takes_something_in_time_stays(clock, pipe, speaker):
    for _ in range(10):
        speaker.hear()
        speaker.pause_writing()
        clock.advance(link.CHOKED_TIMEOUT_S - 1)
        speaker.resume_writing()
        clock.advance(2)
    assert not pipe.is_aborted


def test_a_closed_connection_says_why_and_is_cut_off_when_that_cannot_be_sent(clock, pipe, speaker):
    speaker.hear()
    speaker.close(ErrorCode.ENHANCE_YOUR_CALM, 7, "too much")
    (goaway,) = read_frames(bytes(pipe.written))
    assert goaway.kind == frames.GOAWAY
    assert goaway.payload == b"\0\0\0\7\0\0\0\x0btoo much"
    assert pipe.is_closed
    assert not pipe.is_aborted
    clock.advance(link.FLUSH_TIMEOUT_S)
    assert pipe.is_aborted


def test_nothing_is_done_for_a_connection_that_is_lost(clock, pipe, speaker):
    speaker.pause_writing()
    speaker.connection_lost(None)
    speaker.write(b"x")
    speaker.write_pieces([b"x"])
    speaker.close(ErrorCode.NO_ERROR, 0)
    clock.advance(1000)
    assert not pipe.written
    assert not pipe.is_closed


@pytest.mark.parametrize(("protocol", "begins"), [("h2", True), ("http/1.1", False), (None, False)])
def test_encrypted_clients_negotiate_http2(clock, protocol, begins):
    pipe = EncryptedPipe(protocol)
    speaker = Speaker(clock)
    speaker.connection_made(pipe)
    assert pipe.is_closed is not begins
    if not begins:
        assert read_frames(bytes(pipe.written))[0].payload[4:8] == ErrorCode.INADEQUATE_SECURITY.to_bytes(4, "big")
