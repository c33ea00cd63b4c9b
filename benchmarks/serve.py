"""Streaming load over HTTP: the server in a process of its own, clients in another, in-process runs in between.

    python benchmarks/serve.py --repository model_repository --model NAME

Each client keeps one `/v1/completions` stream open at a time. Server and clients share the machine's cores, so the
client's own cost is part of the result. `--url` measures a server that already runs (any that speaks the OpenAI API);
then there are no in-process runs.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parent))
import engine as in_process
import results
import workload

START_TIMEOUT_S = 120.0


@dataclass
class Stream:
    """What one client saw of one request, in seconds of `time.perf_counter`."""

    sent_s: float
    token_s: list[float] = field(default_factory=list)
    usage_tokens: int = 0
    error: str | None = None


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Stream:
    """One streamed completion; every data frame that carries text counts as one token's arrival."""
    seen = Stream(sent_s=time.perf_counter())
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                seen.error = f"{response.status}: {(await response.text())[:200]}"
                return seen
            async for frame in frames(response):
                if frame == b"[DONE]":
                    return seen
                chunk = json.loads(frame)
                if "error" in chunk:
                    seen.error = str(chunk["error"])
                    return seen
                if chunk["choices"]:
                    seen.token_s.append(time.perf_counter())
                else:
                    seen.usage_tokens = chunk["usage"]["completion_tokens"]
        seen.error = "the stream ended without [DONE]"
    except (aiohttp.ClientError, OSError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    return seen


async def frames(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async for line in response.content:
        if line.startswith(b"data: "):
            yield line[6:].strip()


def completion(model: str, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def closed_loop(url: str, model: str, prompts: list[list[int]], clients: int, max_tokens: int) -> dict[str, Any]:
    waiting = list(reversed(prompts))
    done: list[Stream] = []
    start = time.perf_counter()

    async def client(session: aiohttp.ClientSession) -> None:
        while waiting:
            done.append(await stream(session, url, completion(model, waiting.pop(), max_tokens)))

    async with new_session() as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    wall_s = time.perf_counter() - start
    good = [seen for seen in done if seen.error is None]
    return {
        "clients": clients,
        "requests": len(done),
        "errors": [seen.error for seen in done if seen.error is not None],
        "output_tokens_per_s": sum(seen.usage_tokens for seen in good) / wall_s,
        "ttft_ms": [1e3 * (seen.token_s[0] - seen.sent_s) for seen in good],
        "itl_ms": [1e3 * (b - a) for seen in good for a, b in zip(seen.token_s, seen.token_s[1:], strict=False)],
    }


async def shared_prefix(url: str, model: str, prompts: list[list[int]]) -> dict[str, Any]:
    async with new_session() as session:
        ttft_ms = []
        for prompt in prompts:
            seen = await stream(session, url, completion(model, prompt, 8))
            assert seen.error is None, seen.error
            ttft_ms.append(1e3 * (seen.token_s[0] - seen.sent_s))
    return {"cold_ttft_ms": ttft_ms[:1], "warm_ttft_ms": ttft_ms[1:]}


async def stall(
    url: str, model: str, decoding: list[list[int]], long_prompt: list[int], max_tokens: int
) -> dict[str, Any]:
    async with new_session() as session:
        others = [asyncio.create_task(stream(session, url, completion(model, p, max_tokens))) for p in decoding]
        # A quarter of the others' run at an unhurried pace: long enough for all of them to be decoding.
        probe = await stream(session, url, completion(model, decoding[0][:16], max_tokens // 4))
        assert probe.error is None, probe.error
        long = await stream(session, url, completion(model, long_prompt, 1))
        seen = await asyncio.gather(*others)
    assert long.error is None, long.error
    arrived_s, first_s = long.sent_s, long.token_s[0]
    during, before = [], []
    for other in seen:
        assert other.error is None, other.error
        for a, b in zip(other.token_s, other.token_s[1:], strict=False):
            if b <= arrived_s:
                before.append(1e3 * (b - a))
            elif a < first_s:
                during.append(1e3 * (b - a))
    return {
        "largest_stall_ms": max(during, default=0.0),
        "itl_before_ms": before,
        "itl_during_ms": during,
        "long_ttft_ms": 1e3 * (first_s - arrived_s),
    }


def new_session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600), read_bufsize=1 << 18)


@contextlib.contextmanager
def served(repository: Path, threads: int) -> Iterator[tuple[str, list[str]]]:
    """`sardonyx serve` on a free port, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["serve", str(repository), "--port", str(port), "--num-threads", str(threads)]
    environment = os.environ | {"SARDONYX_LOG_LEVEL": "warning"}
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("sardonyx")), *command], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        asyncio.run(_until_ready(f"http://127.0.0.1:{port}", process))
        yield f"http://127.0.0.1:{port}", ["sardonyx", *command]
    finally:
        process.terminate()
        process.wait(timeout=60)


async def _until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    async with new_session() as session:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/ready") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.2)
    raise SystemExit("the server did not become ready")


def measure_http(url: str, model: str, tokenizer: Any, repeat: int) -> dict[str, Any]:
    asyncio.run(closed_loop(url, model, workload.prompts(tokenizer, 2, 64, seed=9000 + repeat), 2, 8))
    runs = []
    for scenario in in_process.throughput_scenarios(tokenizer, repeat):
        scenario.pop("kind")
        runs.append(asyncio.run(closed_loop(url, model, **scenario)))
    prefix, long = in_process.special_scenarios(tokenizer, repeat)
    prefix_result = asyncio.run(shared_prefix(url, model, prefix["prompts"]))
    stall_result = asyncio.run(stall(url, model, long["decoding"], long["long_prompt"], long["max_tokens"]))
    return {"runs": runs, "shared_prefix": prefix_result, "stall": stall_result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--url", help="measure this server instead of starting one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="serve")
    arguments = parser.parse_args()
    tokenizer = workload.load_tokenizer(arguments.repository, arguments.model)
    http: list[dict[str, Any]] = []
    inside: list[list[dict[str, Any]]] = []
    launch: list[str] | None = None
    for repeat in range(arguments.repeats):
        if arguments.url:
            http.append(measure_http(arguments.url, arguments.model, tokenizer, repeat))
            continue
        job = {
            "model": str(arguments.repository / arguments.model),
            "threads": arguments.threads,
            "options": {},
            "warm_up": workload.prompts(tokenizer, 2, 64, seed=9000 + repeat),
            "scenarios": in_process.throughput_scenarios(tokenizer, repeat),
        }
        inside.append(in_process.run_worker("sardonyx", sys.executable, job)[1:])
        with served(arguments.repository, arguments.threads) as (url, command):
            launch = command
            http.append(measure_http(url, arguments.model, tokenizer, repeat))
        speeds = [f"{run['clients']}: {run['output_tokens_per_s']:.0f}" for run in http[-1]["runs"]]
        sys.stderr.write(f"round {repeat + 1}: {', '.join(speeds)} tokens/s over HTTP\n")
    report(http, inside, launch, arguments)


def report(
    http: list[dict[str, Any]],
    inside: list[list[dict[str, Any]]],
    launch: list[str] | None,
    arguments: argparse.Namespace,
) -> None:
    by_clients: dict[int, dict[str, Any]] = {}
    for index, clients in enumerate(in_process.CLIENTS):
        runs = [measured["runs"][index] for measured in http]
        entry = {
            "output_tokens_per_s": results.median_and_spread([run["output_tokens_per_s"] for run in runs]),
            "ttft_ms": results.percentiles([value for run in runs for value in run["ttft_ms"]]),
            "itl_ms": results.percentiles([value for run in runs for value in run["itl_ms"]]),
            "errors": [error for run in runs for error in run["errors"]],
        }
        if inside:
            alone = results.median_and_spread([measured[index]["output_tokens_per_s"] for measured in inside])
            entry["in_process_tokens_per_s"] = alone
            entry["http_share"] = round(entry["output_tokens_per_s"]["median"] / alone["median"], 3)
        by_clients[clients] = entry
    prefix = [measured["shared_prefix"] for measured in http]
    stalls = [measured["stall"] for measured in http]
    cold = results.median_and_spread([value for run in prefix for value in run["cold_ttft_ms"]])
    warm = results.median_and_spread([value for run in prefix for value in run["warm_ttft_ms"]])
    result = {
        "environment": workload.environment(["sardonyx", "onnxruntime", "numpy", "uvicorn", "litestar", "aiohttp"]),
        "server": launch or arguments.url,
        "threads": arguments.threads,
        "clients": by_clients,
        "shared_prefix_1000": {
            "cold_ttft_ms": cold,
            "warm_ttft_ms": warm,
            "share": round(warm["median"] / cold["median"], 3),
        },
        "long_prompt_4000_among_8": {
            "largest_stall_ms": results.median_and_spread([run["largest_stall_ms"] for run in stalls]),
            "itl_before_ms": results.percentiles([value for run in stalls for value in run["itl_before_ms"]]),
            "itl_during_ms": results.percentiles([value for run in stalls for value in run["itl_during_ms"]]),
            "long_ttft_ms": results.median_and_spread([run["long_ttft_ms"] for run in stalls]),
        },
    }
    path = results.save(arguments.name, result)
    header = ["clients", "tok/s", "in process", "share", "TTFT p50 / p99 ms", "ITL p50 / p99 ms", "errors"]
    rows = [
        [
            clients,
            f"{entry['output_tokens_per_s']['median']:.0f}",
            f"{entry['in_process_tokens_per_s']['median']:.0f}" if inside else "",
            entry.get("http_share", ""),
            f"{entry['ttft_ms'].get('p50')} / {entry['ttft_ms'].get('p99')}",
            f"{entry['itl_ms'].get('p50')} / {entry['itl_ms'].get('p99')}",
            len(entry["errors"]),
        ]
        for clients, entry in by_clients.items()
    ]
    sys.stdout.write(results.table(header, rows) + "\n")
    sys.stdout.write(f"shared prefix: cold {cold['median']} ms, warm {warm['median']} ms\n")
    sys.stdout.write(f"largest stall: {result['long_prompt_4000_among_8']['largest_stall_ms']}\nsaved {path}\n")


if __name__ == "__main__":
    main()
