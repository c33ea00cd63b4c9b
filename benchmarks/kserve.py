"""Our KServe-v2 front beside NVIDIA's tritonserver: the same ONNX files, configs, threads and cores, by turns.

    python benchmarks/kserve.py
    python benchmarks/kserve.py --models add_sub --protocols grpc --clients 1,16 --rounds 1 --seconds 1

Both servers run all the time, and one of them is asked at a time. A closed loop of clients sends prebuilt requests over
HTTP with JSON, HTTP with binary tensors, and gRPC. Before that, Triton's own client asks each model once over each
protocol and compares the numbers, and a short trial picks each server's instance count for each point.
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import results
import workload
from engines import rival_triton, sardonyx_kserve
from v2 import report
from v2.load import Load, Measured
from v2.models import MODELS, Model, build
from v2.payloads import HTTP_JSON, PROTOCOLS, check, payload
from v2.servers import Server

SERVERS = ("sardonyx", "triton")
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
MAX_CLIENTS = {("identity", HTTP_JSON): 8}
"""A request is 20 MB of text there and takes a core for a fifth of a second: more clients would only wait."""
TRIAL_S = 0.7


@dataclass(frozen=True)
class Point:
    model: str
    protocol: str
    clients: int


@dataclass(frozen=True)
class Contestant:
    server: Server
    instances: list[str]
    """What it may choose from: a count, or ``2x1`` for two instances whose runs have one thread each."""


Loads = dict[tuple[str, str, str, str], Load]
"""By server, model, protocol and instances."""


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are stopped then, too
    models = build(arguments.models, arguments.cache)
    points = [
        Point(model.name, protocol, clients)
        for model in models
        for protocol in arguments.protocols
        for clients in arguments.clients
        if clients <= MAX_CLIENTS.get((model.name, protocol), clients)
    ]
    with contestants(arguments, models) as servers:
        loads = prepare(models, arguments.protocols, servers, arguments.cache / "scratch")
        chosen, trials = choose_instances(points, servers, loads)
        head = {
            "environment": workload.environment(["tritonclient", "onnxruntime", "numpy", "psutil"]),
            "load": subprocess.run(["h2load", "--version"], capture_output=True, text=True).stdout.strip(),
            "servers": {name: describe(name, contestant, arguments) for name, contestant in servers.items()},
            "threads": arguments.threads,
            "seconds": arguments.seconds,
            "trials": trials,
        }
        measured: dict[tuple[Point, str], list[Measured]] = {(point, name): [] for point in points for name in servers}
        for number in range(arguments.rounds):
            for point in points:
                # Who comes first changes, in case one leaves something behind.
                for name in sorted(servers, reverse=number % 2 == 1):
                    load = loads[name, point.model, point.protocol, chosen[point, name]]
                    measured[point, name].append(load.measure(point.clients, arguments.seconds))
            summaries = [summarise(point, servers, measured, chosen) for point in points]
            path = results.save(arguments.name, head | {"rounds": number + 1, "points": summaries})
            sys.stderr.write(f"round {number + 1} of {arguments.rounds} is in {path}\n")
    sys.stdout.write(report.tables(json.loads(path.read_text(encoding="utf-8"))) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names_of(MODELS), default=list(MODELS))
    parser.add_argument("--protocols", type=names_of(PROTOCOLS), default=list(PROTOCOLS))
    parser.add_argument("--clients", type=numbers, default=list(CLIENTS))
    parser.add_argument("--servers", type=names_of(SERVERS), default=list(SERVERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.5, help="of one server's turn, after its warm-up")
    parser.add_argument("--threads", type=int, default=2, help="of one run of a model")
    parser.add_argument("--sardonyx-instances", type=texts, default=["1", "2"], help="counts to choose from")
    parser.add_argument("--triton-instances", type=texts, default=["1", "2", "2x1"], help="see --sardonyx-instances")
    parser.add_argument("--sardonyx-python", default=sys.executable, help="an interpreter that has Sardonyx")
    parser.add_argument("--cache", type=lambda text: Path(text).resolve(), default=Path(".cache/kserve").resolve())
    parser.add_argument("--name", default="kserve")
    return parser.parse_args()


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Reads names that are separated by commas. A misspelt one would measure something else."""

    def names(text: str) -> list[str]:
        given = text.split(",")
        if unknown := [name for name in given if name not in set(known)]:
            raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; there are {', '.join(known)}")
        return given

    return names


