"""The gRPC port: KServe-v2 with Triton's extensions, health and reflection, in the application's event loop.

Floor 5. Wires the other ``grpc_*`` modules to a server of ours over HTTP/2 (`h2`); binds, encrypts, drains.

A call that does nothing takes 12 to 19 us of CPU there, and 122 to 147 us in ``grpc.aio``, which hands every call's
events through a thread and a socket: 60,000 calls/s against 10,000 (``h2load -c 1|8|32 -m 1|8 -D 2 --data=FILE
-H 'content-type: application/grpc' -H 'te: trailers' .../ModelInfer``, by turns on 2 shared cores).
"""

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Self

from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from tritonclient.grpc import service_pb2_grpc

from sardonyx.api.auth import Gatekeeper
from sardonyx.api.kserve.grpc_health import Health, Reflection
from sardonyx.api.kserve.grpc_lingering import Lingering
from sardonyx.api.kserve.grpc_routes import Routes
from sardonyx.api.kserve.grpc_servicer import InferenceServicer
from sardonyx.api.kserve.h2.server import BACKLOG, Http2Server
from sardonyx.api.kserve.service import InferenceService
from sardonyx.errors import ConfigError
from sardonyx.settings import Settings


class GrpcServer:
    """A running server. Made by `start`, on the event loop that it then belongs to."""

    def __init__(self, server: Http2Server, port: int, lingering: Lingering) -> None:
        self._server = server
        self._lingering = lingering
        self.port = port
        """The TCP port that was taken."""

    @classmethod
    async def start(cls, service: InferenceService, settings: Settings, keeper: Gatekeeper) -> Self:
        """Listen on `host`:`grpc_port` and serve from now on.

        Raises:
            ConfigError: the port is taken or the host is not ours, or a certificate or key cannot be used.
        """
        lingering = Lingering()
        encryption = await asyncio.to_thread(_encryption, settings)
        listener = _bind(settings.host.strip("[]"), settings.grpc_port)
        server = Http2Server(_routes(service, settings, keeper, lingering), settings.grpc_max_message_bytes)
        await server.listen(listener, encryption)
        return cls(server, listener.getsockname()[1], lingering)

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, and end when the running ones have; those that still run after `grace_s` are cancelled.

        Streams are told at once: they take no more requests, answer those they have, and end with UNAVAILABLE.
        """
        self._lingering.stop()
        await self._server.stop(grace_s)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        is_everywhere = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=is_everywhere)
    except OSError:
        raise ConfigError(
            f"cannot listen on {host}:{port}: the port is taken, or the host is not an address of this machine",
            field="grpc_port",
        ) from None


def _routes(service: InferenceService, settings: Settings, keeper: Gatekeeper, lingering: Lingering) -> Routes:
    routes = Routes(keeper)
    servicer = InferenceServicer(service, keeper, lingering, settings.grpc_max_message_bytes)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, routes)
    health_pb2_grpc.add_HealthServicer_to_server(Health(service.is_ready, lingering), routes)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(Reflection(lingering), routes)
    return routes


def _encryption(settings: Settings) -> ssl.SSLContext | None:
    """For TLS; ``None`` without it."""
    certificate, key = settings.grpc_certificate, settings.grpc_private_key
    authorities = settings.grpc_client_certificates
    if certificate is None:
        for field in ("grpc_private_key", "grpc_client_certificates"):
            if getattr(settings, field) is not None:
                raise ConfigError("is of no use without grpc_certificate", field=field)
        return None
    if key is None:
        raise ConfigError("is missing: grpc_certificate needs its key", field="grpc_private_key")
    _try_to_read(certificate, "grpc_certificate")
    _try_to_read(key, "grpc_private_key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"])
    try:
        # Without a password of ours OpenSSL would ask for one at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError):
        raise ConfigError(
            f"{certificate} and {key} are not a PEM certificate and its unencrypted key", field="grpc_certificate"
        ) from None
    if authorities is not None:
        _try_to_read(authorities, "grpc_client_certificates")
        try:
            context.load_verify_locations(authorities)
        except ssl.SSLError:
            raise ConfigError(f"{authorities} holds no PEM certificate", field="grpc_client_certificates") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _try_to_read(path: Path, field: str) -> None:
    """OpenSSL does not say which file it could not read."""
    try:
        path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or type(error).__name__}", field=field) from None
