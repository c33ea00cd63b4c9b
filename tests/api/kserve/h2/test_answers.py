import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.api.kserve.h2.peer import read_answers, read_frames

from sardonyx.api.kserve.h2.answers import http_refusal, literal, trailers, whole


def decoded(block):
    return hpack.Decoder().decode(block, raw=True)


@given(st.binary(min_size=1, max_size=300), st.binary(max_size=5000))
def test_literals_are_hpack(name, value):
    assert decoded(literal(name, value)) == [(name, value)]


def test_blocks_change_no_table():
    decoder = hpack.Decoder()
    decoder.header_table_size = 0
    assert decoder.decode(trailers(5, "x", (("a", "b"),))) == [("grpc-status", "5"), ("grpc-message", "x"), ("a", "b")]
    assert not decoder.header_table.dynamic_entries


@pytest.mark.parametrize(
    ("details", "sent"),
    [
        ("plain ~ text!", b"plain ~ text!"),
        ("100 %", b"100 %25"),
        ("ü\n\x7f", b"%C3%BC%0A%7F"),
        ("\ud800", b"?"),
        ('"quoted" [id]: {a|b} \\ ^ `', b'"quoted" [id]: {a|b} \\ ^ `'),
    ],
)
def test_messages_are_escaped(details, sent):
    assert dict(decoded(trailers(3, details)))[b"grpc-message"] == sent


def test_a_refusal_in_http_has_its_status():
    assert decoded(http_refusal(415)) == [(b":status", b"415")]


@given(st.integers(1, (1 << 31) - 1), st.binary(max_size=300))
def test_a_whole_answer_is_three_frames(stream_id, data):
    found = read_frames(whole(stream_id, data))
    assert len(found) == 3
    answer = read_answers(found)[stream_id]
    assert answer.headers["content-type"] == "application/grpc"
    assert answer.messages == [data]
    assert answer.trailers == {"grpc-status": "0"}
    assert answer.is_ended
