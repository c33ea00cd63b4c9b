"""Requests made from our own OpenAPI document: none may be a server error, every answer must be as declared."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.conformance.process import serve
from tests.tiny_diffusion import make_diffusion_model, picture_file
from tests.tiny_models import make_language_model
from tests.tiny_speech import make_speech_model, wav

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

# Few files are a sound or a picture by chance.
schemathesis.openapi.format("binary", st.sampled_from([wav(0.5), picture_file()]) | st.binary())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("schema")
    make_language_model(root / "repository")
    make_speech_model(root / "repository", "hears")
    make_diffusion_model(root / "repository", "paints")
    # Answers are short, so that the time goes into requests.
    with serve(root / "repository", root / "log", "--max-choices", "4", "--max-model-len", "64") as server:
        yield server
        assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def operations(server):
    document = schemathesis.openapi.from_url(f"{server.url}/schema/openapi.json")
    return [result.ok() for result in document.get_all_operations()]


def check(operations, mode, max_examples, *, derandomize):
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing to get wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            deadline=None, suppress_health_check=list(HealthCheck), max_examples=max_examples, derandomize=derandomize
        )
        def is_answered_as_declared(case):
            case.call_and_validate(checks=CHECKS, timeout=30)

        is_answered_as_declared()


@pytest.mark.parametrize("mode", GenerationMode)
def test_any_request_is_answered_as_declared(server, operations, mode):
    check(operations, mode, 12, derandomize=True)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}),
        ("completions", {"prompt": "hi", "max_tokens": 3}),
        ("images/generations", {"prompt": "a cat", "guidance_scale": 2.2e-83, "size": None, "partial_images": 1}),
    ],
)
def test_stream_is_as_declared(operations, path, body):
    operation = next(each for each in operations if each.path == f"/v1/{path}")
    case = operation.Case(body=body | {"stream": True}, media_type="application/json")
    response = case.call_and_validate(checks=CHECKS, timeout=30)
    assert response.headers["content-type"] == ["text/event-stream; charset=utf-8"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", GenerationMode)
def test_any_of_many_requests_is_answered_as_declared(server, operations, mode):
    check(operations, mode, 200, derandomize=False)
    if mode is GenerationMode.POSITIVE:
        # Not after a dozen: which ones are drawn depends on the modules that happen to be imported.
        metrics = server.request("GET", "/metrics")[1].splitlines()
        for path in ("audio/transcriptions", "audio/translations", "images/edits", "images/variations"):
            assert any(f'"/v1/{path}"' in line and 'status="200"' in line for line in metrics)
