import asyncio
import gzip
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.api.kserve.h2.peer import message

from sardonyx.api.kserve.h2.messages import MIN_VIEW_BYTES, Inbox, decompress
from sardonyx.errors import PayloadTooLarge

SIZES = st.one_of(st.integers(0, 20), st.integers(MIN_VIEW_BYTES - 10, 3 * MIN_VIEW_BYTES))


@given(st.lists(SIZES, max_size=8), st.lists(SIZES.filter(bool), min_size=1, max_size=8), st.data())
def test_messages_are_cut_out_however_they_came(sizes, steps, data):
    sent = [bytes([number]) * size for number, size in enumerate(sizes)]
    stream = b"".join(map(message, sent))
    inbox, got, at, number = Inbox(1 << 20), [], 0, 0
    while at < len(stream):
        end = min(len(stream), at + steps[number % len(steps)])
        inbox.push(stream, at, end)
        at, number = end, number + 1
        if data.draw(st.booleans()):
            while (taken := inbox.pop()) is not None:
                got.append(taken)
        if number > 50:
            inbox.push(stream, at, len(stream))
            at = len(stream)
    while (taken := inbox.pop()) is not None:
        got.append(taken)
    assert got == [(False, each) for each in sent]
    assert all(type(each) is bytes for _, each in got)
    assert inbox.size == 0
    assert not inbox.has_message


def test_a_large_message_is_copied_once():
    part = bytes(1 << 18)
    inbox = Inbox(1 << 30)
    inbox.push(message(bytes(1 << 24)), 0, 5)
    for _ in range(64):
        inbox.push(part, 0, len(part))
    tracemalloc.start()
    taken = inbox.pop()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken is not None
    assert len(taken[1]) == 1 << 24
    assert peak < (1 << 24) + (1 << 20)


def test_many_small_pieces_take_little_more_than_their_bytes():
    inbox = Inbox(1 << 30)
    data = message(bytes(1 << 30))[:5] + bytes(1000)
    inbox.push(data, 0, 5)
    tracemalloc.start()
    for _ in range(20_000):
        inbox.push(data, 5, 7)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 100_000


def test_a_message_over_the_limit_is_refused_when_its_length_is_known():
    inbox = Inbox(10)
    inbox.push(message(bytes(10)), 0, 15)
    assert inbox.pop() == (False, bytes(10))
    data = message(bytes(11))
    inbox.push(data, 0, 4)
    with pytest.raises(PayloadTooLarge):
        inbox.push(data, 4, 5)


def test_a_message_over_the_limit_is_refused_in_its_turn():
    data = message(b"a") + message(bytes(11))
    inbox = Inbox(10)
    inbox.push(data, 0, len(data))
    assert inbox.pop() == (False, b"a")
    inbox.push(data, 0, 3)
    with pytest.raises(PayloadTooLarge):
        inbox.pop()


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 1_000_000])
def test_what_was_compressed_comes_back(encoding, compress, size):
    data = bytes(size)
    assert asyncio.run(decompress(compress(data), encoding, size)) == data


@pytest.mark.parametrize("size", [1, 65_536, 1_000_000, 50_000_000])
def test_what_is_too_large_is_not_decompressed_to_its_end(size):
    data = gzip.compress(bytes(size))
    tracemalloc.start()
    with pytest.raises(PayloadTooLarge):
        asyncio.run(decompress(data, "gzip", min(size - 1, 1_000_000)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000
