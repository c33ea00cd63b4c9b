"""Multipart bodies: a form's parts as the struct that an endpoint declares.

Floor 5. Every value of a form is text. Clients spell lists and objects in several ways; all of them are read:
``include[]=a`` twice, ``include=a`` twice, ``chunking_strategy[type]=server_vad``, and JSON in one part.
"""

import re
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from litestar import Request
from litestar.datastructures import UploadFile
from litestar.exceptions import HTTPException

from sardonyx.api.body import decode_json, invalid_field
from sardonyx.errors import InvalidRequest

MULTIPART = "multipart/form-data"
MAX_PARTS = 128
"""OpenAI's longest list has a hundred keywords."""
_NAME = re.compile(r"(\w+)(?:\[(\w*)\])?")
_ANYTHING = msgspec.json.Decoder(Any)

F = TypeVar("F", bound=msgspec.Struct)


async def read_form(request: "Request[Any, Any, Any]", form: type[F]) -> F:
    """The body of a request as a `form`.

    Fields of type ``bytes`` are files, in memory once read. Unknown fields are ignored, as in JSON bodies; an empty
    value counts as absent.

    Raises:
        HTTPException: 415, the body is no multipart form.
        InvalidRequest: the body is broken, or a field is missing, repeated, of the wrong type or out of range.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != MULTIPART:
        raise HTTPException(status_code=415, detail=f"send the body as {MULTIPART}")
    try:
        parts = await request.form()
    except (UnicodeDecodeError, LookupError):
        raise InvalidRequest("the form: a value is no text in the charset that it names") from None
    kinds = typing.get_type_hints(form)
    values: dict[str, Any] = {}
    try:
        for name, value in parts.multi_items():
            await _add(values, kinds, name, value)
    finally:
        for _, value in parts.multi_items():
            if isinstance(value, UploadFile):
                await value.close()
    try:
        return msgspec.convert(values, form, strict=False)
    except msgspec.ValidationError as error:
        raise invalid_field(str(error)) from None


async def _add(values: dict[str, Any], kinds: Mapping[str, Any], name: str, value: "UploadFile | str") -> None:
    """One part."""
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in kinds:
        return
    field, key = match[1], match[2]
    is_file = kinds[field] is bytes
    if isinstance(value, UploadFile) != is_file:
        wanted = "be uploaded as a file, with a file name" if is_file else "be text, not a file"
        raise InvalidRequest(f"{field}: must {wanted}", param=field)
    if isinstance(value, UploadFile):
        read: Any = await value.read()
    elif not value:
        return
    else:
        read = value
    if typing.get_origin(kinds[field]) is list:
        values.setdefault(field, []).append(read)
    elif key:
        if not isinstance(values.setdefault(field, {}), dict):
            raise InvalidRequest(f"{field}: is given in two ways", param=field)
        values[field][key] = read
    elif field in values:
        raise InvalidRequest(f"{field}: is given twice", param=field)
    elif isinstance(read, str) and read.lstrip()[:1] == "{":
        # A text that begins so stays one, where the field is text.
        values[field] = read if kinds[field] is str else decode_json(read.encode(), _ANYTHING)
    else:
        values[field] = read
