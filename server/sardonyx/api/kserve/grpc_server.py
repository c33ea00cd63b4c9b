"""The gRPC port: KServe-v2 with Triton's extensions, health and reflection, in the application's event loop.

Floor 5. Wires the other ``grpc_*`` modules to a ``grpc.aio`` server; binds, encrypts, drains.
"""

import asyncio
import ssl
from pathlib import Path
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from tritonclient.grpc import service_pb2_grpc

from sardonyx.api.auth import Gatekeeper
from sardonyx.api.kserve.grpc_health import Health, Reflection
from sardonyx.api.kserve.grpc_lingering import Lingering
from sardonyx.api.kserve.grpc_routes import Routes
from sardonyx.api.kserve.grpc_servicer import InferenceServicer
from sardonyx.api.kserve.service import InferenceService
from sardonyx.errors import ConfigError
from sardonyx.settings import Settings

MAX_CALLS_PER_CONNECTION = 1024
"""Clients keep further ones to themselves until earlier ones have ended."""
KEEPALIVE_INTERVAL_S = 60
"""A connection that says nothing for so long is asked for a sign of life; gRPC's own two hours would keep dead ones."""
KEEPALIVE_TIMEOUT_S = 20
MIN_PING_INTERVAL_S = 10
"""Clients may ask us as often; gRPC's own five minutes punish clients with usual keep-alive settings."""


class GrpcServer:
    """A running server. Made by `start`, on the event loop that it then belongs to."""

    def __init__(self, server: Any, port: int, lingering: Lingering) -> None:
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
        credentials = await asyncio.to_thread(_credentials, settings)
        server = grpc.aio.server(handlers=(_routes(service, settings, keeper, lingering),), options=_options(settings))
        host = settings.host.strip("[]")
        address = f"[{host}]:{settings.grpc_port}" if ":" in host else f"{host}:{settings.grpc_port}"
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
        except RuntimeError:
            raise ConfigError(
                f"cannot listen on {address}: the port is taken, or the host is not an address of this machine",
                field="grpc_port",
            ) from None
        await server.start()
        return cls(server, port, lingering)

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, and end when the running ones have; those that still run after `grace_s` are cancelled.

        Streams are told at once: they take no more requests, answer those they have, and end with UNAVAILABLE.
        """
        self._lingering.stop()
        await self._server.stop(grace_s)


def _routes(service: InferenceService, settings: Settings, keeper: Gatekeeper, lingering: Lingering) -> Routes:
    routes = Routes(keeper)
    servicer = InferenceServicer(service, keeper, lingering, settings.grpc_max_message_bytes)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, routes)
    health_pb2_grpc.add_HealthServicer_to_server(Health(service.is_ready, lingering), routes)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(Reflection(lingering), routes)
    return routes


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.grpc_max_message_bytes),
        ("grpc.max_send_message_length", settings.grpc_max_message_bytes),
        # Otherwise two servers may take one port, and each gets some of the connections.
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
        ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_S * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_S * 1000),
    ]


def _credentials(settings: Settings) -> Any:
    """For TLS; ``None`` without it. Files are read and tried here, for gRPC only says that it cannot bind."""
    certificate, key = settings.grpc_certificate, settings.grpc_private_key
    authorities = settings.grpc_client_certificates
    if certificate is None:
        for field in ("grpc_private_key", "grpc_client_certificates"):
            if getattr(settings, field) is not None:
                raise ConfigError("is of no use without grpc_certificate", field=field)
        return None
    if key is None:
        raise ConfigError("is missing: grpc_certificate needs its key", field="grpc_private_key")
    certificate_pem, key_pem = _read(certificate, "grpc_certificate"), _read(key, "grpc_private_key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password of ours OpenSSL would ask for one at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError):
        raise ConfigError(
            f"{certificate} and {key} are not a PEM certificate and its unencrypted key", field="grpc_certificate"
        ) from None
    authorities_pem = None
    if authorities is not None:
        authorities_pem = _read(authorities, "grpc_client_certificates")
        try:
            context.load_verify_locations(authorities)
        except ssl.SSLError:
            raise ConfigError(f"{authorities} holds no PEM certificate", field="grpc_client_certificates") from None
    return grpc.ssl_server_credentials(
        [(key_pem, certificate_pem)], authorities_pem, require_client_auth=authorities_pem is not None
    )


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or type(error).__name__}", field=field) from None
