"""Functions that a model file defines itself: how many nodes they become when they are unfolded.

Floor 2. ONNX Runtime puts a function's nodes in place of each call. Functions call functions, so that a file of a few
kilobytes can stand for more nodes than any memory holds: 40 of them that each call the one before twice kept a core
busy for ever, in a thread that nothing ends.

Source: onnx.proto (FunctionProto, NodeProto).
"""

import mmap
from collections import Counter
from pathlib import Path

from sardonyx.errors import ConfigError
from sardonyx.runtime.external_data import GraphReader

MAX_NODES = 100_000
"""Unfolded, of a file that has functions. ONNX Runtime 1.32 takes 39 s for 65,000."""
_MAX_CALL_DEPTH = 100
_MAX_MESSAGE_DEPTH = 100

_GRAPH_FIELD, _FUNCTION_FIELD = 7, 25  # of a model
_NAME_FIELD, _FUNCTION_DOMAIN_FIELD = 1, 10  # of a function
_OPERATOR_FIELD, _DOMAIN_FIELD = 4, 7  # of a node
_INNER: dict[str, dict[int, str]] = {
    "graph": {1: "node"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {6: "graph", 11: "graph"},
}

_Calls = Counter[tuple[bytes, bytes]]
"""How often each operator is used, by domain and name."""


def check_functions(path: Path) -> None:
    """Refuse a model whose functions unfold to more than `MAX_NODES`, call themselves or nest too deep.

    Args:
        path: of a file that `check_external_data` has passed.

    Raises:
        ConfigError: names the file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check(GraphReader(data), len(data))
    except ConfigError as error:
        raise ConfigError(error.reason, file=path.name) from None


def _check(reader: GraphReader, size: int) -> None:
    graphs, functions = [], []
    for number, start, end in reader.fields(0, size):
        if number == _GRAPH_FIELD:
            graphs.append((start, end))
        elif number == _FUNCTION_FIELD:
            functions.append((start, end))
    if not functions:
        return
    bodies: dict[tuple[bytes, bytes], _Calls] = {}
    for start, end in functions:
        calls: _Calls = Counter()
        _count(reader, "function", start, end, calls, depth=0)
        # Overloads of a name count as one that does what all of them do.
        bodies.setdefault(_function_key(reader, start, end), Counter()).update(calls)
    unfolder = _Unfolder(bodies)
    for start, end in graphs:
        calls = Counter()
        _count(reader, "graph", start, end, calls, depth=0)
        unfolder.num_nodes(calls, depth=0)


def _count(reader: GraphReader, kind: str, start: int, end: int, calls: _Calls, depth: int) -> None:
    if depth > _MAX_MESSAGE_DEPTH:
        raise ConfigError(f"has graphs more than {_MAX_MESSAGE_DEPTH} messages deep")
    names = {_OPERATOR_FIELD: b"", _DOMAIN_FIELD: b""}
    for number, inner_start, inner_end in reader.fields(start, end):
        if number in _INNER[kind]:
            _count(reader, _INNER[kind][number], inner_start, inner_end, calls, depth + 1)
        elif kind == "node" and number in names:
            names[number] = reader.data(inner_start, inner_end)
    if kind == "node":
        calls[names[_DOMAIN_FIELD], names[_OPERATOR_FIELD]] += 1


def _function_key(reader: GraphReader, start: int, end: int) -> tuple[bytes, bytes]:
    names = {_NAME_FIELD: b"", _FUNCTION_DOMAIN_FIELD: b""}
    for number, inner_start, inner_end in reader.fields(start, end):
        if number in names:
            names[number] = reader.data(inner_start, inner_end)
    return names[_FUNCTION_DOMAIN_FIELD], names[_NAME_FIELD]


class _Unfolder:
    """Counts nodes; each function once."""

    def __init__(self, bodies: dict[tuple[bytes, bytes], _Calls]) -> None:
        self._bodies = bodies
        self._sizes: dict[tuple[bytes, bytes], int] = {}

    def num_nodes(self, calls: _Calls, depth: int) -> int:
        if depth > _MAX_CALL_DEPTH:
            raise ConfigError(f"has functions that call each other more than {_MAX_CALL_DEPTH} deep, or themselves")
        total = 0
        for key, count in calls.items():
            total += count * self._size(key, depth)
            if total > MAX_NODES:
                raise ConfigError(f"has functions that unfold to more than {MAX_NODES:,} nodes")
        return total

    def _size(self, key: tuple[bytes, bytes], depth: int) -> int:
        if key not in self._bodies:
            return 1
        if key not in self._sizes:
            self._sizes[key] = max(1, self.num_nodes(self._bodies[key], depth + 1))
        return self._sizes[key]
