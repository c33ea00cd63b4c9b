"""Tables of what was measured on a card, and the targets beside them."""

from collections.abc import Mapping
from typing import Any

import results

Result = dict[str, Any]
TARGETS = {1: 0.6, 64: 0.5}
"""Share of the bound that a decode step reaches, by batch."""
MAX_IDLE_SHARE = 0.10
"""Of a step in which the card waits for Python, with steps launched ahead."""


def report(stages: Mapping[str, Result | None]) -> str:
    """Markdown of the stages that are there."""
    parts = []
    for stage, result in stages.items():
        if result is None:
            continue
        card = result["environment"]["card"]
        where = "REHEARSAL without a card" if result["rehearsal"] else card["name"] if card else "no card"
        parts.append(f"\n### {stage} ({where}{'' if result['is_complete'] else ', not complete'})\n")
        make = {
            "fp16": _steps,
            "int4": _steps,
            "rival": _rival,
            "compiled": _rival,
            "http": _http,
            "families": _families,
        }
        parts.append(make.get(stage, _plain)(result, stages))
    return "\n".join(parts) + "\n"


def _points(result: Result | None, kind: str) -> list[Result]:
    return [point for point in (result or {"points": []})["points"] if point.get("kind") == kind]


def _steps(result: Result, stages: Mapping[str, Result | None]) -> str:
    rival = [point for each in ("rival", "compiled") for point in (stages.get(each) or {"points": []})["points"]]
    header = ["batch", "steps", "step ms", "tok/s", "host ms", "idle %", "bound %", "bound by", "× best transformers"]
    rows = []
    for point in _points(result, "decode"):
        same = [
            each["step_ms"]
            for each in rival
            if each.get("batch") == point["batch"]
            and each["prompt_tokens"] == result["prompt_tokens"]
            and "step_ms" in each
        ]
        how = ("captured" if point["captured"] else "eager") + (", ahead" if point["overlapped"] else ", one by one")
        rows.append(
            [
                point["batch"],
                how,
                point["step_ms"],
                point["tokens_per_s"],
                point["host_ms"],
                _percent(point.get("idle_share")),
                _percent(point["bound_share"]),
                point["bound_by"] or "",
                f"{min(same) / point['step_ms']:.2f}" if same else "",
            ]
        )
    text = results.table(header, rows)
    header = ["prompts", "tokens each", "steps", "first token ms", "tok/s", "matrix rate %"]
    keys = ("prompts", "prompt_tokens", "num_steps", "first_token_ms", "tokens_per_s")
    rows = [[*(point[key] for key in keys), _percent(point["matrix_share"])] for point in _points(result, "prefill")]
    text += "\n\n" + results.table(header, rows)
    text += "\n\n" + _agreement(result, rival)
    return text if result["rehearsal"] else text + "\n\n" + results.table(["target", "measured", ""], _verdicts(result))


def _agreement(result: Result, rival: list[Result]) -> str:
    """How far greedy completions go before they leave those of `transformers`: the weights of fp16 are the same."""
    theirs = {
        point["batch"]: point["tokens"]
        for point in rival
        if point.get("cache") == "dynamic" and "tokens" in point and point["prompt_tokens"] == result["prompt_tokens"]
    }
    lengths = []
    for point in _points(result, "decode"):
        for ours, others in zip(point["tokens"], theirs.get(point["batch"], []), strict=False):
            parted = (place for place, (a, b) in enumerate(zip(ours, others, strict=False)) if a != b)
            lengths.append(next(parted, len(ours)))
    if not lengths or result["points"][0].get("precision") == "int4":
        return "Tokens were not compared."
    return f"Tokens as `transformers`' until they part: {sum(lengths) / len(lengths):.1f} of {result['new_tokens']}."


def _verdicts(result: Result) -> list[list[object]]:
    rows: list[list[object]] = []
    for point in _points(result, "decode"):
        if not (point["captured"] and point["overlapped"]):
            continue
        if point["batch"] in TARGETS and point["bound_share"] is not None:
            least, share = TARGETS[point["batch"]], point["bound_share"]
            rows.append([f"batch {point['batch']}: ≥ {least:.0%} of the bound", f"{share:.1%}", _word(share >= least)])
        if point.get("idle_share") is not None:
            share = point["idle_share"]
            said = f"batch {point['batch']}: the card waits ≤ {MAX_IDLE_SHARE:.0%} of a step"
            rows.append([said, f"{share:.1%}", _word(share <= MAX_IDLE_SHARE)])
    return rows


def _rival(result: Result, _: Mapping[str, Result | None]) -> str:
    rows = [
        [
            point["batch"],
            point["prompt_tokens"],
            point["cache"],
            point.get("error", point.get("step_ms")),
            point.get("tokens_per_s", ""),
            round(1e3 * point["prefill_s"], 1) if "prefill_s" in point else "",
        ]
        for point in result["points"]
        if "cache" in point
    ]
    return results.table(["batch", "prompt", "cache", "step ms", "tok/s", "prefill ms"], rows)


def _http(result: Result, _: Mapping[str, Result | None]) -> str:
    rows = [
        [
            point["precision"],
            point["clients"],
            point["output_tokens_per_s"],
            f"{point['ttft_ms'].get('p50')} / {point['ttft_ms'].get('p99')}",
            f"{point['itl_ms'].get('p50')} / {point['itl_ms'].get('p99')}",
            len(point["errors"]),
        ]
        for point in _points(result, "clients")
    ]
    header = ["precision", "clients", "tok/s", "TTFT p50 / p99 ms", "ITL p50 / p99 ms", "errors"]
    return results.table(header, rows)


def _families(result: Result, _: Mapping[str, Result | None]) -> str:
    runs = {
        (point["engine"], point["name"], point["batch"]): point["run_ms"]
        for point in result["points"]
        if "run_ms" in point
    }
    rows = [
        [name, batch, ms, runs.get(("torch", name, batch), ""), _ratio(runs.get(("torch", name, batch)), ms)]
        for (engine, name, batch), ms in runs.items()
        if engine == "sardonyx"
    ]
    text = results.table(["graph", "batch", "ms", "torch ms", "torch / ours"], rows)
    errors = [
        f"- {point['engine']} {point['name']}: {point['error']}" for point in result["points"] if "error" in point
    ]
    return "\n".join([text, *errors])


def _plain(result: Result, _: Mapping[str, Result | None]) -> str:
    return "\n".join(f"- {key}: {value}" for point in result["points"] for key, value in point.items())


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _ratio(theirs: float | None, ours: float) -> str:
    return "" if theirs is None else f"{theirs / ours:.2f}"


def _word(is_met: bool) -> str:
    return "met" if is_met else "**missed**"
