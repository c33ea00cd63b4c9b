"""How a gRPC call ends that has no answer: with a status from the KServe table.

Floor 5.
"""

import logging
import math
from typing import Any, NoReturn

import grpc

from sardonyx.api.kserve.errors import grpc_code_name, message_of
from sardonyx.errors import Overloaded, ServeError

logger = logging.getLogger(__name__)

MAX_DETAILS_BYTES = 2048
"""Clients take 8 KiB of trailers, in which a byte may become three; messages quote names that callers chose."""


def status_of(error: BaseException, request_id: str = "") -> tuple[Any, str, tuple[tuple[str, str], ...]]:
    """Code, message and trailing metadata for an exception.

    A full queue also says, in ``grpc-retry-pushback-ms``, when clients that retry by themselves should.

    Source: gRPC proposal A6, "Pushback".
    """
    trailers: tuple[tuple[str, str], ...] = ()
    if isinstance(error, Overloaded):
        trailers = (("grpc-retry-pushback-ms", str(max(1, math.ceil(error.retry_after_s * 1000)))),)
    return grpc.StatusCode[grpc_code_name(error)], details_of(error, request_id), trailers


async def abort(context: Any, error: BaseException, request_id: str = "") -> NoReturn:
    """End the call with an error's status; what we did not foresee is logged, and its caller learns nothing of it."""
    log_unforeseen(error)
    await context.abort(*status_of(error, request_id))
    raise AssertionError("abort returns to nobody")


def details_of(error: BaseException, request_id: str = "") -> str:
    """The message for a caller, cut to what a status carries."""
    return message_of(error, request_id).encode(errors="replace")[:MAX_DETAILS_BYTES].decode(errors="ignore")


def log_unforeseen(error: BaseException) -> None:
    """Write down an exception that is not of our tree: its caller is not told."""
    if not isinstance(error, ServeError):
        logger.error("a gRPC call failed", exc_info=error)
