"""The composition root: the only module that knows every floor.

Floor 6. `create_app` puts the parts together that it is given; `run` makes them from settings and serves.
"""

import asyncio
import contextlib
import faulthandler
import gc
import logging
import shlex
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from litestar import Litestar, Router
from litestar.config.cors import CORSConfig
from litestar.di import Provide

from sardonyx.api.auth import Gatekeeper
from sardonyx.api.front import Front
from sardonyx.api.kserve.grpc_server import GrpcServer
from sardonyx.api.kserve.http import KServeHttp, Shortcut, kserve_http
from sardonyx.api.kserve.service import InferenceService
from sardonyx.api.metrics_port import serve_metrics
from sardonyx.api.openai.audio import AudioController
from sardonyx.api.openai.chat import ChatController
from sardonyx.api.openai.completions import CompletionsController
from sardonyx.api.openai.embeddings import EmbeddingsController
from sardonyx.api.openai.errors import EXCEPTION_HANDLERS
from sardonyx.api.openai.image_forms import ImageFormsController
from sardonyx.api.openai.image_schemas import MAX_FORM_BYTES
from sardonyx.api.openai.images import ImagesController
from sardonyx.api.openai.models import ModelsController
from sardonyx.api.openai.moderations import ModerationsController
from sardonyx.api.openai.rerank import RerankController
from sardonyx.api.openai.tokens import TokensController
from sardonyx.api.openapi import openapi_config
from sardonyx.api.ops import OpsController
from sardonyx.api.server import DrainingServer, bind
from sardonyx.api.systemd import ServiceManager, report
from sardonyx.api.textgen.billing import BillingController
from sardonyx.api.textgen.internal import InternalController
from sardonyx.errors import ConfigError, ServeError
from sardonyx.metrics import Metrics
from sardonyx.serving.loader import build_registry
from sardonyx.serving.picture_store import PictureStore
from sardonyx.serving.registry import Registry
from sardonyx.serving.task_finder import TaskFinder
from sardonyx.settings import Settings, check_exposure
from sardonyx.version import __version__

logger = logging.getLogger(__name__)

_LAG_INTERVAL_S = 0.5
NUM_JOB_THREADS = 8
"""For what would block the event loop. Beside those of loads, which may hold theirs for minutes."""
GRPC_GRACE_S = 5.0
"""After the drain, for the last answers over gRPC."""


class Ending:
    """Why the process must end although nobody told it to."""

    def __init__(self) -> None:
        self.error: ConfigError | None = None
        self.stop: Callable[[], object] = lambda: None
        """Begins the end. On the event loop."""


def create_app(
    settings: Settings,
    registry: Registry,
    metrics: Metrics,
    ending: Ending | None = None,
    manager: ServiceManager | None = None,
) -> Litestar:
    """The ASGI application. Its lifespan starts and closes the registry and the other ports.

    Args:
        ending: told where the lifespan cannot go on.
        manager: told how it goes.
    """
    own_hosts = ("localhost", "127.0.0.1", "[::1]", _url_host(settings.host))
    keeper = Gatekeeper(
        api_keys=settings.api_keys,
        admin_keys=settings.admin_keys,
        local_hosts=() if settings.allow_unauthenticated else own_hosts,
        origins=settings.cors_origins,
    )
    service = InferenceService(registry, settings)
    kserve = KServeHttp(service, settings, keeper)
    given = {
        "models": registry,
        "tasks": TaskFinder(registry),
        "settings": settings,
        "metrics": metrics,
        "keeper": keeper,
        "store": PictureStore(settings.image_store_bytes),
    }
    app = Litestar(
        [
            OpsController,
            ModelsController,
            CompletionsController,
            ChatController,
            EmbeddingsController,
            RerankController,
            ModerationsController,
            Router("/", route_handlers=[AudioController], request_max_body_size=settings.max_audio_bytes),
            ImagesController,
            Router("/", route_handlers=[ImageFormsController], request_max_body_size=MAX_FORM_BYTES),
            TokensController,
            InternalController,
            BillingController,
            kserve_http(service, settings, keeper),
        ],
        guards=[keeper.guard],
        dependencies={name: _provide(value) for name, value in given.items()},
        exception_handlers=EXCEPTION_HANDLERS,
        request_max_body_size=settings.max_body_bytes,
        cors_config=_cors(settings),
        openapi_config=openapi_config(__version__, needs_key=bool(settings.api_keys)),
        logging_config=None,
        lifespan=[
            lambda _: _reporting(manager, registry),
            lambda _: _running(settings, registry, metrics, service, keeper, ending),
        ],
    )
    app.asgi_handler = Front(Shortcut(kserve, app.asgi_handler), metrics)
    return app


