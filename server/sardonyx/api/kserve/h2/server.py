"""Listens for HTTP/2 connections, and lets them end.

Floor 5.
"""

import asyncio
import socket
import ssl
from typing import Self

from sardonyx.api.kserve.grpc_routes import Routes
from sardonyx.api.kserve.h2.connection import Connection

HANDSHAKE_TIMEOUT_S = 10.0
ENDING_TIMEOUT_S = 10.0
"""For cancelled calls to end."""
BACKLOG = 1024


class Http2Server:
    """Connections of one port. Belongs to the event loop that it was made in.

    Args:
        routes: pick the methods.
        max_message_bytes: of a request.
    """

    def __init__(self, routes: Routes, max_message_bytes: int) -> None:
        self._routes = routes
        self._max_message_bytes = max_message_bytes
        self._loop = asyncio.get_running_loop()
        self._connections: set[Connection] = set()
        self._all_gone = asyncio.Event()
        self._orphans: set[asyncio.Task[None]] = set()
        """Calls that run on for a moment after their connection is gone."""
        self._is_stopped = False
        self._listener: asyncio.Server | None = None

    async def listen(self, listener: socket.socket, encryption: ssl.SSLContext | None) -> Self:
        """Accept from a bound socket, from now on."""
        timeout_s = None if encryption is None else HANDSHAKE_TIMEOUT_S
        self._listener = await self._loop.create_server(
            self._connect, sock=listener, ssl=encryption, ssl_handshake_timeout=timeout_s, backlog=BACKLOG
        )
        return self

    async def stop(self, grace_s: float) -> None:
        """Accept no more, and be back when every call has ended; those that run after `grace_s` are cancelled."""
        self._is_stopped = True
        if self._listener is not None:
            self._listener.close()
        if grace_s > 0:
            for connection in list(self._connections):
                connection.drain()
            await self._wait(grace_s)
        for connection in list(self._connections):
            connection.cut_short()
        tasks = self._orphans.union(*(connection.tasks for connection in self._connections))
        if tasks:
            await asyncio.wait(tasks, timeout=ENDING_TIMEOUT_S)
        await self._wait(ENDING_TIMEOUT_S)

    def _connect(self) -> Connection:
        return Connection(self._loop, self._routes, self._max_message_bytes, self._add, self._forget)

    def _add(self, connection: Connection) -> None:
        self._connections.add(connection)
        self._all_gone.clear()
        if self._is_stopped:
            # Its encryption took longer than the listener lasted.
            connection.cut_short()

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        for task in connection.tasks:
            self._orphans.add(task)
            task.add_done_callback(self._orphans.discard)
        if not self._connections:
            self._all_gone.set()

    async def _wait(self, timeout_s: float) -> None:
        if self._connections:
            try:
                await asyncio.wait_for(self._all_gone.wait(), timeout_s)
            except TimeoutError:
                return
