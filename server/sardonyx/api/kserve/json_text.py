"""Request JSON: one strict way to decode it, with Triton's messages and bounds on what it may cost.

Floor 5. msgspec reads the bytes straight into the wanted type. What it does not bound is checked on the text before:
nesting, and how many objects and lists there are, since 64 MiB of ``[],`` would become gigabytes.
"""

import re
from typing import Any, TypeVar

import msgspec
import numpy as np

from sardonyx.errors import InvalidRequest, PayloadTooLarge

T = TypeVar("T")

MAX_DEPTH = 100
"""Of nested lists and objects; Triton's."""
MAX_CONTAINERS = 131_072
"""Objects and lists outside of numeric data, as in the bodies of `api.body`."""
MAX_MEMBERS = 4 * MAX_CONTAINERS
"""Of all objects together."""
MAX_LITERALS = 1 << 20
"""``NaN`` and ``Infinity``, each of which is rewritten."""

# Possessive, or a string of 28 MB takes 10 s, in which no thread runs Python, and 3.5 GB. A string that does not end
# runs to the text's end, so that no text is looked at twice.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)'
# Strings with nothing to replace between them are one match: each costs a call and a hundred bytes.
_LITERALS = re.compile(rb"(?:" + _STRING + rb'[^"NI-]*+)++|-?\bInfinity\b|\bNaN\b', re.DOTALL)
_IS_BRACKET = np.isin(np.arange(256), list(b"[]{}"))
_AT = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$")
_INDEX = re.compile(r"\[(?:\d+|\.\.\.)\]")
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_EXPECTED = re.compile(r"Expected `(\w+)(?: \| null)?`")
_JSON_TYPES = {"str": "string", "bool": "boolean", "int": "unsigned-integer", "array": "array", "object": "object"}
"""What Triton calls msgspec's types. The protocol has unsigned integers only, in shapes, sizes and offsets."""


def decode_json(text: bytes | memoryview, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode one JSON document. ``NaN`` and ``Infinity``, which Triton reads, become strings.

    Raises:
        InvalidRequest: it is not JSON, nested too deeply, or a field has the wrong type.
    """
    check_nesting(text)
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        raise _mistyped(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raw = bytes(text)
        if raw.count(b"NaN") + raw.count(b"Infinity") > MAX_LITERALS:
            raise PayloadTooLarge(
                f"the JSON has more than {MAX_LITERALS:,} NaN and Infinity; send it as bytes"
            ) from None
        escaped = _LITERALS.sub(_as_string, text)
        if len(escaped) != len(text):
            return decode_json(escaped, decoder)
        reason = str(error).removeprefix("JSON is malformed: ")
        raise InvalidRequest(f"failed to parse the request JSON buffer: {reason}") from None


def check_nesting(text: bytes | memoryview) -> None:
    """Raise InvalidRequest where lists and objects are nested more than `MAX_DEPTH` deep."""
    raw = bytes(text)
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return
    outside = _outside_strings(raw)
    brackets = outside[_IS_BRACKET[outside]]
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), np.int8(1), np.int8(-1))
    if np.cumsum(steps, dtype=np.int64).max(initial=0) > MAX_DEPTH:
        raise InvalidRequest(f"JSON nesting depth exceeds maximum allowed limit ({MAX_DEPTH})")


def check_containers(text: bytes | memoryview, openers: bytes = b"[{") -> None:
    """Raise PayloadTooLarge where more than `MAX_CONTAINERS` of the lists and objects open that `openers` begin.

    Or where objects have more than `MAX_MEMBERS`.
    """
    if has_more(text, openers, MAX_CONTAINERS):
        raise PayloadTooLarge(f"the JSON opens more than {MAX_CONTAINERS:,} lists and objects; split the request")
    if has_more(text, b":", MAX_MEMBERS):
        raise PayloadTooLarge(f"the JSON's objects have more than {MAX_MEMBERS:,} members; split the request")


def has_more(text: bytes | memoryview, characters: bytes, limit: int) -> bool:
    """Whether more of these characters than `limit` stand outside of strings."""
    raw = bytes(text)
    if sum(raw.count(character) for character in characters) <= limit:
        return False
    return int(np.isin(_outside_strings(raw), list(characters)).sum()) > limit


def _outside_strings(text: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What stands outside of strings. Takes a few bytes for each of the text's."""
    # What is escaped cannot end a string; pairs of backslashes go first, so that one before a quote is its own.
    marks = np.frombuffer(text.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    is_inside = np.logical_xor.accumulate(marks == ord('"'))
    return marks[~is_inside]


def _as_string(match: re.Match[bytes]) -> bytes:
    found = match[0]
    return found if found.startswith(b'"') else b'"' + found + b'"'


def _mistyped(message: str) -> InvalidRequest:
    """Turn msgspec's ``Expected `int`, got `str` - at `$.inputs[0].shape[1]` `` into what Triton says."""
    at = _AT.search(message)
    reason = message[: at.start()] if at else message
    path = _INDEX.sub("", at[1]) if at else ""
    if missing := _MISSING.fullmatch(reason):
        where = f" in '{path}'" if path else ""
        return InvalidRequest(f"'{missing[1]}' is required{where}", param=missing[1])
    field = path.rpartition(".")[2]
    if field == "parameters" and "object" not in reason.partition("got")[0]:
        return InvalidRequest(
            "a parameter has invalid type. It should be either 'int', 'bool', 'double' or 'string'", param=path
        )
    expected = _EXPECTED.match(reason)
    if expected and (wanted := _JSON_TYPES.get(expected[1])):
        reason = f"attempt to access JSON non-{wanted} as {wanted}"
    else:
        reason = reason.replace("`", "").replace("Expected", "expected")
    return InvalidRequest(
        f"Unable to parse '{field}': {reason}" if field else f"the request JSON: {reason}", param=path
    )
