"""What systemd is told: that the service is ready, how it goes, that it still turns, that it ends.

Floor 5. Datagrams to the socket that ``NOTIFY_SOCKET`` names; without one there is nobody to tell.

Source: systemd, sd_notify(3), sd_watchdog_enabled(3), systemd.service(5) on ``Type=notify`` and ``WatchdogSec=``.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Mapping

from sardonyx.serving.registry import Registry

logger = logging.getLogger(__name__)

_STARTING_INTERVAL_S = 0.5
"""How often readiness is looked at before it is there."""
_STATUS_INTERVAL_S = 5.0
"""And afterwards, where no watchdog wants it more often."""
_EXTENSION_S = 60
"""Loading may take as long as it takes while the event loop turns: each time, so much more is asked for."""
_MAX_STATUS_CHARS = 300


class ServiceManager:
    """systemd's end of the notification socket.

    Args:
        address: a path, or a name in the abstract namespace that begins with ``@``.
        watchdog_s: the service is ended after so long without a sign of life; ``None``: it is not watched.
    """

    def __init__(self, address: str, watchdog_s: float | None = None) -> None:
        self.watchdog_s = watchdog_s
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)  # the event loop waits for nobody
        self._is_failing = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "ServiceManager | None":
        """Who started us, if it wants to be told."""
        address = environ.get("NOTIFY_SOCKET", "")
        if not address:
            return None
        if address[0] not in "/@":
            logger.warning("NOTIFY_SOCKET is neither a path nor an abstract name: nobody is notified")
            return None
        period_us = environ.get("WATCHDOG_USEC", "")
        is_ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        is_watched = is_ours and period_us.isdigit() and int(period_us) > 0
        return cls(address, int(period_us) / 1e6 if is_watched else None)

    def tell(self, *assignments: str) -> bool:
        """Send ``NAME=value`` lines; false where that fails, which is logged once until it works again."""
        lines = (" ".join(assignment.splitlines()) for assignment in assignments)
        try:
            self._socket.sendto("\n".join(lines).encode(errors="replace"), self._address)
        except OSError as error:
            if not self._is_failing:
                logger.warning("the service manager cannot be told %s: %s", assignments[0], error)
            self._is_failing = True
            return False
        self._is_failing = False
        return True

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()


async def report(manager: ServiceManager, registry: Registry) -> None:
    """Tell a manager how the server goes, until cancelled.

    It is told READY once the registry is ready, or once each model of the start has been loaded or has failed: then the
    others serve, and restarting would not repair the failed one. STATUS says what is wrong. WATCHDOG comes at half of
    the period from the event loop, so that it ends with that, and also ends when an engine has stopped or makes no
    progress.
    """
    is_ready, status = False, ""
    watched_s = manager.watchdog_s / 2 if manager.watchdog_s is not None else _STATUS_INTERVAL_S
    while True:
        assignments = []
        if not is_ready:
            is_starting = not (registry.is_ready() or registry.has_settled())
            assignments.append(f"EXTEND_TIMEOUT_USEC={_EXTENSION_S * 1_000_000}" if is_starting else "READY=1")
        if (now := _status(registry)) != status:
            assignments.append(f"STATUS={now}")
        if manager.watchdog_s is not None and not registry.stuck_reasons():
            assignments.append("WATCHDOG=1")
        if assignments and manager.tell(*assignments):
            is_ready, status = is_ready or "READY=1" in assignments, now
        interval_s = min(watched_s, _STATUS_INTERVAL_S)
        await asyncio.sleep(interval_s if is_ready else min(interval_s, _STARTING_INTERVAL_S))


def _status(registry: Registry) -> str:
    """One line for ``systemctl status``."""
    reasons = registry.unready_reasons()
    if not reasons:
        num_ready = len(registry.ready_models())
        return f"ready with {num_ready} model{'s' * (num_ready != 1)}"
    return f"not ready: {'; '.join(reasons)}"[:_MAX_STATUS_CHARS]
