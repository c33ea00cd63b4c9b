"""How near steps on a card come to what the card can do, stage by stage, each in minutes.

    python benchmarks/gpu.py rates fp16 rival int4          # in this order
    python benchmarks/gpu.py all --rehearsal                # tiny, without a card: shows that the script works

Stages, the most telling first:
    rates     bytes a second of a copy on the card and operations a second of a matrix product, by torch
    fp16      a random Llama-3-8B: decode at each batch with steps ahead and without, prefill, then eager steps
    rival     `transformers`' own generation of the same weights, cache dynamic and static
    int4      as fp16
    http      SmolLM2 over HTTP, exported for the card from the GGUF file of --gguf
    families  BERT base, Whisper base's encoder, half of Stable Diffusion 1.5's UNet, beside torch
    compiled  as rival, static cache compiled, at two batches

Each writes ``gpu-STAGE.json`` into --out after every point; one that is there and complete is not run again without
--force. ``report`` prints tables of what is there.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import results
import workload
from card.shapes import SHAPES, Shape

HERE = Path(__file__).parent
CACHE = HERE.parent / ".cache"
Result = dict[str, Any]
PACKAGES = ["sardonyx", "onnxruntime-gpu", "onnxruntime", "numpy", "torch", "transformers", "diffusers"]
BATCHES = (1, 4, 16, 64, 256)
PREFILLS = ((1, 128), (1, 2048), (4, 2048), (16, 512))
"""Prompts at once, and their length."""
COMPILED_BATCHES = (1, 64)


class Bench:
    """Arguments, and where results go."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.is_rehearsal: bool = arguments.rehearsal
        self.shape: Shape = SHAPES[arguments.shape or ("tiny" if self.is_rehearsal else "llama-3-8b")]
        self.out: Path = arguments.out or (CACHE / "card-rehearsal" if self.is_rehearsal else results.FOLDER)
        self.work: Path = arguments.work or _roomiest()
        self.gguf: Path | None = arguments.gguf
        self.torch_python: str = arguments.torch_python
        self.is_forced: bool = arguments.force
        self.new_tokens = 12 if self.is_rehearsal else arguments.new_tokens
        self.prompt_tokens = 24 if self.is_rehearsal else arguments.prompt_tokens
        self.batches = (1, 4) if self.is_rehearsal else BATCHES
        self.prefills = ((1, 16), (2, 40)) if self.is_rehearsal else PREFILLS
        self.deadline_s = time.monotonic() + arguments.seconds
        self.out.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)

    def path(self, stage: str) -> Path:
        return self.out / f"gpu-{stage}.json"

    def read(self, stage: str) -> Result | None:
        path = self.path(stage)
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, stage: str, result: Result) -> None:
        """Whole or not at all: a stage may be cut off at any time."""
        path = self.path(stage)
        path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".part").replace(path)

    @property
    def rates(self) -> Result | None:
        measured = self.read("rates")
        return measured["points"][0] if measured and measured["points"] else None

    def prompts(self, batch: int, length: int) -> list[list[int]]:
        """The same in every process; no two batches share a prefix."""
        import numpy as np

        draw = np.random.default_rng([batch, length])
        prompts: list[list[int]] = draw.integers(0, self.shape.vocab_size, (batch, length)).tolist()
        return prompts

    def ask_torch(self, job: Result, log: str) -> Iterator[Result]:
        """Results of a job of `card.rival_torch`, in a process that sees its own packages first.

        Raises:
            SystemExit: it failed, or its time is over; what it said until then was passed on.
        """
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        variables |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        path = self.out / f"{log}.log"
        left_s = max(10, int(self.deadline_s - time.monotonic()))
        command = ["timeout", str(left_s), self.torch_python, str(HERE / "card" / "rival_torch.py")]
        with path.open("w") as sink:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True, env=variables
            )
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
        if process.wait():
            raise SystemExit(f"torch's side ended with {process.returncode}; see {path}")


