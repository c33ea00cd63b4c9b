"""What is measured: an engine that makes pictures, several at once."""

import asyncio
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import aiohttp

from line_process import LineProcess
from our_server import OurServer

GUIDANCE = 5.0
"""Above 1: every step asks the UNet twice, with the prompt and without."""


@dataclass(frozen=True)
class Wish:
    """One picture asked for."""

    prompt: str
    steps: int
    seed: int


@dataclass(frozen=True)
class Job:
    """Some pictures of one size."""

    pictures: list[Wish]
    num_clients: int
    """Requests at once."""
    side: int
    """Pixels."""


@dataclass(frozen=True)
class Made:
    """What became of a job."""

    seconds: float
    latencies: list[float]
    """Of each picture, in the job's order."""
    peak_bytes: int
    """The most memory that the process had resident, from its start."""


class Engine(Protocol):
    """One contestant."""

    def paint(self, job: Job) -> Made: ...

    def stop(self) -> None: ...


class Diffusers:
    """A process of `rivals.py`; batched by hand, or a call for each picture."""

    def __init__(self, python: str, folder: Path, threads: int, log: Path, *, is_batched: bool) -> None:
        script = Path(__file__).parent / "rivals.py"
        self._process = LineProcess([python, str(script), str(folder), str(threads)], threads, log)
        self._is_batched = is_batched

    def paint(self, job: Job) -> Made:
        return Made(
            **self._process.ask(
                {
                    "pictures": [asdict(wish) for wish in job.pictures],
                    "num_clients": job.num_clients,
                    "side": job.side,
                    "guidance": GUIDANCE,
                    "is_batched": self._is_batched,
                }
            )
        )

    def stop(self) -> None:
        self._process.stop()


class Ours:
    """One model of our server, asked over HTTP; pictures come back as PNG in base64."""

    def __init__(self, server: OurServer, model: str) -> None:
        self._server = server
        self._model = model

    def paint(self, job: Job) -> Made:
        seconds, latencies = asyncio.run(self._paint(job))
        return Made(seconds, latencies, self._server.peak_bytes())

    def stop(self) -> None:
        """The server is stopped by who started it."""

    def paint_among(self, first: list[Wish], then: Wish, side: int) -> float:
        """Seconds that one picture takes which is asked for once the others are under way: one has shown a preview."""

        async def run() -> float:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
                streams = [asyncio.create_task(self._follow(session, wish, side)) for wish in first]
                await asyncio.wait(streams, return_when=asyncio.FIRST_COMPLETED)
                seconds = await self._post(session, then, side)
                rests = [rest for _, rest in await asyncio.gather(*streams)]
                assert not any(rest.done() for rest in rests), "long requests ended before the short one"
                for rest in rests:
                    rest.cancel()
                # The connections close with the session, and the server lets go of what nobody reads.
                return seconds

        return asyncio.run(run())

    async def _paint(self, job: Job) -> tuple[float, list[float]]:
        places = asyncio.Semaphore(job.num_clients)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

            async def one(wish: Wish) -> float:
                async with places:
                    return await self._post(session, wish, job.side)

            start_s = time.perf_counter()
            latencies = list(await asyncio.gather(*(one(wish) for wish in job.pictures)))
            return time.perf_counter() - start_s, latencies

    def _body(self, wish: Wish, side: int) -> dict[str, object]:
        return {
            "model": self._model,
            "prompt": wish.prompt,
            "steps": wish.steps,
            "seed": wish.seed,
            "size": f"{side}x{side}",
            "guidance_scale": GUIDANCE,
            "response_format": "b64_json",
        }

    async def _post(self, session: aiohttp.ClientSession, wish: Wish, side: int) -> float:
        start_s = time.perf_counter()
        url = f"{self._server.url}/v1/images/generations"
        async with session.post(url, json=self._body(wish, side)) as response:
            if response.status != 200:
                raise SystemExit(f"{self._model}: {response.status}: {await response.text()}")
            await response.read()
        return time.perf_counter() - start_s

    async def _follow(self, session: aiohttp.ClientSession, wish: Wish, side: int) -> tuple[bytes, asyncio.Task[bytes]]:
        """The first event of a stream, and what reads the others."""
        body = self._body(wish, side) | {"stream": True, "partial_images": 3}
        response = await session.post(f"{self._server.url}/v1/images/generations", json=body)
        if response.status != 200:
            raise SystemExit(f"{self._model}: {response.status}: {await response.text()}")
        event = await response.content.readuntil(b"\n\n")
        return event, asyncio.create_task(response.read())
