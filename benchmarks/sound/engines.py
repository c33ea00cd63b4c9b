"""What is measured: an engine that transcribes files, several at once."""

import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import aiohttp

from line_process import LineProcess
from our_server import OurServer


@dataclass(frozen=True)
class Heard:
    """What became of one file."""

    text: str
    first_s: float | None
    """From its request to its first text."""
    seconds: float


@dataclass(frozen=True)
class Job:
    """Some files."""

    files: list[Path]
    num_clients: int
    """Files at once."""
    batched: bool


class Engine(Protocol):
    """One contestant."""

    def transcribe(self, job: Job) -> tuple[float, list[Heard]]:
        """Seconds in all, and what became of each file."""
        ...

    def stop(self) -> None: ...


class FasterWhisper:
    """A process of `rivals.py`."""

    def __init__(
        self, python: str, folder: Path, threads: int, compute_type: str, log: Path, *, beam_size: int
    ) -> None:
        script = Path(__file__).parent / "rivals.py"
        self._process = LineProcess([python, str(script), str(folder), str(threads), compute_type], threads, log)
        self._beam_size = beam_size

    def transcribe(self, job: Job) -> tuple[float, list[Heard]]:
        answer = self._process.ask(
            {
                "files": [str(file) for file in job.files],
                "num_clients": job.num_clients,
                "batched": job.batched,
                "beam_size": self._beam_size,
            }
        )
        return answer["seconds"], [Heard(**each) for each in answer["files"]]

    def stop(self) -> None:
        self._process.stop()


class Ours:
    """One model of our server, asked over HTTP for events, as OpenAI's client does."""

    def __init__(self, server: OurServer, model: str) -> None:
        self._server = server
        self._model = model

    def transcribe(self, job: Job) -> tuple[float, list[Heard]]:
        sounds = {file: file.read_bytes() for file in job.files}

        async def run() -> tuple[float, list[Heard]]:
            places = asyncio.Semaphore(job.num_clients)
            timeout = aiohttp.ClientTimeout(total=None)
            async with aiohttp.ClientSession(timeout=timeout) as session:

                async def one(file: Path) -> Heard:
                    async with places:
                        return await self._post(session, file.name, sounds[file], batched=job.batched)

                start_s = time.perf_counter()
                heard = list(await asyncio.gather(*(one(file) for file in job.files)))
                return time.perf_counter() - start_s, heard

        return asyncio.run(run())

    def stop(self) -> None:
        """The server is stopped by who started it."""

    async def _post(self, session: aiohttp.ClientSession, name: str, sound: bytes, *, batched: bool) -> Heard:
        form = aiohttp.FormData({"model": self._model, "language": "en", "stream": "true"})
        if batched:
            form.add_field("chunking_strategy", "auto")
        form.add_field("file", sound, filename=name)
        start_s = time.perf_counter()
        first_s, text = None, ""
        async with session.post(f"{self._server.url}/v1/audio/transcriptions", data=form) as response:
            if response.status != 200:
                raise SystemExit(f"{self._model}: {response.status}: {await response.text()}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if event.get("type") == "transcript.text.delta" and first_s is None:
                    first_s = time.perf_counter() - start_s
                elif event.get("type") == "transcript.text.done":
                    text = event["text"]
                elif "error" in event:
                    raise SystemExit(f"{self._model}: {event}")
        return Heard(text, first_s, time.perf_counter() - start_s)
