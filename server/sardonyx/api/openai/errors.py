"""How an exception looks to a caller: one envelope, one table of statuses.

Floor 5. Everything that is not the KServe protocol answers with OpenAI's ``{"error": {message, type, param, code}}``,
all four keys always there: openai-python reads `type`, `param` and `code` from it. Every class of `sardonyx.errors` has
its row in `ANSWERS`.
"""

import logging
import math
from collections.abc import Mapping

import msgspec
from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException, InternalServerException
from litestar.types import ExceptionHandlersMap

from sardonyx import errors

logger = logging.getLogger(__name__)

INTERNAL_MESSAGE = "internal error; the server's log has it under this answer's x-request-id"


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong, for people and programs."""

    message: str
    type: str
    """``invalid_request_error`` where the request must change, ``server_error`` where it need not."""
    param: str | None = None
    """The field at fault, dotted."""
    code: str | None = None
    """A stable word; see `ANSWERS`."""


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table."""

    status: int
    type: str
    code: str | None = None
    """Used where the error brings none."""
    headers: dict[str, str] = {}


_INVALID = "invalid_request_error"
_SERVER = "server_error"
# openai-python retries 408, 409, 429 and every 5xx twice, unless this header says that it is pointless.
_FINAL = {"x-should-retry": "false"}

ANSWERS: dict[type[errors.ServeError], Answer] = {
    errors.ServeError: Answer(status=500, type=_SERVER, headers=_FINAL),
    errors.InvalidRequest: Answer(status=400, type=_INVALID),
    errors.ContextLengthExceeded: Answer(status=400, type=_INVALID, code="context_length_exceeded"),
    errors.UnsupportedFeature: Answer(status=400, type=_INVALID, code="unsupported_parameter"),
    errors.Unauthenticated: Answer(
        status=401, type=_INVALID, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
    ),
    errors.PermissionDenied: Answer(status=403, type=_INVALID, code="permission_denied"),
    errors.PayloadTooLarge: Answer(status=413, type=_INVALID, code="payload_too_large"),
    errors.ModelNotFound: Answer(status=404, type=_INVALID, code="model_not_found"),
    errors.ModelNotReady: Answer(status=503, type=_SERVER, code="model_not_ready", headers={"Retry-After": "5"}),
    errors.Overloaded: Answer(status=429, type="rate_limit_exceeded", code="rate_limit_exceeded"),
    # A second try would wait as long; under load it would also make others wait longer.
    errors.DeadlineExceeded: Answer(status=504, type=_SERVER, code="deadline_exceeded", headers=_FINAL),
    errors.RequestAborted: Answer(status=499, type=_INVALID, code="request_aborted"),
    errors.EngineError: Answer(status=500, type=_SERVER, code="engine_error"),
    # Behind a balancer the next try finds another replica: readiness has turned false here.
    errors.EngineDead: Answer(status=503, type=_SERVER, code="engine_dead", headers={"Retry-After": "5"}),
    errors.ConfigError: Answer(status=500, type=_SERVER, code="config_error", headers=_FINAL),
}
"""Status, type and code of every class of the tree; a class without a row of its own has its nearest parent's."""

_CODES_BY_STATUS = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "payload_too_large"}
DECLARED_STATUSES = (400, 401, 403, 404, 413, 415, 429, 500, 503, 504)
"""Answers with an envelope that any route of the API may give; the OpenAPI schema declares them."""


def answer_for(error: errors.ServeError) -> Answer:
    """The row of an error's class."""
    return next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)


def encode_error(error: Exception) -> bytes:
    """The envelope of any exception, as JSON; what is not a `ServeError` says only that it is internal."""
    if not isinstance(error, errors.ServeError):
        return encode_envelope(INTERNAL_MESSAGE, type=_SERVER)
    answer = answer_for(error)
    return encode_envelope(error.message, type=answer.type, param=error.param, code=error.code or answer.code)


def encode_envelope(message: str, *, type: str, param: str | None = None, code: str | None = None) -> bytes:
    """One envelope as JSON."""
    return msgspec.json.encode(ErrorBody(error=ErrorDetail(message=message, type=type, param=param, code=code)))


def headers_for(error: errors.ServeError) -> dict[str, str]:
    """What goes beside the envelope: when to come again, or not to."""
    headers = dict(answer_for(error).headers)
    if isinstance(error, errors.Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return headers


def _answer_serve_error(request: Request, error: errors.ServeError) -> Response[bytes]:  # type: ignore[type-arg]  # Litestar's own handlers leave the parameters open
    answer = answer_for(error)
    if answer.status == 500:  # 503 and 504 are told by probes and metrics, again and again
        logger.warning("%s: %s", type(error).__name__, error.message)
    return _json(encode_error(error), answer.status, headers_for(error))


def _answer_http_exception(request: Request, error: HTTPException) -> Response[bytes]:  # type: ignore[type-arg]  # as above
    """What Litestar itself refuses: no such route or method, a body over its limit, a malformed query."""
    if error.status_code >= 500:
        return _answer_unexpected(request, error)
    if error.status_code == 404:
        message = f"no such endpoint: {request.method} {request.scope['path'][:128]}"
    elif error.status_code == 413:
        message = "the body is over the server's limit; split the request"
    else:
        message = error.detail or "bad request"
    body = encode_envelope(message, type=_INVALID, code=_CODES_BY_STATUS.get(error.status_code))
    return _json(body, error.status_code, error.headers or {})


def _answer_unexpected(request: Request, error: Exception) -> Response[bytes]:  # type: ignore[type-arg]  # as above
    logger.error("request %s failed", request.scope["state"].get("request_id"), exc_info=error)
    return _json(encode_error(error), 500, _FINAL)


def _json(body: bytes, status: int, headers: Mapping[str, str]) -> Response[bytes]:
    return Response(body, status_code=status, headers=dict(headers), media_type=MediaType.JSON)


EXCEPTION_HANDLERS: ExceptionHandlersMap = {
    errors.ServeError: _answer_serve_error,
    HTTPException: _answer_http_exception,
    InternalServerException: _answer_unexpected,
    Exception: _answer_unexpected,
}
"""For `Litestar(exception_handlers=...)`."""
