import contextlib
import timeit

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sardonyx.api.kserve.json_text import MAX_DEPTH, check_containers, check_nesting, decode_json
from sardonyx.errors import InvalidRequest, PayloadTooLarge


class Item(msgspec.Struct):
    name: str
    shape: list[int] = []
    flag: bool = False


class Body(msgspec.Struct):
    items: list[Item]
    parameters: dict[str, bool | int | float | str] = {}
    data: msgspec.Raw = msgspec.Raw()


DECODER = msgspec.json.Decoder(Body)
ANYTHING = msgspec.json.Decoder(object)


def depth_of(value):
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@pytest.mark.parametrize("opener", ["[", '{"a":'])
def test_nesting_is_bounded(opener):
    closer = "]" if opener == "[" else "}"
    for depth, is_fine in ((MAX_DEPTH, True), (MAX_DEPTH + 1, False), (100_000, False)):
        text = (opener * depth + "1" + closer * depth).encode()
        if is_fine:
            check_nesting(text)
        else:
            with pytest.raises(InvalidRequest, match=r"JSON nesting depth exceeds maximum allowed limit \(100\)"):
                check_nesting(text)


@settings(deadline=None)
@given(st.lists(st.text(alphabet='[]{}"\\a', max_size=9), min_size=30, max_size=60))
def test_brackets_in_strings_are_not_nesting(strings):
    check_nesting(msgspec.json.encode([strings] * 4))


def test_text_that_no_quote_ends_is_looked_at_once():
    text = b'{"a":' + b"[" * 200 + b'"\\"' * 1_000_000

    def decode():
        with pytest.raises(InvalidRequest):
            decode_json(text, ANYTHING)

    assert timeit.timeit(decode, number=1) < 10.0  # each quote to the end would be hours


@settings(deadline=None)
@given(st.text(alphabet='[]{}"\\,:1aNIfinty -', max_size=40))
def test_any_text_is_decoded_or_refused(text):
    with contextlib.suppress(InvalidRequest):
        decode_json(text.encode(), ANYTHING)


def test_literals_that_json_lacks_become_strings():
    assert decode_json(b'[NaN, -Infinity, Infinity, "NaN", 1]', ANYTHING) == ["NaN", "-Infinity", "Infinity", "NaN", 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "failed to parse the request JSON buffer"),
        (b"{", "failed to parse the request JSON buffer"),
        (b'{"items":[{"name":"\xff"}]}', "failed to parse the request JSON buffer"),
        (b"[]", "the request JSON: attempt to access JSON non-object as object"),
        (b"{}", "'items' is required"),
        (b'{"items":[{}]}', "'name' is required in 'items'"),
        (b'{"items":[{"name":5}]}', "Unable to parse 'name': attempt to access JSON non-string as string"),
        (b'{"items":[{"name":"a","shape":[1.5]}]}', "Unable to parse 'shape': attempt to access JSON non-unsigned-int"),
        (b'{"items":[{"name":"a","flag":1}]}', "Unable to parse 'flag': attempt to access JSON non-boolean as boolean"),
        (b'{"items":5}', "Unable to parse 'items': attempt to access JSON non-array as array"),
        (b'{"items":[],"parameters":{"a":[]}}', "a parameter has invalid type"),
    ],
)
def test_what_is_wrong_is_said_in_tritons_words(text, message):
    with pytest.raises(InvalidRequest, match=message):
        decode_json(text, DECODER)


def test_containers_are_counted_outside_of_strings():
    check_containers(b'["' + b"[" * 200_000 + b'"]')
    with pytest.raises(PayloadTooLarge):
        check_containers(b"[" + b"[]," * 200_000 + b"[]]")
