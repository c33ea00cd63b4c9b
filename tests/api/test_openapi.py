import pytest
from tests.api.live import application

from sardonyx.api.openai.errors import DECLARED_STATUSES
from sardonyx.api.openai.schemas import CompletionRequest
from sardonyx.api.openapi import body_schemas


@pytest.fixture(scope="module")
def document(api):
    return api.get("/schema/openapi.json").json()


def operations(document):
    return [(method, path, operation) for path, item in document["paths"].items() for method, operation in item.items()]


def references(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner
            else:
                yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_every_route_is_described(api, document):
    paths = {route.path.replace(":path", "").replace(":str", "") for route in api.client.app.routes}
    # KServe-v2 is described by its own specification.
    assert paths - set(document["paths"]) == {"/schema", "/schema/openapi.json", "/v2"}
    assert api.get("/schema/other").json()["error"]["code"] == "not_found"


def test_every_reference_leads_somewhere(document):
    for reference in references(document):
        assert reference.rpartition("/")[2] in document["components"]["schemas"]


def test_every_operation_declares_the_envelope(document):
    for method, path, operation in operations(document):
        for status in DECLARED_STATUSES:
            schema = operation["responses"][str(status)]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorBody"}, (method, path)
        assert operation["description"]


def test_operations_have_names_of_their_own(document):
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)


def test_bodies_are_described_as_they_are_checked(document):
    body = document["components"]["schemas"]["CompletionRequest"]
    assert body["properties"]["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 4096}
    assert body["properties"]["prompt"]["description"].startswith("A text, texts")
    chat = document["components"]["schemas"]["ChatCompletionRequest"]
    assert chat["required"] == ["messages"]


def test_what_can_be_streamed_says_so(document):
    content = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    content = document["paths"]["/tokenize"]["post"]["responses"]["200"]["content"]
    assert set(content) == {"application/json"}


@pytest.mark.parametrize(
    ("path", "form"), [("transcriptions", "TranscriptionForm"), ("translations", "TranslationForm")]
)
def test_forms_are_described_with_their_file_and_all_their_answers(document, path, form):
    operation = document["paths"][f"/v1/audio/{path}"]["post"]
    assert operation["requestBody"] == {
        "required": True,
        "content": {"multipart/form-data": {"schema": {"$ref": f"#/components/schemas/{form}"}}},
    }
    schema = document["components"]["schemas"][form]
    assert schema["required"] == ["file"]
    file = schema["properties"]["file"]
    assert (file["type"], file["format"]) == ("string", "binary")
    assert "contentEncoding" not in file
    assert "wav" in file["description"]
    assert schema["properties"]["temperature"]["maximum"] == 1
    content = operation["responses"]["200"]["content"]
    events = {"text/event-stream"} if form == "TranscriptionForm" else set()
    assert set(content) == {"application/json", "text/plain", "text/vtt"} | events


def test_every_field_that_is_not_openais_is_explained():
    properties = body_schemas([CompletionRequest])["CompletionRequest"]["properties"]
    known = {"stream", "stream_options", "top_p", "min_p", "typical_p", "skip_special_tokens", "response_format"}
    known |= {"frequency_penalty", "presence_penalty", "repetition_penalty", "include_stop_str_in_output"}
    assert {name for name, schema in properties.items() if "description" not in schema} <= known


def test_the_key_is_asked_for_where_there_is_one(script_source, document):
    assert "securitySchemes" not in document["components"]
    with application(script_source, api_keys=("sk-one",)) as api:
        assert api.get("/schema/openapi.json").status_code == 401
        locked = api.get("/schema/openapi.json", headers={"X-Api-Key": "sk-one"}).json()
    assert locked["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
