import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.api.body import MAX_CONTAINERS, decode_json, refuse_fields
from sardonyx.api.openai.schemas import ChatCompletionRequest, CompletionRequest
from sardonyx.errors import InvalidRequest, PayloadTooLarge, ServeError, UnsupportedFeature

DECODER = msgspec.json.Decoder(CompletionRequest)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b'{"n": "1"}', "n", "expected int, got str"),
        (b'{"n": 0}', "n", ">= 1"),
        (b'{"prompt": [[1, "a"]]}', "prompt.0.1", "expected int"),
        (b'{"stop": ["a", ""]}', "stop.1", "length >= 1"),
        (b'{"logit_bias": {"1": 101}}', "logit_bias", "<= 100"),
        (b'{"logit_bias": {"a": 1}}', "logit_bias", "expected int"),
        (b'{"stream_options": {"include_usage": 1}}', "stream_options.include_usage", "expected bool"),
        (b"[]", None, "expected object, got array"),
        (b"", None, "empty"),
        (b"{", None, "not JSON"),
        (b'{"prompt": "\xff"}', None, "not JSON"),
        (b'{"temperature": 1e999}', "temperature", "out of range"),
        (b'{"temperature": NaN}', None, "not JSON"),
        (b'{"response_format": {}}', "response_format.type", "is required"),
    ],
)
def test_what_is_wrong_is_said_with_the_field_and_the_rule(body, param, words):
    with pytest.raises(InvalidRequest) as caught:
        decode_json(body, DECODER)
    assert caught.value.param == param
    assert words in caught.value.message
    assert "null" not in caught.value.message


@pytest.mark.parametrize("key", ["prompt", "unknown", "logit_bias", "user"])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting_is_refused_and_not_a_crash(key, opening):
    body = f'{{"{key}": {opening * 100_000}'.encode()
    with pytest.raises(InvalidRequest):
        decode_json(body, DECODER)


def test_a_body_of_too_many_pieces_is_refused_before_it_is_built():
    body = b'{"prompt": [' + b",".join([b"[0]"] * MAX_CONTAINERS) + b"]}"
    with pytest.raises(PayloadTooLarge):
        decode_json(body, DECODER)


def test_a_body_of_as_many_pieces_as_allowed_does_not_hold_the_event_loop(benchmark_s):
    body = b'{"prompt": [' + b",".join([b"[0]"] * (MAX_CONTAINERS - 2)) + b"]}"
    assert benchmark_s(lambda: decode_json(body, DECODER)) < 0.5


@given(st.binary())
def test_any_bytes_are_decoded_or_refused(body):
    for kind in (CompletionRequest, ChatCompletionRequest):
        with contextlib.suppress(ServeError):
            decode_json(body, msgspec.json.Decoder(kind))


@given(st.dictionaries(st.sampled_from(CompletionRequest.__struct_fields__), JSON, max_size=3))
def test_any_values_are_decoded_or_refused_by_name(fields):
    body = msgspec.json.encode(fields)
    try:
        decode_json(body, DECODER)
    except InvalidRequest as error:
        param = error.param
    else:
        return
    assert param is None or param.partition(".")[0] in fields


@given(JSON)
def test_a_refused_field_passes_only_when_neutral(value):
    neutral = (0, "off")
    body = msgspec.json.encode({"mirostat": value, "prompt": "x"})
    if value is None or value in ("", [], {}) or value in neutral:
        refuse_fields(body, {"mirostat": neutral})
    else:
        with pytest.raises(UnsupportedFeature, match="mirostat"):
            refuse_fields(body, {"mirostat": neutral})


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
def test_a_body_that_is_not_called_json_is_refused(api, media_type):
    answer = api.client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": media_type})
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"])
def test_json_may_be_called_by_its_other_names(api, media_type):
    answer = api.client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": media_type})
    assert answer.status_code == 200
