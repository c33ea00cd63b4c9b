"""Run one engine's scenarios in a process of its own and print the measurements as JSON on the last line.

    python worker.py llama_cpp|openvino|sardonyx < job.json

The job holds the model's path, the thread count and the scenarios with their prompts as token ids. The orchestrating
scripts start it with the interpreter that has the engine.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import closed_loop

ENGINES = {
    "llama_cpp": ("engines.rival_llama_cpp", "LlamaCpp"),
    "openvino": ("engines.rival_openvino", "OpenVino"),
    "sardonyx": ("engines.in_process", "InProcess"),
}


def main() -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    module, name = ENGINES[sys.argv[1]]
    started = time.perf_counter()
    engine = getattr(importlib.import_module(module), name)(job["model"], threads=job["threads"], **job["options"])
    results: list[dict[str, object]] = [{"load_s": time.perf_counter() - started}]
    closed_loop.run(engine, job["warm_up"], len(job["warm_up"]), 8)
    for number, scenario in enumerate(job["scenarios"]):
        measure = getattr(closed_loop, scenario.pop("kind"))
        # Numbers of their own for each scenario: engines remember the requests they had.
        results.append(measure(closed_loop.Renumbered(engine, 10_000 * (number + 1)), **scenario))
    sys.stdout.write("\n" + json.dumps(results) + "\n")
    sys.stdout.flush()


main()