def _roomiest() -> Path:
    """Where 25 GB of weights go: memory, if it has room for them twice, since the graph is read once more."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 50 << 30:
        return memory / "sardonyx-card"
    return CACHE / "card-work"


# Stages: each yields its points, the first of them facts about the stage where it has any.


def stage_rates(bench: Bench) -> Iterator[Result]:
    job = {"kind": "rates", "copy_bytes": 4 << 30, "matrix_side": 8192}
    if bench.is_rehearsal:
        job |= {"copy_bytes": 1 << 22, "matrix_side": 128}
    yield from bench.ask_torch(job, "rates")


def stage_fp16(bench: Bench) -> Iterator[Result]:
    yield from _our_steps(bench, "fp16")


def stage_int4(bench: Bench) -> Iterator[Result]:
    yield from _our_steps(bench, "int4")


def _our_steps(bench: Bench, precision: str) -> Iterator[Result]:
    from card.steps import CardModel
    from card.version import make_version
    from sardonyx.serving.capacity import EngineLimits

    folder = bench.work / f"{bench.shape.name}-{precision}" / "1"
    yield {"kind": "build", "precision": precision, **make_version(folder, bench.shape, precision)}
    longest = max(bench.prompt_tokens + bench.new_tokens, *(length + 1 for _, length in bench.prefills))
    limits = EngineLimits(
        max_num_seqs=max(bench.batches),
        max_model_len=longest,
        max_chunk_tokens=min(2048, longest),
        max_batch_tokens=64 if bench.is_rehearsal else 4096,
        max_step_ms=60_000.0,
        kv_cache_bytes=None,
    )
    for is_capturing in (True, False):
        model = CardModel(folder, limits, is_capturing=is_capturing, is_rehearsal=bench.is_rehearsal)
        try:
            yield {"kind": "load", "captured": is_capturing, **model.load}
            model.generate(bench.prompts(2, 33), 4)
            for batch in bench.batches:
                for is_overlapped in (True, False) if is_capturing else (True,):
                    yield _decode(bench, model, precision, batch, is_captured=is_capturing, is_overlapped=is_overlapped)
            if is_capturing:
                for num_prompts, length in bench.prefills:
                    yield _prefill(bench, model, precision, num_prompts, length)
        finally:
            model.close()


def _decode(bench: Bench, model: Any, precision: str, batch: int, *, is_captured: bool, is_overlapped: bool) -> Result:
    model.runner.is_overlapped = is_overlapped
    run = model.generate(bench.prompts(batch, bench.prompt_tokens), bench.new_tokens)
    model.runner.is_overlapped = True
    found = run.decodes(batch)
    run.forget()
    work = bench.shape.decode_work(precision, batch, bench.prompt_tokens + bench.new_tokens / 2)
    return {
        "kind": "decode",
        "batch": batch,
        "captured": is_captured,
        "overlapped": is_overlapped,
        **found,
        **work.shares(found["step_ms"] / 1e3, bench.rates),
        "tokens": run.tokens[:4],
    }


def _prefill(bench: Bench, model: Any, precision: str, num_prompts: int, length: int) -> Result:
    """Other prompts each time, or the prefix cache would have them."""
    taken_s, num_steps = [], 0
    for repeat in range(3):
        prompts = [
            [(token + repeat) % bench.shape.vocab_size for token in p] for p in bench.prompts(num_prompts, length)
        ]
        run = model.generate(prompts, 1)
        taken_s.append(max(run.first_token_s))
        num_steps = len(run.steps)
        run.forget()
    median_s = sorted(taken_s)[1]
    work = bench.shape.prefill_work(precision, num_prompts, length, num_steps)
    return {
        "kind": "prefill",
        "prompts": num_prompts,
        "prompt_tokens": length,
        "num_steps": num_steps,
        "first_token_ms": round(1e3 * median_s, 2),
        "tokens_per_s": round(num_prompts * length / median_s, 1),
        **work.shares(median_s, bench.rates),
    }


def stage_rival(bench: Bench) -> Iterator[Result]:
    yield from _rival(bench, ["dynamic", "static"], bench.batches, bench.prefills, "rival")


def stage_compiled(bench: Bench) -> Iterator[Result]:
    yield from _rival(bench, ["compiled"], COMPILED_BATCHES if not bench.is_rehearsal else (1,), (), "compiled")


def _rival(bench: Bench, caches: list[str], batches: Any, prefills: Any, log: str) -> Iterator[Result]:
    points = [(batch, bench.prompt_tokens) for batch in batches]
    points += [point for point in prefills if point not in points]
    job = {
        "kind": "generate",
        "shape": bench.shape.name,
        "caches": caches,
        "new_tokens": bench.new_tokens,
        "points": [
            {"batch": batch, "prompt_tokens": length, "prompts": bench.prompts(batch, length)}
            for batch, length in points
        ],
    }
    yield from bench.ask_torch(job, log)


def stage_http(bench: Bench) -> Iterator[Result]:
    """The demo model as an operator would serve it, from its GGUF file to streams."""
    import asyncio

    import onnxruntime

    import serve
    from our_server import OurServer

    if bench.gguf is None:
        raise SystemExit("http needs --gguf")
    repository, name = bench.work / "http", "smollm2"
    # ONNX Runtime for CUDA may be too old for the CPU's decoders: a rehearsal then ends with the export.
    serves_on_cpu = bench.is_rehearsal and onnxruntime.__version__ >= "1.32"
    target = "cpu" if serves_on_cpu else "cuda"
    for precision in ("int4",) if bench.is_rehearsal else ("fp16", "int4"):
        model, started_s = f"{name}-{precision}", time.perf_counter()
        export = [sys.executable, "-m", "sardonyx", "export", str(bench.gguf), "--name", model, "--target", target]
        export += ["--repository", str(repository / precision), "--precision", precision, "--if-missing"]
        with (bench.out / "http-export.log").open("a") as log:
            subprocess.run(export, check=True, stdout=log, stderr=subprocess.STDOUT)
        yield {"kind": "export", "precision": precision, "export_s": round(time.perf_counter() - started_s, 1)}
        if bench.is_rehearsal and not serves_on_cpu:
            continue
        tokenizer = workload.load_tokenizer(repository / precision, model)
        os.environ["SARDONYX_MAX_NUM_SEQS"] = "256"
        os.environ["SARDONYX_MAX_QUEUED_REQUESTS"] = "1024"
        started_s = time.perf_counter()
        server = OurServer(repository / precision, os.cpu_count() or 1, bench.out / f"http-{precision}.log")
        try:
            yield {"kind": "start", "precision": precision, "start_s": round(time.perf_counter() - started_s, 1)}
            warm_up = workload.prompts(tokenizer, 4, 64, seed=9000)
            asyncio.run(serve.closed_loop(server.url, model, warm_up, 4, 8))
            for clients in (1, 2) if bench.is_rehearsal else (1, 8, 32, 128, 256):
                count, length = (clients, 8) if bench.is_rehearsal else (2 * clients, 128)
                prompts = workload.prompts(tokenizer, count, length, seed=clients)
                seen = asyncio.run(serve.closed_loop(server.url, model, prompts, clients, length))
                yield {
                    "kind": "clients",
                    "precision": precision,
                    "clients": clients,
                    "output_tokens_per_s": round(seen["output_tokens_per_s"], 1),
                    "ttft_ms": results.percentiles(seen["ttft_ms"]),
                    "itl_ms": results.percentiles(seen["itl_ms"]),
                    "errors": seen["errors"],
                }
        finally:
            server.stop()


def stage_families(bench: Bench) -> Iterator[Result]:
    from card.families import measure_families, sizes

    wanted, repeats = sizes(is_rehearsal=bench.is_rehearsal), 3 if bench.is_rehearsal else 20
    for point in measure_families(bench.work, wanted, repeats, is_rehearsal=bench.is_rehearsal):
        yield {"engine": "sardonyx", **point}
    for point in bench.ask_torch({"kind": "modules", "modules": wanted, "repeats": repeats}, "families"):
        yield {"engine": "torch", **point}


STAGES: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "rates": stage_rates,
    "fp16": stage_fp16,
    "rival": stage_rival,
    "int4": stage_int4,
    "http": stage_http,
    "families": stage_families,
    "compiled": stage_compiled,
}


def run_stage(bench: Bench, stage: str) -> None:
    """Write each point as soon as it is there. A stage that was cut off begins anew."""
    known = bench.read(stage)
    if known is not None and known["is_complete"] and not bench.is_forced:
        sys.stderr.write(f"{stage}: done before\n")
        return
    result: Result = {
        "environment": workload.environment(PACKAGES),
        "rehearsal": bench.is_rehearsal,
        "shape": bench.shape.name,
        "prompt_tokens": bench.prompt_tokens,
        "new_tokens": bench.new_tokens,
        "rates": bench.rates,
        "is_complete": False,
        "points": [],
    }
    started_s = time.monotonic()
    for point in STAGES[stage](bench):
        result["points"].append(point)
        bench.write(stage, result)
        shown = {key: value for key, value in point.items() if key != "tokens"}
        sys.stderr.write(f"{stage} {time.monotonic() - started_s:.0f} s: {json.dumps(shown)}\n")
    # A rival may have no memory for a point; where ours fails the stage is to be run again.
    is_complete = not any("error" in point and point.get("engine") == "sardonyx" for point in result["points"])
    bench.write(stage, result | {"is_complete": is_complete, "stage_s": round(time.monotonic() - started_s, 1)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all", "report"], metavar="STAGE")
    parser.add_argument("--out", type=Path, help="of results; by default beside those of other benchmarks")
    parser.add_argument("--work", type=Path, help="for weights, 25 GB; by default /dev/shm where it has room")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct's file, for http")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has torch and transformers")
    parser.add_argument("--rehearsal", action="store_true", help="tiny, and without a card")
    parser.add_argument("--seconds", type=int, default=540, help="after which a rival is stopped; its points stand")
    parser.add_argument("--force", action="store_true", help="run stages that are done once more")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    for stage in STAGES if "all" in arguments.stages else arguments.stages:
        if stage == "report":
            continue
        run_stage(bench, stage)
    from card.report import report

    sys.stdout.write(report({stage: bench.read(stage) for stage in STAGES}))


if __name__ == "__main__":
    main()
