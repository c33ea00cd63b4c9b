"""What is measured: an engine that embeds texts, in a process of its own, whether library or server."""

import asyncio
import base64
import time
from pathlib import Path
from typing import Protocol

import aiohttp
import numpy as np
import numpy.typing as npt

from line_process import LineProcess
from our_server import OurServer

Vectors = npt.NDArray[np.float32]


class Engine(Protocol):
    """One contestant."""

    name: str

    def embed(self, texts: list[str]) -> tuple[float, Vectors]:
        """Seconds that all texts together took, and their vectors."""
        ...

    def one_by_one(self, texts: list[str]) -> list[float]:
        """Milliseconds of each text, asked when the one before it is answered."""
        ...

    def serve(self, texts: list[str], at_s: list[float]) -> list[float]:
        """Milliseconds from each text's arrival to its vector."""
        ...

    def stop(self) -> None: ...


class Library:
    """A process of `rivals.py`."""

    def __init__(self, name: str, python: str, folder: Path, threads: int, log: Path) -> None:
        self.name = name
        script = Path(__file__).parent / "rivals.py"
        self._process = LineProcess([python, str(script), name, str(folder), str(threads)], threads, log)

    def embed(self, texts: list[str]) -> tuple[float, Vectors]:
        answer = self._process.ask({"texts": texts})
        vectors = np.frombuffer(base64.b64decode(answer["vectors"]), np.float32)
        return answer["seconds"], vectors.reshape(len(texts), -1)

    def one_by_one(self, texts: list[str]) -> list[float]:
        return [1e3 * self.embed([text])[0] for text in texts]

    def serve(self, texts: list[str], at_s: list[float]) -> list[float]:
        taken: list[float] = self._process.ask({"texts": texts, "at_s": at_s})["latency_ms"]
        return taken

    def stop(self) -> None:
        self._process.stop()


class Ours:
    """One model of our server, asked over HTTP with base64, as OpenAI's client does."""

    def __init__(self, name: str, server: OurServer, model: str) -> None:
        self.name = name
        self._server = server
        self._model = model

    def embed(self, texts: list[str]) -> tuple[float, Vectors]:
        async def run() -> tuple[float, Vectors]:
            async with aiohttp.ClientSession() as session:
                start_s = time.perf_counter()
                reply = await self._post(session, texts)
                return time.perf_counter() - start_s, reply

        return asyncio.run(run())

    def one_by_one(self, texts: list[str]) -> list[float]:
        async def run() -> list[float]:
            taken = []
            async with aiohttp.ClientSession() as session:
                for text in texts:
                    start_s = time.perf_counter()
                    await self._post(session, [text])
                    taken.append(1e3 * (time.perf_counter() - start_s))
            return taken

        return asyncio.run(run())

    def serve(self, texts: list[str], at_s: list[float]) -> list[float]:
        async def run() -> list[float]:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                start_s = time.perf_counter()

                async def one(text: str, due_s: float) -> float:
                    await asyncio.sleep(max(0.0, due_s - (time.perf_counter() - start_s)))
                    await self._post(session, [text])
                    return 1e3 * (time.perf_counter() - start_s - due_s)

                return list(await asyncio.gather(*(one(text, due_s) for text, due_s in zip(texts, at_s, strict=True))))

        return asyncio.run(run())

    def stop(self) -> None:
        """The server is stopped by who started it."""

    async def _post(self, session: aiohttp.ClientSession, texts: list[str]) -> Vectors:
        body = {"model": self._model, "input": texts, "encoding_format": "base64"}
        async with session.post(f"{self._server.url}/v1/embeddings", json=body) as response:
            answer = await response.json()
            if response.status != 200:
                raise SystemExit(f"{self.name}: {response.status}: {answer}")
        return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), np.float32) for row in answer["data"]])
