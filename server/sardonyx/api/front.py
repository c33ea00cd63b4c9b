"""What every HTTP request passes before and after routing: ids, counts, slow bodies, the answers of a stopping server.

Floor 5. Plain ASGI around Litestar's own handler, because Litestar's middleware sees neither unknown paths nor their
errors.
"""

import asyncio
import itertools
import re
import secrets
import time
from typing import Any

from litestar.enums import ScopeType
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from sardonyx.errors import RequestAborted
from sardonyx.metrics import Metrics

BODY_GRACE_S = 30.0
"""Before the pace of a body counts."""
MIN_BODY_BYTES_PER_S = 1024
"""Slower than this after the grace, a body is given up: holding many half-sent requests is a way to hurt a server."""

_SANE_ID = re.compile(rb"[\w.:+/=-]{1,128}")
# Random for each request would be a system call for each request.
_PROCESS_ID = secrets.token_hex(6).encode()
_serials = itertools.count()


class Front:
    """Wraps the application.

    Attributes:
        is_draining: answers tell clients to come back on a new connection, which another server then gets.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.is_draining = False
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        assert scope["type"] == ScopeType.HTTP, "the server is started without websockets"
        started_s = time.monotonic()
        request_id = _request_id(scope)
        scope["state"]["request_id"] = request_id.decode()
        status = 499  # nothing was sent

        async def send_answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                closing = [(b"connection", b"close")] if self.is_draining else []
                message["headers"] = [*message["headers"], (b"x-request-id", request_id), *closing]
            await send(message)

        self._metrics.start_http()
        try:
            await self._app(scope, _paced(receive), send_answer)
        finally:
            route = scope.get("path_template") or "unmatched"
            self._metrics.finish_http(scope["method"], route, status, time.monotonic() - started_s)


def _request_id(scope: HTTPScope) -> bytes:
    """The caller's ``X-Request-Id`` where it has one that is safe to repeat, else a fresh one."""
    own = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return own if _SANE_ID.fullmatch(own) else b"%s%012x" % (_PROCESS_ID, next(_serials))


def _paced(receive: Receive) -> Receive:
    """`receive` that gives up on a body that does not come, or comes too slowly to be meant."""
    deadline_s = time.monotonic() + BODY_GRACE_S
    is_complete = False

    async def receive_paced() -> Any:  # Any: Litestar's union of all messages of all scopes
        nonlocal deadline_s, is_complete
        if is_complete:
            return await receive()
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                message: Any = await receive()
        except TimeoutError:
            raise HTTPException(status_code=408, detail="the body came too slowly") from None
        if message["type"] == "http.disconnect":
            raise RequestAborted("the client left before its request was complete")
        deadline_s += len(message.get("body", b"")) / MIN_BODY_BYTES_PER_S
        is_complete = not message.get("more_body", False)
        return message

    return receive_paced
