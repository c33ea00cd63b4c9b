"""gRPC's own health service and reflection, for probes and for tools such as grpcurl.

Floor 5. Health is asked of the service at each look, never stored.

Source: grpc/grpc, doc/health-checking.md and doc/server-reflection.md.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from sardonyx.api.kserve.grpc_lingering import Lingering
from sardonyx.api.kserve.grpc_routes import HEALTH, INFERENCE

WATCH_INTERVAL_S = 0.5
"""How soon a watcher hears of a change."""
SERVICES = (INFERENCE, HEALTH, reflection.SERVICE_NAME)
"""What reflection lists."""

_Status = health_pb2.HealthCheckResponse


class Health:
    """``grpc.health.v1.Health`` of the whole server (empty name) and of the inference service.

    Args:
        is_ready: whether requests can be served, now.
        lingering: where watches wait.
    """

    def __init__(self, is_ready: Callable[[], bool], lingering: Lingering) -> None:
        self._is_ready = is_ready
        self._lingering = lingering

    async def Check(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        """One look."""
        if request.service not in ("", INFERENCE):
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return _Status(status=self._status())

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802 - gRPC's name
        """The status now and at each change, until the caller leaves. The last one of a stopping server says so."""
        if request.service not in ("", INFERENCE):
            await context.write(_Status(status=_Status.SERVICE_UNKNOWN))
            await self._lingering.run(_wait_for_ever())
            return
        if not await self._lingering.run(self._watch(context)):
            await context.write(_Status(status=_Status.NOT_SERVING))

    async def _watch(self, context: Any) -> None:
        told = None
        while True:
            if (status := self._status()) != told:
                told = status
                await context.write(_Status(status=status))
            await asyncio.sleep(WATCH_INTERVAL_S)

    def _status(self) -> int:
        return int(_Status.SERVING if self._is_ready() else _Status.NOT_SERVING)


class Reflection:
    """``grpc.reflection.v1alpha.ServerReflection``.

    Args:
        lingering: where calls wait for questions.
    """

    def __init__(self, lingering: Lingering) -> None:
        self._answers = reflection.aio.ReflectionServicer(SERVICES).ServerReflectionInfo
        self._lingering = lingering

    async def ServerReflectionInfo(self, questions: Any, context: Any) -> None:  # noqa: N802 - gRPC's name
        """Answer until the caller has no more questions."""
        await self._lingering.run(self._answer(questions, context))

    async def _answer(self, questions: Any, context: Any) -> None:
        async for answer in self._answers(questions, context):
            await context.write(answer)


async def _wait_for_ever() -> None:
    await asyncio.get_running_loop().create_future()
