"""What ensembles are made of, through any number of others. Floor 4."""

from collections.abc import Callable, Iterable, Mapping

from sardonyx.serving.entry import Entry

PartsOf = Callable[[Entry], Iterable[str]]


def parts_of_any_kind(entry: Entry) -> set[str]:
    """Models that an ensemble itself names: as it is being loaded, as it serves, as it lies on disk."""
    return {*entry.awaited, *entry.serving_parts, *entry.facts.depends_on}


def parts_on_disk(entry: Entry) -> tuple[str, ...]:
    """Models that an ensemble itself names, as it lies on disk."""
    return entry.facts.depends_on


def reach(entries: Mapping[str, Entry], names: Iterable[str], parts_of: PartsOf, user: str = "") -> dict[str, str]:
    """Names that are reached from `names`, which `user` depends on, each with one that depends on it."""
    users: dict[str, str] = {}
    rest = [(name, user) for name in reversed(list(names))]
    while rest:
        name, by = rest.pop()
        if name not in users:
            users[name] = by
            if name in entries and name != user:
                rest += [(part, name) for part in parts_of(entries[name])]
    return users


def find_circle(entries: Mapping[str, Entry], name: str, depends_on: Iterable[str]) -> list[str]:
    """The way from a model over what it depends on back to itself; empty where there is none."""
    users = reach(entries, depends_on, parts_of_any_kind, name)
    if name not in users:
        return []
    circle = [name, users[name]]
    while circle[-1] != name:
        circle.append(users[circle[-1]])
    return circle[::-1]
