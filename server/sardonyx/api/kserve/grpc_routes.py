"""The methods of the gRPC port: which there are, who may call them, and their outer edge.

Floor 5. Default deny: a method needs a key unless `PUBLIC` names it. The check stands before the message is read.

Generated code registers its servicers here as with a server of its own.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from sardonyx.api.auth import Gatekeeper, presented_key
from sardonyx.api.kserve.grpc_status import abort
from sardonyx.errors import InvalidRequest, RequestAborted, ServeError

INFERENCE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"

PUBLIC = frozenset(
    {
        f"/{HEALTH}/Check",
        f"/{HEALTH}/Watch",
        f"/{INFERENCE}/ServerLive",
        f"/{INFERENCE}/ServerReady",
        f"/{INFERENCE}/ModelReady",
    }
)
"""For probes: what is open over HTTP, too."""
ADMIN = frozenset(
    f"/{INFERENCE}/{name}"
    for name in (
        "RepositoryModelLoad",
        "RepositoryModelUnload",
        "SystemSharedMemoryRegister",
        "SystemSharedMemoryUnregister",
        "CudaSharedMemoryRegister",
        "CudaSharedMemoryUnregister",
    )
)
"""TraceSetting and LogSettings need an admin key as well where they change something, which their handlers know."""

RAW = frozenset({f"/{INFERENCE}/ModelInfer", f"/{INFERENCE}/ModelStreamInfer"})
"""Methods that take and give serialized messages."""

RawMethod = Callable[[bytes, Any], Awaitable[bytes]]
"""A unary method of bytes; ``Any`` is the untyped context of grpc."""


class Routes:
    """Collects the methods of services, and picks one for each call. A ``grpc.GenericRpcHandler``.

    Args:
        keeper: knows the keys.
    """

    def __init__(self, keeper: Gatekeeper) -> None:
        self._keeper = keeper
        self._methods: dict[str, grpc.RpcMethodHandler] = {}

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        """Generated code calls it with the same methods as `add_registered_method_handlers`."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Take a service's methods from generated code. Unary ones get their edge here, see `answering`."""
        for name, handler in handlers.items():
            path = f"/{service}/{name}"
            is_raw = path in RAW
            if not handler.request_streaming and not handler.response_streaming:
                method = handler.unary_unary if is_raw else _with_messages(handler)
                handler = grpc.unary_unary_rpc_method_handler(answering(method))
            elif is_raw:
                handler = grpc.stream_stream_rpc_method_handler(handler.stream_stream)
            self._methods[path] = handler

    def service(self, details: Any) -> Any:
        """Of ``grpc.GenericRpcHandler``: the call's handler, one that refuses it, or ``None`` for an unknown method."""
        method = details.method
        if method not in PUBLIC:
            access = "admin" if method in ADMIN else ""
            try:
                self._keeper.check_key(key_of(details.invocation_metadata), access)
            except ServeError as error:
                return _refusing(error)
        return self._methods.get(method)


def answering(method: RawMethod) -> RawMethod:
    """A unary method whose every exception becomes a status. The call's own cancellation goes on."""

    async def answer(data: bytes, context: Any) -> bytes:
        try:
            return await method(data, context)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # What it waited for was cancelled and not the call, which would have no end without this.
            await abort(context, RequestAborted("the request was cancelled"))
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, error)

    return answer


def key_of(metadata: Iterable[tuple[str, str | bytes]]) -> bytes:
    """The key that a call presents, as over HTTP; empty where there is none."""
    return presented_key({name: value for name, value in metadata or () if isinstance(value, str)})


def _with_messages(handler: Any) -> RawMethod:
    """A generated method as one of bytes. Messages that cannot be parsed are refused."""
    parse, method, serialize = handler.request_deserializer, handler.unary_unary, handler.response_serializer

    async def answer(data: bytes, context: Any) -> bytes:
        try:
            request = parse(data)
        except DecodeError:
            raise InvalidRequest("the message cannot be parsed") from None
        reply: bytes = serialize(await method(request, context))
        return reply

    return answer


def _refusing(error: ServeError) -> Any:
    """A handler for calls of any kind, for it reads nothing and writes nothing."""

    async def refuse(_: Any, context: Any) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
