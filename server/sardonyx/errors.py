"""The one exception tree. It knows no transport: `api/*/errors.py` holds a table of statuses for each.

Floor 0. A message of a `ServeError` may be sent to a caller, so it names fields and limits, and never a path, a
library's own text or another caller's data.

    ServeError
    ├─ InvalidRequest            malformed, wrong shape or datatype, value out of range
    │  ├─ ContextLengthExceeded  prompt + max_tokens over the model's limit
    │  └─ UnsupportedFeature     valid protocol, not offered by this model
    ├─ Unauthenticated           no key, or a wrong one
    ├─ PermissionDenied          a good key without the scope that the route asks for
    ├─ PayloadTooLarge           body or field over its limit
    ├─ ModelNotFound
    ├─ ModelNotReady             loading, unloading or failed
    ├─ Overloaded                queue full; carries retry_after_s
    ├─ DeadlineExceeded
    ├─ RequestAborted            the client left, or asked to stop
    ├─ EngineError               this request failed; the engine goes on
    ├─ EngineDead                the engine stopped; readiness turns false
    └─ ConfigError               start-up and load time; names file and field
"""


class ServeError(Exception):
    """Anything that a caller or an operator is told.

    Args:
        message: what is wrong and what to do, safe to send.
        param: the request field at fault, dotted (``messages.0.content``).
        code: OpenAI's machine-readable code where one exists (``context_length_exceeded``).
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequest(ServeError):
    """The request cannot be served as it stands; sending it again will not help."""


class ContextLengthExceeded(InvalidRequest):
    """The prompt, or the prompt and the wanted completion, does not fit the model."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class UnsupportedFeature(InvalidRequest):
    """The protocol has it, this model or this server does not."""


class Unauthenticated(ServeError):
    """No API key came with the request, or one that we do not know."""


class PermissionDenied(ServeError):
    """The key is good but not for this route."""


class PayloadTooLarge(ServeError):
    """A body or a field is over its limit."""


class ModelNotFound(ServeError):
    """No model of that name in the repository, and no alias."""


class ModelNotReady(ServeError):
    """The model exists but is loading, unloading or failed."""


class Overloaded(ServeError):
    """Admission said no.

    Args:
        message: which limit is reached.
        retry_after_s: when another try is likely to be admitted, in seconds.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(ServeError):
    """The request's time was over before its answer."""


class RequestAborted(ServeError):
    """The client left or asked to stop. Logged, rarely sent."""


class EngineError(ServeError):
    """This request failed inside the engine; others go on."""


class EngineDead(ServeError):
    """The engine of this model stopped and takes no more work."""


class ConfigError(ServeError):
    """A file, a flag or a variable that an operator must mend.

    Args:
        message: what is wrong with the field, and what would be right.
        file: the file, as the operator knows it; ``None`` for flags and environment.
        field: the field's dotted name.
    """

    def __init__(self, message: str, *, file: str | None = None, field: str | None = None) -> None:
        where = ": ".join(part for part in (file, field) if part)
        super().__init__(f"{where}: {message}" if where else message)
        self.reason = message
        self.file = file
        self.field = field
