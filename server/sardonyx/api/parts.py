"""Multipart bodies, cut into their parts in memory: nothing that was sent comes to lie on a disk.

Floor 5.
"""

from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from litestar import Request
from litestar.exceptions import HTTPException
from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser, parse_options_header

from sardonyx.errors import InvalidRequest

MULTIPART = "multipart/form-data"
MAX_PARTS = 128
"""OpenAI's longest list has a hundred keywords."""


class Part(msgspec.Struct, frozen=True):
    """One value of a form."""

    name: str
    data: bytes
    is_file: bool
    """It has a file name."""
    charset: str | None = None
    """That it names."""


async def read_parts(request: "Request[Any, Any, Any]") -> list[Part]:
    """The parts of a request's body, in order.

    Raises:
        HTTPException: 415, the body is no multipart form; 413, it is too large.
        InvalidRequest: it is broken, or has too many parts.
    """
    media_type, options = parse_options_header(request.headers.get("content-type", ""))
    if media_type != MULTIPART:
        raise HTTPException(status_code=415, detail=f"send the body as {MULTIPART}")
    boundary = options.get("boundary")
    if not boundary:
        raise InvalidRequest("the form: Content-Type names no boundary")
    try:
        return await _parts(request.stream(), boundary)
    except ParserLimitReached:
        raise InvalidRequest(f"the form: has more than {MAX_PARTS} parts, or the head of one is too large") from None
    except MultipartError as error:
        raise InvalidRequest(f"the form is broken: {error}") from None


async def _parts(stream: AsyncGenerator[bytes, None], boundary: str) -> list[Part]:
    parts: list[Part] = []
    segment: MultipartSegment | None = None
    pieces: list[bytes] = []
    with PushMultipartParser(boundary, max_segment_count=MAX_PARTS) as parser:
        # What follows the form is read, too, and left out: an answer before the body's end may never arrive.
        async for chunk in stream:
            if not chunk:
                continue
            for event in parser.parse(chunk):
                if isinstance(event, MultipartSegment):
                    segment = event
                elif event is not None:
                    pieces.append(bytes(event))
                else:
                    assert segment is not None, "a part has a head"
                    name = segment.name or ""
                    parts.append(Part(name, b"".join(pieces), bool(segment.filename), segment.charset))
                    pieces.clear()
    return parts
