"""KServe-v2 with Triton's extensions over HTTP, as one ASGI application.

Floor 5. What every request needs is here: route, access, errors in this protocol's own envelope. For small tensors the
front is most of what an inference costs, so this is plain ASGI with a route table of its own. CPU of one core for a
request of 300 bytes, behind uvicorn and `Front`, with a handler that does nothing: 168 us as a Litestar controller,
103 us mounted in Litestar, 45 us past it. Hence the mount, which is complete, and the `Shortcut` for the paths that
are called most. With all of the parsing here and a model in numpy: 222 us mounted, 110 us by the shortcut.
"""

from collections.abc import Awaitable, Callable, Mapping

from litestar.enums import ScopeType
from litestar.exceptions import HTTPException
from litestar.handlers import asgi
from litestar.handlers.asgi_handlers import ASGIRouteHandler
from litestar.types import ASGIApp, HTTPScope, Receive, Scope, Send

from sardonyx.api.auth import PUBLIC, Gatekeeper
from sardonyx.api.kserve.control import Control
from sardonyx.api.kserve.errors import encode_error, encode_message, headers_for, http_status
from sardonyx.api.kserve.exchange import JSON_TYPE, Exchange, Header, Reply
from sardonyx.api.kserve.inference import Inference
from sardonyx.api.kserve.metadata import Metadata
from sardonyx.api.kserve.routes import find_route
from sardonyx.api.kserve.service import InferenceService
from sardonyx.errors import UnsupportedFeature
from sardonyx.settings import Settings

PREFIX = "/v2"

Endpoint = Callable[[Exchange], Awaitable[Reply | None]]
"""Answers one request, by itself where it gives ``None``."""

_NOT_FOUND = Reply(b'{"error":"Not Found"}', 404, (JSON_TYPE,))
_NOT_ALLOWED = b'{"error":"Method Not Allowed"}'
_UNMATCHED = "unmatched"
_ACCEPTED_ENCODINGS: Header = (b"accept-encoding", b"gzip, deflate")


class KServeHttp:
    """The ASGI application of everything under ``/v2``.

    Args:
        service: what answers.
        settings: for the limit of bodies.
        keeper: who may call what.
    """

    def __init__(self, service: InferenceService, settings: Settings, keeper: Gatekeeper) -> None:
        self._keeper = keeper
        self._max_bytes = settings.http_max_input_size
        self._endpoints = _endpoints(service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        assert scope["type"] == ScopeType.HTTP, "the server is started without websockets"
        # Of several headers of one name the first counts, as everywhere else in the server.
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed([*scope["headers"]])}
        exchange = Exchange(scope, receive, send, headers, {}, self._max_bytes)
        scope["path_template"] = _UNMATCHED
        try:
            reply = await self._answer(scope, exchange)
        except Exception as error:
            reply = _refusal(error, exchange)
        if reply is not None and not exchange.has_begun:
            await exchange.send(reply)

    async def _answer(self, scope: HTTPScope, exchange: Exchange) -> Reply | None:
        found = find_route(scope["raw_path"].partition(b"?")[0])
        if found is None:
            return _NOT_FOUND
        route = found.route
        scope["path_template"] = route.template
        access = route.methods.get(exchange.method)
        if access is None:
            return Reply(_NOT_ALLOWED, 405, (JSON_TYPE, (b"allow", ", ".join(route.methods).encode())))
        self._keeper.check(exchange.headers, access)
        exchange.arguments = found.arguments
        return await self._endpoints[route.endpoint](exchange)


class Shortcut:
    """Takes requests about models to the KServe application before Litestar sees them, all others to Litestar.

    They would come to the same end, later. Pages of other origins go through Litestar,
    which adds the CORS headers.

    Args:
        kserve: the application of everything under ``/v2``.
        app: Litestar's handler, in which it is mounted as well.
    """

    def __init__(self, kserve: KServeHttp, app: ASGIApp) -> None:
        self._kserve = kserve
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        is_short = (
            scope["type"] == ScopeType.HTTP
            and scope["raw_path"].startswith(b"/v2/models/")
            and not any(name == b"origin" for name, _ in scope["headers"])
        )
        await (self._kserve if is_short else self._app)(scope, receive, send)


def kserve_http(service: InferenceService, settings: Settings, keeper: Gatekeeper) -> ASGIRouteHandler:
    """The route handler that mounts the protocol in Litestar."""
    application = KServeHttp(service, settings, keeper)

    # Public to Litestar's guards, whose refusals would wear OpenAI's envelope; the application has its own.
    @asgi(PREFIX, is_mount=True, copy_scope=False, opt=PUBLIC)
    async def kserve(scope: Scope, receive: Receive, send: Send) -> None:
        await application(scope, receive, send)

    return kserve


def _endpoints(service: InferenceService) -> Mapping[str, Endpoint]:
    """What answers to each route, by the table's names."""
    inference, metadata, control = Inference(service), Metadata(service), Control(service)
    return {
        "infer": inference.infer,
        "generate": inference.generate,
        "generate_stream": inference.generate_stream,
        "live": metadata.live,
        "ready": metadata.ready,
        "model_ready": metadata.model_ready,
        "server_metadata": metadata.server_metadata,
        "model_metadata": metadata.model_metadata,
        "config": metadata.config,
        "statistics": metadata.statistics,
        "index": control.index,
        "load": control.load,
        "unload": control.unload,
        "trace_settings": control.trace_settings,
        "log_settings": control.log_settings,
        "system_memory_status": control.system_memory_status,
        "register_system_memory": control.register_system_memory,
        "unregister_system_memory": control.unregister_system_memory,
        "cuda_memory_status": control.cuda_memory_status,
        "register_cuda_memory": control.register_cuda_memory,
        "unregister_cuda_memory": control.unregister_cuda_memory,
    }


def _refusal(error: Exception, exchange: Exchange) -> Reply:
    """An error in this protocol's envelope. uvicorn drops it where the client has left."""
    if isinstance(error, HTTPException):  # of `Front`: a body that comes too slowly
        return Reply(encode_message(error.detail), error.status_code, (JSON_TYPE,))
    exchange.log_failure(error)
    headers = [JSON_TYPE, *headers_for(error)]
    if isinstance(error, UnsupportedFeature) and "compression" in error.message:
        headers.append(_ACCEPTED_ENCODINGS)
    return Reply(encode_error(error, exchange.request_id), http_status(error), tuple(headers))
