"""The OpenAPI document: what Litestar gathers from the handlers, completed by msgspec's own schemas of the bodies.

Floor 5. Litestar's schemas of structs leave constraints out; msgspec's say exactly what is checked.
"""

import ast
import inspect
import typing
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import msgspec
from litestar import Litestar, MediaType, Request, Router, post
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme

from sardonyx.api.body import StrictJson, json_body
from sardonyx.api.openai.errors import DECLARED_STATUSES, ErrorBody
from sardonyx.api.parts import MULTIPART

_FORM = "form"
"""Under this name a handler's ``opt`` holds the struct of its form."""
_TEXTS = "texts"
"""Under this one the media types of its answers beside JSON."""
_REFERENCE = "#/components/schemas/{name}"


def answers(reply: Any, media_type: MediaType | str = MediaType.JSON) -> dict[int, ResponseSpec]:
    """``responses=`` of a handler: the reply, and the envelope for whatever may go wrong."""
    refused = ResponseSpec(ErrorBody, generate_examples=False, description="Refused or failed; the envelope says why.")
    success = ResponseSpec(reply, generate_examples=False, description="Success.", media_type=media_type)
    return {200: success} | dict.fromkeys(DECLARED_STATUSES, refused)


def json_post(path: str | list[str], body: type[msgspec.Struct], reply: Any, **options: Any) -> post:
    """A POST handler that takes `body` as JSON and answers 200 with `reply`."""
    return post(path, dto=json_body(body), return_dto=None, status_code=200, responses=answers(reply), **options)


def form_post(path: str, form: type[msgspec.Struct], reply: Any, *, media_types: Sequence[str] = ()) -> post:
    """A POST handler that reads a multipart `form` itself (`api.form.read_form`) and answers 200 with `reply`.

    Args:
        media_types: of plain texts that it may answer with instead.
    """
    options = {_FORM: form, _TEXTS: media_types}
    return post(path, return_dto=None, status_code=200, responses=answers(reply), opt=options)


def openapi_config(version: str, *, needs_key: bool) -> OpenAPIConfig:
    """For `Litestar(openapi_config=...)`: the document at ``/schema/openapi.json``."""
    bearer = SecurityScheme(type="http", scheme="bearer")
    return OpenAPIConfig(
        title="Sardonyx",
        version=version,
        description="OpenAI's API, and what vLLM, llama.cpp and text-generation-webui add to it.",
        use_handler_docstrings=True,
        components=Components(security_schemes={"bearer": bearer} if needs_key else None),
        security=[{"bearer": []}] if needs_key else None,
        render_plugins=[_Document(path="/openapi.json", media_type="application/json")],  # type: ignore[arg-type]  # any string works, and clients know this one
    )


class _Document(JsonRenderPlugin):
    """Puts msgspec's schemas where `StrictJson` only left references."""

    _rendered: bytes | None = None

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        if self._rendered is None:
            schemas = openapi_schema["components"]["schemas"]
            forms = _forms(request.app)
            schemas |= body_schemas([*_bodies(request.app), *(handler.opt[_FORM] for handler in forms.values())])
            for path, operations in openapi_schema["paths"].items():
                if path in forms:
                    _declare_form(operations["post"], forms[path], schemas)
                for operation in operations.values():
                    _declare_stream(operation, schemas)
            self._rendered = msgspec.json.encode(openapi_schema)
        return self._rendered

    def receive_router(self, router: Router) -> None:
        # Litestar would answer every other path below with a page of HTML, not with the envelope.
        router.routes = [route for route in router.routes if "{" not in route.path]


def body_schemas(bodies: Iterable[type[msgspec.Struct]]) -> dict[str, Any]:
    """JSON Schemas by name of structs and all that they hold; the text under a field is its description."""
    structs = list(bodies)
    _, components = msgspec.json.schema_components(structs, ref_template=_REFERENCE)
    for struct in structs:
        for name, text in _field_texts(struct).items():
            components[struct.__name__]["properties"].get(name, {}).setdefault("description", text)
    return components


def _handlers(app: Litestar) -> Iterator[HTTPRouteHandler]:
    for route in app.routes:
        for handler in getattr(route, "route_handlers", ()):
            if isinstance(handler, HTTPRouteHandler):
                yield handler


def _forms(app: Litestar) -> dict[str, HTTPRouteHandler]:
    """Those that read forms, by path."""
    return {path: handler for handler in _handlers(app) if _FORM in handler.opt for path in handler.paths}


def _declare_form(operation: dict[str, Any], handler: HTTPRouteHandler, schemas: dict[str, Any]) -> None:
    form = handler.opt[_FORM]
    schema = {"$ref": _REFERENCE.format(name=form.__name__)}
    operation["requestBody"] = {"required": True, "content": {MULTIPART: {"schema": schema}}}
    for name, kind in typing.get_type_hints(form).items():
        if kind is bytes:
            # As the bytes that they are; msgspec means base64 in JSON.
            described = schemas[form.__name__]["properties"][name]
            del described["contentEncoding"]
            described["format"] = "binary"
    for media_type in handler.opt[_TEXTS]:
        operation["responses"]["200"]["content"][media_type] = {"schema": {"type": "string"}}


def _bodies(app: Litestar) -> list[type[msgspec.Struct]]:
    transfers = (handler.resolve_data_dto() for handler in _handlers(app))
    return [dto.model_type for dto in transfers if dto is not None and issubclass(dto, StrictJson)]


def _declare_stream(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Where a body may ask for a stream, the answer may be one.

    Without a schema: OpenAPI 3.1 has none for events, and one for the text would be held against each event by some.
    """
    content = operation.get("requestBody", {}).get("content", {})
    reference: dict[str, str] = next((each.get("schema", {}) for each in content.values()), {})
    body = schemas.get(reference.get("$ref", "").rpartition("/")[2], {})
    if "stream" in body.get("properties", {}):
        operation["responses"]["200"]["content"]["text/event-stream"] = {}


def _field_texts(struct: type[msgspec.Struct]) -> dict[str, str]:
    texts = {}
    for kind in reversed(struct.__mro__):
        if not issubclass(kind, msgspec.Struct) or kind is msgspec.Struct:
            continue
        body = ast.parse(inspect.getsource(kind)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                texts[field.target.id] = str(ast.literal_eval(text.value))
    return texts
