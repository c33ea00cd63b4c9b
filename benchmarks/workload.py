"""What every engine is given, the same prompts as ids of the same tokenizer, and the facts of the machine."""

import datetime
import importlib.metadata
import os
import platform
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

_SUBJECTS = "the harbour, an old clock, the river, a letter, the garden, her brother, the engine, a teacher, rain"
_VERBS = "turned, waited, carried, opened, remembered, followed, measured, lost, answered, painted"
_OBJECTS = "a blue door, the last train, seven stones, the morning paper, an empty cup, the long road, the map"
_PLACES = "near the bridge, before noon, under the stairs, in winter, without a word, beside the mill"
_PARTS = [part.split(", ") for part in (_SUBJECTS, _VERBS, _OBJECTS, _PLACES)]


def text(num_words: int, rng: random.Random) -> str:
    """English-looking sentences of about `num_words` words, the same for the same `rng` state."""
    words: list[str] = []
    while len(words) < num_words:
        parts = [rng.choice(choices) for choices in _PARTS]
        words += (" ".join(parts).capitalize() + ".").split()
    return " ".join(words[:num_words])


def prompts(
    tokenizer: Tokenizer, count: int, num_tokens: int, *, seed: int, shared_prefix_tokens: int = 0
) -> list[list[int]]:
    """`count` prompts of exactly `num_tokens` ids after a prefix that all of them share.

    Apart from that prefix no two prompts begin alike, so that no engine's prefix cache helps by accident.
    """
    rng = random.Random(seed)
    prefix = tokenizer.encode(text(shared_prefix_tokens, rng)).ids[:shared_prefix_tokens]
    made = []
    for number in range(count):
        body = f"Story {rng.randrange(10**6)} of {number}: " + text(num_tokens + 16, rng)
        made.append(prefix + tokenizer.encode(body).ids[:num_tokens])
    return made


def load_tokenizer(repository: Path, model: str) -> Tokenizer:
    """The exported model's own tokenizer, from its newest version folder."""
    newest = max(
        (folder for folder in (repository / model).iterdir() if folder.name.isdigit()), key=lambda f: int(f.name)
    )
    return Tokenizer.from_file(str(newest / "tokenizer.json"))


def environment(packages: list[str]) -> dict[str, Any]:
    """Hardware, versions, commit, command and date, as every result file states them."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "?")
    flags = next((line.split(":", 1)[1].split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "cpu": model,
        "cpu_flags": [flag for flag in wanted if flag in flags],
        "cpus": len(os.sched_getaffinity(0)),
        "card": card(),
        "python": platform.python_version(),
        "versions": versions,
    }


def card() -> dict[str, str] | None:
    """The first NVIDIA card and its driver; ``None``: there is none."""
    fields = ["name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.memory"]
    try:
        command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (value.strip() for value in answer.split(",")), strict=False))


def _commit() -> str:
    """Git's word for the tree, or what a copy without git was told."""
    told = os.environ.get("SARDONYX_COMMIT")
    if told:
        return told
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return done.stdout.strip()
