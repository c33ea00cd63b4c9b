"""A closed loop of clients over a step-wise engine, each with one request at a time, in one thread.

Needs nothing but the standard library, so that a rival's interpreter can run it unchanged.
"""

import itertools
import time
from dataclasses import dataclass, field
from typing import Protocol


class Engine(Protocol):
    """What is compared. Greedy, end tokens ignored, so that each request makes exactly the tokens it was asked for."""

    def add(self, request: int, prompt: list[int], max_tokens: int) -> None: ...

    def step(self) -> dict[int, int]:
        """Run one step; new tokens by request. A request is over when it has had `max_tokens`."""
        ...

    def tokens(self, request: int) -> list[int]:
        """What a finished request generated."""
        ...


@dataclass
class Trace:
    """Times of one request, in seconds from the start of the run."""

    added_s: float
    num_tokens: int = 0
    token_s: list[float] = field(default_factory=list)


def run(engine: Engine, prompts: list[list[int]], clients: int, max_tokens: int) -> dict[str, object]:
    """Send all `prompts`, at most `clients` at once.

    Returns:
        Output tokens a second over the whole run (prefill included), and the raw latencies: time to first token of each
        request, and gaps between tokens of a request, in milliseconds.
    """
    start = time.perf_counter()
    waiting = list(enumerate(prompts))
    active: dict[int, Trace] = {}
    done: dict[int, Trace] = {}
    while waiting or active:
        while waiting and len(active) < clients:
            request, prompt = waiting.pop(0)
            active[request] = Trace(added_s=time.perf_counter() - start)
            engine.add(request, prompt, max_tokens)
        for request, num_new in engine.step().items():
            trace = active[request]
            trace.num_tokens += num_new
            trace.token_s += [time.perf_counter() - start] * num_new
            if trace.num_tokens >= max_tokens:
                done[request] = active.pop(request)
    wall_s = time.perf_counter() - start
    traces = [done[request] for request in sorted(done)]
    return {
        "clients": clients,
        "requests": len(prompts),
        "output_tokens": sum(trace.num_tokens for trace in traces),
        "wall_s": wall_s,
        "output_tokens_per_s": sum(trace.num_tokens for trace in traces) / wall_s,
        "ttft_ms": [1e3 * (trace.token_s[0] - trace.added_s) for trace in traces],
        "itl_ms": [1e3 * (b - a) for trace in traces for a, b in zip(trace.token_s, trace.token_s[1:], strict=False)],
        "tokens": [engine.tokens(request) for request in sorted(done)],
    }


def shared_prefix(engine: Engine, prompts: list[list[int]], max_tokens: int) -> dict[str, object]:
    """One request after the other, all with the same long prefix: the first is cold, the rest can reuse it."""
    first = run(engine, prompts[:1], 1, max_tokens)
    rest = run(Renumbered(engine, 1), prompts[1:], 1, max_tokens)
    return {"cold_ttft_ms": first["ttft_ms"], "warm_ttft_ms": rest["ttft_ms"]}


def stall(engine: Engine, decoding: list[list[int]], long_prompt: list[int], max_tokens: int) -> dict[str, object]:
    """All of `decoding` generate; halfway a long prompt arrives. How long do the others wait for a token meanwhile?"""
    start = time.perf_counter()
    made = dict.fromkeys(range(len(decoding)), 0)
    token_s: dict[int, list[float]] = {request: [] for request in made}
    for request, prompt in enumerate(decoding):
        engine.add(request, prompt, max_tokens)
    long_request = len(decoding)
    arrived_s = first_s = None
    while any(count < max_tokens for count in made.values()) or (arrived_s is not None and first_s is None):
        if arrived_s is None and min(made.values()) >= max_tokens // 4:
            arrived_s = time.perf_counter() - start
            engine.add(long_request, long_prompt, 1)
        for request, num_new in engine.step().items():
            now = time.perf_counter() - start
            if request == long_request:
                first_s = now
            else:
                made[request] += num_new
                token_s[request] += [now] * num_new
    assert arrived_s is not None
    assert first_s is not None
    before, during = [], []
    for times in token_s.values():
        for a, b in itertools.pairwise(times):
            if b <= arrived_s:
                before.append(1e3 * (b - a))
            elif a < first_s:
                during.append(1e3 * (b - a))
    return {
        "clients": len(decoding),
        "long_prompt_tokens": len(long_prompt),
        "long_ttft_ms": 1e3 * (first_s - arrived_s),
        "itl_before_ms": before,
        "itl_during_ms": during,
        "largest_stall_ms": max(during, default=0.0),
    }


class Renumbered:
    """The same engine with request numbers moved, so that two runs do not share them."""

    def __init__(self, engine: Engine, offset: int) -> None:
        self._engine, self._offset = engine, offset

    def add(self, request: int, prompt: list[int], max_tokens: int) -> None:
        self._engine.add(request + self._offset, prompt, max_tokens)

    def step(self) -> dict[int, int]:
        return {request - self._offset: count for request, count in self._engine.step().items()}

    def tokens(self, request: int) -> list[int]:
        return self._engine.tokens(request + self._offset)
