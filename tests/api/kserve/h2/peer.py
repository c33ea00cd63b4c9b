"""The other end of a connection: a client that sends exactly the frames that a test wants, and reads those it gets."""

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import hpack
from tritonclient.grpc import service_pb2_grpc

from sardonyx.api.auth import Gatekeeper
from sardonyx.api.kserve.grpc_routes import INFERENCE, Routes
from sardonyx.api.kserve.h2 import frames
from sardonyx.api.kserve.h2.connection import Connection

UNARY = f"/{INFERENCE}/ModelInfer"
STREAM = f"/{INFERENCE}/ModelStreamInfer"


class Frame(NamedTuple):
    kind: int
    flags: int
    stream_id: int
    payload: bytes


def read_frames(data: bytes) -> list[Frame]:
    """Whole frames; what is left over fails."""
    found, at = [], 0
    while at < len(data):
        high, low, kind, flags, stream_id = frames.HEADER.unpack_from(data, at)
        end = at + 9 + (high << 8 | low)
        assert end <= len(data), "the last frame is cut off"
        found.append(Frame(kind, flags, stream_id, data[at + 9 : end]))
        at = end
    return found


@dataclass
class Answer:
    """What came on one stream."""

    headers: dict[str, str] = field(default_factory=dict)
    trailers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    reset: int | None = None
    is_ended: bool = False

    @property
    def status(self) -> int:
        return int(({**self.headers, **self.trailers})["grpc-status"])

    @property
    def messages(self) -> list[bytes]:
        found, at = [], 0
        while at < len(self.data):
            assert self.data[at] == 0
            end = at + 5 + int.from_bytes(self.data[at + 1 : at + 5], "big")
            assert end <= len(self.data)
            found.append(self.data[at + 5 : end])
            at = end
        return found


def read_answers(found: list[Frame]) -> dict[int, Answer]:
    """The answers of a connection by their streams."""
    decoder, answers = hpack.Decoder(), {}
    for each in found:
        if not each.stream_id:
            continue
        answer = answers.setdefault(each.stream_id, Answer())
        if each.kind == frames.HEADERS:
            target = answer.headers if not answer.headers else answer.trailers
            target.update(decoder.decode(each.payload))
        elif each.kind == frames.DATA:
            answer.data += each.payload
        elif each.kind == frames.RST_STREAM:
            answer.reset = int.from_bytes(each.payload, "big")
        answer.is_ended |= each.kind in (frames.HEADERS, frames.DATA) and bool(each.flags & frames.END_STREAM)
    return answers


def message(data: bytes = b"", *, is_compressed: bool = False) -> bytes:
    return bytes([is_compressed]) + len(data).to_bytes(4, "big") + data


def goaway_code(found: list[Frame]) -> int | None:
    """Why the connection was given up, if it was."""
    codes = [int.from_bytes(each.payload[4:8], "big") for each in found if each.kind == frames.GOAWAY]
    return codes[-1] if codes else None


class Requests:
    """Makes a client's frames."""

    def __init__(self) -> None:
        self.encoder = hpack.Encoder()

    def headers(self, stream_id: int = 1, path: str = UNARY, *, ends: bool = False, **fields: str) -> bytes:
        """HEADERS of a call. Other fields have ``_`` for ``-``; an empty value leaves one out."""
        flags = frames.END_HEADERS | (frames.END_STREAM if ends else 0)
        return frames.frame(frames.HEADERS, flags, stream_id, self.block(path, **fields))

    def block(self, path: str = UNARY, **fields: str) -> bytes:
        named = {name.replace("_", "-"): value for name, value in fields.items()}
        wanted = {
            ":method": named.pop("method", "POST"),
            ":scheme": "http",
            ":path": path,
            ":authority": "test",
            "te": "trailers",
            "content-type": "application/grpc",
            **named,
        }
        return self.encoder.encode([(name, value) for name, value in wanted.items() if value])

    def call(self, stream_id: int = 1, data: bytes = b"", path: str = UNARY, **fields: str) -> bytes:
        """A whole unary call."""
        return self.headers(stream_id, path, **fields) + self.data(stream_id, message(data), ends=True)

    @staticmethod
    def data(stream_id: int, data: bytes, *, ends: bool = False) -> bytes:
        return frames.frame(frames.DATA, frames.END_STREAM if ends else 0, stream_id, data)

    @staticmethod
    def greeting(**settings: int) -> bytes:
        numbers = {getattr(frames, name.upper()): value for name, value in settings.items()}
        return frames.PREFACE + frames.settings(numbers)


class Echo:
    """Gives back what it gets. ``wait`` waits for `gate`, ``raise`` fails. Tests may set `infer` and `stream`."""

    def __init__(self) -> None:
        self.num_cancelled = 0
        self.num_read = 0
        self.gate = asyncio.Event()
        self.metadata: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.ModelInfer

    async def ModelInfer(self, data: bytes, context: Any) -> bytes:
        try:
            return await self.infer(data, context)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise

    async def ModelStreamInfer(self, questions: Any, context: Any) -> None:
        try:
            await self.stream(questions, context)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise

    async def infer(self, data: bytes, context: Any) -> bytes:
        self.metadata = context.invocation_metadata()
        if data == b"raise":
            raise RuntimeError("secret")
        if data == b"wait":
            await self.gate.wait()
        return data

    async def stream(self, questions: Any, context: Any) -> None:
        async for data in questions:
            self.num_read += 1
            await context.write(await self.infer(data, context))


class Pipe(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.is_closed = False
        self.is_aborted = False
        self.is_reading = True
        self.protocol: Any = None

    def write(self, data: Any) -> None:
        assert not self.is_closed
        self.written += data

    def writelines(self, pieces: Any) -> None:
        for each in pieces:
            self.write(each)

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = high

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


class Peer(Requests):
    """A client of a connection in the running loop."""

    def __init__(self, *, max_message_bytes: int = 1 << 20, greets: bool = True, keeper: Any = None) -> None:
        super().__init__()
        self.echo = Echo()
        routes = Routes(keeper or Gatekeeper())
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self.echo, routes)
        self.pipe = Pipe()
        self.lost: list[Connection] = []
        loop = asyncio.get_running_loop()
        self.connection = Connection(loop, routes, max_message_bytes, lambda _: None, self.lost.append)
        self.connection.connection_made(self.pipe)
        self._num_seen = 0
        if greets:
            self.send(self.greeting())
            self.seen()

    def send(self, *data: bytes) -> None:
        self.connection.data_received(b"".join(data))

    @property
    def frames(self) -> list[Frame]:
        """All that came."""
        return read_frames(bytes(self.pipe.written))

    def seen(self) -> list[Frame]:
        """What came since the last look."""
        found = self.frames[self._num_seen :]
        self._num_seen += len(found)
        return found

    @property
    def answers(self) -> dict[int, Answer]:
        return read_answers(self.frames)

    @property
    def fault(self) -> int | None:
        return goaway_code(self.frames) if self.pipe.is_closed else None

    async def settle(self) -> None:
        """Until every call has ended."""
        while self.connection.tasks:
            await asyncio.wait(set(self.connection.tasks))

    async def turn(self, times: int = 20) -> None:
        """Let calls go as far as they can."""
        for _ in itertools.repeat(None, times):
            await asyncio.sleep(0)

    async def leave(self) -> None:
        self.connection.connection_lost(None)
        await self.settle()