def texts(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


@contextlib.contextmanager
def contestants(arguments: argparse.Namespace, models: list[Model]) -> Iterator[dict[str, Contestant]]:
    with contextlib.ExitStack() as stack:
        made = {}
        for name in arguments.servers:
            if name == "triton":
                instances = arguments.triton_instances
                server = rival_triton.serve(models, instances, arguments.threads, arguments.cache)
            else:
                instances = arguments.sardonyx_instances
                server = sardonyx_kserve.serve(
                    models, instances, arguments.threads, arguments.cache, arguments.sardonyx_python
                )
            stack.callback(server.stop)
            made[name] = Contestant(server, instances)
        yield made


def prepare(models: list[Model], protocols: list[str], servers: dict[str, Contestant], scratch: Path) -> Loads:
    """The load for each server, model, protocol and instance count, once Triton's client got the right numbers."""
    loads = {}
    for name, contestant in servers.items():
        server = contestant.server
        for model in models:
            for protocol in protocols:
                for count in contestant.instances:
                    entry = f"{model.name}_x{count}"
                    check(model, entry, protocol, server.http_port, server.grpc_port)
                    folder = scratch / f"{name}-{entry}-{protocol}"
                    folder.mkdir(parents=True, exist_ok=True)
                    request = payload(model, entry, protocol)
                    loads[name, model.name, protocol, count] = Load(server, entry, protocol, request, folder)
    return loads


def choose_instances(
    points: list[Point], servers: dict[str, Contestant], loads: Loads
) -> tuple[dict[tuple[Point, str], str], list[dict[str, Any]]]:
    """Each server's faster instance count at each point, from a trial that is not part of the result."""
    chosen, trials = {}, []
    for point in points:
        for name, contestant in servers.items():
            if len(contestant.instances) == 1:
                chosen[point, name] = contestant.instances[0]
                continue
            rates = {}
            for count in contestant.instances:
                load = loads[name, point.model, point.protocol, count]
                rates[count] = round(load.measure(point.clients, TRIAL_S).run.inferences_per_s, 1)
            chosen[point, name] = max(rates, key=lambda count: rates[count])
            trials.append(point.__dict__ | {"server": name, "inferences_per_s_by_instances": rates})
    return chosen, trials


def summarise(
    point: Point,
    servers: dict[str, Contestant],
    measured: dict[tuple[Point, str], list[Measured]],
    chosen: dict[tuple[Point, str], str],
) -> dict[str, Any]:
    summary: dict[str, Any] = dict(point.__dict__)
    for name in servers:
        turns = measured[point, name]
        summary[name] = {
            "instances": chosen[point, name],
            "inferences_per_s": results.median_and_spread([turn.run.inferences_per_s for turn in turns]),
            "latency_ms": results.percentiles([value for turn in turns for value in turn.run.latency_ms.tolist()]),
            "mean_batch": results.median_and_spread([turn.mean_batch for turn in turns]),
            "server_cpu_ms": report.median3([turn.server_cpu_ms for turn in turns]),
            "client_cpu_ms": report.median3([1e3 * turn.run.client_cpu_s / turn.run.requests for turn in turns]),
            "requests": sum(turn.run.requests for turn in turns),
            "errors": [error for turn in turns for error in turn.errors],
        }
    return summary | {"ratio": report.ratio(summary)}


def describe(name: str, contestant: Contestant, arguments: argparse.Namespace) -> dict[str, Any]:
    if name == "triton":
        versions = dict(package.split("==") for package in rival_triton.BACKEND_PACKAGES)
        versions |= {rival_triton.WHEEL[0]: rival_triton.WHEEL[1]}
    else:
        versions = sardonyx_kserve.versions(arguments.sardonyx_python)
    metadata = contestant.server.metadata()
    return {
        "command": contestant.server.command,
        "version": f"{metadata['name']} {metadata['version']}",
        "versions": versions,
        "instances": contestant.instances,
    }


if __name__ == "__main__":
    main()
