"""faster-whisper in a process of its own, asked over its standard input: a JSON object a line, answers likewise.

    python rivals.py FOLDER THREADS COMPUTE_TYPE

FOLDER holds the model in CTranslate2's layout. A request says ``files``, ``num_clients`` (files at once), ``batched``
and ``beam_size``; an answer holds seconds in all, and for each file its text and when its first text came.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import faster_whisper

BATCH_SIZE = 8
"""Windows of a file at once in the batched mode: faster-whisper's README has 8 and 16, and 8 for the CPU."""


def main() -> None:
    folder, threads, compute_type = sys.argv[1:]
    model = faster_whisper.WhisperModel(folder, device="cpu", compute_type=compute_type, cpu_threads=int(threads))
    pipeline = faster_whisper.BatchedInferencePipeline(model)
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        start_s = time.perf_counter()
        # A loop over one model, as its users write it: calls of several threads take turns inside.
        with ThreadPoolExecutor(request["num_clients"]) as clients:
            found = list(clients.map(partial(transcribe, model, pipeline, request), request["files"]))
        answer({"seconds": time.perf_counter() - start_s, "files": found})


def transcribe(model: Any, pipeline: Any, request: dict[str, Any], file: str) -> dict[str, object]:
    start_s = time.perf_counter()
    options: dict[str, Any] = {"beam_size": request["beam_size"], "language": "en"}
    if request["batched"]:
        # Ours has timestamps in this mode as well.
        segments, _ = pipeline.transcribe(file, batch_size=BATCH_SIZE, without_timestamps=False, **options)
    else:
        segments, _ = model.transcribe(file, **options)
    texts = []
    first_s = None
    for segment in segments:
        if first_s is None:
            first_s = time.perf_counter() - start_s
        texts.append(segment.text)
    return {"text": "".join(texts), "first_s": first_s, "seconds": time.perf_counter() - start_s}


def answer(value: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


main()
