"""``/metrics`` on a port of its own, as Triton has it: in a thread, so that it answers whatever the event loop does.

Floor 5. Public, like ``/metrics`` of the main port.
"""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics

TIMEOUT_S = 10.0
"""Of a client that sends nothing."""


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
        server = ThreadingHTTPServer((host.strip("[]"), port), Answer)
    except OSError as error:
        reason = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise ConfigError(reason, field="metrics_port") from error
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return stop
