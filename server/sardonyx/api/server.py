"""uvicorn, with an end in order.

Floor 5. uvicorn by itself stops listening at the first signal and dies of it after its last answer.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator

import uvicorn
from litestar.types import ASGIApp

from sardonyx.api.connection import LimitedHttpProtocol
from sardonyx.errors import ConfigError

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Longer than balancers keep an idle connection (60 s), so that they, and not we, close it first."""
FLUSH_TIMEOUT_S = 5
"""After the drain, for the last bytes of the last answers."""
EXIT_TIMEOUT_S = 10.0
"""After that, for threads that cannot be interrupted, such as one that loads a model."""
BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything slow begins.

    Raises:
        ConfigError: the address is taken or is not ours.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}", field="port") from error


class DrainingServer(uvicorn.Server):
    """Serves until the first SIGTERM or SIGINT, drains, and returns; a second signal ends the process at once.

    Args:
        drain: does what must happen before the listener closes. Its argument says whether to leave time for balancers
            to notice: yes for SIGTERM, no for someone who pressed Ctrl-C.
    """

    def __init__(self, app: ASGIApp, drain: Callable[[bool], Awaitable[None]]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=LimitedHttpProtocol,
                ws="none",
                loop="uvloop",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=FLUSH_TIMEOUT_S,
            )
        )
        self._drain = drain
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals become calls on the event loop. In a thread (tests) there are none; see `request_exit`."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def request_exit(self, *, with_grace: bool = False) -> "asyncio.Task[None]":
        """Begin to drain. On the event loop; once."""
        self._draining = asyncio.get_running_loop().create_task(self._drain_and_exit(with_grace))
        return self._draining

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._draining is None:
            logger.info("%s: shutting down; once more to exit at once", name)
            self.request_exit(with_grace=number == signal.SIGTERM).add_done_callback(_exit_in_time)
            return
        logger.warning("%s again: exiting at once", name)
        logging.shutdown()
        os._exit(128 + number)

    async def _drain_and_exit(self, with_grace: bool) -> None:
        try:
            await self._drain(with_grace)
        except Exception:
            logger.exception("the shutdown went wrong")
        finally:
            self.should_exit = True


def _exit_in_time(_: object) -> None:
    """The interpreter waits for its threads before it ends; this does not wait for ever."""
    timer = threading.Timer(FLUSH_TIMEOUT_S + EXIT_TIMEOUT_S, os._exit, [0])
    timer.daemon = True
    timer.start()
