"""Why a server is not ready, read from the registry's entries. Floor 4."""

from collections.abc import Iterable, Mapping

from sardonyx.serving.entry import Entry
from sardonyx.serving.status import ModelState

STALLED_S = 30.0
"""With work and no finished step for so long, an engine is taken for stuck."""

_NOT_THERE = "is not in the repository"


def missing(entries: Mapping[str, Entry], needed: Iterable[str]) -> list[str]:
    """What keeps needed models from serving, in a line each."""
    reasons = []
    for name in sorted(needed):
        if name not in entries:
            reasons.append(f"model {name} {_NOT_THERE}")
        elif entries[name].state is not ModelState.READY:
            progress = entries[name].progress()
            reasons.append(f"model {name} is {entries[name].state.lower()}" + (f": {progress}" if progress else ""))
    return reasons


def failures(entries: Mapping[str, Entry], needed: Iterable[str]) -> dict[str, str]:
    """Needed models that cannot serve, with the reason; those that are still loading are none."""
    reasons = {}
    for name in sorted(needed):
        if name not in entries:
            reasons[name] = _NOT_THERE
        elif entries[name].state is ModelState.UNAVAILABLE:
            reasons[name] = entries[name].reason
    return reasons


def stuck(entries: Mapping[str, Entry]) -> list[str]:
    """Models whose engines ended or make no progress, in a line each."""
    reasons = []
    for name, entry in sorted(entries.items()):
        served = entry.model.versions.values() if entry.model is not None else ()
        if not all(each.is_alive for each in served):
            reasons.append(f"the engine of model {name} stopped")
        elif any(each.stalled_s > STALLED_S for each in served):
            reasons.append(f"the engine of model {name} makes no progress")
    return reasons