def run(settings: Settings) -> None:
    """Serve until told to stop. Returns after a drain that a signal began.

    Raises:
        ConfigError: the settings expose an open server or contradict each other, there is no repository, an address is
            taken, or with `exit_on_error` a model of the start cannot be loaded.
    """
    configure_logging(settings)
    check_exposure(settings)
    check_startup_models(settings)
    metrics = Metrics(__version__)
    registry = build_registry(settings, metrics)
    with bind(settings.host, settings.port) as listener:
        settings = msgspec.structs.replace(settings, port=listener.getsockname()[1])
        ending = Ending()
        manager = ServiceManager.from_environment()
        if manager is not None:
            # A watchdog ends us with SIGABRT: the log then says where each thread was.
            faulthandler.enable()
        app = create_app(settings, registry, metrics, ending, manager)
        front = app.asgi_handler
        assert isinstance(front, Front)

        async def drain(with_grace: bool) -> None:
            front.is_draining = True
            if manager is not None:
                manager.tell("STOPPING=1")
            await registry.drain(settings.drain_grace_s if with_grace else 0.0, settings.drain_timeout_s)

        # What is imported is never freed: 70,000 objects, which cost each full collection 25 to 40 ms without a token.
        gc.collect()
        gc.freeze()
        logger.info("listening on %s:%d, loading models from %s", settings.host, settings.port, settings.repository)
        server = DrainingServer(app, drain)
        ending.stop = server.request_exit
        server.run(sockets=[listener])
    if ending.error is not None:
        raise ending.error
    logger.info("stopped")


def check_startup_models(settings: Settings) -> None:
    """Refuse a `load_model` that would have no effect.

    Raises:
        ConfigError: names the way out.
    """
    if settings.load_model and settings.model_control_mode != "explicit":
        raise ConfigError("is for model_control_mode explicit; the others load every model", field="load_model")
    if "*" in settings.load_model and len(settings.load_model) > 1:
        raise ConfigError("is either * alone, for every model, or names of models", field="load_model")


def configure_logging(settings: Settings) -> None:
    """All loggers to stderr, at the level of the settings, one line an event."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if settings.log_json else _LineFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    # "Started server process", "Waiting for connections": ours say it in our words.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class _LineFormatter(logging.Formatter):
    """For people. What a message quotes cannot begin a line of its own and pass for one of ours."""

    def __init__(self) -> None:
        super().__init__("{asctime} {levelname:<7} {message}", style="{")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the standard library's name
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)


class _JsonFormatter(logging.Formatter):
    """For machines: the message, and each of its ``extra`` fields by name."""

    _standard = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in self._standard}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields, enc_hook=str).decode()


def _cors(settings: Settings) -> CORSConfig | None:
    # Without a list Litestar would allow every origin.
    if not settings.cors_origins:
        return None
    return CORSConfig(allow_origins=list(settings.cors_origins), expose_headers=["x-request-id", "retry-after"])


def _url_host(host: str) -> str:
    """As a URL or a Host header spells an address."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host.lower()


def _provide(value: Any) -> Provide:
    return Provide(lambda: value, sync_to_thread=False)


