"""What operators, probes and Prometheus ask.

Floor 5. Public, and answered without the engine: a server that is full must still say so.
"""

import msgspec
from litestar import Controller, MediaType, Response, get

from sardonyx.api.auth import PUBLIC
from sardonyx.api.dependencies import Models, ServerMetrics
from sardonyx.api.openapi import answers
from sardonyx.errors import ModelNotReady
from sardonyx.version import __version__


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """All is well."""

    status: str = "ok"


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """Of the server."""

    version: str


class OpsController(Controller):
    """State of the server."""

    tags = ("Operations",)
    opt = PUBLIC

    @get("/live", responses=answers(Status))
    async def live(self) -> Status:
        """The process answers; anything but 200 means that it should be restarted."""
        return Status()

    @get(["/ready", "/health", "/v1/health", "/ping"], responses=answers(Status))
    async def ready(self, models: Models) -> Status:
        """Requests can be served now: models loaded, engines moving, not shutting down."""
        if not models.is_ready():
            raise ModelNotReady("not ready: models are loading, an engine stopped, or the server is shutting down")
        return Status()

    @get("/version", responses=answers(Version))
    async def version(self) -> Version:
        """The server's version."""
        return Version(version=__version__)

    @get("/metrics", sync_to_thread=True, responses=answers(str, media_type=MediaType.TEXT))
    def render_metrics(self, metrics: ServerMetrics) -> Response[bytes]:
        """Prometheus' text format."""
        content, media_type = metrics.render()
        return Response(content, headers={"Content-Type": media_type})
