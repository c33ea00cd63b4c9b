"""JSON bodies: strict decoding straight into the struct that a handler declares.

Floor 5. Litestar by itself decodes to builtins and converts them leniently (``"1"`` passes for ``1``); here msgspec
reads the bytes once, and whatever is wrong becomes an `InvalidRequest` that names the field.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import msgspec
from litestar.dto import AbstractDTO
from litestar.dto.data_structures import DTOFieldDefinition
from litestar.exceptions import HTTPException
from litestar.openapi.spec import Reference, Schema
from litestar.typing import FieldDefinition

from sardonyx.errors import InvalidRequest, PayloadTooLarge, UnsupportedFeature

MAX_CONTAINERS = 131_072
"""Arrays and objects that a body may open, counted as ``[`` and ``{`` anywhere in it. What costs time and memory is not
a body's bytes but its containers: 10 MB of ``[0],`` take a second of the event loop, 10 MB of text 7 ms."""

_AT = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$")
_INDEX = re.compile(r"\[(\d+|\.\.\.)\]")
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ANYTHING = msgspec.json.Decoder(Any)
_MISSING = re.compile(r"Object missing required field `(\w+)`")


class StrictJson(AbstractDTO[Any]):
    """Transfers a JSON body into a handler's ``data``; see `json_body`."""

    decoder: ClassVar[msgspec.json.Decoder[Any]]

    def decode_bytes(self, value: bytes) -> Any:
        """Decode a whole body.

        Raises:
            InvalidRequest: not JSON, nested too deeply, a field of the wrong type or out of range.
            UnsupportedFeature: a field that we know, cannot honour, and that would change the answer.
            PayloadTooLarge: too many containers.
        """
        # A browser asks a foreign page's JSON requests for permission first, others it just sends.
        media_type = self.asgi_connection.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json" and not media_type.endswith("+json"):
            raise HTTPException(status_code=415, detail="send the body as JSON, with Content-Type: application/json")
        body = decode_json(value, self.decoder)
        refuse_fields(value, getattr(self.model_type, "refused", {}))
        return body

    @classmethod
    def create_openapi_schema(cls, field_definition: Any, handler_id: str, schema_creator: Any) -> Reference | Schema:
        """A reference to what `api.openapi` adds from msgspec's own schemas."""
        return Reference(ref=f"#/components/schemas/{cls.model_type.__name__}")

    @classmethod
    def create_for_field_definition(cls, field_definition: Any, handler_id: str, backend_cls: Any = None) -> None:
        """Nothing to make: the decoder is all there is."""

    @classmethod
    def generate_field_definitions(cls, model_type: type[Any]) -> Iterator[DTOFieldDefinition]:  # type: ignore[override]  # no generator needed
        """No field is transferred: msgspec builds the struct."""
        return iter(())

    @classmethod
    def detect_nested_field(cls, field_definition: FieldDefinition) -> bool:
        """No field is transferred."""
        return False


def json_body(model: type[msgspec.Struct]) -> type[StrictJson]:
    """``dto=`` of a handler whose ``data`` is a `model`."""
    return type(f"{model.__name__}Body", (StrictJson,), {"model_type": model, "decoder": msgspec.json.Decoder(model)})


def decode_json(body: bytes | msgspec.Raw, decoder: msgspec.json.Decoder[Any]) -> Any:
    """Decode one JSON document.

    Raises:
        InvalidRequest: as `StrictJson.decode_bytes`.
        PayloadTooLarge: too many containers.
    """
    if isinstance(body, bytes) and body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        raise PayloadTooLarge(f"the body opens more than {MAX_CONTAINERS:,} brackets and braces; split the request")
    try:
        return decoder.decode(body)
    except RecursionError:  # about a thousand levels
        raise InvalidRequest("the body is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise invalid_field(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        raise InvalidRequest(f"the body is not JSON: {reason}" if body else "the body is empty; send JSON") from None


def refuse_fields(body: bytes, refused: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse fields whose value says more than "as usual".

    Args:
        body: a JSON object that was decoded before.
        refused: field name → values that change nothing; null, an empty string, list or object never do.

    Raises:
        UnsupportedFeature: names the field.
        InvalidRequest: one of them is nested too deeply.
    """
    if not refused:
        return
    fields = decode_json(body, _FIELDS)
    for name in fields.keys() & refused.keys():
        value = decode_json(fields[name], _ANYTHING)
        if value is None or value in ("", [], {}):
            continue
        # 0 == False in Python, but 0 is no answer to "early_stopping: bool" that anybody would mean otherwise.
        if value not in refused[name]:
            raise UnsupportedFeature(f"{name}: not supported by this server; leave it out", param=name)


def invalid_field(message: str) -> InvalidRequest:
    """Turn msgspec's ``Expected `int`, got `str` - at `$.prompt[0]` `` into an error about ``prompt.0``."""
    at = _AT.search(message)
    reason = message[: at.start()] if at else message
    param = _INDEX.sub(r".\1", at[1]).replace("....", "").strip(".") if at else ""
    if missing := _MISSING.fullmatch(reason):
        param = f"{param}.{missing[1]}".strip(".")
        reason = "is required"
    # null counts as absent everywhere, so it need not be offered.
    reason = reason.replace(" | null", "").replace("Expected", "expected").replace("`", "")
    return InvalidRequest(f"{param}: {reason}" if param else f"the body: {reason}", param=param or None)
