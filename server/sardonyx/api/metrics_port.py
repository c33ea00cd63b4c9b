"""``/metrics`` on a port of its own, as Triton has it: in a thread, so that it answers whatever the event loop does.

Floor 5. Public, like ``/metrics`` of the main port.
"""

import logging
import socket
import socketserver
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""Of a client that sends nothing."""
MAX_CONNECTIONS = 16
"""A thread answers each; more are closed at once."""


_POLL_S = 0.05
"""How long `stop` may take."""


class _Server(socketserver.ThreadingTCPServer):
    """Not http.server's, which looks its own name up when it starts: without a name server that takes seconds."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], answer: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, answer)

    def process_request(self, request: Any, client_address: Any) -> None:  # as socketserver types them
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Mostly a scraper that left."""
        logger.debug("metrics were not sent", exc_info=True)


def serve_metrics(metrics: Metrics, host: str, port: int) -> Callable[[], None]:
    """Listen, and answer in threads.

    Returns:
        What ends it.

    Raises:
        ConfigError: the address is taken or is not ours.
    """

    class Answer(BaseHTTPRequestHandler):
        timeout = TIMEOUT_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404)
                return
            content, media_type = metrics.render()
            self.send_response(200)
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Scrapes are no news."""

    try:
        server = _Server((host.strip("[]"), port), Answer)
    except OSError as error:
        reason = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise ConfigError(reason, field="metrics_port") from error
    threading.Thread(target=server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True).start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return stop
