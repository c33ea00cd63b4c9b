"""How an exception looks to a caller of the KServe protocol: one table of statuses for each of its transports.

Floor 5. HTTP answers Triton's ``{"error": "<message>"}``; gRPC puts the same message into its status. Every class of
`sardonyx.errors` has its row in `ANSWERS`. Statuses are Triton's where clients depend on them (400 for a body over its
limit, 503 for a full queue), and OpenAI's table has its own.

Source: Triton, server/src/http_server.cc and src/grpc/grpc_utils.cc.
"""

import math
from typing import NamedTuple

import msgspec

from sardonyx import errors

INTERNAL_MESSAGE = "internal error"
"""All that a caller learns of an exception that we did not foresee; the log has the rest."""


class Answer(NamedTuple):
    """A row of the table."""

    http_status: int
    grpc_code: str
    """Name of a ``grpc.StatusCode``."""


ANSWERS: dict[type[errors.ServeError], Answer] = {
    errors.ServeError: Answer(500, "INTERNAL"),
    errors.InvalidRequest: Answer(400, "INVALID_ARGUMENT"),
    errors.ContextLengthExceeded: Answer(400, "INVALID_ARGUMENT"),
    errors.UnsupportedFeature: Answer(501, "UNIMPLEMENTED"),
    errors.Unauthenticated: Answer(401, "UNAUTHENTICATED"),
    errors.PermissionDenied: Answer(403, "PERMISSION_DENIED"),
    errors.PayloadTooLarge: Answer(400, "RESOURCE_EXHAUSTED"),
    errors.ModelNotFound: Answer(404, "NOT_FOUND"),
    errors.ModelNotReady: Answer(503, "UNAVAILABLE"),
    errors.Overloaded: Answer(503, "UNAVAILABLE"),
    errors.DeadlineExceeded: Answer(504, "DEADLINE_EXCEEDED"),
    errors.RequestAborted: Answer(499, "CANCELLED"),
    errors.EngineError: Answer(500, "INTERNAL"),
    errors.EngineDead: Answer(503, "UNAVAILABLE"),
    errors.ConfigError: Answer(500, "INTERNAL"),
}
"""Both statuses of every class of the tree; a class without a row of its own has its nearest parent's."""

_UNEXPECTED = Answer(500, "INTERNAL")


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every HTTP answer that is not a success."""

    error: str


def answer_for(error: BaseException) -> Answer:
    """The row of an exception; anything outside of the tree is internal."""
    return next((ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS), _UNEXPECTED)


def http_status(error: BaseException) -> int:
    """What HTTP answers."""
    return answer_for(error).http_status


def grpc_code_name(error: BaseException) -> str:
    """Name of the ``grpc.StatusCode`` that gRPC answers."""
    return answer_for(error).grpc_code


def message_of(error: BaseException, request_id: str = "") -> str:
    """What a caller is told; "internal error" for what is no `ServeError`.

    Args:
        error: any exception.
        request_id: the caller's own id of its request: Triton puts it in front of what it says about one.
    """
    message = error.message if isinstance(error, errors.ServeError) else INTERNAL_MESSAGE
    # Triton looks up the model before it reads the id.
    if not request_id or isinstance(error, (errors.ModelNotFound, errors.ModelNotReady)):
        return message
    prefix = f"[request id: {request_id}] "
    return message if message.startswith(prefix) else prefix + message


def encode_error(error: BaseException, request_id: str = "") -> bytes:
    """The HTTP envelope of any exception, as JSON."""
    return encode_message(message_of(error, request_id))


def encode_message(message: str) -> bytes:
    """The HTTP envelope of a message, as JSON."""
    # Messages may quote what a caller sent.
    return msgspec.json.encode(ErrorBody(message.encode(errors="replace").decode()))


def headers_for(error: BaseException) -> list[tuple[bytes, bytes]]:
    """What HTTP sends beside the envelope: when to come again, how to name oneself."""
    if isinstance(error, errors.Overloaded):
        return [(b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s)))]
    if isinstance(error, errors.Unauthenticated):
        return [(b"www-authenticate", b"Bearer")]
    return []
