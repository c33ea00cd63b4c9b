import contextlib
import timeit
import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sardonyx.api.kserve import json_text
from sardonyx.api.kserve.json_text import (
    MAX_DEPTH,
    MAX_LITERALS,
    MAX_MEMBERS,
    check_containers,
    check_nesting,
    decode_json,
    has_more,
)
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


@pytest.mark.parametrize(
    "strings", [b'"' + b"[x" * 500_000 + b'"', b",".join([b'"["'] * 250_000), b'"' + b'\\"[' * 300_000 + b'"']
)
def test_strings_take_a_few_times_their_own_memory(strings):
    text = b'{"items":[' + strings + b",NaN" + b"[]" * 100 + b"]}"
    tracemalloc.start()
    check_nesting(text)
    with pytest.raises(InvalidRequest):
        decode_json(text, DECODER)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * len(text)


@given(st.lists(st.text(alphabet='[]{}"\\a', max_size=9) | st.lists(st.just(""), max_size=3), max_size=30))
def test_lists_are_counted_outside_of_strings_only(values):
    num_lists = 1 + sum(isinstance(value, list) for value in values)
    text = msgspec.json.encode([values] * 4)
    assert bytes(json_text._outside_strings(text)).count(b"[") == 1 + 4 * num_lists


@pytest.mark.parametrize("literal", [b"NaN", b"Infinity", b"-Infinity"])
@pytest.mark.parametrize("before", [b'"a",', b'"a", "NaN", -1, ', b'"\\"", 1, "",', b'{"NaN":"Infinity"},'])
def test_what_json_has_no_number_for_becomes_a_string_wherever_it_stands(before, literal):
    known = msgspec.json.decode(b"[" + before + b"0]")[:-1]
    assert decode_json(b"[" + before + literal + b",1]", ANYTHING) == [*known, literal.decode(), 1]


def test_members_are_bounded_and_colons_in_strings_are_none():
    check_containers(msgspec.json.encode({"a": ":" * (MAX_MEMBERS + 1)}))
    with pytest.raises(PayloadTooLarge, match="members"):
        check_containers(b"{" + b'"a":1,' * (MAX_MEMBERS + 1) + b'"b":1}')


def test_literals_are_bounded():
    with pytest.raises(PayloadTooLarge, match="NaN and Infinity"):
        decode_json(b"[" + b"NaN," * (MAX_LITERALS + 1) + b"1]", ANYTHING)


@given(st.lists(st.text(alphabet='[]{},"\\a', max_size=9), max_size=30), st.integers(0, 30))
def test_characters_are_counted_outside_of_strings_only(strings, limit):
    assert has_more(msgspec.json.encode(strings), b",", limit) == (max(0, len(strings) - 1) > limit)


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
