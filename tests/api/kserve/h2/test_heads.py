import contextlib

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.api.kserve.h2.answers import literal
from sardonyx.api.kserve.h2.frames import ConnectionFault, ErrorCode
from sardonyx.api.kserve.h2.heads import MAX_LIST_BYTES, MAX_REMEMBERED, HeadReader

CALL = [(":method", "POST"), (":scheme", "http"), (":path", "/a/B"), ("content-type", "application/grpc")]


def read(*more):
    return HeadReader().read(hpack.Encoder().encode([*CALL, *more]))


def test_a_repeated_block_is_looked_up():
    encoder, reader = hpack.Encoder(), HeadReader()
    first, second, third = (reader.read(encoder.encode([*CALL, ("a", "b")])) for _ in range(3))
    assert first == second
    assert second is third


def test_a_block_means_something_else_once_the_table_has_changed():
    encoder, reader = hpack.Encoder(), HeadReader()
    reader.read(encoder.encode([*CALL, ("a", "b")]))
    block = encoder.encode([*CALL, ("a", "b")])
    remembered = reader.read(block)
    assert remembered.invocation_metadata == (("a", "b"),)
    # One more entry before the others, whose numbers now are those of their successors.
    reader.read(encoder.encode([*CALL, ("a", "c")]))
    assert reader.read(encoder.encode([*CALL, ("a", "b")])) == remembered
    assert reader.read(block) != remembered


def test_a_block_with_literals_that_go_nowhere_is_looked_up():
    reader = HeadReader()
    plain = b"".join(literal(name.encode(), value.encode()) for name, value in CALL)
    assert reader.read(plain) is reader.read(plain)


def test_an_entry_like_the_last_one_changes_the_table_too():
    reader = HeadReader()
    plain = b"".join(literal(name.encode(), value.encode()) for name, value in CALL)
    # Full, so that its length stays: 4,096 bytes of entries of 34.
    for number in range(130):
        reader.read(plain + b"\x40\x01a\x01" + bytes([48 + number % 10]))
    second = plain + b"\xbf"
    assert reader.read(second).invocation_metadata == (("a", "8"),)
    reader.read(plain + b"\x40\x01a\x019")
    assert reader.read(second).invocation_metadata == (("a", "9"),)


@pytest.mark.parametrize("size", [b"\x20", b"\x3e"])
def test_a_smaller_table_is_a_change(size):
    encoder, reader = hpack.Encoder(), HeadReader()
    reader.read(encoder.encode([*CALL, ("a", "b")]))
    block = encoder.encode([*CALL, ("a", "b")])
    reader.read(block)
    reader.read(size)
    with pytest.raises(ConnectionFault):
        reader.read(block)


def test_long_blocks_are_not_remembered():
    reader = HeadReader()
    plain = b"".join(literal(name.encode(), value.encode()) for name, value in CALL) + literal(b"a", bytes(1000))
    reader.read(plain.replace(b"\0" * 1000, b"x" * 1000))
    assert not reader._known


METADATA = st.lists(
    st.tuples(st.sampled_from(["a", "b", "grpc-timeout", "key-bin"]), st.sampled_from(["1S", "2S", "AAAA", "BBBB"])),
    max_size=4,
)


@given(st.lists(METADATA, max_size=30))
def test_what_is_read_does_not_depend_on_what_is_remembered(calls):
    encoder, reader = hpack.Encoder(), HeadReader()
    for more in calls:
        assert reader.read(encoder.encode([*CALL, *more])) == read(*more)


def test_only_so_many_blocks_are_remembered():
    encoder, reader = hpack.Encoder(), HeadReader()
    names = [f"n{number}" for number in range(8)]
    reader.read(encoder.encode([*CALL, *((name, "x") for name in names)]))
    for number in range(256):
        wanted = [(name, "x") for position, name in enumerate(names) if number >> position & 1]
        assert len(reader.read(encoder.encode([*CALL, *wanted])).invocation_metadata) == len(wanted)
    assert len(reader._known) == MAX_REMEMBERED


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2H", 7200),
        ("3M", 180),
        ("4S", 4),
        ("5m", 0.005),
        ("6u", 6e-6),
        ("7n", 7e-9),
        ("0S", 0),
        ("99999999S", 99999999),
    ],
)
def test_timeouts_have_units(text, seconds):
    assert read(("grpc-timeout", text)).timeout_s == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "S", "1", "1s", "-1S", "1.5S", "1SS", " 1S", "٣S", "100000000S"])
def test_other_timeouts_are_malformed(text):
    assert read(("grpc-timeout", text)).is_malformed


def test_a_list_up_to_the_limit_is_taken():
    # 32 bytes of overhead for each field.
    rest = MAX_LIST_BYTES - sum(32 + len(name) + len(value) for name, value in CALL) - 33
    assert len(read(("a", "x" * rest)).invocation_metadata[0][1]) == rest
    with pytest.raises(ConnectionFault) as raised:
        read(("a", "x" * (rest + 1)))
    assert raised.value.code is ErrorCode.ENHANCE_YOUR_CALM


@given(st.binary(max_size=60))
def test_any_block_is_read_or_refused(block):
    with contextlib.suppress(ConnectionFault):
        assert HeadReader().read(block).http_status in (200, 405, 415)
