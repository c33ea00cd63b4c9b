import asyncio
import contextlib
import gzip
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sardonyx.api.kserve.body import MAX_SMALL_PIECES, choose_encoding, compress, decompress, read_body
from sardonyx.errors import InvalidRequest, PayloadTooLarge, RequestAborted, UnsupportedFeature

MIB = 1 << 20


def receiving(*pieces, ends=True):
    """ASGI's receive for a body in pieces; a client that leaves in its middle unless it ends."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    if ends:
        messages[-1]["more_body"] = False
    waiting = iter([*messages, {"type": "http.disconnect"}])

    async def receive():
        return next(waiting)

    return receive


def read(*pieces, max_bytes=100, headers=None, **options):
    return asyncio.run(read_body(receiving(*pieces, **options), headers or {}, max_bytes))


def inflate(body, encoding, max_bytes=100):
    return asyncio.run(decompress(body, encoding, max_bytes))


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20), min_size=1, max_size=5))
def test_the_pieces_are_put_together(pieces):
    assert read(*pieces) == b"".join(pieces)


def test_the_limit_holds_for_the_bytes_that_come():
    assert read(b"a" * 100) == b"a" * 100
    for pieces in ([b"a" * 101], [b"a" * 60, b"a" * 41]):
        with pytest.raises(PayloadTooLarge, match="exceeds the maximum allowed value of 100 bytes"):
            read(*pieces, headers={"content-length": "5"})


def test_a_body_that_states_too_much_is_not_read():
    with pytest.raises(PayloadTooLarge):
        read(b"a", headers={"content-length": "101"})


def test_a_client_that_leaves_in_the_middle_is_noticed():
    with pytest.raises(RequestAborted):
        read(b"abc", ends=False)


def test_a_body_in_too_many_tiny_pieces_is_refused():
    with pytest.raises(InvalidRequest, match="Chunked request body exceeds maximum of 65536 non-empty chunks"):
        read(*[b"a"] * (MAX_SMALL_PIECES + 1), max_bytes=MIB)
    assert len(read(*[b"a"] * MAX_SMALL_PIECES, b"", max_bytes=MIB)) == MAX_SMALL_PIECES


@pytest.mark.parametrize("encoding", ["gzip", "deflate", " GZip ", "identity"])
@pytest.mark.parametrize("size", [0, 10, 300_000, 5 * MIB])
def test_a_body_is_decompressed(encoding, size):
    body = bytes(range(256)) * (size // 256)
    packers = {"gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}
    assert inflate(packers[encoding.strip().lower()](body), encoding, max_bytes=size) == body


@pytest.mark.parametrize("encoding", ["br", "gzip, deflate", "zstd"])
def test_another_encoding_is_not_supported(encoding):
    with pytest.raises(UnsupportedFeature, match="Unsupported compression type"):
        inflate(b"abc", encoding)


@pytest.mark.parametrize("limit", [100, 5 * MIB])
def test_a_bomb_is_refused_at_the_limit(limit):
    bomb = zlib.compress(bytes(200 * MIB), 9)
    with pytest.raises(PayloadTooLarge, match=f"maximum allowed value of {limit} bytes"):
        inflate(bomb, "deflate", max_bytes=limit)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"abc", "is not gzip data"),
        (gzip.compress(b"abc")[:-3], "ends in the middle"),
        (gzip.compress(bytes(MIB))[:-3], "ends in the middle"),
        (gzip.compress(b"abc") + b"x", "has bytes behind"),
    ],
)
def test_a_broken_body_is_refused(body, message):
    with pytest.raises(InvalidRequest, match=message):
        inflate(body, "gzip", max_bytes=2 * MIB)


@settings(deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["gzip", "deflate"]))
def test_any_bytes_are_decompressed_or_refused(body, encoding):
    with contextlib.suppress(InvalidRequest, PayloadTooLarge):
        assert len(inflate(body, encoding)) <= 100


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("", None),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", "gzip"),
        ("gzip;q=0.5, deflate", "deflate"),
        ("gzip;q=0.5, deflate;q=0.8, identity", None),
        ("gzip;q=0", None),
        ("br", None),
        ("*", "gzip"),
        ("*;q=0.2, gzip;q=0", "deflate"),
        ("GZIP ; Q=0.3", "gzip"),
        ("gzip;q=x", None),
        ("gzip;q=7", None),
        ("gzip;q=nan", None),
        ("identity;q=0.5, gzip;q=0.9", "gzip"),
    ],
)
def test_the_best_liked_encoding_is_chosen(accepted, encoding):
    assert choose_encoding(accepted) == encoding


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_accept_encoding_is_understood_somehow(accepted):
    assert choose_encoding(accepted) in (None, "gzip", "deflate")


def test_an_answer_is_compressed_for_any_client():
    assert gzip.decompress(compress(b"abc" * 99, "gzip")) == b"abc" * 99
    assert zlib.decompress(compress(b"abc" * 99, "deflate")) == b"abc" * 99
