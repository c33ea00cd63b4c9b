"""Multipart bodies: a form's parts as the struct that an endpoint declares.

Floor 5. Every value of a form is text. Clients spell lists and objects in several ways; all of them are read:
``include[]=a`` twice, ``include=a`` twice, ``chunking_strategy[type]=server_vad``, and an object as JSON in one part.
"""

import re
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from litestar import Request

from sardonyx.api.body import decode_json, invalid_field
from sardonyx.api.parts import Part, read_parts
from sardonyx.errors import InvalidRequest, PayloadTooLarge

MAX_TEXT_BYTES = 1 << 20
"""Of one value that is no file. A megabyte of JSON takes some milliseconds of the event loop."""
_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1", "latin-1", "windows-1252"})
"""Python knows codecs that take time quadratic in a text's length, and some whose result is no text."""
_NAME = re.compile(r"(\w+)(?:\[(\w*)\])?")
_ANYTHING = msgspec.json.Decoder(Any)

F = TypeVar("F", bound=msgspec.Struct)


async def read_form(request: "Request[Any, Any, Any]", form: type[F]) -> F:
    """The body of a request as a `form`.

    Fields of type ``bytes`` are files, in memory once read. Unknown fields are ignored, as in JSON bodies; an empty
    value counts as absent.

    Raises:
        HTTPException: as `read_parts`.
        InvalidRequest: the body is broken, or a field is missing, repeated, of the wrong type or out of range.
        PayloadTooLarge: a value that is no file is longer than `MAX_TEXT_BYTES`.
    """
    kinds = typing.get_type_hints(form)
    values: dict[str, Any] = {}
    for part in await read_parts(request):
        match = _NAME.fullmatch(part.name)
        if match is not None and match[1] in kinds:
            _add(values, kinds, match[1], match[2], part)
    try:
        return msgspec.convert(values, form, strict=False)
    except msgspec.ValidationError as error:
        raise invalid_field(str(error)) from None


def _add(values: dict[str, Any], kinds: Mapping[str, Any], field: str, key: str | None, part: Part) -> None:
    """One part, named ``field[key]`` or ``field``."""
    kind = kinds[field]
    if part.is_file != (kind is bytes):
        wanted = "be uploaded as a file, with a file name" if kind is bytes else "be text, not a file"
        raise InvalidRequest(f"{field}: must {wanted}", param=field)
    read: Any = part.data if part.is_file else _text(field, part)
    if not part.is_file and not read:
        return
    if typing.get_origin(kind) is list:
        values.setdefault(field, []).append(read)
    elif part.is_file:
        # However lists are spelled: `image` again, `image[]`, `image[1]`.
        if field in values:
            raise InvalidRequest(f"{field}: is given twice; one file is taken", param=field)
        values[field] = read
    elif key:
        inside = values.setdefault(field, {})
        if not isinstance(inside, dict):
            raise InvalidRequest(f"{field}: is given in two ways", param=field)
        if key in inside:
            raise InvalidRequest(f"{field}: {key} is given twice", param=field)
        inside[key] = read
    elif field in values:
        raise InvalidRequest(f"{field}: is given twice", param=field)
    elif isinstance(read, str) and read.lstrip()[:1] == "{" and str not in (kind, *typing.get_args(kind)):
        values[field] = _object(field, read)
    else:
        values[field] = read


def _text(field: str, part: Part) -> str:
    if len(part.data) > MAX_TEXT_BYTES:
        raise PayloadTooLarge(f"{field}: is longer than {MAX_TEXT_BYTES:,} bytes", param=field)
    charset = part.charset or "utf-8"
    if charset.lower() not in _CHARSETS:
        raise InvalidRequest(f"{field}: is in a charset that is not read here; send UTF-8", param=field)
    try:
        return part.data.decode(charset)
    except UnicodeDecodeError:
        raise InvalidRequest(f"{field}: is no text in the charset {charset}", param=field) from None


def _object(field: str, text: str) -> Any:
    try:
        return decode_json(text.encode(), _ANYTHING)
    except InvalidRequest as error:
        raise InvalidRequest(f"{field}: {error.message.removeprefix('the body ')}", param=field) from None
