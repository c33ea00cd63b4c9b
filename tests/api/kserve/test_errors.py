import inspect

import grpc
import msgspec
import pytest

from sardonyx import errors
from sardonyx.api.kserve.errors import (
    ANSWERS,
    encode_error,
    encode_message,
    grpc_code_name,
    headers_for,
    http_status,
    message_of,
)

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.ServeError)]


@pytest.mark.parametrize("kind", TREE)
def test_every_class_of_the_tree_has_a_row_with_both_statuses(kind):
    answer = ANSWERS[kind]
    assert 400 <= answer.http_status < 600
    assert answer.grpc_code in grpc.StatusCode.__members__


def test_a_class_without_a_row_is_answered_as_its_nearest_parent():
    class TooFunny(errors.UnsupportedFeature):
        pass

    assert http_status(TooFunny("x")) == 501
    assert grpc_code_name(TooFunny("x")) == "UNIMPLEMENTED"


def test_an_unexpected_exception_is_internal_and_says_nothing_about_itself():
    error = ValueError("secret")
    assert (http_status(error), grpc_code_name(error)) == (500, "INTERNAL")
    assert encode_error(error) == b'{"error":"internal error"}'


def test_a_body_over_its_limit_is_answered_as_triton_does():
    error = errors.PayloadTooLarge("x")
    assert (http_status(error), grpc_code_name(error)) == (400, "RESOURCE_EXHAUSTED")


def test_the_envelope_is_one_string():
    assert msgspec.json.decode(encode_error(errors.InvalidRequest('a "quoted" word'))) == {"error": 'a "quoted" word'}


def test_a_message_about_a_request_with_an_id_begins_with_it():
    assert message_of(errors.InvalidRequest("bad shape"), "7") == "[request id: 7] bad shape"
    assert message_of(errors.InvalidRequest("bad shape"), "") == "bad shape"


def test_an_id_is_not_written_twice():
    assert message_of(errors.InvalidRequest("[request id: 7] bad shape"), "7") == "[request id: 7] bad shape"


def test_a_message_about_a_model_has_no_request_id():
    assert message_of(errors.ModelNotFound("Request for unknown model: 'x' is not found"), "7").startswith("Request")


def test_a_full_server_says_when_to_come_again():
    assert headers_for(errors.Overloaded("full", retry_after_s=2.3)) == [(b"retry-after", b"3")]
    assert headers_for(errors.Overloaded("full", retry_after_s=0.0)) == [(b"retry-after", b"1")]


def test_a_missing_key_is_answered_with_the_scheme_to_use():
    assert headers_for(errors.Unauthenticated("who?")) == [(b"www-authenticate", b"Bearer")]


def test_a_message_that_is_not_unicode_is_told_all_the_same():
    assert encode_message("a\ud800b") == b'{"error":"a?b"}'
