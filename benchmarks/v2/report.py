"""Tables printed from a result of `kserve.py`."""

import statistics
from collections.abc import Sequence
from typing import Any

import results

SERVERS = ("sardonyx", "triton")


def median3(values: Sequence[float]) -> float:
    """The median with three decimals: a small model takes less than a tenth of a millisecond."""
    return round(statistics.median(values), 3)


def ratio(point: dict[str, Any]) -> float | None:
    """Our inferences a second over Triton's; nothing where one of them did not run or answered nothing."""
    if any(name not in point for name in SERVERS):
        return None
    ours, theirs = (point[name]["inferences_per_s"]["median"] for name in SERVERS)
    return round(ours / theirs, 2) if theirs else None


def tables(result: dict[str, Any]) -> str:
    """A Markdown table for each model and protocol, a row for each number of clients."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in result["points"]:
        groups.setdefault((point["model"], point["protocol"]), []).append(point)
    return "\n\n".join(f"### {model}, {protocol}\n\n{_table(points)}" for (model, protocol), points in groups.items())


def _table(points: list[dict[str, Any]]) -> str:
    names = [name for name in SERVERS if name in points[0]]
    header = ["clients", *(f"{name} inf/s" for name in names), *(["ratio"] if len(names) == 2 else [])]
    header += [f"{name} p50 / p90 / p99 ms" for name in names]
    header += [f"{name} CPU ms" for name in names]
    header += [f"{name} batch" for name in names]
    header += ["instances", "errors"]
    return results.table(header, [_row(point, names) for point in points])


def _row(point: dict[str, Any], names: list[str]) -> list[object]:
    sides = [point[name] for name in names]
    row: list[object] = [point["clients"], *(f"{side['inferences_per_s']['median']:.0f}" for side in sides)]
    row += [point["ratio"]] if len(names) == 2 else []
    row += [" / ".join(f"{side['latency_ms'].get(share, 0):.2f}" for share in ("p50", "p90", "p99")) for side in sides]
    row += [side["server_cpu_ms"] for side in sides]
    row += [f"{side['mean_batch']['median']:.1f}" for side in sides]
    return [*row, " / ".join(str(side["instances"]) for side in sides), sum(len(side["errors"]) for side in sides)]
