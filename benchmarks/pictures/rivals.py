"""diffusers' pipeline in a process of its own, asked over its standard input: a JSON object a line, answers likewise.

    python rivals.py FOLDER THREADS

A request says ``pictures`` (prompt, steps and seed of each), ``num_clients`` (requests at once), ``side`` in pixels,
``guidance`` and ``is_batched``; an answer holds seconds in all, the seconds of each picture and the process's peak of
memory in bytes.
"""

import json
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging

_one_at_a_time = threading.Lock()
"""A pipeline keeps its schedule in itself, so calls of several threads take turns: that is eager serving."""


def main() -> None:
    folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    logging.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        start_s = time.perf_counter()
        paint = paint_batches if request["is_batched"] else paint_each
        latencies = paint(pipeline, request)
        seconds = time.perf_counter() - start_s
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer({"seconds": seconds, "latencies": latencies, "peak_bytes": peak_bytes})


def paint_each(pipeline: StableDiffusionPipeline, request: dict[str, Any]) -> list[float]:
    """Every picture by a call of its own."""

    def one(picture: dict[str, Any]) -> float:
        start_s = time.perf_counter()
        with _one_at_a_time:
            call(pipeline, request, [picture])
        return time.perf_counter() - start_s

    with ThreadPoolExecutor(request["num_clients"]) as clients:
        return list(clients.map(one, request["pictures"]))


def paint_batches(pipeline: StableDiffusionPipeline, request: dict[str, Any]) -> list[float]:
    """All pictures that are asked for at once by one call, as somebody would who has them all together."""
    latencies = []
    pictures, count = request["pictures"], request["num_clients"]
    for begin in range(0, len(pictures), count):
        start_s = time.perf_counter()
        batch = pictures[begin : begin + count]
        call(pipeline, request, batch)
        latencies += [time.perf_counter() - start_s] * len(batch)
    return latencies


def call(pipeline: StableDiffusionPipeline, request: dict[str, Any], pictures: list[dict[str, Any]]) -> None:
    pipeline(
        [picture["prompt"] for picture in pictures],
        num_inference_steps=pictures[0]["steps"],
        guidance_scale=request["guidance"],
        height=request["side"],
        width=request["side"],
        generator=[torch.Generator().manual_seed(picture["seed"]) for picture in pictures],
    )


def answer(value: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


main()
