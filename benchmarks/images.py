"""Our pictures beside diffusers': the same weights and steps, by turns, two threads each.

    python benchmarks/images.py
    python benchmarks/images.py --rounds 1 --scenarios quarter-1 quarter-8

Ours is asked over HTTP and answers PNG files; diffusers makes arrays inside its process, which favours it. diffusers
runs eagerly, once a call for each picture (requests at once take turns, as they must over one pipeline), and once with
all pictures of a moment in one call, which nobody can do whose requests come when they like. Guidance is on: every
step asks the UNet twice. *short*: a request of few steps, by itself and among four long ones.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import results
import workload
from our_server import OurServer
from pictures.engines import Diffusers, Engine, Job, Made, Ours, Wish
from pictures.pipelines import make_pipeline

SIDES = {"demo": 64, "quarter": 256}
"""Pixels, by pipeline; see `pictures.pipelines`."""
STEPS = {"demo": 20, "quarter": 8}
SCENARIOS = {
    f"{pipeline}-{count}": {"pipeline": pipeline, "num_clients": count, "num_pictures": num_pictures}
    for pipeline, counts in (
        ("demo", {1: 8, 4: 16, 8: 32, 16: 32}),
        ("quarter", {1: 3, 4: 8, 8: 8, 16: 16}),
    )
    for count, num_pictures in counts.items()
}
SHORT_STEPS = 4
LONG_STEPS = 60
NUM_LONG = 4
NUM_SHORT_RUNS = 5
PROMPTS = ("a red circle", "a blue square left of a green star", "two white rings", "a big heart on a black background")


def main() -> None:
    arguments = parse_arguments()
    measured: dict[str, dict[str, list[Made]]] = {}
    shorts: dict[str, list[dict[str, float]]] = {}
    with contestants(arguments) as engines:
        for (_, pipeline), engine in engines.items():
            engine.paint(make_job(pipeline, 2, 2))
        for number in range(arguments.rounds):
            for scenario in arguments.scenarios:
                facts = SCENARIOS[scenario]
                job = make_job(facts["pipeline"], facts["num_clients"], facts["num_pictures"])
                # Who comes first changes, in case one leaves something behind.
                for name, pipeline in sorted(engines, reverse=number % 2 == 1):
                    if pipeline == facts["pipeline"]:
                        made = engines[name, pipeline].paint(job)
                        measured.setdefault(scenario, {}).setdefault(name, []).append(made)
                        sys.stderr.write(f"round {number + 1}: {scenario} {name}: {made.seconds:.2f} s\n")
            for pipeline in sorted({SCENARIOS[each]["pipeline"] for each in arguments.scenarios}):
                ours = engines["sardonyx", pipeline]
                assert isinstance(ours, Ours)
                shorts.setdefault(pipeline, []).append(measure_short(ours, pipeline))
                sys.stderr.write(f"round {number + 1}: short {pipeline}: {shorts[pipeline][-1]}\n")
            result = {
                "environment": workload.environment(["sardonyx", "onnxruntime", "numpy", "torch", "diffusers"]),
                "threads": arguments.threads,
                "steps": STEPS,
                "pixels": SIDES,
                "rounds": number + 1,
                "scenarios": {scenario: summarise(runs, scenario) for scenario, runs in measured.items()},
                "short": {pipeline: summarise_shorts(runs) for pipeline, runs in shorts.items()},
            }
            path = results.save(arguments.name, result)
            sys.stderr.write(f"round {number + 1} of {arguments.rounds} is in {path}\n")
    sys.stdout.write(report(result) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--batch-rows", type=int, help="max_batch_rows of our models; else the server's own")
    parser.add_argument("--rival-python", default=sys.executable, help="an interpreter with diffusers")
    parser.add_argument("--cache", type=lambda text: Path(text).resolve(), default=Path(".cache/images").resolve())
    parser.add_argument("--name", default="images")
    return parser.parse_args()


@contextlib.contextmanager
def contestants(arguments: argparse.Namespace) -> Iterator[dict[tuple[str, str], Engine]]:
    """By name and pipeline."""
    cache: Path = arguments.cache
    repository = cache / "models"
    pipelines = sorted({SCENARIOS[scenario]["pipeline"] for scenario in arguments.scenarios})
    folders = {name: make_pipeline(name, cache / name) for name in pipelines}
    for name, folder in folders.items():
        export(folder, repository, name, arguments.batch_rows)
    with contextlib.ExitStack() as stack:
        server = OurServer(repository, arguments.threads, cache / "server.log")
        stack.callback(server.stop)
        engines: dict[tuple[str, str], Engine] = {}
        for name, folder in folders.items():
            engines["sardonyx", name] = Ours(server, name)
            for is_batched in (False, True):
                label = "diffusers batched" if is_batched else "diffusers"
                log = cache / f"{label.replace(' ', '-')}-{name}.log"
                rival = Diffusers(arguments.rival_python, folder, arguments.threads, log, is_batched=is_batched)
                stack.callback(rival.stop)
                engines[label, name] = rival
        yield engines


def export(folder: Path, repository: Path, name: str, batch_rows: int | None) -> None:
    command = [sys.executable, "-m", "sardonyx", "export", str(folder), "--name", name]
    subprocess.run([*command, "--repository", str(repository), "--if-missing"], check=True)
    if batch_rows is not None:
        config = repository / name / "config.pbtxt"
        lines = [line for line in config.read_text().splitlines() if "max_batch_rows" not in line]
        lines.append(f'parameters {{ key: "max_batch_rows" value {{ string_value: "{batch_rows}" }} }}')
        config.write_text("\n".join(lines) + "\n")


def make_job(pipeline: str, num_clients: int, num_pictures: int) -> Job:
    wishes = [Wish(PROMPTS[seed % len(PROMPTS)], STEPS[pipeline], seed) for seed in range(num_pictures)]
    return Job(wishes, num_clients, SIDES[pipeline])


def measure_short(ours: Ours, pipeline: str) -> dict[str, float]:
    """Seconds of a short request by itself, and of one among long ones; medians of a few."""
    side = SIDES[pipeline]
    short = Wish(PROMPTS[0], SHORT_STEPS, 0)
    alone = [ours.paint(Job([short], 1, side)).seconds for _ in range(NUM_SHORT_RUNS)]
    long = [Wish(PROMPTS[seed % len(PROMPTS)], LONG_STEPS, seed) for seed in range(NUM_LONG)]
    among = [ours.paint_among(long, short, side) for _ in range(NUM_SHORT_RUNS)]
    return {"alone_s": statistics.median(alone), "among_long_s": statistics.median(among)}


def summarise(runs: dict[str, list[Made]], scenario: str) -> dict[str, Any]:
    summary = {}
    num_pictures = SCENARIOS[scenario]["num_pictures"]
    ours = [num_pictures / made.seconds for made in runs["sardonyx"]]
    for name, mine in runs.items():
        speeds = [num_pictures / made.seconds for made in mine]
        latencies = [latency for made in mine for latency in made.latencies]
        summary[name] = {
            "pictures_per_minute": results.median_and_spread([60 * speed for speed in speeds]),
            # Round by round: the machine's speed changes between rounds more than within one.
            "ours_to_it": round(statistics.median(a / b for a, b in zip(ours, speeds, strict=True)), 2),
            "latency_s": {"median": round(statistics.median(latencies), 3), "max": round(max(latencies), 3)},
            "peak_mib": round(max(made.peak_bytes for made in mine) / (1 << 20)),
        }
    return summary


def summarise_shorts(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "alone_s": results.median_and_spread([run["alone_s"] for run in runs]),
        "among_long_s": results.median_and_spread([run["among_long_s"] for run in runs]),
        "ratio": round(statistics.median(run["among_long_s"] / run["alone_s"] for run in runs), 2),
    }


def report(result: dict[str, Any]) -> str:
    header = ["scenario", "engine", "pictures/min", "ours to it", "latency s (median, max)", "peak MiB"]
    rows: list[list[object]] = []
    for scenario, engines in result["scenarios"].items():
        for name, each in engines.items():
            ratio = "" if name == "sardonyx" else f"{each['ours_to_it']:.2f}"
            speed = f"{each['pictures_per_minute']['median']:.1f}"
            latency = f"{each['latency_s']['median']:.2f}, {each['latency_s']['max']:.2f}"
            rows.append([scenario, name, speed, ratio, latency, each["peak_mib"]])
    shorts = [
        [pipeline, each["alone_s"]["median"], each["among_long_s"]["median"], each["ratio"]]
        for pipeline, each in result["short"].items()
    ]
    short_header = ["pipeline", "a short request alone, s", "among long ones, s", "ratio"]
    return results.table(header, rows) + "\n\n" + results.table(short_header, shorts)


if __name__ == "__main__":
    main()