@contextlib.asynccontextmanager
async def _running(
    settings: Settings,
    registry: Registry,
    metrics: Metrics,
    service: InferenceService,
    keeper: Gatekeeper,
    ending: Ending | None,
) -> AsyncIterator[None]:
    """Models load while the server already answers; everything is closed at the end."""
    threads = ThreadPoolExecutor(settings.model_load_thread_count + NUM_JOB_THREADS, "sardonyx-job")
    asyncio.get_running_loop().set_default_executor(threads)
    async with contextlib.AsyncExitStack() as closing:
        closing.push_async_callback(registry.close)
        closing.callback(service.close)
        try:
            await _open_ports(settings, metrics, service, keeper, closing)
        except ConfigError as error:
            if ending is None:
                raise
            # Raised from here it would be logged with its traceback, and the process would end with another code.
            ending.error = error
            ending.stop()
            yield
            return
        tasks = [
            asyncio.create_task(_load_models(settings, registry, ending or Ending())),
            asyncio.create_task(_watch_event_loop(metrics)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def _reporting(manager: ServiceManager | None, registry: Registry) -> AsyncIterator[None]:
    """From before the first model is loaded until the last one is closed."""
    if manager is None:
        yield
        return
    task = asyncio.create_task(report(manager, registry))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        manager.close()


async def _open_ports(
    settings: Settings,
    metrics: Metrics,
    service: InferenceService,
    keeper: Gatekeeper,
    closing: contextlib.AsyncExitStack,
) -> None:
    """The ports beside the main one. `closing` closes them."""
    if settings.allow_grpc:
        grpc_server = await GrpcServer.start(service, settings, keeper)
        closing.push_async_callback(grpc_server.stop, GRPC_GRACE_S)
        logger.info("listening on %s:%d for gRPC", settings.host, grpc_server.port)
    if settings.metrics_port:
        closing.callback(serve_metrics(metrics, settings.host, settings.metrics_port))


async def _load_models(settings: Settings, registry: Registry, ending: Ending) -> None:
    """Load what is wanted, say how to use it, and in `poll` mode go on looking."""
    started_s = time.monotonic()
    try:
        await registry.start(_startup_names(settings))
    except ServeError as error:
        logger.error("no model can be used: %s", error)
    except Exception:
        logger.exception("no model can be used")
    if settings.exit_on_error and (failures := registry.startup_failures()):
        ending.error = ConfigError(f"failed to load all models: {', '.join(failures)}", field="exit_on_error")
        ending.stop()
        return
    _tell_how_to_use(settings, registry, started_s)
    while settings.model_control_mode == "poll":
        await asyncio.sleep(settings.repository_poll_s)
        try:
            await registry.poll()
        except ServeError as error:
            logger.error("the repositories could not be read: %s", error)
        except Exception:
            logger.exception("the repositories could not be read")


def _startup_names(settings: Settings) -> tuple[str, ...] | None:
    """Models to load first; ``None``: all of them."""
    if settings.model_control_mode != "explicit" or settings.load_model == ("*",):
        return None
    return settings.load_model


def _tell_how_to_use(settings: Settings, registry: Registry, started_s: float) -> None:
    num_ready = sum(len(model.versions) for model in registry.ready_models())
    logger.info("%d model versions are ready after %.1f s", num_ready, time.monotonic() - started_s)
    try:
        model = registry.resolve(None)
    except ServeError as error:
        logger.info("no text can be asked for: %s", error)
        return
    logger.info("model %s is ready; try:", model.name)
    logger.info(example_command(settings, has_chat_template=model.chat_template is not None))


def example_command(settings: Settings, *, has_chat_template: bool) -> str:
    """A curl command that works on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, _url_host(settings.host))  # noqa: S104 - compared
    path, body = "completions", '{"prompt": "Once upon a time", "max_tokens": 32}'
    if has_chat_template:
        path, body = "chat/completions", '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
    words = ["curl", f"http://{host}:{settings.port}/v1/{path}", "-H", "Content-Type: application/json"]
    if settings.api_keys:
        words += ["-H", "Authorization: Bearer YOUR_KEY"]
    return shlex.join([*words, "-d", body])


async def _watch_event_loop(metrics: Metrics) -> None:
    """Measure how late the event loop is: what blocks it delays every stream."""
    while True:
        due_s = time.monotonic() + _LAG_INTERVAL_S
        await asyncio.sleep(_LAG_INTERVAL_S)
        metrics.observe_event_loop_lag(max(0.0, time.monotonic() - due_s))
