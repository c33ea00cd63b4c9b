"""One HTTP request and its answer, as the handlers of the KServe protocol see them.

Floor 5. Plain ASGI: a request object of the framework costs as much as a small inference.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import msgspec
from litestar.types import HTTPScope, Receive, Send

from sardonyx.api.kserve.body import MAX_INLINE_BYTES, read_body
from sardonyx.api.kserve.errors import http_status
from sardonyx.api.kserve.json_text import check_containers, decode_json
from sardonyx.errors import RequestAborted, ServeError, UnsupportedFeature

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S = 0.02
"""How long an answer may take before somebody watches whether its client is still there. Watching costs a task, 15 us,
as much as the rest of a small request."""

JSON_TYPE = (b"content-type", b"application/json")
Header = tuple[bytes, bytes]


class Reply(NamedTuple):
    """A whole answer."""

    body: bytes = b""
    status: int = 200
    headers: tuple[Header, ...] = ()
    """With its content type, if it has a body."""
    more: tuple[bytes | memoryview, ...] = ()
    """What follows on the body; large tensors are not copied into it."""


class Exchange:
    """A request whose route is known.

    Args:
        scope: ASGI's.
        receive: ASGI's.
        send: ASGI's.
        headers: by lower-case name; of several the first.
        arguments: of the path.
        max_bytes: of the body.
    """

    __slots__ = (
        "_receive",
        "_send",
        "arguments",
        "has_begun",
        "headers",
        "log_id",
        "max_bytes",
        "method",
        "request_id",
    )

    def __init__(
        self,
        scope: HTTPScope,
        receive: Receive,
        send: Send,
        headers: dict[str, str],
        arguments: dict[str, str],
        max_bytes: int,
    ) -> None:
        self._receive = receive
        self._send = send
        self.method = scope["method"]
        self.log_id = scope["state"].get("request_id")
        self.headers = headers
        self.arguments = arguments
        self.max_bytes = max_bytes
        self.has_begun = False
        """The head of the answer is sent."""
        self.request_id = ""
        """The caller's own, once its body has told; for what an error says."""

    @property
    def model(self) -> str:
        """Name in the path; empty where it has none."""
        return self.arguments.get("model", "")

    @property
    def version(self) -> str:
        """Digits in the path; empty where it names none."""
        return self.arguments.get("version") or ""

    async def read_body(self) -> bytes:
        """The body as it was sent. Raises what `body.read_body` raises."""
        return await read_body(self._receive, self.headers, self.max_bytes)

    async def read_json(self, decoder: msgspec.json.Decoder[T], empty: T) -> T:
        """The body as JSON, or `empty` where there is none.

        Raises:
            UnsupportedFeature: it is compressed.
            InvalidRequest: it is not the JSON that is wanted.
            PayloadTooLarge: it is over the limit, or has too many parts.
        """
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise UnsupportedFeature("Unsupported compression type")
        body = await self.read_body()
        if not body:
            return empty

        def decode() -> T:
            check_containers(body)
            return decode_json(body, decoder)

        return await off_loop(len(body), decode)

    def log_failure(self, error: BaseException) -> None:
        """What was not the caller's doing, for the operator."""
        if not isinstance(error, ServeError):
            logger.error("request %s failed", self.log_id, exc_info=error)
        elif http_status(error) == 500:  # 503 and 504 are told by probes and metrics, again and again
            logger.warning("%s: %s", type(error).__name__, error.message)

    async def send(self, reply: Reply) -> None:
        """Send a whole answer."""
        size = len(reply.body) + sum(map(len, reply.more))
        headers = [*reply.headers, (b"content-length", b"%d" % size)]
        await self._send({"type": "http.response.start", "status": reply.status, "headers": headers})
        *parts, last = (reply.body, *reply.more)
        for part in parts:
            await self.send_piece(part)
        await self.send_piece(last, is_last=True)

    async def begin(self, headers: Iterable[Header]) -> None:
        """Start an answer that comes in pieces."""
        self.has_begun = True
        await self._send({"type": "http.response.start", "status": 200, "headers": list(headers)})

    async def send_piece(self, piece: bytes | memoryview, *, is_last: bool = False) -> None:
        """Send a piece of it."""
        body = cast(bytes, piece)  # uvicorn takes any buffer
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def while_connected(self, work: Coroutine[Any, Any, T], patience_s: float = PATIENCE_S) -> T:
        """Run `work` here; cancel it when the client leaves. The body must have been read.

        As `api.disconnect.while_connected`, without its two tasks for work that is quick.

        Raises:
            RequestAborted: the client left first. What else `work` raises comes through.
        """
        task = asyncio.current_task()
        assert task is not None
        watcher = _Watcher(self._receive, task)
        timer = task.get_loop().call_later(patience_s, watcher.start)
        try:
            return await work
        except asyncio.CancelledError:
            if watcher.is_gone and task.uncancel() == 0:
                raise RequestAborted("the client left before its answer") from None
            raise
        finally:
            timer.cancel()
            watcher.stop()


class _Watcher:
    """Cancels a task when the client leaves."""

    __slots__ = ("_receive", "_task", "_watching", "is_gone")

    def __init__(self, receive: Receive, task: "asyncio.Task[Any]") -> None:
        self.is_gone = False
        self._receive = receive
        self._task = task
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._watching = self._task.get_loop().create_task(self._watch())

    def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()

    async def _watch(self) -> None:
        # uvicorn may repeat an empty last piece of the body before it has nothing but the disconnect to tell.
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        self._task.cancel()


async def off_loop(num_bytes: int, job: Callable[[], T]) -> T:
    """What `job` returns: at once where it is about few bytes, else from a thread."""
    return job() if num_bytes <= MAX_INLINE_BYTES else await asyncio.to_thread(job)


def json_reply(value: Any) -> Reply:
    """An answer of JSON."""
    return Reply(msgspec.json.encode(value), headers=(JSON_TYPE,))
